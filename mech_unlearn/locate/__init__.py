"""Where is it kept? One file per way to look, each a function (model, facts, ...) -> Attribution.

`LOCATORS` holds those that the command line runs. Behind them stand tests of what they say (`act`, `consensus`,
`neuron_effects`, `noise_effects`) and closer looks (`candidates`, `top_contexts`, `probe_groups`, `concept_other`, and
token by token `causal_trace_tokens`, `prompt_attribution_tokens`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from mech_unlearn.attribution import Attribution
from mech_unlearn.locate.acting.act import act
from mech_unlearn.locate.acting.consensus import consensus
from mech_unlearn.locate.latents.known_unknown import known_unknown
from mech_unlearn.locate.latents.latent_effects import latent_ablation
from mech_unlearn.locate.latents.latent_scores import concept_other
from mech_unlearn.locate.latents.sae_latents import sae_latents
from mech_unlearn.locate.latents.top_contexts import top_contexts
from mech_unlearn.locate.lenses.direct_logit_attribution import (
    direct_logit_attribution,
    direct_logit_attribution_per_fact,
)
from mech_unlearn.locate.lenses.logit_lens import logit_lens, logit_lens_per_fact
from mech_unlearn.locate.lenses.probes import probe, probe_groups
from mech_unlearn.locate.lenses.tuned_lens import tuned_lens
from mech_unlearn.locate.neurons.concept_causal import noise_effects
from mech_unlearn.locate.neurons.concept_vectors import candidates, concept_vectors
from mech_unlearn.locate.neurons.knowledge_neurons import located_neurons
from mech_unlearn.locate.neurons.neuron_interventions import neuron_effects
from mech_unlearn.locate.patching.activation_patching import (
    activation_patching,
    activation_patching_per_fact,
    interchange,
)
from mech_unlearn.locate.patching.attribution_patching import attribution_patching, attribution_patching_per_fact
from mech_unlearn.locate.patching.causal_trace import causal_trace, causal_trace_per_fact, causal_trace_tokens
from mech_unlearn.locate.patching.path_patching import path_patching, path_patching_per_fact
from mech_unlearn.locate.prompt.prompt_attribution import (
    prompt_attribution,
    prompt_attribution_per_fact,
    prompt_attribution_tokens,
)

__all__ = [
    "INPUTS",
    "LOCATORS",
    "Locator",
    "act",
    "candidates",
    "causal_trace_tokens",
    "concept_other",
    "consensus",
    "neuron_effects",
    "noise_effects",
    "probe_groups",
    "prompt_attribution_tokens",
    "top_contexts",
]

INPUTS = ("seed", "others", "retain", "unknown", "texts", "sae", "saes", "folder")
"""What a locator may need beside model and facts; the command line finds it."""


@dataclass(frozen=True)
class Locator:
    """A way to look."""

    run: Callable[..., Attribution]
    inputs: tuple[str, ...] = ()
    per_fact: Callable[..., Attribution] | None = None
    """The same before averaging over facts; with it thousands of facts are done piece by piece."""

    def settings(self) -> dict[str, inspect.Parameter]:
        """The settings that `run` takes, by name, with their types and defaults."""
        found = inspect.signature(self.run).parameters.values()
        return {p.name: p for p in found if p.name not in ("model", "facts", *INPUTS) and not p.name.startswith("_")}


PATCHING = ("seed", "others")
LOCATORS = {
    "logit_lens": Locator(logit_lens, (), logit_lens_per_fact),
    "tuned_lens": Locator(tuned_lens, ("texts", "seed")),
    "direct_logit_attribution": Locator(direct_logit_attribution, (), direct_logit_attribution_per_fact),
    "causal_trace": Locator(causal_trace, ("seed",), causal_trace_per_fact),
    "activation_patching": Locator(activation_patching, PATCHING, activation_patching_per_fact),
    "interchange": Locator(interchange, PATCHING),
    "attribution_patching": Locator(attribution_patching, PATCHING, attribution_patching_per_fact),
    "path_patching": Locator(path_patching, PATCHING, path_patching_per_fact),
    "knowledge_neurons": Locator(located_neurons, ("folder",)),
    "concept_vectors": Locator(concept_vectors, ("seed",)),
    "known_unknown": Locator(known_unknown, ("unknown", "saes", "texts", "seed")),
    "sae_latents": Locator(sae_latents, ("sae", "retain", "unknown", "texts", "seed")),
    "latent_ablation": Locator(latent_ablation, ("sae", "seed")),
    "probe": Locator(probe, ("seed",)),
    "prompt_attribution": Locator(prompt_attribution, ("seed",), prompt_attribution_per_fact),
}
