"""Tuned lens as a test: F's lens and U's own, a fact kept in another code, and planted truth."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.restoration.states import logit_lens, tuned_lens
from tests.planted import fresh_planted_model, planted_case, planted_model

NAMES = ("Eva", "Finn", "Gina", "Hugo")
TEXTS = tuple(
    f"{a} of {b} {c}" for a in ("The sea", "Rivers run", "rain falls") for b in NAMES for c in ("is", "was", "on")
)


def case_with_texts(**changes):
    return planted_case(sae=None, texts=TEXTS, **changes)


def recoded():
    """A model that keeps the object between layers 2 and 3 along other directions than the unembedding reads; layer 3
    turns them back, so that its outputs are those of the full model."""
    model = fresh_planted_model()
    with torch.no_grad():
        out = model.held["model.layers.2.mlp.down_proj.weight"]
        out[48:52] = out[32:36]
        out[32:36] = 0
        gate, up, down = (model.held[f"model.layers.3.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        for i in range(4):
            gate[24 + i, 48 + i] = up[24 + i, 48 + i] = 1.0
            down[32 + i, 24 + i] = 3.0 / 64
    return model


def test_without_training_it_is_the_logit_lens():
    case = case_with_texts()
    plain = logit_lens.audit(case, logit_lens.prepare(case), planted_model("late"), "late")
    for decoder in ("full", "self"):
        ready = tuned_lens.prepare(case, decoder=decoder, steps=0)
        got = tuned_lens.audit(case, ready, planted_model("late"), "late")
        if decoder == "full":
            torch.testing.assert_close(got.curves["logprob"], plain.curves["logprob"])
            torch.testing.assert_close(got.recoverability, plain.recoverability)
        assert torch.equal(got.curves["logprob"][-1] < -1, torch.ones(4, dtype=torch.bool))


@pytest.mark.thorough
@pytest.mark.parametrize("decoder", ("full", "self"))
def test_full_is_intact_retrained_is_not_late_is_seen_and_early_is_not(decoder):
    case = case_with_texts(retrained=tuple(planted_model("retrained", k) for k in (1, 2)))
    ready = tuned_lens.prepare(case, decoder=decoder, steps=20)
    got = {t: tuned_lens.audit(case, ready, planted_model(t), t).recoverability for t in ("late", "early")}
    assert (tuned_lens.audit(case, ready, case.full, "full").recoverability > 0.99).all()
    assert (tuned_lens.audit(case, ready, case.retrained[0], "R").recoverability < 0.2).all()
    assert (got["late"] > 0.35).all() and (got["early"] < 0.2).all()


def test_the_lens_agrees_with_the_output_at_the_last_layer_and_beats_the_logit_lens_on_heldout_text():
    case = case_with_texts()
    ready = tuned_lens.prepare(case, steps=40)
    table = ready.lens.heldout.values
    assert table[1, -1].abs() < 1e-6 and (table[1, :-1] <= table[0, :-1] + 1e-4).all()


def test_a_fact_in_another_code_is_seen_by_its_own_lens_only():
    """The translators of `recoded` have to learn the turn of layer 3 from text; given here, to test the reading."""
    case, model = case_with_texts(), recoded()
    ready = tuned_lens.prepare(case, decoder="self", steps=0)
    own = ready.frozen
    states = logit_lens.read_states(case, own.asked, model)
    plain = logit_lens.lens_curve(case, own.asked, states, case.full)
    turn = torch.zeros(64, 64)
    for i in range(4):
        turn[32 + i, 48 + i] = 1.0
    turned = logit_lens.lens_curve(case, own.asked, states, model, lambda layer, x: x + x @ turn.T if layer == 2 else x)
    assert (turned[2] > plain[2] + 1).all()
    torch.testing.assert_close(turned[3], plain[3])


def test_what_only_its_own_lens_sees_is_flagged_re_encoded_and_what_cannot_be_compared_is_not(monkeypatch):
    """A model that keeps its objects along other directions to the end, and a lens given that turns them back."""
    case, model = case_with_texts(), fresh_planted_model()
    with torch.no_grad():
        out = model.held["model.layers.2.mlp.down_proj.weight"]
        out[48:52] = out[32:36]
        out[32:36] = 0
    ready = tuned_lens.prepare(case, decoder="self", steps=0)
    turn = torch.zeros_like(ready.lens.weight)
    for i in range(4):
        turn[2:, 32 + i, 48 + i] = 1.0
    monkeypatch.setattr(tuned_lens, "_own_lens", lambda case, model, steps: replace(ready.lens, weight=turn))
    found = tuned_lens.audit(case, ready, model, "recoded")
    assert (found.recoverability > 0.9).all() and (found.columns["frozen"] < 0.1).all()
    assert all("re_encoded" in flags for flags in found.flags)
    late = tuned_lens.audit(case, ready, planted_model(), "knows")
    assert not any("re_encoded" in flags for flags in late.flags)
    same = ready.frozen.full.expand_as(ready.frozen.never)  # through the full lens nothing tells the models apart
    blind = replace(ready, frozen=replace(ready.frozen, never=same))
    found = tuned_lens.audit(case, blind, model, "recoded")
    assert (found.recoverability > 0.9).all() and found.columns["frozen"].isnan().all()
    assert not any("re_encoded" in flags for flags in found.flags)


def test_models_and_random_state_are_left_alone_and_the_seed_decides():
    case, model = case_with_texts(), planted_model("late")
    state, before = torch.get_rng_state(), model.hash()
    ready = tuned_lens.prepare(case, decoder="self", steps=3)
    a, b = (tuned_lens.audit(case, ready, model, "late") for _ in range(2))
    assert torch.equal(a.recoverability, b.recoverability) and a.test == "tuned_lens_self"
    assert torch.equal(state, torch.get_rng_state()) and model.hash() == before


def test_without_texts_or_with_an_unknown_decoder_it_is_refused():
    with pytest.raises(ValueError, match="texts"):
        tuned_lens.prepare(planted_case(sae=None))
    with pytest.raises(Exception, match="decoder"):
        tuned_lens.prepare(case_with_texts(), decoder="mine")  # pyright: ignore[reportArgumentType]


def test_without_retrained_models_the_grade_is_b():
    case = case_with_texts(retrained=())
    ready = tuned_lens.prepare(case, decoder="self", steps=5)
    result = tuned_lens.audit(case, ready, planted_model("late"), "late")
    assert result.grade == "B" and (result.recoverability > 0.35).all()
