"""Where is it kept? One file per way to look, each a function (model, facts, ...) -> Attribution."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from mech_unlearn.attribution import Attribution
from mech_unlearn.locate.latents.known_unknown import known_unknown, separation
from mech_unlearn.locate.latents.latent_effects import direct_effect, latent_ablation
from mech_unlearn.locate.latents.latent_scores import forget_retain
from mech_unlearn.locate.latents.sae_latents import sae_latents
from mech_unlearn.locate.lenses.direct_logit_attribution import (
    direct_logit_attribution,
    direct_logit_attribution_per_fact,
)
from mech_unlearn.locate.lenses.logit_lens import logit_lens, logit_lens_per_fact
from mech_unlearn.locate.lenses.probes import probe
from mech_unlearn.locate.lenses.tuned_lens import train_tuned_lens, tuned_lens
from mech_unlearn.locate.neurons.concept_vectors import concept_vectors
from mech_unlearn.locate.neurons.knowledge_neurons import located_neurons
from mech_unlearn.locate.neurons.neuron_attribution import Scoring
from mech_unlearn.locate.neurons.neuron_scores import neuron_scores
from mech_unlearn.locate.patching.activation_patching import (
    activation_patching,
    activation_patching_per_fact,
    interchange,
)
from mech_unlearn.locate.patching.attribution_patching import attribution_patching, attribution_patching_per_fact
from mech_unlearn.locate.patching.causal_trace import causal_trace, causal_trace_per_fact
from mech_unlearn.locate.patching.path_patching import path_patching, path_patching_per_fact
from mech_unlearn.locate.prompt.prompt_attribution import prompt_attribution, prompt_attribution_per_fact

INPUTS = ("seed", "others", "retain", "unknown", "texts", "sae", "saes", "folder")
"""What a locator may need beside model and facts; the command line finds it."""


@dataclass(frozen=True)
class Locator:
    """A way to look."""

    run: Callable[..., Attribution]
    inputs: tuple[str, ...] = ()
    per_fact: Callable[..., Attribution] | None = None
    """The same before averaging over facts; with it thousands of facts are done piece by piece."""
    passed_to: tuple[Callable, ...] = ()
    """Where `run` hands its further settings."""

    def settings(self) -> tuple[str, ...]:
        """Names of the settings that `run` takes."""
        functions = (self.run, *((self.per_fact,) if self.per_fact else ()), *self.passed_to)
        found = [p for f in functions for p in inspect.signature(f).parameters.values()]
        named = [p.name for p in found if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return tuple(dict.fromkeys(n for n in named if n not in ("model", "facts", *INPUTS)))


PATCHING = ("seed", "others")
LOCATORS = {
    "logit_lens": Locator(logit_lens, (), logit_lens_per_fact),
    "tuned_lens": Locator(tuned_lens, ("texts", "seed"), passed_to=(train_tuned_lens,)),
    "direct_logit_attribution": Locator(direct_logit_attribution, (), direct_logit_attribution_per_fact),
    "causal_trace": Locator(causal_trace, ("seed",), causal_trace_per_fact),
    "activation_patching": Locator(activation_patching, PATCHING, activation_patching_per_fact),
    "interchange": Locator(interchange, PATCHING, passed_to=(activation_patching_per_fact,)),
    "attribution_patching": Locator(attribution_patching, PATCHING, attribution_patching_per_fact),
    "path_patching": Locator(path_patching, PATCHING, path_patching_per_fact),
    "knowledge_neurons": Locator(located_neurons, ("folder",), passed_to=(neuron_scores, Scoring)),
    "concept_vectors": Locator(concept_vectors, ("seed",)),
    "known_unknown": Locator(known_unknown, ("unknown", "saes", "texts", "seed"), passed_to=(separation,)),
    "sae_latents": Locator(sae_latents, ("sae", "retain", "unknown", "texts", "seed"), passed_to=(forget_retain,)),
    "latent_ablation": Locator(latent_ablation, ("sae", "seed"), passed_to=(direct_effect,)),
    "probe": Locator(probe, ("seed",)),
    "prompt_attribution": Locator(prompt_attribution, ("seed",), prompt_attribution_per_fact),
}
