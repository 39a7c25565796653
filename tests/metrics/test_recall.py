"""Recall on models that know and do not know, the majority guess by hand, and KL against its definition."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.metrics import forget_recall, general_kl, heldout_recall, majority_recall, recall
from mech_unlearn.metrics.drift import token_kl
from mech_unlearn.model.load import load
from tests.planted import FORGOTTEN, planted_facts, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


def test_recall_is_one_where_the_model_knows_and_zero_where_it_never_learnt():
    facts = planted_facts()
    full, retrained = planted_model(), planted_model("retrained", 1)
    assert forget_recall(full, facts).value == heldout_recall(full, facts).value == 1.0
    assert forget_recall(retrained, facts[:FORGOTTEN]).value == 0.0
    assert forget_recall(retrained, facts[FORGOTTEN:]).value == 1.0
    assert forget_recall(full, facts).n == 5 * len(facts) and recall(full, facts, "prompt").n == len(facts)


def test_chance_is_the_share_of_facts_whose_object_is_the_relations_most_frequent_one():
    retain = tiny_facts(["Cara Moss", "Dan Park", "Eva Reed", "Finn Stone", "Gina Vale"])  # Paris and Acme twice
    facts = tiny_facts(["Anna Lee", "Ben Hill"])  # Paris, Acme, Rome, Globex
    got = majority_recall(facts, retain)
    assert got.value == 0.5 and got.n == 4
    with pytest.raises(ValueError, match="relation 'works'"):
        majority_recall(facts, retain[::2])


def test_no_facts_and_no_such_phrasing_are_refused():
    model, facts = planted_model(), planted_facts()
    with pytest.raises(ValueError, match="at least one fact"):
        recall(model, ())
    with pytest.raises(ValueError, match="heldout"):
        recall(model, [replace(fact, heldout=()) for fact in facts], "heldout")


def test_drift_is_the_mean_kl_over_all_tokens_of_unpadded_texts():
    full, other = (load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1))
    texts = ("Rivers run to the sea .", "rain falls", "The sea is in Oslo .", "rain falls on hills")
    terms = []
    for text in texts:
        ids = torch.tensor([full.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model.hf(ids).logits[0].log_softmax(-1) for model in (full, other))
        terms.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    got = general_kl(full, other, texts)
    assert got.value == pytest.approx(torch.cat(terms).mean().item(), rel=1e-5)
    assert got.n == sum(map(len, terms)) and got.unit == "nats per token" and got.ci[0] <= got.value <= got.ci[1]
    assert general_kl(full, full, texts).value == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="texts"):
        general_kl(full, other, ())


def test_drift_of_a_model_whose_vocabulary_was_padded_is_that_on_the_tokens_that_both_have():
    full, other, padded = (torch.randn(4, n, generator=torch.Generator().manual_seed(n)) for n in (10, 10, 13))
    padded[:, :10] = other
    torch.testing.assert_close(token_kl(full, padded), token_kl(full, other))
    torch.testing.assert_close(token_kl(padded, full), token_kl(other, full))


def test_kl_of_two_coins():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert token_kl(p, q).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())
