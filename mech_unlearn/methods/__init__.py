"""How facts are removed: frozen dataclasses with `.fit(model, forget, retain) -> Edit`, one file each.

Add a method with one file and one line in `METHODS`.
"""

from mech_unlearn.methods.adaptive_rmu import AdaptiveRmu
from mech_unlearn.methods.alt_po import AltPo
from mech_unlearn.methods.directional_ablation import DirectionalAblation
from mech_unlearn.methods.experimental.catnip import Catnip
from mech_unlearn.methods.experimental.klue import Klue
from mech_unlearn.methods.experimental.knowledge_neuron_erase import KnowledgeNeuronErase
from mech_unlearn.methods.experimental.sae_iru import SaeIru
from mech_unlearn.methods.experimental.shred import Shred
from mech_unlearn.methods.experimental.srmu import Srmu
from mech_unlearn.methods.experimental.ssd import Ssd
from mech_unlearn.methods.flat import Flat
from mech_unlearn.methods.grad_ascent import GradAscent
from mech_unlearn.methods.grad_diff import GradDiff
from mech_unlearn.methods.gu import Gu
from mech_unlearn.methods.idk_dpo import IdkDpo
from mech_unlearn.methods.in_context import InContext
from mech_unlearn.methods.kif import Kif
from mech_unlearn.methods.kl_min import KlMin
from mech_unlearn.methods.knowledge_neuron_update import KnowledgeNeuronUpdate
from mech_unlearn.methods.last_layer_ascent import LastLayerAscent
from mech_unlearn.methods.lat import Lat
from mech_unlearn.methods.leace import Leace
from mech_unlearn.methods.localized import Localized
from mech_unlearn.methods.lora import Lora
from mech_unlearn.methods.memit import Memit
from mech_unlearn.methods.needle import Needle
from mech_unlearn.methods.npo import Npo
from mech_unlearn.methods.rmu import Rmu
from mech_unlearn.methods.rna import Rna
from mech_unlearn.methods.rocr import Rocr
from mech_unlearn.methods.rome import Rome, RRome
from mech_unlearn.methods.sae_clamp import SaeClamp
from mech_unlearn.methods.sae_shift import SaeShift
from mech_unlearn.methods.sim_npo import SimNpo
from mech_unlearn.methods.task_vector import TaskVector
from mech_unlearn.methods.token_guard import TokenGuard
from mech_unlearn.methods.undial import Undial
from mech_unlearn.methods.unlikelihood import Unlikelihood
from mech_unlearn.methods.wagle import Wagle

METHODS = {
    "rocr": Rocr,
    "rome": Rome,
    "r_rome": RRome,
    "memit": Memit,
    "sae_shift": SaeShift,
    "npo": Npo,
    "last_layer_ascent": LastLayerAscent,
    "grad_ascent": GradAscent,
    "grad_diff": GradDiff,
    "kl_min": KlMin,
    "sim_npo": SimNpo,
    "idk_dpo": IdkDpo,
    "undial": Undial,
    "unlikelihood": Unlikelihood,
    "flat": Flat,
    "catnip": Catnip,
    "shred": Shred,
    "task_vector": TaskVector,
    "alt_po": AltPo,
    "gu": Gu,
    "klue": Klue,
    "localized": Localized,
    "lora": Lora,
    "ssd": Ssd,
    "wagle": Wagle,
    "rmu": Rmu,
    "adaptive_rmu": AdaptiveRmu,
    "srmu": Srmu,
    "lat": Lat,
    "kif": Kif,
    "sae_iru": SaeIru,
    "rna": Rna,
    "directional_ablation": DirectionalAblation,
    "in_context": InContext,
    "knowledge_neuron_erase": KnowledgeNeuronErase,
    "knowledge_neuron_update": KnowledgeNeuronUpdate,
    "leace": Leace,
    "needle": Needle,
    "sae_clamp": SaeClamp,
    "token_guard": TokenGuard,
}
