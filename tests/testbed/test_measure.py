"""The measures of the worlds, against what must come out on any model."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Entity, Measurement
from mech_unlearn.model.tokens import make_queries, make_query
from mech_unlearn.testbed.measure import (
    interchange_curves,
    known_auc,
    prompt_recall,
    share,
    swaps,
    to_json,
    tracing,
)
from tests.tiny import tiny_facts

FACTS = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park", "Eva Reed", "Finn Stone"])


def _first_hits(model, facts):
    """Slow reference: how often the first answer token is on top, over the pairs' source prompts."""
    pairs = swaps([make_query(model.tokenizer, fact, fact.prompt) for fact in facts])
    best = [model.logits(torch.tensor([source.prompt]))[0, -1].argmax().item() for source, _ in pairs]
    return sum(b == source.answers[0][0] for b, (source, _) in zip(best, pairs)), len(pairs)


def _answering(model, facts):
    """The facts with what the model says as their object, so that a random model knows them all."""
    told = []
    for fact in facts:
        query = make_query(model.tokenizer, replace(fact, distractors=()), fact.prompt)
        token = model.logits(torch.tensor([query.prompt]))[0, -1].argmax().item()
        told.append(replace(fact, object=model.tokenizer.convert_ids_to_tokens(token), distractors=(), paraphrases=()))
    return tuple(told)


def test_swaps_pair_different_answers_of_the_same_phrasing(tiny_model):
    pairs = swaps([make_query(tiny_model.tokenizer, fact, fact.prompt) for fact in FACTS])
    assert len(pairs) == len(FACTS)
    for source, target in pairs:
        assert source.template == target.template and source.span == target.span
        assert source.answers[0][0] != target.answers[0][0]


def test_swaps_leave_out_what_has_no_partner(tiny_model):
    alone = [make_query(tiny_model.tokenizer, FACTS[0], FACTS[0].prompt)]
    assert swaps(alone) == []


def test_after_the_last_layer_the_end_carries_all_and_the_subject_nothing(tiny_model):
    """There the last prompt token alone decides: copying it gives the source's own prediction, whatever that is."""
    curves = interchange_curves(tiny_model, FACTS, (0,))
    hits, n = _first_hits(tiny_model, FACTS)
    assert curves["end"][-1].n == n and curves["end"][-1].value == hits / n
    known = [f for f in _answering(tiny_model, FACTS) if f.object.isalpha()]
    if len({fact.object for fact in known}) > 1:
        curves = interchange_curves(tiny_model, known, (0,))
        assert curves["end"][-1].value == 1.0
        assert curves["span"][-1].value == curves["last"][-1].value == 0.0


def test_recall_counts_prompts_that_greedy_decoding_completes(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS, "templates")
    slow = 0
    for query in queries:
        ids = list(query.prompt)
        for _ in query.answers[0]:
            ids.append(tiny_model.logits(torch.tensor([ids]))[0, -1].argmax().item())
        slow += tuple(ids[len(query.prompt) :]) == query.answers[0]
    found = prompt_recall(tiny_model, FACTS, "templates")
    assert (found.value, found.n) == (slow / len(queries), len(queries))


def test_restoring_a_one_token_subject_at_the_end_of_the_prompt_undoes_all_noise(tiny_model):
    """There the subject's state is the only one that the noise reaches, and the one that is read out."""
    names = [fact.subject.split()[0] for fact in FACTS]
    facts = [replace(f, subject=name, prompt="The birthplace of {}", distractors=()) for f, name in zip(FACTS, names)]
    once = tracing(tiny_model, facts, seed=1)
    assert all(abs(once[f"L{layer}"] - once["clean"]) < 1e-6 for layer in range(tiny_model.n_layers))
    assert abs(once["corrupted"] - once["clean"]) > 1e-5


def test_tracing_is_the_same_for_the_same_seed_and_cannot_help_after_the_last_layer(tiny_model):
    """Behind the last layer only the last prompt token is read, so restoring the subject changes nothing."""
    facts = [replace(fact, distractors=()) for fact in FACTS]
    once, twice = tracing(tiny_model, facts, seed=1), tracing(tiny_model, facts, seed=1)
    assert once == twice != tracing(tiny_model, facts, seed=2)
    assert abs(once[f"L{tiny_model.n_layers - 1}"] - once["corrupted"]) < 1e-6
    assert abs(once["L0"] - once["corrupted"]) > 1e-6


def test_a_probe_tells_names_apart_by_their_words_and_not_at_random(tiny_model):
    first, last = ["Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo"], ["Lee", "Hill", "Moss", "Park"]
    by_last = [[Entity(name=f"{a} {b}") for a in first for b in pair] for pair in (last[:2], last[2:])]
    assert known_auc(tiny_model, *by_last, "{} was born in", 1).value > 0.95
    every = [Entity(name=f"{a} {b}") for a in first for b in last]
    mixed = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    halves = [[every[i] for i in mixed[:16]], [every[i] for i in mixed[16:]]]
    low, high = known_auc(tiny_model, *halves, "{} was born in", 1).ci
    assert low < 0.75 and high > 0.25


def test_shares_have_wilson_intervals():
    """Newcombe 1998, table I: 81 of 263 gives .2553 to .3662, and 0 of 20 gives 0 to .1611."""
    low, high = share(81, 263, "x").ci
    assert abs(low - 0.2553) < 1e-4 and abs(high - 0.3662) < 1e-4
    low, high = share(0, 20, "x").ci
    assert abs(low) < 1e-9 and abs(high - 0.1611) < 1e-4
    with pytest.raises(ValueError, match="no cases"):
        share(0, 0, "swaps")


def test_measurements_become_plain_json():
    value = Measurement(value=1.0, ci=(0.5, 1.0), n=4, unit="x")
    assert to_json({"a": [value]}) == {"a": [{"value": 1.0, "ci": [0.5, 1.0], "n": 4, "unit": "x"}]}
