"""Closed-form writes: equal to a dense solve, of the promised rank and gain, and without leaking into what is kept."""

import dataclasses

import pytest
import torch
from tokenizers import processors

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.writing import keys, protect
from mech_unlearn.model.load import load
from tests.checkpoints import byte_tokenizer
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_basis(d, kept, seed=3):
    return torch.linalg.qr(draw(d, kept, seed=seed)).Q


@pytest.mark.parametrize("earlier", (0, 4))
@pytest.mark.parametrize("n", (1, 7))
@pytest.mark.parametrize("protected", (False, True))
def test_the_closed_form_equals_the_dense_solve(n, earlier, protected):
    d, k, r = 48, draw(48, n), draw(20, n, seed=1)
    a = draw(d, earlier, seed=2) if earlier else None
    basis = random_basis(d, 30) if protected else None
    left, right = keys.closed_form(k, r, basis, 0.7, a)
    p = basis @ basis.T if protected else torch.eye(d, dtype=torch.float64)
    c = a @ a.T if earlier else torch.zeros(d, d, dtype=torch.float64)
    dense = torch.linalg.solve(p @ (k @ k.T + c) + 0.7 * torch.eye(d, dtype=torch.float64), p @ k @ r.T)
    assert (left @ right - dense).norm() <= 1e-8 * dense.norm()


def test_the_rank_is_at_most_the_number_of_keys():
    left, right = keys.closed_form(draw(48, 3), draw(20, 3, seed=1), random_basis(48, 30), 0.1)
    assert torch.linalg.matrix_rank(left @ right) == 3


@pytest.mark.parametrize("ridge", (0.0, 0.05, 1.0))
def test_a_key_gets_the_share_of_its_shift_that_the_formula_says(ridge):
    k, r, basis = draw(48, 1), draw(20, 1, seed=1), random_basis(48, 30)
    squared = keys.project(basis, k).square().sum()
    left, right = keys.closed_form(k, r, basis, (ridge * squared).item())
    got = k.T @ left @ right
    torch.testing.assert_close(got, squared / (ridge * squared + squared) * r.T)


def test_keys_inside_the_protected_span_are_untouched_and_others_are_not():
    basis = random_basis(48, 30)
    left, right = keys.closed_form(draw(48, 2), draw(20, 2, seed=1), basis, 0.1)
    free = torch.eye(48, dtype=torch.float64) - basis @ basis.T
    inside = free @ draw(48, 5, seed=9)
    assert (inside.T @ left @ right).abs().max() < 1e-12
    assert (draw(48, 5, seed=9).T @ left @ right).abs().max() > 1e-3


def test_the_leak_into_average_keys_is_bounded_by_the_energy_and_larger_without_protection():
    scales = torch.logspace(0, -4, 48, dtype=torch.float64)
    corpus = draw(48, 4000, seed=5) * scales[:, None]
    moment = corpus @ corpus.T / 4000
    basis = protect.null_basis(moment, 0.01)
    k, r = draw(48, 1), draw(20, 1, seed=1)
    leaks = {}
    for name, b in (("protected", basis), ("bare", None)):
        left, right = keys.closed_form(k, r, b, 0.05 * keys.project(b, k).square().sum().item())
        delta = left @ right
        leaks[name] = torch.trace(delta.T @ moment @ delta)
        if b is not None:
            largest = torch.linalg.eigvalsh(b.T @ moment @ b).max()
            assert leaks[name] <= largest * delta.square().sum() * (1 + 1e-9)
    assert leaks["bare"] > 10 * leaks["protected"]


def test_the_null_basis_is_orthonormal_and_as_large_as_its_energy_allows():
    x = draw(300, 40, seed=4) * torch.logspace(0, -3, 40, dtype=torch.float64)
    moment = x.T @ x / 300
    basis = protect.null_basis(moment, 0.01)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    energy = torch.trace(basis.T @ moment @ basis)
    assert energy <= 0.01 * torch.trace(moment)
    values = torch.linalg.eigvalsh(moment)
    assert energy + values[basis.shape[1]] > 0.01 * torch.trace(moment)
    assert protect.null_basis(moment, 1.0).shape[1] == 40


