"""General data sets, from the hub, a folder or a file. Add one with a file, its loader, and a line in `DATASETS`."""

from mech_unlearn.data.blur import load_blur
from mech_unlearn.data.counterfact import load_counterfact
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.data.popqa import load_popqa
from mech_unlearn.data.relations import load_relations
from mech_unlearn.data.trex import load_trex
from mech_unlearn.data.zsre import load_zsre

DATASETS = {
    "jsonl": load_facts,
    "counterfact": load_counterfact,
    "zsre": load_zsre,
    "trex": load_trex,
    "relations": load_relations,
    "blur": load_blur,
    "popqa": load_popqa,
}
