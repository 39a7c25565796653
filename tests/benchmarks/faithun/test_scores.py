"""FaithUn and RESTOR: closed forms of their numbers, joint clusters, perfect and superficial deletions."""

import pytest
import torch

from mech_unlearn.benchmarks.faithun.scores import SETS, summary
from mech_unlearn.benchmarks.restor.scores import (
    accuracy_in_context,
    holds_answer,
    option_support,
    recovered,
)
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.metrics.multiple_choice import ChoiceQuestion, choice_by_letter, choice_by_option_text


def answered(shares, n=40, unit="x", clusters=True):
    """Rows of 0 and 1 with the given means, ten clusters."""
    return {
        name: RowScores(
            values=(torch.arange(n) < round(share * n)).double(),
            unit=unit,
            clusters=tuple(i % 10 for i in range(n)) if clusters else None,
        )
        for name, share in zip(SETS, shares)
    }


def test_the_score_is_the_mean_of_what_is_gone_and_what_is_kept():
    found = summary(answered((0.1, 0.4, 0.2, 0.9, 0.8)))
    assert {name: m.value for name, m in found.accuracy.items()} == pytest.approx(
        {"UA_base": 0.1, "UA_paraphrase": 0.4, "UA_multihop": 0.2, "TA": 0.9, "SA_keep": 0.8}
    )
    assert found.score.value == pytest.approx((0.9 + 0.6 + 0.8 + 0.9 + 0.8) / 5) and found.score.n == 200
    assert found.score.ci[0] < found.score.value < found.score.ci[1]
    assert summary(answered((0, 0, 0, 1, 1))).score.value == 1 and summary(answered((1, 1, 1, 0, 0))).score.value == 0


def test_forgetting_that_leaves_the_paraphrases_or_takes_the_same_answers_is_called_superficial():
    full = summary(answered((1, 1, 1, 1, 1)))
    under, over = summary(answered((0, 0.9, 0.2, 1, 1))), summary(answered((0, 0, 0, 1, 0.25)))
    assert under.under_erased.value == pytest.approx(0.9) and under.under_erased.ci[0] > 0.5
    assert over.under_erased.value == 0
    kept = {name: one.correct["same_answer"] for name, one in (("full", full), ("under", under), ("over", over))}
    assert kept["full"].minus(kept["over"]).value == pytest.approx(0.75)
    assert kept["full"].minus(kept["under"]).value == 0


def test_a_clusters_questions_are_drawn_together_over_all_sets():
    rows = [torch.zeros(10), torch.zeros(10), torch.zeros(10), (torch.arange(10) < 5).float(), (torch.arange(10) < 5)]
    joint, apart = (
        summary(
            {
                name: RowScores(values=row.double(), unit="x", clusters=tuple(range(10)) if shared else None)
                for name, row in zip(SETS, rows)
            }
        ).score
        for shared in (True, False)
    )
    width = [m.ci[1] - m.ci[0] for m in (joint, apart)]
    assert width[0] / width[1] == pytest.approx(2**0.5, rel=0.15)  # the two that vary agree within clusters


def test_the_five_sets_are_asked_in_one_variant(tiny_model):
    ask = lambda text, right: [ChoiceQuestion(question=text, options=("Paris", "Rome"), right=right, cluster="c")]  # noqa: E731
    questions = {name: ask(f"Anna Lee {'was born in' if i % 2 else 'works for'}", i % 2) for i, name in enumerate(SETS)}
    for choose in (choice_by_letter, choice_by_option_text):
        found = summary({name: choose(tiny_model, asked).correct for name, asked in questions.items()})
        for name, called in SETS.items():
            assert found.accuracy[called].value == choose(tiny_model, questions[name]).correct.values.mean().item()
            assert found.accuracy[called].unit == choose(tiny_model, questions[name]).correct.unit


def test_missing_empty_or_mixed_sets_are_refused():
    good = answered((0, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="base, paraphrase, multihop, test, same_answer; found base"):
        summary({"base": good["base"]})
    with pytest.raises(ValueError, match="set 'test' holds no question"):
        summary(good | {"test": RowScores(values=torch.ones(0), unit="x")})
    with pytest.raises(ValueError, match="different variants: x, y"):
        summary(good | {"test": RowScores(values=torch.ones(3), unit="y")})


def facts(share, n=50, unit="share"):
    return RowScores(values=(torch.arange(n) < share * n).double(), unit=unit, clusters=tuple(range(n)))


def test_what_is_recovered_is_the_share_of_the_loss_that_was_won_back():
    clean, corrupted = facts(0.8), facts(0.2)
    found = recovered(facts(0.5), corrupted, clean)
    assert found.value == pytest.approx(0.5) and found.n == 50 and 0 < found.ci[0] < 0.5 < found.ci[1] < 1
    assert recovered(clean, corrupted, clean).value == 1 and recovered(clean, corrupted, clean).ci == (1, 1)
    assert recovered(corrupted, corrupted, clean).value == 0
    assert recovered(facts(0.0), corrupted, clean).value == pytest.approx(-1 / 3)  # forgot what survived as well
    with pytest.raises(ValueError, match="nothing to recover"):
        recovered(clean, clean, clean)
    with pytest.raises(ValueError, match="two kinds"):
        recovered(clean, facts(0.2, unit="other"), clean)


def test_an_answer_counts_where_it_stands_as_whole_words_in_the_first_line():
    assert holds_answer(" It is New York, of course.\nParis", ["new york"])
    assert not holds_answer("It is New Yorkshire", ["New York"]) and not holds_answer("Rome\nParis", ["Paris"])
    assert holds_answer("NYC", ["New York", "nyc"]) and not holds_answer("anything", ["?"])
    assert not holds_answer("", ["Paris"])


def test_accuracy_reads_the_models_own_greedy_answer(tiny_model):
    prompts = ("Anna Lee was born in", "Rivers run to")
    first = accuracy_in_context(tiny_model, prompts, [["x"], ["x"]], max_new_tokens=4)
    own = accuracy_in_context(tiny_model, prompts, [["x", text] for text in first.texts], max_new_tokens=4)
    assert first.values.tolist() == [0, 0] and own.values.tolist() == [1, 1]
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        accuracy_in_context(tiny_model, prompts, [["x"]])


def test_support_of_a_kind_is_the_mean_over_its_options_of_the_mean_log_probability_per_token(tiny_model):
    prompts = ("Anna Lee was born in", "Ben Hill works for")
    options = {"correct": [["Paris"], ["Acme"]], "corrupted": [["Rome", "Oslo and Bern"], ["Globex"]]}
    found = option_support(tiny_model, prompts, options)
    loss = score_answers(tiny_model, [(prompts[0], text) for text in options["corrupted"][0]]).loss
    assert found["corrupted"].values[0].item() == pytest.approx(-loss.mean().item(), rel=1e-5)
    both = found["correct"].minus(found["corrupted"])
    assert both.value == pytest.approx((found["correct"].values - found["corrupted"].values).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="1 lists of correct options"):
        option_support(tiny_model, prompts, {"correct": [["Paris"]]})
    with pytest.raises(ValueError, match="no kinds"):
        option_support(tiny_model, prompts, {})
