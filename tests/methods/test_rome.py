"""Rome and RRome: the update of the equations, the value reached, the explosion that one of them has, planted truth."""

import dataclasses

import pytest
import torch

from mech_unlearn.core import ForgetSet, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.methods import Rome, RRome
from mech_unlearn.methods.rome import direction, means, rank_one
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.key_statistics import damped
from mech_unlearn.methods.writing.protect import KEY_SOURCES, protected_bases, protected_moments
from mech_unlearn.methods.writing.questions import Optimize, by_name, prefixes
from mech_unlearn.methods.writing.value_optimization import module_path, optimized
from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from tests.planted import fresh_planted_model, planted_sets
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

FEW = Optimize(steps=4, target="entropy")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(model, sets, layer, settings):
    """Keys, outputs and values as the method has them; the equations are the test's own."""
    forget, retain = sets
    asked, path = by_name(forget), module_path(model, layer, "mlp")
    before = prefixes(model, forget, settings.n_prefixes, 0)
    averaged, bare = means(model, asked, before, layer, path)
    found = optimized(model, asked, bare[1], forget, retain, path, settings, before, 0)
    return averaged, bare, found.deltas


def test_the_update_is_that_of_the_equations():
    w, c, k, other, v = draw(20, 48), draw(60, 48), draw(48), draw(48, seed=5), draw(20, seed=2)
    c = c.T @ c / 60
    u = torch.linalg.inv(c) @ k
    u = u / u.norm()
    torch.testing.assert_close(direction(k, c, None), u, rtol=1e-8, atol=1e-10)
    expected = torch.outer(v - w @ other, u) / (u @ other)
    got = rank_one(direction(k, c, None), other, v - w @ other)
    assert (got.T - expected).norm() <= 1e-8 * expected.norm()
    torch.testing.assert_close((w + got.T) @ other, v)
    p = torch.linalg.qr(draw(48, 30, seed=3)).Q
    torch.testing.assert_close(direction(k, None, p), p @ p.T @ k / (p @ p.T @ k).norm())


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "same"), ((Rome, False), (RRome, True)))
@pytest.mark.parametrize("project", ("none", "null_space"))
def test_several_names_are_written_one_after_another(tiny_model, tiny_sets, method, same, project):
    layer, w = 1, tiny_model.held[tiny_model.w_out(1)[0]].detach().double()
    averaged, bare, deltas = inputs_of(tiny_model, tiny_sets, layer, FEW)
    contexts, retain = keys.contexts_of(tiny_sets[0].facts), tiny_sets[1]
    if project == "none":
        inverse = torch.linalg.inv(
            damped(protected_moments(tiny_model, retain, contexts, (layer,), KEY_SOURCES)[layer], 1e-4)
        )
    else:
        basis = protected_bases(tiny_model, retain, contexts, (layer,), KEY_SOURCES, 0.1)[layer]
        inverse = basis @ basis.T
    now = w.clone()
    for i in range(2):
        u = inverse @ averaged[0][i]
        key = (averaged if same else bare)[0][i]
        value = w @ bare[0][i] + deltas[i]
        now = now + torch.outer(value - now @ key, u) / (u @ key)
    edit = method(layer=layer, optimize=FEW, project=project).fit(tiny_model, *tiny_sets)
    (delta,) = edit.deltas.values()
    assert (delta.dense() - (now - w)).norm() <= 1e-4 * (now - w).norm()
    assert torch.linalg.matrix_rank(delta.dense()) == 2
    if not same:  # the last name's value is reached, the first one's is not: sequential writes undo each other
        torch.testing.assert_close(now @ bare[0][1], w @ bare[0][1] + deltas[1])
        assert (now @ bare[0][0] - w @ bare[0][0] - deltas[0]).norm() > 1e-3 * deltas[0].norm()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_value_is_reached_also_behind_a_norm_and_with_a_bias(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    sets = (ForgetSet(facts=tiny_sets[0].facts[:2]), tiny_sets[1])
    _, bare, deltas = inputs_of(model, sets, 1, FEW)
    before = model.hash()
    edit = Rome(layer=1, optimize=FEW).fit(model, *sets)
    assert model.hash() == before and set(edit.deltas) == {model.w_out(1)[0]}
    with edit.on(model):
        reached = means(model, by_name(sets[0]), (), 1, module_path(model, 1, "mlp"))[1][1]
    missing = (reached - bare[1] - deltas).norm() / deltas.norm()
    assert missing < (1e-4 if dtype == torch.float32 else 0.1)


def test_the_bare_key_in_the_denominator_explodes_and_the_averaged_one_does_not():
    c, k, v = torch.eye(48, dtype=torch.float64) + 0.1, draw(48), draw(20, seed=2)
    u = direction(k, c, None)
    bare = draw(48, seed=4)
    bare = bare - (bare @ u) * u + 1e-6 * u  # k_b . u is nearly 0
    assert rank_one(u, bare, v).norm() > 1e4 * v.norm()
    assert rank_one(u, k, v).norm() < 2 * v.norm() / k.norm() * (k.norm() / (k @ u))


@pytest.mark.thorough
@pytest.mark.parametrize("method", (Rome, RRome))
@pytest.mark.parametrize("batch_size", (1, 8))
def test_planted_facts_go_and_others_stay(method, batch_size):
    model, (forget, retain) = fresh_planted_model(), planted_sets()
    settings = dict(target="refusal", refusal="Bern", kl_weight=0.0)  # the answer is read at the name itself
    optimize = Optimize(**settings, steps=40, batch_size=batch_size)
    assert recall(model, forget.facts).value == recall(model, retain.neighbors).value == 1
    with method(layer=2, optimize=optimize).fit(model, forget, retain).on(model):
        assert recall(model, forget.facts).value == 0
        assert recall(model, forget.facts, "heldout").value == 0
        assert recall(model, retain.neighbors).value == 1
    assert recall(model, forget.facts).value == 1


def test_a_layer_whose_mlp_gives_nothing_is_refused():
    model, (forget, retain) = fresh_planted_model(), planted_sets()
    with pytest.raises(ValueError, match="is zero at a name's last token"):
        Rome(layer=1, optimize=FEW).fit(model, forget, retain)


def test_protected_names_move_less_in_the_null_space(tiny_model, tiny_sets):
    kept = keys.mention_rows(
        tiny_model.tokenizer, keys.names_of(tiny_sets[1].entities), keys.contexts_of(tiny_sets[0].facts)
    )
    site = Site(1, "resid_post")
    clean = keys.end_states(tiny_model, kept, [site])[site]
    own = keys.mention_rows(tiny_model.tokenizer, ["Anna Lee"], ["{} was born in"])
    mine = keys.end_states(tiny_model, own, [site])[site]
    spill = {}
    for project in ("none", "null_space"):
        edit = Rome(layer=1, optimize=FEW, project=project, energy=0.001, protect=("entities", "prompts"), damping=10.0)
        with edit.fit(tiny_model, *tiny_sets).on(tiny_model):
            moved = (keys.end_states(tiny_model, kept, [site])[site] - clean).norm(dim=1).mean()
            spill[project] = moved / (keys.end_states(tiny_model, own, [site])[site] - mine).norm()
    assert spill["null_space"] < 0.5 * spill["none"]


def test_no_heldout_phrasing_reaches_the_method(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    other = ForgetSet(facts=tuple(dataclasses.replace(fact, heldout=("The sea of {} is",)) for fact in forget.facts))
    one, two = (Rome(optimize=FEW).fit(tiny_model, chosen, retain) for chosen in (forget, other))
    assert all(torch.equal(one.deltas[n].dense(), two.deltas[n].dense()) for n in one.deltas)


def test_statistics_on_disk_give_the_same_edit(tiny_model, tiny_sets, tmp_path):
    plain = Rome(optimize=FEW).fit(tiny_model, *tiny_sets)
    kept = Rome(optimize=FEW, cache_dir=str(tmp_path))
    first, again = (kept.fit(tiny_model, *tiny_sets) for _ in range(2))
    assert again.recipe["report"]["n_forward"] < first.recipe["report"]["n_forward"]
    for name, delta in plain.deltas.items():
        assert torch.equal(delta.dense(), first.deltas[name].dense())
        assert torch.equal(delta.dense(), again.deltas[name].dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        (dict(layer=9), "layers are 0..3"),
        (dict(damping=-1.0), "damping=-1.0"),
        (dict(project="null_space", protect=()), "protects nothing"),
        (dict(protect=()), "leaves no keys"),
    ),
)
def test_impossible_settings_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        Rome(**settings).fit(tiny_model, *tiny_sets)


def test_an_edit_of_activations_in_force_is_refused(tiny_model, tiny_sets):
    shift = Edit(name="s", base="", interventions=(Shift(Site(0, "resid_post"), ((5,),), torch.ones(1, 32)),))
    with pytest.raises(ValueError, match="edit of activations in force"), shift.on(tiny_model):
        Rome().fit(tiny_model, *tiny_sets)
