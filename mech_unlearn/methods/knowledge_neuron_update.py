"""KnowledgeNeuronUpdate: turn the value vectors of a fact's knowledge neurons from the old answer to another.

Paper:    Dai, Dong, Hao, Sui, Chang, Wei 2022, Knowledge neurons in pretrained transformers, arXiv 2104.08696,
          section 5.1: v <- v - lambda1 e_t + lambda2 e_t', e scaled to the length of v as in the official code.
Changes:  single columns of MLP output matrices [d_model, d_mlp]; every other entry stays bit-identical.
Needs:    facts with at least three phrasings; attribution for the forget facts and for others of their relations: per
          phrasing a forward pass and a suffix sweep of n_layers x 20 rows with its backward pass.
Differs:  e is the row of the unembedding, not of BERT's word embedding; of an answer of several tokens the first. Where
          a norm lies behind the MLP (Gemma 2, OLMo 2), e is divided by its gain, so that the residual stream receives
          e. The share of a relation's facts that use a neuron leaves out the fact itself (with few facts it would be
          over 10 % by itself). Changes of a neuron that several facts share are computed from the stored vector and
          added. t' is a distractor, what the model answers about an unknown entity, or given.
Fails:    only the answer changes, one token of it, and only where these neurons write it: the subject keeps all that
          is read elsewhere. A large lambda2 writes t' for every prompt on which the neuron is active.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.locate.neurons.neuron_scores import neuron_scores
from mech_unlearn.locate.neurons.neuron_sets import NeuronSets, refine
from mech_unlearn.methods.writing.anchors import unknown_names
from mech_unlearn.methods.writing.columns import Neuron, column_deltas, outcome, stored_vector
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.bridge import Model, post_norm
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.tokens import Query, encode_all, make_queries, make_query


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
class KnowledgeNeuronUpdate:
    """Settings of the update; `fit` computes it."""

    to: Literal["distractor", "unknown", "text"] = "distractor"
    """The new answer t': a distractor of the fact drawn at random, what the model answers first about an unknown
    entity of its kind in the same prompt, or `text`."""
    text: str | None = None
    """The new answer for to="text"; its first token behind the prompt counts."""
    lambda_old: float = 1.0
    """Strength of taking out e_t, in lengths of v. Source: lambda1 of section 5.1."""
    lambda_new: float = 8.0
    """Strength of putting in e_t'. Source: lambda2 of section 5.1."""
    max_share: float = 0.1
    """Neurons that more than this share of the relation's other facts use are left alone. Source: section 5.1."""
    others: int = 50
    """Retained facts of each relation, drawn at random, over which that share is counted, beside the forget facts."""
    refinement: Refinement = Refinement()
    seed: int = 0
    """Draws the distractors, the unknown entities and the other facts."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The update.

        Raises:
            ValueError: no fact has a neuron of its own, no new answer to be had, a setting out of range, or an
                intervention in force.
        """
        start = time.perf_counter()
        if not 0 <= self.max_share <= 1 or self.others < 0 or (self.text is None) == (self.to == "text"):
            raise ValueError(
                f'max_share={self.max_share}, others={self.others}, to="{self.to}", text={self.text!r}: a share '
                'between 0 and 1, others 0 or more, and text= with to="text" only'
            )
        if model.in_force.interventions:
            raise ValueError(f"{model.name!r} has an edit of activations in force; leave it before changing weights")
        generator = torch.Generator().manual_seed(self.seed)
        with count_forwards(model) as forwards:
            queries = make_queries(model.tokenizer, forget.facts, "prompt")
            new = self._new_tokens(model, forget, retain, queries, generator)
            sets = self.refinement.sets(model, (*forget.facts, *self._others(forget, retain, generator)))
            own = {fact.id: rare(sets, fact, self.max_share) for fact in forget.facts}
            changes, pairs = self._changes(model, queries, new, own)
            if not changes:
                raise ValueError(
                    "no forget fact has a neuron of its own: raise max_share= or lower refinement.threshold"
                )
            deltas = column_deltas(model, changes)
            edit = Edit(name="knowledge_neuron_update", base=model.hash(), deltas=deltas)
            report = refined_report(sets) | outcome(model, edit, forget.facts)
        report |= {
            "neurons": {name: [list(x) for x in some] for name, some in own.items()},
            "unchanged": [name for name, some in own.items() if not some],
            "tokens": pairs,
            "n_forward": forwards[0],
            "seconds": time.perf_counter() - start,
        }
        recipe = {"method": "knowledge_neuron_update", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name=edit.name, base=edit.base, deltas=deltas, recipe=recipe)

    def _others(self, forget: ForgetSet, retain: RetainSet, generator: torch.Generator) -> list[Fact]:
        """Retained facts of the forgotten relations that have phrasings enough."""
        out = []
        for relation in dict.fromkeys(fact.relation for fact in forget.facts):
            pool = [
                fact
                for fact in retain.facts
                if fact.relation == relation and len(fact.templates) >= self.refinement.min_prompts
            ]
            out += [pool[i] for i in torch.randperm(len(pool), generator=generator)[: self.others].tolist()]
        return list({fact.id: fact for fact in out}.values())

    def _new_tokens(
        self, model: Model, forget: ForgetSet, retain: RetainSet, queries: Sequence[Query], generator: torch.Generator
    ) -> list[int]:
        """The first token of each fact's new answer."""

        def draw(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        if self.to == "text":
            prompts = [query.template.replace("{}", query.fact.subject) for query in queries]
            told = [query.fact.joined(p, str(self.text)) for query, p in zip(queries, prompts, strict=True)]
            known = encode_all(model.tokenizer, told)
            found = [known[text].ids[len(query.prompt) :] for text, query in zip(told, queries, strict=True)]
            if not all(found):
                raise ValueError(f"text={self.text!r} has no token of its own behind a prompt")
            out = [ids[0] for ids in found]
        elif self.to == "unknown":
            pool = unknown_names(forget, retain)
            asked = [make_query(model.tokenizer, q.fact, q.template, pool[draw(len(pool))]).prompt for q in queries]
            answers = greedy(model, asked, 1)
            if not all(answers):
                raise ValueError('the model ends the text after an unknown entity: use to="distractor" or to="text"')
            out = [answer[0] for answer in answers]
        else:
            if bare := [query.fact.id for query in queries if len(query.answers) < 2]:
                raise ValueError(f"fact {bare[0]!r} has no distractor: give some, or use another to=")
            out = [query.answers[1 + draw(len(query.answers) - 1)][0] for query in queries]
        unknown = model.tokenizer.unk_token_id
        if unknown is not None and unknown in out:
            raise ValueError("the tokenizer has no token for the new answer: use another one")
        return out

    def _changes(
        self, model: Model, queries: Sequence[Query], new: Sequence[int], own: Mapping[str, Sequence[Neuron]]
    ) -> tuple[dict[Neuron, Tensor], dict[str, list[str]]]:
        """(What is added to each value vector, old and new token of each fact)."""
        readout = model.hf.get_output_embeddings().weight.detach()
        changes: dict[Neuron, Tensor] = {}
        pairs = {}
        for query, token in zip(queries, new, strict=True):
            old = query.answers[0][0]
            pairs[query.fact.id] = [model.tokenizer.decode([old]), model.tokenizer.decode([token])]
            for neuron in own[query.fact.id]:
                away, toward = (_ungained(model, neuron[0], readout[t].float()) for t in (old, token))
                change = turned(stored_vector(model, neuron), away, toward, self.lambda_old, self.lambda_new)
                changes[neuron] = changes.get(neuron, 0) + change
        return changes, pairs


def turned(
    v: Float[Tensor, " d_model"],
    old: Float[Tensor, " d_model"],
    new: Float[Tensor, " d_model"],
    lambda_old: float,
    lambda_new: float,
) -> Float[Tensor, " d_model"]:
    """-lambda_old (|v| / |e_t|) e_t + lambda_new (|v| / |e_t'|) e_t'; a row of zeros has no direction and adds nothing.

    Source: 2104.08696, section 5.1, and its code.
    """
    n_new, n_old = (e.norm().clamp(min=1e-12) for e in (new, old))
    return v.norm() * (lambda_new * new / n_new - lambda_old * old / n_old)


def rare(sets: NeuronSets, fact: Fact, max_share: float) -> tuple[Neuron, ...]:
    """The neurons of a fact that at most this share of the other facts of its relation use."""
    others = [f.id for f in sets.facts if f.relation == fact.relation and f.id != fact.id]
    used = Counter(neuron for name in others for neuron in sets.neurons[name])
    return tuple(neuron for neuron in sets.neurons[fact.id] if used[neuron] <= max_share * len(others))


def _ungained(model: Model, layer: int, e: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The direction to store so that e reaches the residual stream through the norm behind an MLP, if there is one."""
    norm = post_norm(model, layer)
    if norm is None:
        return e
    gain = norm[1].to(e)
    return torch.where(gain == 0, torch.zeros_like(e), e / gain)


def refined_report(sets: NeuronSets) -> dict[str, Any]:
    """What a recipe says about refined sets."""
    phrasings = sum(len(fact.templates) for fact in sets.facts)
    mean = sum(map(len, sets.neurons.values())) / len(sets.facts)
    return {"neurons_per_fact": mean, "sharing": dict(sets.sharing), "phrasings": phrasings, "n_backward": phrasings}
