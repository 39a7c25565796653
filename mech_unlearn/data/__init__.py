"""Datasets: one loader per file, from the hub, a folder or a file. Add one with a file and a line in `DATASETS`."""

from mech_unlearn.data.blur import load_blur
from mech_unlearn.data.conceptvectors import load_concepts
from mech_unlearn.data.counterfact import load_counterfact
from mech_unlearn.data.dusk import load_dusk
from mech_unlearn.data.faithun import load_faithun
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.data.muse import load_muse
from mech_unlearn.data.ort import load_ort
from mech_unlearn.data.popqa import load_popqa
from mech_unlearn.data.relations import load_relations
from mech_unlearn.data.restor import load_restor
from mech_unlearn.data.rwku import load_rwku
from mech_unlearn.data.tofu import load_tofu
from mech_unlearn.data.trex import load_trex
from mech_unlearn.data.wmdp import load_wmdp
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
