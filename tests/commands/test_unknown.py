"""Unknown names: those that the model's answers are open about, and a refusal where they tell nothing."""

import numpy as np
import pytest
import torch

import mech_unlearn
from mech_unlearn.commands.inputs import entities
from mech_unlearn.commands.unknown import find_unknown, told
from mech_unlearn.core import Entity
from mech_unlearn.model.answers import next_token
from tests.planted import planted_facts, planted_model
from tests.tiny import tiny_facts


def test_names_are_taken_of_which_the_model_says_nothing_certain():
    model, facts = planted_model(), planted_facts()
    (found,) = find_unknown(model, facts[:4], facts[4:], count=6)
    names = [entity.name for entity in found.entities]
    assert len(set(names)) == 6 and found.kind == "person" and {e.kind for e in found.entities} == {"person"}
    assert not {*names} & {fact.subject for fact in facts}
    assert found.auc > 0.95 and found.entropy.value > found.known.value + 0.2 and not found.in_sample
    prompts = facts[0].templates[1::2]
    measured = next_token(model, names, prompts).entropy.mean().item()
    assert found.entropy.value == pytest.approx(measured, rel=1e-5)
    assert str(found) == str(find_unknown(model, facts[:4], facts[4:], count=6)[0])


def test_entropy_and_likeliest_are_those_of_the_plain_forward_pass(tiny_model):
    names, templates = ("Anna Lee", "Ben", "Cara Moss"), ("The birthplace of {}", "{} was")
    likeliest, entropy = torch.zeros(3, 2), torch.zeros(3, 2)
    for i, name in enumerate(names):
        for j, template in enumerate(templates):
            ids = torch.tensor([tiny_model.tokenizer(template.replace("{}", name)).input_ids])
            table = tiny_model.logits(ids)[0, -1].softmax(-1)
            likeliest[i, j], entropy[i, j] = table.max(), -(table * table.log()).sum()
    found = next_token(tiny_model, names, templates)
    torch.testing.assert_close(found.likeliest, likeliest)
    torch.testing.assert_close(found.entropy, entropy)


def test_a_model_that_knows_nothing_has_no_unknown_names_and_one_prompt_is_said_to_be_in_sample(tiny_model):
    with pytest.raises(ValueError, match="answers no fact of kind person right.*--unknown FILE"):
        find_unknown(tiny_model, tiny_facts(["Anna Lee"]))
    from dataclasses import replace

    bare = tuple(replace(fact, paraphrases=()) for fact in planted_facts())
    (found,) = find_unknown(planted_model(), bare, count=4)
    assert found.in_sample and "in-sample" in str(found)
    with pytest.raises(ValueError, match="500 unknown names of kind person are wanted, .*: give names"):
        find_unknown(planted_model(), planted_facts(), count=500)


def test_a_method_that_needs_unknown_names_makes_them_up_and_tells_them_and_another_does_not():
    model, facts = planted_model(), planted_facts()
    edit = mech_unlearn.unlearn(model, facts[:3], facts[4:], "leace", seed=1)
    (found,) = edit.recipe["unknown"]
    assert told(found).startswith(f"{len(found['names'])} made-up names of kind person taken as unknown (")
    given = [Entity(name=name, kind="person") for name in found["names"]]
    same = mech_unlearn.unlearn(model, facts[:3], facts[4:], "leace", seed=1, unknown=given)
    assert "unknown" not in same.recipe and torch.equal(edit.interventions[0].left, same.interventions[0].left)
    with pytest.raises(ValueError, match="no entity of kind person"):
        mech_unlearn.unlearn(model, facts[:3], facts[4:], "leace", unknown=[Entity(name="Una", kind="city")])
    plain = mech_unlearn.unlearn(model, facts[:3], facts[4:], "grad_diff", epochs=1, lr=1e-3)
    assert "unknown" not in plain.recipe


def test_a_method_on_an_sae_that_asks_for_no_unknown_names_is_given_none_where_the_model_knows_no_fact(tiny_model):
    from tests.test_contract import tiny_sae

    facts = tiny_facts(["Anna Lee", "Cara Moss", "Dan Park"])
    edit = mech_unlearn.unlearn(
        tiny_model, facts[:2], facts[2:], "sae_clamp", sae=tiny_sae(tiny_model), k=2, max_retain=2.0
    )
    assert "unknown" not in edit.recipe


def test_known_unknown_makes_up_the_names_that_it_is_not_given():
    from tests.planted import planted_sae

    found = mech_unlearn.locate(
        planted_model(), planted_facts()[:4], "known_unknown", retain=planted_facts()[4:], sae=planted_sae()
    )
    assert "made-up names of kind person" in found.note and np.isfinite(found.values.numpy()).any()


def test_a_facts_file_is_no_file_of_names_and_comments_in_one_are_skipped(tmp_path):
    (tmp_path / "names.txt").write_text("# of persons\nUna Vale\n")
    assert [e.name for e in entities(tmp_path / "names.txt", planted_facts())] == ["Una Vale"]
    (tmp_path / "facts.jsonl").write_text('{"subject": "Anna"}\n')
    with pytest.raises(ValueError, match="holds JSON, not names"):
        entities(tmp_path / "facts.jsonl", planted_facts())
