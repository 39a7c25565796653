"""`facts check`: what a model knows of each fact, phrasing by phrasing, against plain arithmetic."""

import json
from dataclasses import replace

import pytest

from mech_unlearn.commands.check import check, run_check
from mech_unlearn.commands.options import CheckOptions
from mech_unlearn.data.jsonl import load_facts, save_facts
from mech_unlearn.model.tokens import encode
from tests.commands.test_cli import refused
from tests.planted import FORGOTTEN, planted_facts, planted_hf, planted_model
from tests.tiny import tiny_tokenizer


def test_a_model_knows_what_was_planted_and_not_what_was_left_out():
    full, never = (check(planted_model(truth), planted_facts()) for truth in ("full", "retrained"))
    assert full.known == planted_facts() and full.recall.value == full.heldout.value == 1.0
    assert all(row.testable and row.says == row.fact.object for row in full.rows)
    assert [row.fact for row in never.rows if row.knows] == list(planted_facts()[FORGOTTEN:])
    assert not any(row.testable for row in never.rows[:FORGOTTEN])
    assert never.rows[0].margin < 0.5 < full.rows[0].margin


def test_probability_and_answers_are_those_of_the_plain_forward_pass():
    model, fact = planted_model(), planted_facts()[0]
    row = check(model, [fact]).rows[0]
    prompt = encode(model.tokenizer, fact.prompt.replace("{}", fact.subject)).ids
    import torch

    table = model.logits(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert row.probability == pytest.approx(table[model.tokenizer.convert_tokens_to_ids(fact.object)].item(), rel=1e-5)
    assert set(row.right) == set(fact.templates) and set(row.heldout) == set(fact.heldout)


def test_a_fact_with_few_distractors_is_said_to_be_untestable_and_odd():
    fact = replace(planted_facts()[0], distractors=())
    found = check(planted_model(), [fact, planted_facts()[1]])
    assert [row.testable for row in found.rows] == [None, True]
    assert [(one.oddity, one.facts) for one in found.findings] == [("distractors", (fact.id,))]
    assert "1 of 1 testable" in found.summary and "–" in found.lines()[1]


def test_what_users_and_models_wrote_is_escaped_and_kept_to_one_line():
    fact = replace(planted_facts()[0], id="<b>\nb", distractors=("Rome", "Oslo"))
    found = check(planted_model(), [fact])
    assert "<b>" not in found._repr_html_() and "&lt;b&gt;" in found._repr_html_()
    assert not any("\n" in line for line in found.lines())


def test_the_command_writes_the_known_facts_and_refuses_before_it_loads(tmp_path, call):
    planted_hf("retrained").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    facts, known = tmp_path / "facts.jsonl", tmp_path / "known.jsonl"
    save_facts(planted_facts(), facts)
    asked = CheckOptions(model=str(tmp_path / "model"), facts=facts, retain=facts, known=known)
    found = run_check(asked)
    assert load_facts(known) == planted_facts()[FORGOTTEN:] == found.known
    assert {one.oddity for one in found.findings} == {"kept and forgotten", "id twice"}
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="known.jsonl' is there already"):
        run_check(replace(asked, model="nowhere"))
    save_facts(planted_facts()[:2], tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="knows none of these facts"):
        run_check(replace(asked, facts=tmp_path / "gone.jsonl", retain=None, known=tmp_path / "new.jsonl"))
    assert not (tmp_path / "new.jsonl").exists()
    words = ("--model", tmp_path / "model", "--facts")
    refused(call("facts", "check", *words, tmp_path / "none.jsonl"), "none.jsonl")
    status, out, _ = call("facts", "check", *words, facts)
    assert status == 0 and "4 of 8 facts known" in out and out.count("\n") > len(planted_facts())
