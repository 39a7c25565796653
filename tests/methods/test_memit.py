"""Memit: the normal equations, the spread over layers, planted truth; and names redirected one after another."""

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods import Memit, Rocr
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.questions import Optimize
from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from tests.planted import fresh_planted_model, planted_sets
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FEW = Optimize(steps=4, target="entropy", clamp=0.75)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("earlier", (0, 3))
@pytest.mark.parametrize("n", (1, 7, 60))
def test_the_write_solves_the_normal_equations(n, earlier):
    k, r, x = draw(48, n), draw(20, n, seed=1), draw(48, 300, seed=2)
    c, lam = x @ x.T / 300, 15.0
    t = draw(48, earlier, seed=3) if earlier else None
    left, right = keys.closed_form(k, r, None, lam, t, c)
    joint = k @ k.T + (t @ t.T if earlier else 0)
    dense = torch.linalg.inv(lam * c + joint) @ k @ r.T
    assert (left @ right - dense).norm() <= 1e-8 * dense.norm()
    with pytest.raises(ValueError, match="not both"):
        keys.closed_form(k, r, draw(48, 3), lam, None, c)


def test_average_keys_move_less_than_without_their_statistics():
    x = draw(48, 400, seed=2) * torch.logspace(0, -2, 48, dtype=torch.float64)[:, None]
    c, k, r = x @ x.T / 400, draw(48, 3), draw(20, 3, seed=1)
    moved = {}
    for name, moment in (("C", c), ("none", None)):
        left, right = keys.closed_form(k, r, None, 1e-9, None, moment)
        assert (k.T @ left @ right - r.T).norm() < 1e-4 * r.norm()
        moved[name] = (x.T @ left @ right).norm()
    assert moved["C"] < 0.2 * moved["none"]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_come_nearer_to_their_targets_on_every_architecture(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    before = model.hash()
    edit = Memit(layers=(0, 1), optimize=FEW).fit(model, *tiny_sets)
    report = edit.recipe["report"]
    assert model.hash() == before and set(edit.deltas) == {model.w_out(0)[0], model.w_out(1)[0]}
    assert report["distance_after"] < 0.9 * report["distance_before"]
    for delta in edit.deltas.values():
        assert torch.linalg.matrix_rank(delta.dense()) <= 2


def test_one_name_in_one_context_reaches_its_target_whatever_the_number_of_layers(tiny_model, tiny_sets):
    facts = tuple(f for f in tiny_facts(["Anna Lee"], ("born",)))
    facts = tuple(type(f)(**{**vars(f), "paraphrases": ()}) for f in facts)
    optimize = Optimize(steps=3, target="entropy", n_prefixes=0, clamp=0.1)
    for layers in ((1,), (0, 1), (0, 1, 2)):
        edit = Memit(layers=layers, optimize=optimize, ridge=0.0).fit(tiny_model, ForgetSet(facts=facts), tiny_sets[1])
        report = edit.recipe["report"]
        assert len(edit.deltas) == len(layers)
        assert report["distance_after"] < 0.02 * report["distance_before"]


@pytest.mark.slow
def test_lambda_can_be_that_of_the_paper_and_a_large_one_writes_little(tiny_model, tiny_sets):
    gains = {}
    for weight in (None, 0.05, 1.0, 15_000.0):
        lam = dict(ridge=weight) if weight == 0.05 else dict(cov_weight=weight)
        report = Memit(layers=(1,), optimize=FEW, **lam).fit(tiny_model, *tiny_sets).recipe["report"]
        gains[weight] = report["gain"][0], sum(report["delta_norm"].values())
    assert gains[0.05][0] == pytest.approx(1 / 1.05, abs=0.02)
    assert gains[None][0] == pytest.approx(1 / 1.9, abs=0.05)
    assert gains[15_000.0][0] < gains[1.0][0] and gains[15_000.0][1] < gains[1.0][1]


@pytest.mark.thorough
@pytest.mark.parametrize("project", ("none", "null_space"))
def test_planted_facts_go_and_others_stay(project):
    model, (forget, retain) = fresh_planted_model(), planted_sets()
    settings = dict(target="refusal", refusal="Bern", kl_weight=0.0)  # the answer is read at the name itself
    optimize = Optimize(**settings, steps=40, clamp=2.0)
    method = Memit(layers=(2,), optimize=optimize, project=project, energy=0.01, ridge=0.05)
    assert recall(model, forget.facts).value == recall(model, retain.neighbors).value == 1
    with method.fit(model, forget, retain).on(model):
        assert recall(model, forget.facts).value == 0
        assert recall(model, forget.facts, "heldout").value == 0
        assert recall(model, retain.neighbors).value == 1
    assert recall(model, forget.facts).value == 1


def test_impossible_settings_are_refused(tiny_model, tiny_sets):
    for settings, message in (
        (dict(layers=(2,), z_layer=1), "cannot reach"),
        (dict(ridge=-1.0), "ridge=-1.0"),
        (dict(cov_weight=-1.0), "cov_weight=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Memit(**settings).fit(tiny_model, *tiny_sets)


def drift_of_the_first(model, sets, earlier):
    """How far the first name moves when a second one is redirected on the edited model, as a share of the second's."""
    forget, retain = sets
    one, two = (ForgetSet(facts=tiny_facts([name])) for name in ("Anna Lee", "Ben Hill"))
    site, contexts = Site(1, "resid_post"), keys.contexts_of(forget.facts)
    settings = dict(layers=(0, 1), protect=(), ridge=0.01)
    with Rocr(**settings).fit(model, one, retain).on(model):
        first = keys.name_states(model, ["Anna Lee"], contexts, site)
        second = keys.name_states(model, ["Ben Hill"], contexts, site)
        edit = Rocr(**settings, earlier=("Anna Lee",) if earlier else ()).fit(model, two, retain)
        with edit.on(model):
            moved = (keys.name_states(model, ["Anna Lee"], contexts, site) - first).norm()
            redirected = (keys.name_states(model, ["Ben Hill"], contexts, site) - second).norm()
    return (moved / redirected).item()


def test_an_earlier_name_drifts_less_when_its_keys_are_kept(tiny_model, tiny_sets):
    assert drift_of_the_first(tiny_model, tiny_sets, True) < 0.6 * drift_of_the_first(tiny_model, tiny_sets, False)
    with pytest.raises(ValueError, match="to be forgotten now"):
        Rocr(earlier=("Anna Lee",)).fit(tiny_model, *tiny_sets)


def test_the_neutral_anchor_is_the_mean_of_retained_names(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    site, kept = Site(1, "resid_post"), [entity.name for entity in retain.entities]
    target = keys.name_states(tiny_model, kept, ["{} was"], site).mean(0)
    far = (keys.name_states(tiny_model, ["Anna Lee", "Ben Hill"], ["{} was"], site) - target).norm()
    edit = Rocr(anchor="neutral", layers=(1,), protect=(), ridge=0.01, contexts=("{} was",))
    with edit.fit(tiny_model, forget, retain).on(tiny_model):
        near = (keys.name_states(tiny_model, ["Anna Lee", "Ben Hill"], ["{} was"], site) - target).norm()
    assert near < 0.1 * far
    with pytest.raises(ValueError, match="no facts about other entities"):
        edit.fit(tiny_model, forget, RetainSet(texts=retain.texts, unknown=retain.unknown))


def test_rejection_moves_a_name_by_the_vector_that_was_found(tiny_model, tiny_sets):
    edit = Rocr(anchor="reject", optimize=FEW, layers=(0, 1), protect=(), ridge=0.01).fit(tiny_model, *tiny_sets)
    report = edit.recipe["report"]
    assert report["loss_after"] < report["loss_before"] and report["n_backward"] == 4
    assert report["distance_after"] < 0.7 * report["distance_before"]
    assert isinstance(edit, Edit)
