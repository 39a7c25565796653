"""How facts are removed: frozen dataclasses with `.fit(model, forget, retain) -> Edit`, one file each.

Add a method with one file and one line in `METHODS`.
"""

from mech_unlearn.methods.last_layer_ascent import LastLayerAscent
from mech_unlearn.methods.npo import Npo
from mech_unlearn.methods.rocr import Rocr
from mech_unlearn.methods.sae_shift import SaeShift

METHODS = {
    "rocr": Rocr,
    "sae_shift": SaeShift,
    "npo": Npo,
    "last_layer_ascent": LastLayerAscent,
}
