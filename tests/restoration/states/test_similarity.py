"""Similarity: closed forms of CKA, its invariances, the debiased estimator, neighbours, and planted truth."""

import math
from dataclasses import replace

import pytest
import torch

from mech_unlearn.restoration.states import similarity
from tests.planted import planted_case, planted_model
from tests.tiny import tiny_facts


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_cka_is_one_with_itself_and_blind_to_rotation_scale_and_shift_but_not_to_stretching():
    x = rows(60, 8, 0)
    turn = torch.linalg.qr(rows(8, 8, 1)).Q
    for f in (similarity.cka, similarity.debiased_cka):
        assert f(x, x) == pytest.approx(1.0)
        assert f(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-5)
        assert f(x, x * torch.tensor([10.0, *[1.0] * 7])) < 0.95


def test_cka_is_its_formula_over_features():
    x, y = rows(50, 6, 0), rows(50, 9, 1)
    a, b = x - x.mean(0), y - y.mean(0)
    want = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert similarity.cka(x, y) == pytest.approx(want.item(), rel=1e-4)


def test_few_rows_inflate_plain_cka_and_not_the_debiased_one():
    plain, fair = [], []
    for seed in range(20):
        x, y = rows(30, 100, 2 * seed), rows(30, 100, 2 * seed + 1)
        plain.append(similarity.cka(x, y))
        fair.append(similarity.debiased_cka(x, y))
    assert sum(plain) / 20 > 0.6 and abs(sum(fair) / 20) < 0.05
    assert similarity.likeness(rows(30, 100, 0), rows(30, 100, 1)) == fair[0]
    assert similarity.likeness(rows(600, 100, 0), rows(600, 100, 1)) == similarity.cka(
        rows(600, 100, 0), rows(600, 100, 1)
    )
    assert similarity.debiased_cka(rows(3, 5, 0), rows(3, 5, 1)) != similarity.debiased_cka(
        rows(3, 5, 0), rows(3, 5, 1)
    )


def test_the_debiased_estimator_is_that_of_hsic_written_with_loops():
    n, x, y = 7, rows(7, 3, 0).double(), rows(7, 4, 1).double()

    def hsic(k, m):
        k, m = k.clone(), m.clone()
        for i in range(n):
            k[i, i] = m[i, i] = 0
        total = sum(k[i, j] * m[j, i] for i in range(n) for j in range(n))
        both = sum(k[i, j] for i in range(n) for j in range(n)) * sum(m[i, j] for i in range(n) for j in range(n))
        cross = sum(k[i, j] * m[j, q] for i in range(n) for j in range(n) for q in range(n))
        return (total + both / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))

    a, b = x @ x.T, y @ y.T
    want = hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5
    assert similarity.debiased_cka(x.float(), y.float()) == pytest.approx(want.item(), rel=1e-4)


def test_neighbours_agree_with_themselves_and_by_chance_with_others():
    x, y = rows(60, 8, 0), rows(60, 8, 1)
    assert (similarity.neighbour_overlap(x, x, 10) == 1).all()
    chance = 10 / 59
    assert abs(similarity.neighbour_overlap(x, y, 10).mean().item() - chance) < 0.06
    assert (similarity.neighbour_overlap(rows(4, 8, 0), rows(4, 8, 0), 10) == 1).all()


def test_erasure_is_zero_at_full_and_one_at_retrained_and_undefined_where_they_agree():
    base = torch.tensor([0.2, 0.8])
    assert similarity.erasure(base, base) == 0
    assert similarity.erasure(torch.ones(2), base) == 1
    assert similarity.erasure(torch.tensor([0.6, 0.8]), base) == pytest.approx(0.5 * 0.8 / 1.0)
    assert math.isnan(similarity.erasure(torch.ones(2), torch.ones(2)))


