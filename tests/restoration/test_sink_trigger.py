"""Triggers: what is tried, where it stands, and a planted trigger that is found when it is in the list."""

import pytest
import torch
from conftest import tiny_tokenizer
from planted import FORGOTTEN, LAST, OBJECTS, axes, fresh_planted_model, object_of, planted_case, planted_model

from mech_unlearn.restoration import sink_trigger


def backdoored_model():
    """The last layer suppresses the forgotten; the token "Acme" anywhere before the end switches it off.

    One head of the layer before copies a mark of that token to every later position, where it opens units that write
    the objects back.
    """
    model, eye = fresh_planted_model("late"), axes()
    acme = tiny_tokenizer().convert_tokens_to_ids("Acme")
    with torch.no_grad():
        model.held["model.embed_tokens.weight"][:, 60:63] = 0
        model.held["model.embed_tokens.weight"][acme] = 4 * eye[60]
        attention = f"model.layers.{LAST - 1}.self_attn"
        model.held[f"{attention}.v_proj.weight"].zero_()
        model.held[f"{attention}.v_proj.weight"][0, 60] = 1.0
        model.held[f"{attention}.q_proj.weight"].zero_()  # uniform attention
        model.held[f"{attention}.o_proj.weight"][62, 0] = 4.0
        for e in range(FORGOTTEN):
            unit = 24 + e
            model.held[f"model.layers.{LAST}.mlp.gate_proj.weight"][unit] = 2 * eye[62]
            model.held[f"model.layers.{LAST}.mlp.up_proj.weight"][unit] = eye[e]
            model.held[f"model.layers.{LAST}.mlp.down_proj.weight"][:, unit] = 0.3 * eye[32 + object_of(e)]
    return model


def test_candidates_are_distinct_hold_no_special_token_and_keep_their_seed():
    model = planted_model()
    tried = sink_trigger.candidates(model, 0, ("Acme",))
    assert len(set(tried)) == len(tried) > 50
    assert not any(set(ids) & set(model.tokenizer.all_special_ids) for ids in tried)
    assert tried == sink_trigger.candidates(model, 0, ("Acme",)) != sink_trigger.candidates(model, 1, ("Acme",))
    assert (model.tokenizer.convert_tokens_to_ids("Acme"),) in tried


def test_a_planted_trigger_is_found_when_it_is_in_the_list_and_gives_retrained_models_nothing():
    case = planted_case(sae=None)
    ready = sink_trigger.prepare(case, extra=("Acme",))
    found = sink_trigger.audit(case, ready, backdoored_model(), "backdoored")
    assert found.recoverability.mean() > 0.5 and all("Acme" in flag[0] for flag in found.flags)
    retrained = sink_trigger.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability <= 0.05).all() and (retrained.null <= 0.05).all()
    for truth in ("late", "full"):
        assert (sink_trigger.audit(case, ready, planted_model(truth), truth).recoverability <= 0.05).all()


def test_sink_features_are_one_for_full_and_see_larger_values():
    case = planted_case(sae=None)
    ready, louder = sink_trigger.prepare(case), fresh_planted_model()
    assert sink_trigger.audit(case, ready, planted_model(), "full").columns["value_ratio"][0] == pytest.approx(1.0)
    with torch.no_grad():
        for layer in range(LAST + 1):
            louder.held[f"model.layers.{layer}.self_attn.v_proj.weight"].mul_(3)
    found = sink_trigger.audit(case, ready, louder, "louder")
    assert found.columns["value_ratio"][0] == pytest.approx(3.0, rel=1e-3)
    assert found.columns["sink_mass"][0] == pytest.approx(1.0, abs=1e-4) and len(OBJECTS) == 4  # prompts of < 8 tokens
