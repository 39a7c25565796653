"""KnowledgeNeuronErase: set the value vectors of the knowledge neurons of facts, or of a relation, to zero.

Paper:    Dai, Dong, Hao, Sui, Chang, Wei 2022, Knowledge neurons in pretrained transformers, arXiv 2104.08696,
          sections 3.3 (refinement) and 5.2 (erasing a relation: its 20 most frequent neurons).
Changes:  single columns of MLP output matrices [d_model, d_mlp]; every other entry stays bit-identical.
Needs:    facts with at least three phrasings; attribution: per phrasing a forward pass and a suffix sweep of
          n_layers x 20 rows with its backward pass.
Differs:  besides a relation's neurons, those of each forget fact can be erased; the neurons of a relation are counted
          over the forget facts alone. Attribution in a causal model: see `locate.neurons`.
Fails:    neurons are shared, by relation above all: neighbours go with the facts. A neuron that gradients find at the
          last prompt token only hands on what was recalled earlier: the knowledge stays below it.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.locate.neurons.neuron_sets import relation_neurons
from mech_unlearn.methods.knowledge_neuron_update import Refinement, refined_report
from mech_unlearn.methods.writing.columns import Neuron, checked, column_deltas, outcome, stored_vector
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.bridge import Model


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