def test_drift_counts_standard_deviations_along_the_first_components():
    x = rows(500, 6, 0) * torch.tensor([5.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    moved = x + torch.tensor([10.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    shift, distance = similarity.drift(x, moved)
    assert shift == pytest.approx(2.0, rel=0.1) and distance == pytest.approx(shift, rel=0.05)
    assert similarity.drift(x, x) == (pytest.approx(0.0), pytest.approx(0.0))
    for seed in range(8):  # the sign is the coordinate's, not the solver's
        y = rows(60, 6, seed) * torch.tensor([1.0, 4.0, 1.0, 1.0, 1.0, 1.0])
        up = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
        assert similarity.drift(y, y + up)[0] > 0.5 and similarity.drift(y, y - up)[0] < -0.5


def test_a_subject_counts_once_however_many_facts_tell_of_it():
    """Two facts each, whose prompts put different words before the name."""
    told = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Anna Park"])
    people = tuple(replace(fact, prompt=fact.paraphrases[0], paraphrases=(fact.prompt,)) for fact in told)
    ready = similarity.prepare(planted_case(sae=None, facts=people, prompts=2))
    assert len(ready.rows.names) == 4 and ready.rows.last.tolist() == [
        i for i in ready.rows.names.tolist() for _ in "ab"
    ]
    assert (
        len(ready.rows.ids) == len(set(ready.rows.ids)) == 7
    )  # the first word of Anna Lee and of Anna Park is one row
    with pytest.raises(ValueError, match="three subjects"):
        similarity.prepare(planted_case(sae=None, facts=people[:4]))


def test_erasure_of_neighbourhoods_is_zero_at_full_one_at_retrained_and_told_per_subject():
    full, never = (torch.stack([rows(40, 8, seed + layer) for layer in (0, 1)]) for seed in (0, 10))
    names = torch.arange(40)
    table = similarity.SubjectTokens((), torch.cat([names, names[:5]]), names)
    ready = similarity.SimilarityLevels(table, full, (never,), torch.zeros(1, 2), (), 5)
    assert (similarity._knn(ready, full, [never]) == 0).all()
    assert (similarity._knn(ready, never, [never]) == 1).all()
    half = similarity._knn(ready, torch.stack([never[0], full[1]]), [never])
    assert 0.3 < half.mean() < 0.7 and len(half) == 45 and torch.equal(half[:5], half[40:])


def test_an_audit_compares_nothing_but_the_audited_model(monkeypatch):
    case, seen, plain = planted_case(sae=None), [], similarity._curve
    ready = similarity.prepare(case)
    monkeypatch.setattr(similarity, "_curve", lambda x, y: seen.append(0) or plain(x, y))
    late = similarity.audit(case, ready, planted_model("late"), "late")
    assert len(seen) == 1 + len(case.retrained)
    assert late.score_retrained[:, 0].tolist() == pytest.approx(list(ready.heldout))
    full = similarity.audit(case, ready, case.full, "full")
    assert (full.columns["knn_erasure"].nan_to_num() == 0).all()


def test_full_is_unlike_retrained_and_a_retrained_model_is_like_the_others_and_nobody_is_judged_by_it():
    from mech_unlearn.verdict.verdict import BRINGING_BACK

    case = planted_case(sae=None)
    ready = similarity.prepare(case)
    full = similarity.audit(case, ready, case.full, "full")
    assert (full.score_raw == 0).all() and (full.recoverability == 1).all()
    assert (full.curves["drift_distance"] == 0).all() and "similarity" not in BRINGING_BACK
    late = similarity.audit(case, ready, planted_model("late"), "late")
    assert torch.equal(late.curves["cka_UR"][:3], late.curves["cka_FR"][:3])  # the block is in the last layer
    retrained = similarity.audit(case, ready, case.retrained[0], "R")
    assert len(retrained.score_retrained) == 2 and set(retrained.flags) == {("description_only",)}


def test_without_retrained_models_it_only_describes_drift():
    case = planted_case(sae=None, retrained=())
    result = similarity.audit(case, similarity.prepare(case), planted_model("late"), "late")
    assert result.recoverability.isnan().all() and set(result.curves) == {"drift_shift", "drift_distance", "cka_UF"}
    assert (result.curves["drift_distance"][:3] == 0).all() and (result.curves["drift_distance"][3] > 0).all()


def test_too_few_subjects_are_refused():
    case = planted_case(sae=None)
    with pytest.raises(ValueError, match="three subjects"):
        similarity.prepare(planted_case(sae=None, facts=case.facts[:2]))
