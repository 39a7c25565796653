"""Where is it kept? One file per way to look, each a function (model, facts, ...) -> Attribution."""

from mech_unlearn.locate.causal_trace import causal_trace
from mech_unlearn.locate.known_unknown import known_unknown
from mech_unlearn.locate.logit_lens import logit_lens

LOCATORS = {"logit_lens": logit_lens, "causal_trace": causal_trace, "known_unknown": known_unknown}
