"""Datasets: one loader per file, from the hub, a folder or a file. Add one with a file and a line in `DATASETS`."""

from mech_unlearn.benchmarks.conceptvectors.data import load_concepts
from mech_unlearn.benchmarks.dusk.data import load_dusk
from mech_unlearn.benchmarks.faithun.data import load_faithun
from mech_unlearn.benchmarks.muse.data import load_muse
from mech_unlearn.benchmarks.ort.data import load_ort
from mech_unlearn.benchmarks.restor.data import load_restor
from mech_unlearn.benchmarks.rwku.data import load_rwku
from mech_unlearn.benchmarks.tofu.data import load_tofu
from mech_unlearn.benchmarks.wmdp.data import load_wmdp
from mech_unlearn.data.blur import load_blur
from mech_unlearn.data.counterfact import load_counterfact
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.data.popqa import load_popqa
from mech_unlearn.data.relations import load_relations
from mech_unlearn.data.trex import load_trex
from mech_unlearn.data.zsre import load_zsre

DATASETS = {
    "jsonl": load_facts,
    "tofu": load_tofu,
    "muse": load_muse,
    "wmdp": load_wmdp,
    "rwku": load_rwku,
    "counterfact": load_counterfact,
    "zsre": load_zsre,
    "trex": load_trex,
    "relations": load_relations,
    "conceptvectors": load_concepts,
    "faithun": load_faithun,
    "ort": load_ort,
    "dusk": load_dusk,
    "blur": load_blur,
    "restor": load_restor,
    "popqa": load_popqa,
}
