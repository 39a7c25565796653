"""Datasets: one loader per file. Add one with a file and a line in `DATASETS`."""

from mech_unlearn.data.jsonl import load_facts

DATASETS = {"jsonl": load_facts}
