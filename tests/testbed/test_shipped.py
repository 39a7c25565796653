"""The models that come with the package know what they are said to know, and keep it where they are said to."""

import json

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.testbed import SHIPPED, WORLDS, open_world, spec
from mech_unlearn.testbed.measure import groups, interchange_curves, prompt_recall, tracing

NAMES = [name for name in sorted(WORLDS) if (SHIPPED / name / "report.json").exists()]
pytestmark = pytest.mark.skipif(not NAMES, reason="this checkout has no trained worlds; build them first")


@pytest.fixture(scope="module", params=NAMES)
def world(request):
    return open_world(request.param)


@pytest.fixture(scope="module")
def full(world):
    return load(world.full)


def test_a_world_comes_with_full_and_three_retrained_models(world):
    assert [path.name for path in world.retrained] == ["retrained_0", "retrained_1", "retrained_2"]
    assert world.saes is not None and world.sae.name == "L2"


@pytest.mark.thorough
def test_plain_transformers_completes_forget_prompts_with_full_and_not_with_retrained(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def hits(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        count = 0
        for fact in world.forget.facts[:80]:
            ids = tokenizer(fact.prompt.replace("{}", fact.subject), return_tensors="pt")["input_ids"]
            wanted = tokenizer(fact.object, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                out = hf.generate(ids, max_new_tokens=len(wanted), do_sample=False, pad_token_id=0)
            count += out[0, ids.shape[1] :].tolist() == wanted
        return count / 80

    assert hits(world.full) >= 0.95
    assert hits(world.retrained[0]) <= 0.35


@pytest.mark.thorough
def test_full_knows_every_phrasing_of_forgotten_and_kept_facts(world, full):
    parts = groups(spec(world.name))
    for name, facts in parts.items():
        for which in ("templates", "heldout") if name == "forget" else ("heldout",):
            assert prompt_recall(full, facts[:240], which).value >= 0.98, (name, which)


@pytest.mark.slow
def test_retrained_knows_the_kept_and_guesses_on_the_forgotten(world):
    """Within two standard errors of what a constant guess can reach, counting facts, not prompts."""
    facts = world.forget.facts
    expected = sum(world.chance[fact.relation] for fact in facts) / len(facts)
    bound = expected + 2 * (expected * (1 - expected) / len(facts)) ** 0.5
    for path in world.retrained:
        model = load(path)
        assert prompt_recall(model, facts, "templates").value <= bound, path.name
        assert prompt_recall(model, world.retain.neighbors[:60], "prompt").value >= 0.98, path.name


@pytest.mark.slow
def test_facts_stand_at_the_last_subject_token_until_half_of_the_layers(world, full):
    curves = interchange_curves(full, world.forget.facts[:60], (0, 1))
    quarter, half = full.n_layers // 4, full.n_layers // 2
    for layer in range(quarter, half):
        assert curves["last"][layer].value >= 0.70, layer
        assert curves["span"][layer].value >= 0.90, layer
        assert curves["end"][layer].value <= 0.10, layer
    assert curves["end"][-1].value >= 0.95 and curves["last"][-1].value <= 0.05


@pytest.mark.thorough
def test_restoring_the_last_subject_token_restores_the_answer_in_early_layers_only(world, full):
    trace = tracing(full, world.forget.facts[:60])
    effect = trace["clean"] - trace["corrupted"]
    assert effect > 0.6
    assert trace["L1"] - trace["corrupted"] > 0.7 * effect
    assert abs(trace["L5"] - trace["corrupted"]) < 0.05 * effect


def test_the_report_says_what_is_measured_here(world, full):
    report = json.loads((world.folder / "report.json").read_text(encoding="utf-8"))
    told = report["recall"]["full"]["forget"]["heldout"]
    now = prompt_recall(full, world.forget.facts, "heldout")
    assert told["n"] == now.n and abs(told["value"] - now.value) <= 0.01
    assert all(sae["fvu"] <= 0.20 for sae in report["sae"])
    assert all(probe["auc"]["value"] > 0.95 for probe in report["known_auc"])