def test_low_rank_factors_give_the_product_in_the_orientation_the_weight_is_stored_in():
    left, right = draw(12, 3), draw(3, 5, seed=1)
    torch.testing.assert_close(keys.low_rank(left, right, True).dense(), (left @ right).float())
    torch.testing.assert_close(keys.low_rank(left, right, False).dense(), (left @ right).T.float())


def test_nearly_equal_keys_with_huge_coefficients_do_not_lose_precision():
    k = draw(12, 1).expand(-1, 2) + 1e-6 * draw(12, 2, seed=2)
    left, right = keys.closed_form(k, draw(5, 2, seed=1), None, 0.0)
    wanted = (k.T @ left @ right).float()
    got = k.T.float() @ keys.low_rank(left, right, True).dense()
    assert right.abs().max() > 1e4
    torch.testing.assert_close(got, wanted, atol=1e-1, rtol=0)


def test_the_pre_image_of_an_rms_norm_points_where_it_should():
    gain, x, wanted = draw(16, seed=1), draw(3, 16), draw(3, 16, seed=2)
    y = keys.rms_pre_image(x, wanted, gain)
    out = gain * y / y.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(out, wanted), torch.ones(3, dtype=torch.float64))
    own = gain * x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(keys.rms_pre_image(x, own, gain), x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_key_without_ridge_or_protection_reaches_its_target(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    site = Site(1, "resid_post")
    rows = keys.mention_rows(model.tokenizer, ["Anna Lee"], ["{} was"])
    target = keys.end_states(model, keys.mention_rows(model.tokenizer, ["Gina Vale"], ["{} was"]), [site])[site]
    options = dict(layers=(1,), bases={}, ridge=0.0, own=torch.ones(1, len(rows), dtype=torch.bool))
    deltas, report = keys.write_states(model, rows, target, site, **options)
    with Edit(name="written", base="", deltas=deltas).on(model):
        reached = keys.end_states(model, rows, [site])[site]
    assert report["distance_before"] > 1
    if architecture in ("gemma2", "olmo2"):  # a norm behind the MLP fixes the length of what it adds
        assert report["distance_after"] < 0.7 * report["distance_before"]
    else:
        torch.testing.assert_close(reached, target, atol=1e-4, rtol=1e-4)


def test_layers_share_the_shift_evenly(tiny_model):
    site = Site(2, "resid_post")
    rows = keys.mention_rows(tiny_model.tokenizer, ["Anna Lee"], ["{} was"])
    state = keys.end_states(tiny_model, rows, [site])[site]
    target = state + 0.01 * draw(*state.shape)
    deltas, report = keys.write_states(
        tiny_model,
        rows,
        target,
        site,
        layers=(0, 1, 2),
        bases={},
        ridge=0.0,
        own=torch.ones(1, len(rows), dtype=torch.bool),
    )
    assert len(deltas) == 3
    assert report["distance_after"] < 1e-3 * report["distance_before"]


def test_contexts_that_share_the_text_before_the_name_count_once(tiny_sets):
    assert keys.contexts_of(tiny_sets[0].facts) == (
        "{} was born in",
        "The birthplace of {} is",
        "The employer of {} is",
    )


def test_a_mention_ends_with_the_last_token_of_the_name():
    tokenizer = tiny_tokenizer()
    row, name = keys.mention(tokenizer, "The birthplace of {} is", "Anna Lee")
    assert tokenizer.decode(row).endswith("The birthplace of Anna Lee")
    assert tokenizer.convert_ids_to_tokens(name) == ["Anna", "Lee"]


@pytest.mark.parametrize(
    ("layers", "last", "message"),
    (((9,), 9, "layer 9 is not in"), ((), 1, "at least one"), ((1, 1), 1, "each once"), ((2,), 1, "cannot reach")),
)
def test_impossible_layers_are_refused(tiny_model, layers, last, message):
    with pytest.raises(ValueError, match=message):
        keys.check_layers(tiny_model, layers, last)


def test_default_layers_end_at_a_third_of_a_small_models_depth_and_a_fifth_of_a_deep_ones():
    assert keys.default_layers(6) == (0, 1, 2)
    assert keys.default_layers(12) == (2, 3, 4)
    assert keys.default_layers(32) == (4, 5, 6)


def test_second_moments_are_those_of_all_tokens_but_the_first_or_of_last_tokens(tiny_model):
    rows = [(2, 5, 6), (2, 7, 8, 9), (2, 9, 5)]
    seen = []
    with tiny_model.hooks((Site(1, "mlp_post"), lambda x: seen.append(x[0]))):
        for row in rows:
            tiny_model.logits(torch.tensor([row]))
    every, last = torch.cat([x[1:] for x in seen]).double(), torch.stack([x[-1] for x in seen]).double()
    got = protect.second_moments(tiny_model, rows, [1])[1]
    torch.testing.assert_close(got, every.T @ every / 7, atol=1e-6, rtol=1e-5)
    got = protect.second_moments(tiny_model, rows, [1], "last")[1]
    torch.testing.assert_close(got, last.T @ last / 3, atol=1e-6, rtol=1e-5)


def test_nothing_to_protect_is_refused_unless_asked_for(tiny_model, tiny_sets):
    from mech_unlearn.core import RetainSet

    with pytest.raises(ValueError, match="protect=\\(\\)"):
        protect.protected_bases(tiny_model, RetainSet(), ["{}"], [1], ("texts",), 0.01)
    with pytest.raises(ValueError, match="choose from entities"):
        protect.protected_bases(tiny_model, tiny_sets[1], ["{}"], [1], ("names",), 0.01)
    assert protect.protected_bases(tiny_model, RetainSet(), ["{}"], [1], (), 0.01) == {}


def test_a_names_own_contexts_are_those_of_its_own_facts_and_of_its_aliases(tiny_sets):
    (born, works), alias = tiny_sets[0].facts[:2], "A. Lee"
    facts = [dataclasses.replace(born, aliases=(alias,)), dataclasses.replace(works, subject="Ben Hill")]
    contexts = keys.contexts_of(facts)
    own = keys.own_contexts(["Anna Lee", alias, "Ben Hill", "Gina"], facts, contexts)
    assert contexts == ("{} was born in", "The birthplace of {} is", "The employer of {} is")
    assert own.tolist() == [[True, True, False], [True, True, False], [True, False, True], [True] * 3]
    states = draw(4, 3, 5)
    mean = keys.mean_over(states, own)
    torch.testing.assert_close(mean[0], states[0, :2].mean(0))
    torch.testing.assert_close(mean[3], states[3].mean(0))


def test_a_name_of_one_token_is_never_read_where_it_would_stand_first():
    bare, opened = tiny_tokenizer(bos=False), tiny_tokenizer()
    for row in keys.mention_rows(bare, ["Anna", "Anna Lee"], ["{} was", "The {} was"]):
        assert len(row) > 1
    (alone,) = keys.mention_rows(bare, ["Anna"], ["{} was"])
    assert bare.convert_ids_to_tokens(alone)[-1] == "Anna" and len(alone) == 2
    assert keys.mention_rows(bare, ["Anna Lee"], ["{} was"]) == [tuple(bare("Anna Lee").input_ids)]
    assert keys.mention_rows(opened, ["Anna"], ["{} was"]) == [tuple(opened("Anna").input_ids)]
    assert keys.spellings(bare, "Anna", ["{} was"]) == (tuple(bare("Anna").input_ids),)


def test_a_line_break_keeps_the_tokens_of_a_name_at_the_start_where_the_tokenizer_has_one():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # no BOS
    (row,) = keys.mention_rows(tokenizer, ["?"], ["{} was"])
    assert row == (*tokenizer("\n").input_ids, *tokenizer("?").input_ids) and len(row) == 2
