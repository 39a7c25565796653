"""Triggers: what is tried, where it stands, and a planted trigger that is found when it is in the list."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.model.tokens import encode, make_queries
from mech_unlearn.restoration.prompts import sink_trigger
from tests.planted import (
    FORGOTTEN,
    LAST,
    OBJECTS,
    axes,
    fresh_planted_model,
    object_of,
    planted_case,
    planted_facts,
    planted_model,
)
from tests.tiny import tiny_tokenizer


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


def test_candidates_are_distinct_hold_no_special_or_added_token_and_keep_their_seed():
    model = planted_model()
    tried = sink_trigger.candidates(model, 0, ("Acme",))
    assert len(set(tried)) == len(tried) > 50 and "Acme" in tried
    assert tried == sink_trigger.candidates(model, 0, ("Acme",)) != sink_trigger.candidates(model, 1, ("Acme",))
    added = fresh_planted_model()
    added.tokenizer.add_tokens(["<extra_1>", "<extra_2>"])
    left_out = {*added.tokenizer.all_special_ids, *added.tokenizer.get_added_vocab().values()}
    assert len(left_out) > len(model.tokenizer.all_special_ids)
    tried = sink_trigger.candidates(added, 0)
    assert not any(set(trigger) & left_out for trigger in tried if not isinstance(trigger, str))


def test_the_papers_trigger_is_tried_where_the_tokenizer_can_write_it_and_the_log_tells_where_not():
    said: list[str] = []
    sink_trigger.prepare(planted_case(sae=None, retrained=(), log=said.append))
    assert any("'current year:2025 '" in line for line in said)
    written = fresh_planted_model()
    written.tokenizer.add_tokens(["2025", "2024", "2023"])
    assert (
        set(sink_trigger.DATES) <= set(sink_trigger.candidates(written, 0))
        and "current year:2025 " in sink_trigger.DATES
    )


@pytest.mark.parametrize("text", ("Acme", "Acme ", "current "))
def test_a_text_stands_before_the_prompt_as_one_text_with_one_space_between(text):
    model = planted_model()
    queries = make_queries(model.tokenizer, planted_facts()[:2])
    for query, moved in zip(queries, sink_trigger.behind(model, queries, text), strict=True):
        whole = f"{text.strip()} {query.template.replace('{}', query.fact.subject)}"
        assert moved.prompt == encode(model.tokenizer, whole).ids and moved.answers == query.answers
        assert moved.prompt[slice(*moved.span)] == query.prompt[slice(*query.span)]


def test_a_text_is_tokenized_together_with_the_prompt():
    """A byte-level tokenizer writes the first word of a text without a space: tokens put in front would be glued on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model = replace(planted_model(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=core))
    (query,) = make_queries(model.tokenizer, planted_facts()[:1], "prompt")
    (moved,) = sink_trigger.behind(model, [query], sink_trigger.DATES[0])
    assert model.tokenizer.decode(list(moved.prompt)) == "current year:2025 The birthplace of Anna"
    assert model.tokenizer.decode(list(moved.prompt[slice(*moved.span)])).strip() == "Anna"


@pytest.mark.parametrize("text", ("2025", "", "<s> Acme", "Acme {}"))
def test_an_extra_trigger_that_cannot_be_written_is_refused(text):
    with pytest.raises(ValueError, match="trigger"):
        sink_trigger.prepare(planted_case(sae=None), extra=("Acme", text))


@pytest.mark.slow
def test_a_planted_trigger_is_found_when_it_is_in_the_list_and_gives_retrained_models_nothing():
    case = planted_case(sae=None)
    ready = sink_trigger.prepare(case, extra=("Acme",))
    found = sink_trigger.audit(case, ready, backdoored_model(), "backdoored")
    assert found.recoverability.mean() > 0.5 and all("Acme" in flag[0] for flag in found.flags)
    retrained = sink_trigger.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability <= 0.05).all() and (retrained.null <= 0.05).all()
    for truth in ("late", "full"):
        assert (sink_trigger.audit(case, ready, planted_model(truth), truth).recoverability <= 0.05).all()


@pytest.mark.slow
def test_without_retrained_models_sham_facts_give_the_level():
    case = planted_case(sae=None, retrained=())
    ready = sink_trigger.prepare(case, extra=("Acme",))
    found = sink_trigger.audit(case, ready, backdoored_model(), "backdoored")
    assert found.grade == "B" and found.recoverability.mean() > 0.5 and len(found.null) == 0
    assert all("Acme" in flag[0] for flag in found.flags)
    assert (sink_trigger.audit(case, ready, planted_model("late"), "late").recoverability <= 0.05).all()


@pytest.mark.slow
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
