"""The gain of an operator in closed form, folds that cover every fact once, and the one place that makes a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.restoration import Relearn
from mech_unlearn.restoration.engine.case import make_result, tune_facts
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.lessons import by_fold, fold_lessons, fold_of, lesson_batches, lessons
from mech_unlearn.restoration.engine.levels import Levels, make_query_set
from mech_unlearn.restoration.engine.normalise import MIN_GAP
from tests.planted import FORGOTTEN, planted_case, planted_model
from tests.tiny import tiny_facts

POINTS, RETRAINED = 2, 3


def drawn(seed, *shape):
    return 6 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(before, after, never_before, never_after, full):
    """rho of one fact at one point, with plain numbers."""
    base = sum(never_before) / len(never_before)
    if full - base < MIN_GAP:
        return float("nan")
    injected = sum(max(a, base) - max(b, base) for b, a in zip(never_before, never_after)) / len(never_before)
    gain = max(after, base) - max(before, base)
    return min(1.0, max(0.0, (gain - injected) / (full - base)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_gain_is_the_difference_in_differences_fact_by_fact_and_point_by_point(seed):
    case = planted_case(sae=None)
    levels = Levels(make_query_set(case, "test"), drawn(seed, FORGOTTEN), drawn(seed + 1, RETRAINED, FORGOTTEN))
    retrained, before = drawn(seed + 2, RETRAINED, POINTS, FORGOTTEN), drawn(seed + 3, 1, FORGOTTEN)
    after = drawn(seed + 4, POINTS, 1, FORGOTTEN)
    gain = measure_gain(case, levels, retrained, planted_model("late"), lambda _: after, before)
    assert gain.keep == (0, 1, 2) and torch.equal(gain.ignorant, retrained)
    for point in range(POINTS):
        for i in range(FORGOTTEN):
            never, full = levels.never[:, i].tolist(), levels.full[i].item()
            want = by_hand(before[0, i].item(), after[point, 0, i].item(), never, retrained[:, point, i].tolist(), full)
            assert gain.rho[point, i].item() == pytest.approx(want, abs=1e-5, nan_ok=True)
            for k in range(RETRAINED):
                others = [other for other in range(RETRAINED) if other != k]
                theirs = [never[o] for o in others], [retrained[o, point, i].item() for o in others]
                want = by_hand(never[k], retrained[k, point, i].item(), *theirs, full)
                assert gain.null[k, point, i].item() == pytest.approx(want, abs=1e-5, nan_ok=True)
    last = gain.at(-1)
    assert torch.equal(last.rho.nan_to_num(), gain.rho[-1].nan_to_num()) and torch.equal(last.after, after[-1, 0])
    assert torch.equal(last.ignorant, retrained[:, -1]) and last.null.shape == (RETRAINED, FORGOTTEN)
    result = gain_result(case, last, test="t", name="m", cost_fe=2.0, curves=gain.curves(), axis=(1, 8))
    assert torch.equal(result.recoverability.nan_to_num(), last.rho.nan_to_num()) and result.rho is last.rho
    assert torch.equal(result.columns["before"], before[0]) and torch.equal(result.score_raw, after[-1, 0])
    assert result.curve_axes == dict.fromkeys(("rho", "margin", "margin_R"), (1.0, 8.0))


def test_a_retrained_model_is_compared_with_the_others_and_not_run_again():
    case = planted_case(sae=None)
    levels = Levels(make_query_set(case, "test"), torch.full((FORGOTTEN,), 8.0), torch.zeros(RETRAINED, FORGOTTEN))
    retrained = torch.tensor([4.0, 1.0, 3.0])[:, None].expand(-1, FORGOTTEN)
    before = torch.zeros(1, FORGOTTEN)
    gain = measure_gain(case, levels, retrained, case.retrained[0], lambda _: pytest.fail("run again"), before)
    assert gain.keep == (1, 2) and gain.ignorant[:, 0].tolist() == [1.0, 3.0]
    assert gain.rho.tolist() == [0.25] * FORGOTTEN == gain.null[0].tolist()


def test_without_retrained_models_the_gain_of_shams_is_subtracted():
    case = planted_case(sae=None, retrained=())
    levels = Levels(make_query_set(case, "test"), torch.full((FORGOTTEN,), 8.0), torch.zeros(1, FORGOTTEN))
    before, after = torch.zeros(2, FORGOTTEN), torch.tensor([6.0, 2.0])[:, None].expand(-1, FORGOTTEN)
    assert margins_after(case, lambda _: after, (POINTS, FORGOTTEN)).shape == (0, POINTS, FORGOTTEN)
    gain = measure_gain(case, levels, torch.zeros(0, FORGOTTEN), case.full, lambda _: after, before)
    assert gain.rho.tolist() == [0.5] * FORGOTTEN and gain.ignorant.tolist() == [[2.0] * FORGOTTEN]
    assert gain.null.shape == (0, FORGOTTEN) and gain.keep == ()


@settings(max_examples=30, deadline=None)
@given(folds=st.lists(st.integers(0, 2), min_size=FORGOTTEN, max_size=FORGOTTEN))
def test_each_fact_is_scored_with_its_own_fold_and_keeps_its_place(folds):
    query_set = make_query_set(planted_case(sae=None), "test")
    place = {fact.id: float(i) for i, fact in enumerate(query_set.facts)}
    seen = []

    def score(fold, part):
        seen.append(fold)
        assert {query.fact.id for query in part.queries} == {fact.id for fact in part.facts}
        return torch.tensor([[place[fact.id], 10.0 * fold] for fact in part.facts]).T[:, None]

    got = by_fold(query_set, folds, score)
    assert seen == sorted(set(folds))
    assert got[0, 0].tolist() == list(range(FORGOTTEN)) and got[1, 0].tolist() == [10.0 * fold for fold in folds]


def test_what_is_taught_before_a_fold_are_the_other_facts_or_its_own_with_true_or_wrong_answers():
    case = planted_case(sae=None, relearn=Relearn(folds=2))
    folds = fold_of(case.facts, case.relearn, case.seed)
    others, own = fold_lessons(case, folds), fold_lessons(case, folds, own=True)
    assert others == own[::-1] and sorted(others[0] + others[1]) == sorted(lessons(case, case.facts))
    for right, wrong in zip(others, fold_lessons(case, folds, sham=True), strict=True):
        assert [row[:start] for row, start in right] == [row[:start] for row, start in wrong]
        assert all(a[0] != b[0] for a, b in zip(right, wrong, strict=True))


def test_batches_show_every_lesson_once_before_any_twice():
    rows = [((i,), 0) for i in range(7)]
    told = list(lesson_batches(rows, 3, 7, torch.Generator().manual_seed(0)))
    flat = [row for batch in told for row in batch]
    assert [len(batch) for batch in told] == [3] * 7
    assert all(sorted(flat[i : i + 7]) == rows for i in (0, 7, 14)) and flat[:7] != flat[7:14]


def test_a_result_says_recoverability_by_rho_else_by_kappa_else_not_at_all():
    case = planted_case(sae=None, facts=tiny_facts(["Anna Lee"]))
    kappa, rho, none = torch.tensor([-0.5, 1.5]), torch.tensor([0.25, 0.75]), torch.zeros(0, 2)
    given = dict(score_raw=1.0, score_full=torch.tensor([2.0, 3.0]), score_retrained=none, null=none, cost_fe=1.0)
    only_kappa = make_result(case, "t", "m", kappa=kappa, **given)
    assert only_kappa.recoverability.tolist() == [0.0, 1.0] and torch.equal(only_kappa.kappa, kappa)
    assert make_result(case, "t", "m", kappa=kappa, rho=rho, **given).recoverability is rho
    assert make_result(case, "t", "m", kappa=kappa, recoverability=none.new_ones(2), **given).recoverability.sum() == 2
    blank = make_result(case, "t", "m", columns={"x": 0.5, "y": rho}, curves={"c": torch.zeros(3, 2)}, **given)
    assert blank.recoverability.isnan().all() and blank.score_raw.tolist() == [1.0, 1.0]
    assert blank.columns["x"].tolist() == [0.5, 0.5] and blank.curve_axes == {"c": (0.0, 1.0, 2.0)}
    assert (blank.test, blank.model_id, blank.facts, blank.grade) == ("t", "m", case.facts, "A")
    assert (blank.seed, blank.n_paraphrases) == (case.seed, case.prompts) and blank.flags == ()
    assert [record["score_F"] for record in blank.records()] == [2.0, 3.0]


def test_the_facts_that_choose_are_drawn_with_the_seed_in_their_order():
    names = [f"{a} {b}" for a in ("Anna", "Ben", "Cara") for b in ("Lee", "Hill", "Moss", "Park")]
    cases = [planted_case(sae=None, facts=tiny_facts(names), seed=seed) for seed in (0, 0, 1)]
    few = [tune_facts(case, 10) for case in cases]
    assert few[0] == few[1] != few[2] and all(list(x) == sorted(set(x)) and len(x) == 10 for x in few)
    assert tune_facts(cases[0]) == tuple(range(len(cases[0].facts)))
