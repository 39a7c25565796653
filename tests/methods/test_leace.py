"""Leace: no linear probe does better than chance on what it was fitted on, and no smaller change does the same."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.methods import Leace
from mech_unlearn.methods.leace import leace
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.anchors import unknown_names
from mech_unlearn.model.capture import capture
from mech_unlearn.model.load import load
from tests.tiny import tiny_hf, tiny_tokenizer


def cloud(n=400, d=12, seed=0):
    """States of two groups with unlike means and a covariance that is no multiple of the identity."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 3
    z = (torch.arange(n) % 2)[:, None].double()
    return x + z * torch.randn(d, generator=generator, dtype=torch.float64) * 2, z


def erased(x, z, **settings):
    left, right, mu = leace(x, z, **settings)
    return x - (x - mu) @ right.T @ left.T


def slow(x, z):
    """r(x) = x - W^+ P W (x - mu) from full matrices, as the theorem is written."""
    n, mu = len(x), x.mean(0)
    sigma, cross = (x - mu).T @ (x - mu) / n, (x - mu).T @ (z - z.mean(0)) / n
    values, vectors = torch.linalg.eigh(sigma)
    root = torch.where(values > 1e-9, values, torch.zeros_like(values)).sqrt()
    w = vectors @ torch.diag(torch.where(root > 0, 1 / root.clamp(min=1e-30), 0.0)) @ vectors.T
    a = w @ cross
    return x - (x - mu) @ (torch.linalg.pinv(w, rtol=1e-9) @ a @ torch.linalg.pinv(a, rtol=1e-9) @ w).T


def probe(x, z):
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e9, max_iter=5000).fit(x.numpy(), z[:, 0].numpy())
    return fitted.score(x.numpy(), z[:, 0].numpy())


def test_the_closed_form_equals_the_theorem_written_out_also_where_states_span_less_than_the_space():
    x, z = cloud()
    torch.testing.assert_close(erased(x, z), slow(x, z), atol=1e-8, rtol=1e-8)
    few = torch.cat([x, x[:, :3] @ torch.ones(3, 4, dtype=x.dtype)], 1)  # a singular covariance
    torch.testing.assert_close(erased(few, z), slow(few, z), atol=1e-6, rtol=1e-6)
    both = torch.cat([z, torch.roll(z, 1) * x[:, :1].sign()], 1)  # two labels: rank 2
    assert leace(x, both)[0].shape == (12, 2)
    torch.testing.assert_close(erased(x, both), slow(x, both), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("shrinkage", (0.0, 0.3))
def test_afterwards_a_fresh_probe_is_at_chance_and_before_it_is_not(shrinkage):
    x, z = cloud()
    gone = erased(x, z, shrinkage=shrinkage)
    assert probe(x, z) > 0.9
    assert probe(gone, z) == pytest.approx(0.5, abs=0.02)
    covariance = (gone - gone.mean(0)).T @ (z - z.mean(0)) / len(z)
    assert covariance.abs().max() < 1e-9


def test_it_changes_less_than_projecting_the_difference_of_means_out():
    x, z = cloud()
    difference = x[z[:, 0] == 1].mean(0) - x[z[:, 0] == 0].mean(0)
    r = difference / difference.norm()
    mean = x - (x - x.mean(0)) @ r[:, None] * r
    assert (mean - mean.mean(0)).T @ (z - z.mean(0)) == pytest.approx(0, abs=1e-8)  # guards as well
    ours, theirs = erased(x, z) - x, mean - x
    assert ours.square().sum() < 0.9 * theirs.square().sum()
    metric = torch.linalg.inv(torch.cov(x.T))
    assert ((ours @ metric) * ours).sum() < ((theirs @ metric) * theirs).sum()
    shrunk = erased(x, z, shrinkage=0.9) - x
    assert ours.square().sum() < shrunk.square().sum() <= theirs.square().sum() * 1.001


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2"))
def test_in_the_model_forgotten_and_unknown_names_have_one_mean_at_every_site(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    edit = Leace(layers=(0, 2), where="all", skip_first=False).fit(model, *tiny_sets)
    contexts = keys.contexts_of(tiny_sets[0].facts)
    names, others = ("Anna Lee", "Ben Hill"), unknown_names(*tiny_sets)

    def gaps():
        found = []
        for layer in (0, 2):
            means = [
                keys.name_states(model, group, contexts, Site(layer, "resid_post")).mean((0, 1))
                for group in (names, others)
            ]
            found.append((means[0] - means[1]).norm().item())
        return found

    before = gaps()
    with edit.on(model):
        after = gaps()
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert min(before) > 0.5
    assert all(a < bound * b for a, b in zip(after, before, strict=True))


def test_at_the_last_token_other_prompts_stay_bit_identical(tiny_model, tiny_sets):
    rows = [(2, *keys.mention(tiny_model.tokenizer, "{}", name)[1]) for name in ("Anna Lee", "Cara Moss")]
    sites = [Site(3, "resid_post")]
    clean = capture(tiny_model, rows, sites)[sites[0]]
    with Leace().fit(tiny_model, *tiny_sets).on(tiny_model):
        moved = capture(tiny_model, rows, sites)[sites[0]]
    assert torch.equal(moved[len(rows[0]) :], clean[len(rows[0]) :])
    assert (moved != clean).any(-1)[: len(rows[0])].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (7,)}, "layers are 0..3"),
        ({"layers": ()}, "at least one layer"),
        ({"kind": "mlp_out"}, "residual stream"),
        ({"shrinkage": 1.0}, "share in"),
    ],
)
def test_bad_settings_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        Leace(**settings).fit(tiny_model, *tiny_sets)
    with pytest.raises(ValueError, match="vary together"):
        leace(torch.ones(4, 3), torch.ones(4, 1))
