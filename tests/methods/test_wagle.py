"""Wagle: scores and mask against the equation, and entries that are masked never move."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.methods import Npo, Wagle
from mech_unlearn.methods.wagle import attribution, top_share
from mech_unlearn.model.load import load
from mech_unlearn.training.rows import answer_rows, text_rows
from mech_unlearn.training.schedule import Schedule
from tests.tiny import tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-3, epochs=2, batch_size=4)


def test_the_score_is_the_equation_and_its_parts_change_its_order():
    theta, g_f, g_r = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    torch.testing.assert_close(attribution(theta, g_f, g_r, 0.5), torch.tensor([6.0, 8.0]))
    torch.testing.assert_close(attribution(theta, g_f, g_r, 1e9), torch.tensor([6.0, 4.0]))  # without the retain term


def test_the_top_share_is_of_all_entries_together_and_exact_under_ties():
    scores = {"a": torch.tensor([[5.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([4.0, 3.0, 0.0, 0.0])}
    half = top_share(scores, 0.5)
    assert half["a"].tolist() == [[True, True], [False, False]] and half["b"].tolist() == [True, True, False, False]
    assert sum(int(m.sum()) for m in top_share(scores, 1.0).values()) == 8
    assert sum(int(m.sum()) for m in top_share(scores, 0.01).values()) == 1


def test_rho_of_one_is_the_base_bit_by_bit(tiny_model, tiny_sets):
    plain = Npo(schedule=FAST).fit(tiny_model, *tiny_sets)
    same = Wagle(base=Npo(schedule=FAST), rho=1.0).fit(tiny_model, *tiny_sets)
    assert same.deltas.keys() == plain.deltas.keys()
    assert all(torch.equal(same.deltas[n], plain.deltas[n]) for n in plain.deltas)


def slow_mask(model, sets, rho, mu):
    """From the equations: gradients of summed batch means of the NLL, on the model itself, one row at a time."""
    forget, retain = sets
    weights = {n: w for n, w in model.hf.named_parameters() if n in model.held}

    def gradient(rows):
        total = {n: torch.zeros_like(w) for n, w in model.held.items()}
        for ids, start in rows:
            logits = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
            loss = -sum(logits[t - 1, ids[t]] for t in range(start, len(ids))) / (len(ids) - start)
            for name, g in zip(total, torch.autograd.grad(loss / len(rows), list(model.held.values()))):
                total[name] += g
        return total

    assert weights is not None
    g_f = gradient(answer_rows(model.tokenizer, forget.facts))
    g_r = gradient(answer_rows(model.tokenizer, retain.facts) + text_rows(model, retain.texts))
    scores = {n: ((w - g_r[n] / mu) * g_f[n]).abs().detach() for n, w in model.held.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    bound = flat.sort(descending=True).values[round(rho * len(flat)) - 1]
    return {n: s >= bound for n, s in scores.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("mu", (1e-6, 10.0))
def test_what_moves_is_what_the_equation_chooses(tiny_model, tiny_sets, mu):
    edit = Wagle(base=Npo(schedule=FAST), rho=0.1, mu=mu, batch_size=64).fit(tiny_model, *tiny_sets)
    wanted = slow_mask(tiny_model, tiny_sets, 0.1, mu)
    total = sum(m.numel() for m in wanted.values())
    moved = {n: edit.deltas[n] != 0 if n in edit.deltas else torch.zeros_like(m) for n, m in wanted.items()}
    outside = sum(int((moved[n] & ~wanted[n]).sum()) for n in wanted)
    inside = sum(int((moved[n] & wanted[n]).sum()) for n in wanted)
    assert outside < 1e-4 * total  # entries at the bound, by rounding
    assert inside > 0.95 * 0.1 * total


def test_masked_entries_keep_every_bit_also_under_weight_decay(tiny_model, tiny_sets):
    base = Npo(schedule=replace(FAST, weight_decay=10.0))
    everything = base.fit(tiny_model, *tiny_sets)
    edit = Wagle(base=base, rho=0.1).fit(tiny_model, *tiny_sets)
    total = sum(w.numel() for w in tiny_model.held.values())
    moved = sum(int((d != 0).sum()) for d in edit.deltas.values())
    assert moved <= round(0.1 * total)
    assert sum(int((d != 0).sum()) for d in everything.deltas.values()) > 0.9 * total  # decay moves all it may


def test_a_mask_from_a_retain_loss_of_kl_still_reads_retained_rows(tiny_model, tiny_sets):
    from mech_unlearn.methods import KlMin

    edits = [Wagle(base=KlMin(schedule=FAST), rho=0.05, mu=mu).fit(tiny_model, *tiny_sets) for mu in (1e-6, 1e9)]
    names = edits[0].deltas.keys() & edits[1].deltas.keys()
    assert any(not torch.equal(edits[0].deltas[n] != 0, edits[1].deltas[n] != 0) for n in names)


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "gemma2"))
def test_it_works_on_other_architectures_and_in_bfloat16(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2).to(torch.bfloat16), tokenizer=tiny_tokenizer())
    assert Wagle(base=Npo(schedule=Schedule(lr=1e-3, epochs=1, batch_size=8)), rho=0.2).fit(model, *tiny_sets).deltas


def test_settings_out_of_range_are_refused(tiny_model, tiny_sets):
    for method, message in ((Wagle(rho=0.0), "rho"), (Wagle(rho=1.1), "rho"), (Wagle(mu=0.0), "mu must be positive")):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, *tiny_sets)
