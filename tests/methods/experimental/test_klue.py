"""Klue: attributions against a slow reference, an exact mask, and superficial neurons that are left out."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import Klue
from mech_unlearn.methods.experimental.klue import attribution, superficial_rows
from mech_unlearn.methods.localized import neuron_masks
from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from mech_unlearn.training.around import Around
from mech_unlearn.training.rows import answer_rows
from mech_unlearn.training.schedule import Schedule
from tests.planted import FORGOTTEN, WRITER, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-3, epochs=2, batch_size=4, skip_forgotten=False)


class Look:
    """A mask that hides nothing and runs something on the state before the first step."""

    def __init__(self, ask):
        self.ask, self.found = ask, None

    def __call__(self, run):
        self.found = self.ask(run)
        return {}


def looked(model, sets, ask, **settings):
    look = Look(ask)
    Klue(schedule=replace(FAST, weight_decay=0.0), **settings).fit(model, *sets, around=Around(masks=(look,)))
    return look.found


@pytest.mark.parametrize("architecture", ("gpt2", "llama"))
def test_attribution_is_the_largest_activation_times_gradient_of_the_probability(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    rows = answer_rows(model.tokenizer, tiny_sets[0].facts)
    rows.append((rows[0][0] + (30, 31), rows[0][1]))  # an answer of three tokens
    weights = [0.5**i for i in range(len(rows))]
    got = looked(model, tiny_sets, lambda run: attribution(model, run, rows, weights, 3))
    wanted = torch.zeros_like(got)
    for (ids, start), weight in zip(rows, weights):
        for layer in range(2):
            kept = []

            def hold(_, args, kept=kept):
                kept.append(args[0].detach().requires_grad_())
                return (kept[0],)

            plain = model.plain_copy()
            plain.get_submodule(model.w_out(layer)[0].removesuffix(".weight")).register_forward_pre_hook(hold)
            p = plain(torch.tensor([ids])).logits[0].softmax(-1)
            probability = torch.stack([p[t - 1, ids[t]] for t in range(start, len(ids))]).prod()
            (gradient,) = torch.autograd.grad(probability, kept)
            product = (kept[0] * gradient)[0, : len(ids) - 1]
            wanted[layer] += weight * product.amax(0).detach()
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-3)


def test_superficial_rows_put_the_answer_where_it_does_not_belong_and_where_others_share_it(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    rows = superficial_rows(tiny_model, forget.facts, retain.facts, 2, seed=0)
    assert sum(weight for weight, _ in rows) == pytest.approx(1)
    true = {(row[0], row[1]) for row in answer_rows(tiny_model.tokenizer, forget.facts)}
    assert not any((ids, start) in true for _, (ids, start) in rows)
    answers = {tiny_model.tokenizer.convert_tokens_to_ids(f.object) for f in forget.facts}
    assert {ids[start] for _, (ids, start) in rows} == answers
    asked = {(row[0], row[1]) for row in answer_rows(tiny_model.tokenizer, retain.facts)}
    same = [row for _, row in rows if row in asked]
    assert 0 < len(same) < len(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exactly_the_rows_and_columns_of_the_chosen_neurons_move(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    chosen = []
    method = Klue(schedule=replace(FAST, weight_decay=1.0), share=0.05)
    spy = Look(lambda run: chosen.extend(Klue._neurons(method, model, run, shallow)))
    shallow = superficial_rows(model, tiny_sets[0].facts, tiny_sets[1].facts, 4, 0)
    edit = method.fit(model, *tiny_sets, around=Around(masks=(spy,)))
    masks = neuron_masks(model, chosen)
    width = model.held[model.w_out(0)[0]].numel() // model.d_model
    assert len(chosen) == round(0.05 * 2 * width) == edit.recipe["report"]["neurons"]
    assert edit.deltas.keys() == masks.keys()
    for name, mask in masks.items():
        moved = edit.deltas[name] != 0
        assert not (moved & ~mask).any() and (moved & mask).sum() > 0.8 * mask.sum()


def planted_with_a_surface():
    """A unit of the last layer says Paris whatever the name: knowledge of nobody, and strong for Anna's answer."""
    model = fresh_planted_model()
    with torch.no_grad():
        mlp = {k: model.held[f"model.layers.3.mlp.{k}_proj.weight"] for k in ("gate", "up", "down")}
        mlp["gate"][7] = mlp["up"][7] = torch.eye(64)[8]
        mlp["down"][32, 7] = 0.02
    return model


def test_the_superficial_term_drops_a_neuron_that_says_the_answer_to_everyone():
    model, facts = planted_with_a_surface(), planted_facts()
    sets = ForgetSet(facts=facts[:1]), RetainSet(neighbors=facts[1:])

    def neurons(alpha):
        method = Klue(schedule=replace(FAST, weight_decay=0.0), alpha=alpha, share=1 / 128)
        shallow = superficial_rows(model, sets[0].facts, sets[1].facts, 8, 0) if alpha else []
        return looked(model, sets, lambda run: [
            (alpha, Klue._neurons(replace(method, share=2 / 128), model, run, shallow))
        ], alpha=alpha)[0][1]  # fmt: skip

    assert neurons(0.0) == [(2, 0), (3, 7)]
    assert (2, 0) in neurons(4.0) and (3, 7) not in neurons(4.0)


@pytest.mark.parametrize("loss", ("npo", "ga"))
def test_planted_facts_are_forgotten_and_training_ends_when_none_is_left(loss):
    model, facts = fresh_planted_model(), planted_facts()
    sets = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    edit = Klue(
        schedule=Schedule(lr=3e-2, epochs=60, batch_size=8, weight_decay=0.0, skip_forgotten=True), loss=loss
    ).fit(model, *sets)
    report = edit.recipe["report"]
    assert report["stopped"] == "forgotten" and report["epochs"] < 60 and report["forget_recall"] == 0.0
    assert all(f".{WRITER}." in n or ".3." in n or ".1." in n or ".0." in n for n in edit.deltas)
    with edit.on(model):
        assert recall(model, facts[:FORGOTTEN], "heldout").value < 0.2
        assert recall(model, facts[FORGOTTEN:]).value == 1.0


def test_settings_out_of_range_and_missing_contexts_are_refused(tiny_model, tiny_sets):
    for method, retain, message in (
        (Klue(share=0.0), tiny_sets[1], "share must be"),
        (Klue(alpha=-1.0), tiny_sets[1], "alpha=-1.0"),
        (Klue(), RetainSet(texts=tiny_sets[1].texts), "superficially"),
    ):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, tiny_sets[0], retain)
