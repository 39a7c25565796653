"""Verdicts with an error rate: p-values against closed forms, their validity by simulation, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from mech_unlearn.verdict.calibration import ALPHA, TRUTHS, conformal_p, load, save
from mech_unlearn.verdict.features import FEATURES, RECOVERY, Pool, matrix, summarised
from mech_unlearn.verdict.fitting import FOLDS, SEES, _against, fit, require_enough
from tests.simulated import parts, simulated


@pytest.fixture(scope="module")
def pool():
    return simulated()


@pytest.fixture(scope="module")
def fitted(pool):
    return fit(pool, *parts(pool)[:2])


def test_features_cut_health_to_its_bounds_and_add_the_strongest_that_spoke_and_its_mean_over_the_group():
    spread = dict.fromkeys(RECOVERY, 0.1) | {"sae": 0.0}
    rows = [
        {"output": 0.3, "uds_recovered": 0.4, "sae": 0.3, "probe": None, "neighbor_loss": 0.05, "general_kl": 9.0},
        {"output": 0.3, "neighbor_loss": None, "general_kl": 1.0},
    ]
    rows += [{"uds_recovered": 0.2}, {"probe": 0.9}]
    x = matrix(rows, ["a", "a", "a", "b"], spread)
    named = [dict(zip(FEATURES, row)) for row in x]
    assert named[0]["strongest"] == pytest.approx(4.0)  # that of sae, over the least spread, is 3
    assert named[0]["neighbor_loss"] == 0.2 and named[0]["general_kl"] == 5.0
    assert named[2]["strongest"] == pytest.approx(2.0) and named[3]["group"] == pytest.approx(9.0)
    assert all(row["group"] == pytest.approx(3.0) for row in named[:3])  # of the two that spoke
    assert np.isnan(named[0]["probe"]) and np.isnan(named[1]["strongest"]) and np.isnan(named[1]["neighbor_loss"])


def test_a_p_value_counts_each_model_by_the_share_of_its_facts_at_least_as_unusual():
    groups = [[[0.1, 0.9]], [[0.5, 0.5, 0.5]], [[0.0]]]
    got = conformal_p(np.array([0.5, 0.95, 0.0]), groups)
    np.testing.assert_allclose(got, [(1 + 0.5 + 1 + 0) / 4, 1 / 4, (1 + 3) / 4])


def test_several_models_of_a_group_count_as_one_group_by_their_mean():
    two = [[[0.9], [0.1, 0.1]], [[0.9, 0.1]]]
    np.testing.assert_allclose(conformal_p(np.array([0.5]), two), [(1 + 0.5 + 0.5) / 3])
    many = [[[0.9]] * 50, [[0.9]] * 50]
    assert conformal_p(np.array([9.0]), many)[0] == pytest.approx(1 / 3)


def test_with_few_models_no_p_value_is_small_and_with_none_it_is_one():
    assert conformal_p(np.array([9.0]), [[[0.0]]] * 19)[0] == pytest.approx(1 / 20)
    assert conformal_p(np.array([9.0]), []) == [1.0]


def test_a_true_cause_is_ruled_out_no_more_often_than_promised():
    """Models with their own level, facts around it: exchangeable models, dependent facts."""
    rng = np.random.default_rng(0)
    wrong = []
    for _ in range(400):
        levels = rng.normal(size=41)
        scores = levels[:, None] + rng.normal(size=(41, 5))
        wrong.append((conformal_p(scores[0], scores[1:, None].tolist()) <= 0.1).mean())
    assert 0.01 < np.mean(wrong) <= 0.1 + 2 * np.std(wrong) / 20


def test_models_of_one_group_that_fall_together_are_no_more_evidence_than_one():
    """Counted as models of their own they would rule out the true cause far too often; counted by group they do not."""
    rng = np.random.default_rng(1)
    by_group, by_model = [], []
    for _ in range(400):
        levels = rng.normal(size=(13, 1)) + 0.05 * rng.normal(size=(13, 10))
        new, groups = levels[0, 0], [[[v] for v in row] for row in levels[1:]]
        by_group.append(conformal_p(np.array([new]), groups)[0] <= 0.06)
        by_model.append(conformal_p(np.array([new]), [[m] for g in groups for m in g])[0] <= 0.06)
    assert np.mean(by_group) <= 0.06 < np.mean(by_model) - 0.01


def test_facts_of_new_groups_are_judged_by_their_truth(pool, fitted):
    new = pool.where(np.isin(np.array(pool.group), parts(pool)[2]))
    labels = np.array(fitted.judge(new.x).labels)
    truth = np.array(new.truth)
    for name in TRUTHS:
        here = labels[truth == name]
        assert (here == name).mean() > 0.7
        assert ((here != name) & (here != "undetermined")).mean() < 0.05


def test_the_p_value_of_suppression_holds_for_every_family(pool, fitted):
    x = pool.x[:200]
    p = 1 - fitted.probabilities(x)["suppressed"]
    each = [conformal_p(p, [[v] for v in groups.values()]) for groups in fitted.scores["suppressed"].values()]
    assert len(each) == 6
    np.testing.assert_array_equal(fitted.p_values(x)["suppressed"], np.max(each, 0))


def test_with_permuted_truths_nothing_is_learnt(pool):
    rng = np.random.default_rng(1)
    models = sorted(set(zip(pool.cluster, pool.kind)))
    kinds = [kind for _, kind in models]
    rng.shuffle(kinds)
    renamed = dict(zip([name for name, _ in models], kinds))
    shuffled = Pool(
        pool.x, tuple(renamed[c] for c in pool.cluster), pool.family, pool.cluster, pool.group, pool.base, pool.spread
    )
    made = fit(shuffled, *parts(pool)[:2])
    new = shuffled.where(np.isin(np.array(pool.group), parts(pool)[2]))
    p = made.probabilities(new.x)
    from sklearn.metrics import roc_auc_score

    truth = np.array(new.truth)
    both = np.isin(truth, ["suppressed", "deleted"])
    score = p["suppressed"][both] / (p["suppressed"] + p["deleted"])[both]
    assert abs(roc_auc_score(truth[both] == "suppressed", score) - 0.5) < 0.1


def test_a_fact_unlike_the_whole_pool_is_told_apart_from_its_own(pool, fitted):
    new = pool.where(np.isin(np.array(pool.group), parts(pool)[2]))
    assert fitted.unlike(new.x).mean() < 0.05
    assert fitted.unlike(new.x + 10).all()


def test_a_missing_feature_is_no_error_and_a_feature_nobody_measured_says_nothing(pool):
    x = pool.x.copy()
    x[::7, FEATURES.index("uds_recovered")] = np.nan
    x[:, FEATURES.index("probe")] = np.nan
    holes = Pool(x, pool.kind, pool.family, pool.cluster, pool.group, pool.base, pool.spread)
    made = fit(holes, *parts(pool)[:2])
    p = made.p_values(x)
    assert all(np.isfinite(values).all() and (values > 0).all() and (values <= 1).all() for values in p.values())


def test_a_recoverability_that_speaks_for_deletion_is_left_out(pool):
    x = pool.x.copy()
    column = FEATURES.index("logit_lens")
    x[:, column] = np.where(np.array(pool.truth) == "deleted", 3.0, 0.0)
    odd = Pool(x, pool.kind, pool.family, pool.cluster, pool.group, pool.base, pool.spread)
    made = fit(odd, *parts(pool)[:2])
    assert "logit_lens" in made.left_out
    assert not made.weights[:, column].any()
    strongest = [FEATURES.index(name) for name in ("strongest", "group")]
    without = summarised(pool.x, pool.cluster, pool.spread, made.left_out)
    assert (made.read(odd)[:, strongest] == without[:, strongest]).all()  # it takes no part in the summaries either


def test_a_recoverability_is_asked_only_of_the_suppressors_that_it_can_see():
    from types import SimpleNamespace

    kinds = ["deleted", "suppressed/early", "suppressed/late", "suppressed/path"]
    for name, sides in SEES.items():
        for side in ("early", "late", "path"):
            coef = np.zeros((4, len(FEATURES)))
            coef[0] = 1e-9  # all the others are against, by a hair
            coef[kinds.index(f"suppressed/{side}"), FEATURES.index(name)] = 1.0
            against = _against(SimpleNamespace(classes_=kinds, coef_=coef), ())
            assert (name in against) == (side not in sides)


def test_the_penalty_is_chosen_also_where_a_fold_of_groups_lacks_a_truth(pool):
    thin = pool.where(~(np.isin(np.array(pool.truth), ["intact", "collapsed"]) & (np.array(pool.group) > "3")))
    made = fit(thin, *parts(pool)[:2])
    assert made.provenance["C"] > 0.01  # well separated kinds: the strongest penalty is not the best


def test_a_row_on_which_no_test_of_a_direction_spoke_is_never_called_deleted(pool, fitted):
    new = pool.where((np.array(pool.truth) == "deleted") & np.isin(np.array(pool.group), parts(pool)[2]))
    assert "deleted" in fitted.judge(new.x).labels
    for pair in (("uds_recovered", "uds_subject_recovered"), ("writeback", "sae")):
        x = new.x.copy()
        x[:, [FEATURES.index(name) for name in pair]] = np.nan
        assert "deleted" not in fitted.judge(x).labels and fitted.judge(x).blind.all()


def test_a_calibration_round_trips_and_refuses_other_features(fitted, pool, tmp_path):
    save(fitted, tmp_path / "c.json")
    back = load(tmp_path / "c.json")
    for name, values in fitted.p_values(pool.x[:50]).items():
        np.testing.assert_allclose(back.p_values(pool.x[:50])[name], values)
    assert (back.unlike(pool.x) == fitted.unlike(pool.x)).all()
    (tmp_path / "d.json").write_text('{"format": "mech_unlearn.calibration/1", "features": ["output"]}')
    with pytest.raises(ValueError, match="no calibration of the features"):
        load(tmp_path / "d.json")


def test_a_group_on_both_sides_and_a_truth_that_is_not_there_are_refused(pool):
    with pytest.raises(ValueError, match="both in the fit and in the calibration"):
        fit(pool, ["0", "1"], ["1", "2"])
    known = pool.where(np.array(pool.truth) != "collapsed")
    with pytest.raises(ValueError, match="whose truth is 'collapsed'"):
        fit(known, *parts(pool)[:2])


def test_the_least_p_value_is_what_the_smallest_family_allows_and_a_description_says_so(fitted):
    counts = [len(groups) for groups in fitted.scores["suppressed"].values()]
    least = fitted.least_p()
    assert least["suppressed"] == 1 / (min(counts) + 1)
    assert least["deleted"] == 1 / (30 + 1)  # groups, not models: there are two models a group
    few = {family: dict(list(groups.items())[:3]) for family, groups in fitted.scores["suppressed"].items()}
    poor = replace(fitted, scores={**fitted.scores, "suppressed": few})
    assert "ever rule out suppressed (least p-value 0.25)" in poor.describe()
    assert "ever rule out" not in fitted.describe()
    rates = {"value": 0.01, "ci": [0.0, 0.02]}
    told = replace(
        fitted, provenance={"retrained_models": 8, "false_deleted": rates, "false_deleted_worst_family": rates}
    )
    assert "descend from 8 retrained ones" in told.describe() and "0.010 [0.000, 0.020]" in told.describe()


@pytest.mark.parametrize("groups", range(4, 60))
def test_the_least_number_of_groups_is_the_first_whose_calibration_can_rule_out_suppression(groups):
    calibrating = groups - len(range(groups)[::FOLDS]) - len(range(1, groups)[::FOLDS])  # as in `rotate`
    if 1 / (calibrating + 1) > ALPHA:
        with pytest.raises(ValueError, match=f"facts about {groups} subjects"):
            require_enough(groups)
    else:
        require_enough(groups)
