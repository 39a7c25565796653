"""KnowledgeNeuronErase: set the value vectors of the knowledge neurons of facts, or of a relation, to zero.

Paper:    Dai, Dong, Hao, Sui, Chang, Wei 2022, Knowledge neurons in pretrained transformers, arXiv 2104.08696,
          sections 3.3 (refinement) and 5.2 (erasing a relation: its 20 most frequent neurons).
Changes:  single columns of MLP output matrices [d_model, d_mlp]; every other entry stays bit-identical.
Needs:    facts with at least three phrasings; attribution: per phrasing a forward pass and a suffix sweep of
          n_layers x 20 rows with its backward pass.
Differs:  besides a relation's neurons, those of each forget fact can be erased; the neurons of a relation are counted
          over the forget facts alone. Attribution in a causal model: see `locate.neuron_attribution`.
Fails:    neurons are shared, by relation above all: neighbours go with the facts. A neuron that gradients find at the
          last prompt token only hands on what was recalled earlier: the knowledge stays below it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.locate.neurons.neuron_scores import neuron_scores
from mech_unlearn.locate.neurons.neuron_sets import NeuronSets, refine, relation_neurons
from mech_unlearn.methods.writing.columns import Neuron, checked, column_deltas, outcome, stored_vector
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.bridge import Model


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How the neurons of a fact are found; thresholds of arXiv 2104.08696 and its code."""

    threshold: float = 0.2
    """Share of a phrasing's largest attribution that a neuron must reach."""
    sharing: float = 0.7
    """Share of a fact's phrasings in which it must do so; moved until a relation's facts have 2 to 5 neurons each."""
    min_prompts: int = 3
    """And in at least so many."""
    steps: int = 20
    """Points of the integral."""
    target: Literal["probability", "logprob", "logit"] = "probability"
    """What is attributed; where P is near 1 its gradient vanishes, and "logit" is the way out."""

    def sets(self, model: Model, facts: Sequence[Fact]) -> NeuronSets:
        """The refined neurons of each fact.

        Raises:
            ValueError: a setting out of range, or a fact with fewer phrasings than `min_prompts`.
        """
        for fact in facts:  # before any work starts
            if len(fact.templates) < self.min_prompts:
                raise ValueError(
                    f"fact {fact.id!r} has {len(fact.templates)} phrasings, needs {self.min_prompts}: add some or "
                    "lower min_prompts"
                )
        floor = min(0.1, self.threshold)
        scores = neuron_scores(model, facts, floor=floor, steps=self.steps, target=self.target)
        return refine(scores, threshold=self.threshold, sharing=self.sharing, min_prompts=self.min_prompts)


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeuronErase:
    """Settings of the erasure; `fit` computes it."""

    which: Literal["facts", "relation"] = "facts"
    """The refined neurons of each forget fact, or the `n` most frequent of each relation of the forget facts."""
    n: int = 20
    """Neurons per relation. Source: section 5.2."""
    share: float = 0.1
    """A relation's neuron is one of at least this share of its facts. Source: the official code."""
    neurons: tuple[Neuron, ...] | None = None
    """(layer, index) of neurons found otherwise; nothing is attributed then."""
    refinement: Refinement = Refinement()
    seed: int = 0
    """Nothing is drawn; kept with the result."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The erasure.

        Raises:
            ValueError: no neuron reaches the thresholds, a setting out of range, or an intervention in force.
        """
        start = time.perf_counter()
        if self.n < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"n={self.n}, share={self.share}: n must be 1 or more, share between 0 and 1")
        if model.in_force.interventions:
            raise ValueError(f"{model.name!r} has an edit of activations in force; leave it before changing weights")
        with count_forwards(model) as forwards:
            report: dict[str, Any] = {"n_backward": 0}
            if self.neurons is None:
                chosen, report = self._found(model, forget)
            else:
                chosen = self.neurons
            chosen = checked(model, chosen)
            deltas = column_deltas(model, {neuron: -stored_vector(model, neuron) for neuron in chosen})
            edit = Edit(name="knowledge_neuron_erase", base=model.hash(), deltas=deltas)
            report |= outcome(model, edit, forget.facts)
        report |= {"neurons": [list(neuron) for neuron in chosen], "n_forward": forwards[0]}
        report["seconds"] = time.perf_counter() - start
        recipe = {"method": "knowledge_neuron_erase", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name=edit.name, base=edit.base, deltas=deltas, recipe=recipe)

    def _found(self, model: Model, forget: ForgetSet) -> tuple[tuple[Neuron, ...], dict[str, Any]]:
        sets = self.refinement.sets(model, forget.facts)
        if self.which == "facts":
            chosen = [x for fact in forget.facts for x in sets.neurons[fact.id]]
        else:
            chosen = [
                x for relation in sets.sharing for x in relation_neurons(sets, relation, share=self.share, limit=self.n)
            ]
        if not chosen:
            raise ValueError(
                "no neuron reaches the thresholds in enough phrasings: lower threshold=, sharing= or share="
            )
        return tuple(dict.fromkeys(chosen)), refined_report(sets)


def refined_report(sets: NeuronSets) -> dict[str, Any]:
    """What a recipe says about refined sets."""
    phrasings = sum(len(fact.templates) for fact in sets.facts)
    mean = sum(map(len, sets.neurons.values())) / len(sets.facts)
    return {"neurons_per_fact": mean, "sharing": dict(sets.sharing), "phrasings": phrasings, "n_backward": phrasings}
