"""Scores by form: a plain model read by hand in each form, the worst form, and gaps in closed form."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.metrics.forms import FORMS, by_form, form_gap, kappa_of
from mech_unlearn.model.load import load
from tests.planted import FORGOTTEN, planted_facts, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FACTS, OTHERS = tiny_facts(["Anna Lee", "Ben Hill"]), tiny_facts(["Cara Moss", "Dan Park", "Eva Reed"])
MODEL = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


def by_hand(prompt, answer):
    """(Geometric mean probability, share of tokens predicted, whether greedy decoding gives the answer)."""
    tokenizer, hf = tiny_tokenizer(), tiny_hf("llama")
    ids, start = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    own = ids[:start]
    with torch.no_grad():
        table = hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        for _ in ids[start:]:
            own = [*own, int(hf(torch.tensor([own])).logits[0, -1].argmax())]
    picked = [table[t - 1, ids[t]] for t in range(start, len(ids))]
    right = [bool(table[t - 1].argmax() == ids[t]) for t in range(start, len(ids))]
    return torch.stack(picked).mean().exp().item(), sum(right) / len(right), own == ids


def test_each_form_asks_what_it_says_and_scores_the_answer_token_by_token():
    found = by_form(MODEL, FACTS, OTHERS)
    assert list(found.forms) == ["prompt", "cloze", "question", "multiple_choice", "reversed", "heldout"]
    letters = "A: Bern, B: Oslo, C: Paris, D: Rome."
    asked = {
        "prompt": ("Anna Lee was born in", "Paris"),
        "cloze": ("Fill in the blank: Anna Lee was born in . The blank is", "Paris"),  # no token for underscores
        "question": ("Question: what is the born of Anna Lee? Answer:", "Paris"),
        "multiple_choice": (f"{letters} Anna Lee was born in, letter", "C"),
        "reversed": ("Paris is the born of", "Anna Lee"),
        "heldout": ("Rivers run to Anna Lee in", "Paris"),
    }
    for form, (prompt, answer) in asked.items():
        scores = found.forms[form]
        got = scores.probability.values[0].item(), scores.token_accuracy.values[0].item()
        wanted = by_hand(prompt, answer)
        assert got == pytest.approx(wanted[:2], rel=1e-4), form
        assert bool(scores.recall.values[0]) == wanted[2], form
    assert found.forms["multiple_choice"].chance == 0.25 and found.forms["prompt"].chance == 0


def test_the_worst_form_is_the_one_in_which_the_fact_is_still_said():
    found = by_form(MODEL, FACTS, OTHERS)
    loud = {"question": 1.0, "multiple_choice": 0.25}  # guessing gives a quarter of the letters
    forms = {}
    for name, scores in found.forms.items():
        values = torch.full_like(scores.recall.values, loud.get(name, 0.0))
        forms[name] = replace(scores, recall=replace(scores.recall, values=values))
    report = replace(found, forms=forms)
    assert report.worst_by_recall == "question" and "worst by recall above chance: question" in str(report)
    assert report.forms["multiple_choice"].above_chance().value == 0
    assert report.forms["question"].above_chance().value == 1
    best = max(found.forms, key=lambda f: found.forms[f].probability.mean().value)
    assert found.worst_by_probability == best


def test_the_full_model_says_the_fact_in_seen_and_heldout_phrasing_and_a_retrained_one_in_neither():
    facts = planted_facts()
    for truth, share in (("full", 1.0), ("retrained", 0.0), ("early", 0.0)):
        found = by_form(planted_model(truth), facts[:FORGOTTEN], facts[FORGOTTEN:])
        assert found.forms["prompt"].recall.mean().value == found.forms["heldout"].recall.mean().value == share
        assert found.forms["prompt"].recall.mean().n == FORGOTTEN


def test_a_fact_that_a_form_does_not_apply_to_is_left_out_and_counted():
    bare = replace(FACTS[0], distractors=(), heldout=())
    found = by_form(MODEL, (bare, *FACTS[1:]))
    assert found.forms["multiple_choice"].left_out == found.forms["heldout"].left_out == (bare.id,)
    assert found.forms["heldout"].facts == tuple(f.id for f in FACTS[1:]) and not found.forms["prompt"].left_out
    assert found.not_asked == {"reversed": "it applies to none of the facts"}
    alone = by_form(MODEL, [bare])
    assert alone.not_asked["heldout"] == "no fact has a held-out phrasing" and "not asked" in str(alone)
    for bad, reason in (((), "at least one fact"), ((bare, bare), "occurs twice")):
        with pytest.raises(ValueError, match=reason):
            by_form(MODEL, bad)


def test_recall_and_probability_are_never_subtracted_from_each_other_nor_one_form_from_another():
    found = by_form(MODEL, FACTS).forms
    with pytest.raises(ValueError, match="two kinds"):
        found["prompt"].recall.minus(found["prompt"].probability)
    with pytest.raises(ValueError, match="two kinds"):
        found["prompt"].recall.minus(found["question"].recall)


def test_the_form_gap_is_the_largest_kappa_minus_that_of_the_trained_form():
    nan = torch.nan
    kappa = {
        "prompt": torch.tensor([0.1, 0.5, nan, 0.2]),
        "question": torch.tensor([0.9, 0.2, 0.4, nan]),
        "cloze": torch.tensor([0.3, nan, nan, 0.2]),
    }
    found = form_gap(kappa, FACTS)
    torch.testing.assert_close(found.gap.values[[0, 1, 3]], torch.tensor([0.8, 0.0, 0.0]).double(), atol=1e-7, rtol=0)
    assert found.gap.values[2].isnan() and found.worst == ("question", "prompt", "question", "prompt")
    assert found.gap.mean().n == 3 and found.gap.mean().value == pytest.approx(0.8 / 3, rel=1e-6)
    assert form_gap({"prompt": torch.full((4,), nan)}, FACTS).worst == (None,) * 4
    with pytest.raises(ValueError, match="'prompt'"):
        form_gap({"question": kappa["question"]}, FACTS)


def test_kappa_is_one_for_the_full_model_zero_for_the_retrained_one_and_undefined_where_they_agree():
    facts = planted_facts()[:FORGOTTEN]
    full, never = (by_form(planted_model(t), facts) for t in ("full", "retrained"))
    top, bottom = kappa_of(full, full, never, facts), kappa_of(never, full, never, facts)
    for form in ("prompt", "heldout"):
        torch.testing.assert_close(top[form], torch.ones(FORGOTTEN).double())
        torch.testing.assert_close(bottom[form], torch.zeros(FORGOTTEN).double())
    assert kappa_of(full, never, never, facts)["prompt"].isnan().all()
    late = kappa_of(by_form(planted_model("late"), facts), full, never, facts)["prompt"]
    wanted = torch.tensor([m.forms["prompt"].probability.values.log().mean() for m in (full, never)])
    own = by_form(planted_model("late"), facts).forms["prompt"].probability.values.log().mean()
    assert late.mean().item() == pytest.approx(((own - wanted[1]) / (wanted[0] - wanted[1])).item(), abs=0.05)


def test_a_report_in_json_has_every_form_with_its_interval_and_says_why_one_was_not_asked():
    found = by_form(MODEL, FACTS).to_json()
    assert list(found["forms"]) == list(FORMS)
    for form, number in found["forms"].items():
        assert {"value", "ci", "n", "unit"} <= number.keys() and form in number["unit"]
    asked = found["forms"]["multiple_choice"]
    assert asked["chance"] == 0.25 and asked["left_out"] == 0 and asked["unit"].startswith("greedy decoding")
    assert found["forms"]["reversed"] == {
        "value": None, "ci": [None, None], "n": 0, "unit": "recall, reversed form",
        "reason": "it applies to none of the facts",
    }  # fmt: skip


def test_guessed_letters_are_never_the_worst_form_beside_one_fact_that_is_said():
    facts = planted_facts()[:FORGOTTEN]
    report = by_form(planted_model("full"), facts)
    heldout = report.forms["heldout"]
    forms = {name: replace(s, recall=replace(s.recall, values=s.recall.values * 0)) for name, s in report.forms.items()}
    guessed = forms["multiple_choice"].recall.values.clone()
    guessed[: len(guessed) // 4] = 1.0  # a quarter of four letters
    forms["multiple_choice"] = replace(
        forms["multiple_choice"], recall=replace(forms["multiple_choice"].recall, values=guessed)
    )
    once = torch.eye(len(heldout.facts))[0].double()
    forms["heldout"] = replace(forms["heldout"], recall=replace(heldout.recall, values=once))
    worst = replace(report, forms=forms).to_json()["worst_form"]
    assert worst["form"] == "heldout" and worst["value"] == pytest.approx(1 / len(once))
    assert worst["ci"][0] <= worst["value"] <= worst["ci"][1] and "above chance" in worst["unit"]
