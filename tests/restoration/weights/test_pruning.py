"""Pruning: exact sparsity, nothing at share zero, scores against slow references, and a planted closed gate."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.edit.edit import clone
from mech_unlearn.model.load import load
from mech_unlearn.restoration.weights import pruning
from mech_unlearn.restoration.weights.pruning import Criterion
from mech_unlearn.restoration.weights.quantize import linear_weights
from tests.planted import FORGOTTEN, fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_hf, tiny_tokenizer


def half_closed_model():
    """The person direction nearly closes the gates of the forgotten names: the second largest weight of each row."""
    model = fresh_planted_model()
    with torch.no_grad():
        for part in ("gate_proj", "up_proj"):
            model.held[f"model.layers.2.mlp.{part}.weight"][:FORGOTTEN, 8] = -0.9
        model.held["model.layers.2.mlp.down_proj.weight"][:, :FORGOTTEN] *= 1.01
    return model


@pytest.mark.parametrize("share", (0.0, 0.1, 0.33, 0.5))
def test_exactly_the_wanted_share_of_each_row_goes_and_it_is_the_smallest(share):
    scores = torch.rand(7, 40, generator=torch.Generator().manual_seed(0))
    mask = pruning.lowest(scores, share)
    assert (mask.sum(1) == round(share * 40)).all()
    if share:
        assert (scores.masked_fill(~mask, -1).amax(1) <= scores.masked_fill(mask, 2).amin(1)).all()


def test_the_set_difference_takes_what_forgetting_needs_and_spares_what_use_needs():
    forget, use = torch.zeros(10, 10), torch.zeros(10, 10)
    forget[0], use[0, :5] = 1.0, 1.0
    mask = pruning.set_difference(forget, use, 0.1, 0.05)
    assert mask.nonzero().tolist() == [[0, c] for c in range(5, 10)]
    assert pruning.set_difference(forget, use, 0.0, 0.05).sum() == 0
    assert pruning.set_difference(forget, use, 0.1, 0.0).sum() == 10
    assert pruning.set_difference(torch.zeros(10, 10), use, 0.5, 0.0).sum() == 0


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "gemma2"))
def test_norms_of_inputs_are_those_that_plain_hooks_see(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    rows = [(2, 5, 6, 7), (2, 8, 9)]
    norms = pruning.input_norms(model, rows)
    assert set(norms) == set(linear_weights(model))
    plain, seen = tiny_hf(architecture), {}
    name = next(n for n in norms if "1." in n)
    module = plain.get_submodule(name.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda m, args: seen.setdefault("x", []).append(args[0][0]))
    for row in rows:
        plain(torch.tensor([row]))
    torch.testing.assert_close(norms[name], torch.cat(seen["x"]).norm(dim=0), atol=1e-4, rtol=1e-4)


def test_snip_scores_are_weight_times_gradient_of_the_mean_loss_per_token():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    rows = [((2, 5, 6), (7, 8)), ((2, 9), (5,))]
    found = pruning.snip_scores(model, rows)
    plain, name = tiny_hf("llama"), "model.layers.1.mlp.up_proj.weight"
    want = 0
    for prompt, answer in rows:
        plain.zero_grad()
        table = plain(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        (-sum(table[len(prompt) - 1 + t, token] for t, token in enumerate(answer)) / len(answer)).backward()
        weight = plain.get_parameter(name)
        want = want + (weight * weight.grad).abs().detach() / 2
    torch.testing.assert_close(found[name], want, atol=1e-6, rtol=1e-4)


def test_pruning_writes_zeros_there_and_nowhere_else():
    with clone(planted_model()) as copy:
        name = "model.layers.2.mlp.up_proj.weight"
        before = copy.held[name].detach().clone()
        mask = torch.zeros_like(before, dtype=torch.bool)
        mask[0] = True
        pruning.prune_(copy, {name: mask})
        assert (copy.held[name][0] == 0).all() and torch.equal(copy.held[name][1:], before[1:])


@pytest.mark.slow
def test_at_share_zero_nothing_comes_back():
    case = planted_case(sae=None)
    grid = tuple(Criterion(how=how, share=0.0) for how in ("magnitude", "wanda", "difference"))
    found = pruning.audit(case, pruning.prepare(case, grid=grid), planted_model("late"), "late")
    assert (found.recoverability == 0).all() and torch.equal(found.score_raw, found.columns["before"])
    assert (found.columns["lost_others"] == 0).all()


@pytest.mark.slow
def test_a_gate_that_small_weights_close_opens_when_they_go_and_the_damage_is_flagged():
    case = planted_case(sae=None)
    ready = pruning.prepare(case, grid=(Criterion(how="magnitude", share=0.98),))
    closed = half_closed_model()
    weights = {name: w.clone() for name, w in closed.held.items()}
    found = pruning.audit(case, ready, closed, "closed")
    assert (found.recoverability > 0.5).all()
    assert all("collateral" in flags for flags in found.flags)  # each output row keeps one unit: the other names' goes
    assert all(torch.equal(w, closed.held[name]) for name, w in weights.items())
    retrained = pruning.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.05).all() and (retrained.null < 0.05).all()


@pytest.mark.slow
def test_a_setting_that_breaks_other_facts_is_not_chosen_where_another_does_not():
    case = planted_case(sae=None)
    grid = (Criterion(how="magnitude", share=0.98), Criterion(how="magnitude", share=0.1))
    found = pruning.audit(case, pruning.prepare(case, grid=grid), half_closed_model(), "closed")
    assert all("setting:magnitude 10 %" in flags and "collateral" not in flags for flags in found.flags)


@pytest.mark.slow
def test_the_whole_grid_gives_full_and_retrained_models_nothing():
    case = planted_case(sae=None)
    ready = pruning.prepare(case)
    assert len(ready.grid) == 19
    full = pruning.audit(case, ready, planted_model(), "full")
    assert (full.recoverability < 0.05).all() and full.kappa.mean() > 0.9
    assert (pruning.audit(case, ready, case.retrained[1], "R").recoverability < 0.05).all()


def test_without_other_facts_or_with_an_impossible_share_pruning_is_refused():
    with pytest.raises(ValueError, match="others"):
        pruning.prepare(planted_case(sae=None, others=()))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        pruning.prepare(planted_case(sae=None), grid=(Criterion(how="wanda", share=1.0),))


def test_texts_longer_than_the_positions_are_read_in_pieces():
    case = planted_case(sae=None)
    long = replace(case, texts=(" ".join(["Rivers run to the sea ."] * 30),))
    rows = pruning.material(long).texts
    assert len(rows) > 1 and max(map(len, rows)) == case.full.n_ctx
    assert all(norm.isfinite().all() for norm in pruning.input_norms(case.full, rows).values())
