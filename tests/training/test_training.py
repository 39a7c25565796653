"""The shared training loop and its losses: masks, references, stopping, and what may be trained."""

import json
import random
import re
from dataclasses import asdict, fields, replace

import pytest
import torch

from mech_unlearn.core import RetainSet
from mech_unlearn.methods import (
    METHODS,
    Catnip,
    Flat,
    Gu,
    IdkDpo,
    KlMin,
    LastLayerAscent,
    Npo,
    Rmu,
    SimNpo,
    Undial,
    Unlikelihood,
)
from mech_unlearn.methods.last_layer_ascent import ascent_loss
from mech_unlearn.methods.npo import npo_loss
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.training.feed import Feed, by_entity
from mech_unlearn.training.rows import (
    BatchScores,
    answer_rows,
    batch_scores,
    chunks,
    collate,
    eval_chunks,
    forward,
    nll,
    predicting,
    score_rows,
    text_rows,
)
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.trainee import trained_copy
from mech_unlearn.training.wrapping import trains
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
FAST = Schedule(lr=3e-3, epochs=1, batch_size=4)


def scores_of(logprob, tokens=None):
    tokens = torch.ones_like(logprob, dtype=torch.long) if tokens is None else tokens
    return BatchScores(logprob, tokens, logprob > -1, torch.arange(len(logprob)))


def nll_of(model, facts):
    return nll(score_rows(model.hf, answer_rows(model.tokenizer, facts), 0, CPU)).item()


def test_answer_scores_agree_with_the_scoring_that_pads_nothing(tiny_model, tiny_sets):
    facts = tiny_sets[0].facts
    queries = make_queries(tiny_model.tokenizer, facts)
    slow = score(tiny_model, queries)
    fast = score_rows(tiny_model.hf, answer_rows(tiny_model.tokenizer, facts), 0, CPU)
    torch.testing.assert_close(fast.logprob / fast.tokens, slow.logprob[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(fast.exact, slow.exact)
    assert fast.row.tolist() == list(range(len(queries)))


def test_scores_do_not_depend_on_padding(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    longest = (tuple(range(4, 30)), 20)
    alone = forward(tiny_model.hf, collate(rows, [0], 0, CPU))
    padded = forward(tiny_model.hf, collate([rows[0], longest], [0, 1], 0, CPU))
    torch.testing.assert_close(alone.logprob, padded.logprob[:1], atol=1e-5, rtol=1e-5)
    assert alone.tokens[0] == padded.tokens[0]


def test_only_answer_tokens_get_gradient():
    rows = [((5, 6, 7, 8), 2), ((5, 6, 7), 2)]
    batch = collate(rows, [0, 1], 0, CPU)
    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    nll(batch_scores(logits[predicting(batch)], batch)).backward()
    touched = logits.grad.any(-1).tolist()
    assert touched == [[False, True, True, False], [False, True, False, False]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_states_that_predict_an_answer_are_unembedded_and_scores_are_those_of_whole_logits(
    architecture, tiny_sets
):
    hf = tiny_hf(architecture)
    batch = collate(answer_rows(tiny_tokenizer(), tiny_sets[0].facts), range(6), 0, CPU)
    whole = hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[predicting(batch)]
    shapes = []
    handle = hf.get_output_embeddings().register_forward_hook(lambda _, args, out: shapes.append(out.shape[:-1]))
    few = forward(hf, batch)
    handle.remove()
    assert shapes == [(1, int(batch.answer.sum()))]
    torch.testing.assert_close(few.each.logits, whole, atol=1e-5, rtol=1e-5)
    assert not hf.get_output_embeddings()._forward_pre_hooks


def test_rows_are_scored_in_chunks_whose_logits_fit(tiny_model, tiny_sets, monkeypatch):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    whole = score_rows(tiny_model.hf, rows, 0, CPU)
    assert chunks([5, 6, 7, 8], [2, 2, 9, 1], 10, 3) == [[5, 6, 7], [8]]
    monkeypatch.setattr("mech_unlearn.model.forward.LOGIT_BYTES", 4 * 10 * 4)
    assert chunks([5, 6, 7, 8], [2, 2, 9, 1], 10, 3) == [[5, 6], [7], [8]]
    parts = score_rows(tiny_model.hf, rows, 0, CPU)
    assert len(eval_chunks(rows, tiny_model.hf)) == len(rows)
    torch.testing.assert_close(parts.logprob, whole.logprob, atol=1e-5, rtol=1e-5)
    report = Npo(schedule=FAST).fit(tiny_model, *tiny_sets).recipe["report"]
    assert report["n_backward"] > 2 * report["steps"]  # a step's rows are split by themselves


def test_an_answer_of_several_tokens_is_a_sum_and_the_nll_a_mean():
    rows = [((5, 6, 7, 8), 2)]
    logits = torch.randn(1, 4, 11, generator=torch.Generator().manual_seed(0))
    logp = logits.log_softmax(-1)
    batch = collate(rows, [0], 0, CPU)
    got = batch_scores(logits[predicting(batch)], batch)
    wanted = logp[0, 1, 7] + logp[0, 2, 8]
    torch.testing.assert_close(got.logprob[0], wanted)
    torch.testing.assert_close(nll(got), -wanted / 2)


def test_texts_predict_every_token_but_the_first(tiny_model):
    (row,) = text_rows(tiny_model, ("Rivers run to the sea .",))
    batch = collate([row], [0], 0, CPU)
    assert batch.answer.tolist() == [[False] + [True] * (len(row[0]) - 1)]


def test_each_pass_gives_every_row_once_in_a_new_order():
    feed = Feed(random.Random(0), 3, 8)
    passes = [sum((feed.take() for _ in range(3)), []) for _ in range(2)]
    assert [sorted(p) for p in passes] == [list(range(8))] * 2
    assert passes[0] != passes[1]


def test_a_feed_goes_on_where_its_state_was_taken():
    feed = Feed(random.Random(0), 3, 8)
    feed.take()
    state = json.loads(json.dumps(feed.state))
    wanted = [feed.take() for _ in range(5)]
    again = Feed(random.Random(7), 3, 8)
    again.restore(state)
    assert [again.take() for _ in range(5)] == wanted


def test_by_entity_a_batch_holds_as_many_entities_as_it_can_and_a_pass_every_row_once():
    owners = ["a"] * 5 + ["b"] * 2 + ["c"] * 3 + ["", ""]
    feed = Feed(random.Random(0), 4, 12, by_entity(owners))
    first = feed.take()
    assert {owners[i] for i in first} - {""} <= {"a", "b", "c"} and len({owners[i] or i for i in first}) == 4
    rest = feed.take() + feed.take()
    assert sorted(first + rest) == list(range(12))
    assert rest[-2:] and {owners[i] for i in rest[-2:]} == {"a"}


@pytest.mark.parametrize("beta", (0.05, 0.1, 1.0))
def test_npos_gradient_at_the_reference_is_that_of_gradient_ascent(beta):
    reference = torch.tensor([-1.0, -3.0, -0.2])
    logprob = reference.clone().requires_grad_()
    npo_loss(logprob, reference, beta).backward()
    torch.testing.assert_close(logprob.grad, torch.full((3,), 1 / 3))


def test_npo_becomes_gradient_ascent_as_beta_vanishes_and_saturates_otherwise():
    reference = torch.zeros(3)
    far = torch.tensor([-1.0, -5.0, -9.0])

    def gradient(beta):
        logprob = far.clone().requires_grad_()
        npo_loss(logprob, reference, beta).backward()
        return 3 * logprob.grad

    torch.testing.assert_close(gradient(1e-5), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient(1.0), 2 * torch.sigmoid(far))
    shift = npo_loss(far, reference, 1e-4) - npo_loss(reference, reference, 1e-4)
    torch.testing.assert_close(shift, far.mean(), atol=1e-2, rtol=0)


def test_ascent_pushes_no_answer_past_its_bound():
    logprob = torch.tensor([-1.0, -7.0, -3.0], requires_grad=True)
    ascent_loss(scores_of(logprob), 5.0).backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([1 / 3, 0.0, 1 / 3]))


@pytest.mark.parametrize(
    "method",
    (
        Npo(schedule=replace(FAST, epochs=6), beta=1.0),
        LastLayerAscent(schedule=replace(FAST, epochs=6, stop_recall=None, weight_decay=0.0)),
    ),
)
def test_training_makes_forgotten_answers_unlikely_and_retained_ones_likely(tiny_model, tiny_sets, method):
    forget, retain = tiny_sets
    before = nll_of(tiny_model, forget.facts), nll_of(tiny_model, retain.facts)
    with method.fit(tiny_model, forget, retain).on(tiny_model):
        after = nll_of(tiny_model, forget.facts), nll_of(tiny_model, retain.facts)
    assert after[0] > before[0] and after[1] < before[1]


def test_without_a_retain_term_nothing_else_is_needed_and_with_one_it_is(tiny_model, tiny_sets):
    bare = Npo(schedule=FAST, retain_weight=0.0).fit(tiny_model, tiny_sets[0], RetainSet())
    assert bare.deltas
    with pytest.raises(ValueError, match="retain_weight=0"):
        Npo(schedule=FAST).fit(tiny_model, tiny_sets[0], RetainSet())


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama", "gemma2"))
def test_last_layer_ascent_leaves_everything_below_the_last_layer_bit_identical(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    edit = LastLayerAscent(schedule=replace(FAST, weight_decay=0.0, stop_recall=0.1)).fit(model, *tiny_sets)
    assert edit.deltas and all(".3." in name for name in edit.deltas)
    ids = torch.tensor([make_queries(model.tokenizer, tiny_sets[0].facts)[0].prompt])

    def read():
        seen = []
        with model.hooks(*((f"blocks.{layer}.hook_resid_pre", seen.append) for layer in range(4))):
            return seen, model.logits(ids)

    below, clean = read()
    with edit.on(model):
        below_edited, edited = read()
    assert all(torch.equal(a, b) for a, b in zip(below, below_edited))
    assert not torch.equal(clean, edited)


def test_npo_trains_every_tensor_or_those_it_is_told_to(tiny_model, tiny_sets):
    every = Npo(schedule=FAST).fit(tiny_model, *tiny_sets)
    assert every.deltas.keys() == tiny_model.held.keys()
    some = Npo(schedule=FAST, trainable=r"layers\.[01]\.mlp").fit(tiny_model, *tiny_sets)
    assert {name.split(".")[2] for name in some.deltas} == {"0", "1"}
    assert all(".mlp." in name for name in some.deltas)
    with pytest.raises(ValueError, match="nothing would be trained"):
        Npo(schedule=FAST, trainable="no such").fit(tiny_model, *tiny_sets)


def test_a_bfloat16_model_is_trained_in_float32_so_that_small_steps_add_up(tiny_sets):
    model = load(tiny_hf("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    edit = Npo(schedule=Schedule(lr=1e-6, epochs=1, batch_size=4)).fit(model, *tiny_sets)
    delta = edit.deltas["model.layers.0.mlp.up_proj.weight"]
    assert delta.dtype == torch.float32
    assert 0 < delta.abs().max() < 1e-4
    before = model.hash()
    with Npo(schedule=replace(FAST, epochs=4), beta=1.0).fit(model, *tiny_sets).on(model):
        assert model.dtype == torch.bfloat16
        after = nll_of(model, tiny_sets[0].facts)
    assert model.hash() == before
    assert after > nll_of(model, tiny_sets[0].facts)


def test_training_stops_by_its_rule_and_says_so(tiny_model, tiny_sets):
    forget, _ = tiny_sets
    at_once = Npo(schedule=replace(FAST, epochs=5, stop_recall=1.0)).fit(tiny_model, *tiny_sets).recipe["report"]
    assert (at_once["stopped"], at_once["steps"]) == ("stop_recall", len(forget.facts) * 2 // 4)
    full = Npo(schedule=replace(FAST, epochs=2)).fit(tiny_model, *tiny_sets).recipe["report"]
    assert (full["stopped"], full["steps"]) == ("epochs", 2 * len(forget.facts) * 2 // 4)
    assert full["n_backward"] == 2 * full["steps"]
    assert set(full["final_losses"]) == {"forget_nll", "forget_loss", "retain_nll"}


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"epochs": -1}, "epochs must not be negative, got -1"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"retain_sampling": "all"}, "retain_sampling"),  # a TypeError where annotations are checked
    ),
)
def test_a_schedule_that_cannot_work_is_refused_when_it_is_made(settings, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        replace(FAST, **settings)


def test_every_method_that_trains_holds_its_settings_of_training_in_its_schedule(tiny_model, tiny_sets):
    names = {field.name for field in fields(Schedule)}
    for kind in METHODS.values():
        own = {field.name for field in fields(kind)}
        assert not trains(kind) or {"schedule", "base"} & own
        assert "schedule" not in own or not names & own, kind
    settings = Npo(schedule=FAST).fit(tiny_model, *tiny_sets).recipe["settings"]
    assert settings["schedule"] == asdict(FAST) and settings["beta"] == 0.1 and "lr" not in settings


def test_another_seed_gives_another_order_and_so_another_edit(tiny_model, tiny_sets):
    one, other = (Npo(schedule=FAST, seed=seed).fit(tiny_model, *tiny_sets) for seed in (0, 1))
    assert any(not torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (Npo(beta=0.0), "beta must be positive"),
        (Npo(schedule=Schedule(lr=1e-05, epochs=0)), "epochs must be positive"),
        (LastLayerAscent(max_nll=0.0), "max_nll must be positive"),
        (Npo(schedule=Schedule(lr=1e30, epochs=4, batch_size=4, clip=1e30)), "lower lr"),
    ),
)
def test_settings_that_cannot_work_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "llama"))
def test_nothing_is_trained_that_an_export_would_lose(architecture, tiny_sets, tmp_path):
    """The bridge adds a trainable bias to the head of a model without one; trained through it, it would be lost."""
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    added = {id(p) for p in model.bridge.parameters()} - {id(p) for p in model.held.values()}
    assert added, "the bridge adds nothing any more: this test can go"
    trained = {name for name, p in trained_copy(model, "").named_parameters() if p.requires_grad}
    assert trained == set(model.held)
    edit = Npo(schedule=replace(FAST, epochs=2)).fit(model, *tiny_sets)
    assert edit.deltas.keys() <= set(model.held)
    worst, bound = edit.export(model, tmp_path / "out")
    assert worst <= bound


def test_a_model_whose_blocks_hold_no_module_named_mlp_is_trained(tiny_sets):
    model = load(tiny_hf("opt"), tokenizer=tiny_tokenizer())
    before = nll_of(model, tiny_sets[0].facts)
    with Npo(schedule=FAST).fit(model, *tiny_sets).on(model):
        assert nll_of(model, tiny_sets[0].facts) > before + 0.1


def descend(optimizer):
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.data.sub_(group["lr"] * weight.grad)


ROWS = dict(lr=0.1, epochs=1, batch_size=8)
MEANS_OVER_ROWS = {
    "npo": Npo(),
    "kl_min": KlMin(),
    "idk_dpo": IdkDpo(refusals=("the sea",)),
    "sim_npo": SimNpo(),
    "undial": Undial(),
    "flat": Flat(refusals=("the sea",)),
    "catnip": Catnip(),
    "rmu": Rmu(alpha=1.0),
    "unlikelihood": Unlikelihood(),
    "gu": Gu(base=Npo(), k=2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MEANS_OVER_ROWS)
def test_micro_batches_add_up_to_the_batch(name, tiny_model, tiny_sets, monkeypatch):
    """Of plain gradient descent, because AdamW's first step is a sign, which rounding turns where a gradient is 0."""
    monkeypatch.setattr(torch.optim.AdamW, "step", descend)
    method = MEANS_OVER_ROWS[name]

    def fitted(**settings):
        schedule = Schedule(**ROWS, **settings)
        own = replace(method, base=replace(method.base, schedule=schedule)) if hasattr(method, "base") else None
        return (own or replace(method, schedule=schedule)).fit(tiny_model, *tiny_sets)

    whole, parts = fitted(), fitted(micro_batch=3)
    assert parts.recipe["report"]["n_backward"] > whole.recipe["report"]["n_backward"]
    for key, delta in whole.deltas.items():
        torch.testing.assert_close(parts.deltas[key], delta, atol=1e-6, rtol=1e-4)
    assert max(delta.abs().max() for delta in whole.deltas.values()) > 1e-4


def test_one_micro_batch_of_the_whole_and_no_warm_up_change_no_bit(tiny_model, tiny_sets):
    plain = Npo(schedule=FAST).fit(tiny_model, *tiny_sets)
    same = Npo(schedule=replace(FAST, micro_batch=FAST.batch_size, warmup=0.0)).fit(tiny_model, *tiny_sets)
    assert all(torch.equal(same.deltas[key], delta) for key, delta in plain.deltas.items())


def test_the_step_size_rises_linearly_and_stays(tiny_model, tiny_sets, monkeypatch):
    schedule, seen = Schedule(lr=1e-3, epochs=5, batch_size=4, warmup=0.4), []
    assert [schedule.ramp(i, 10) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert Schedule(lr=1e-3, epochs=1).ramp(0, 10) == 1.0
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    Npo(schedule=schedule).fit(tiny_model, *tiny_sets)
    assert seen == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, *[1e-3] * 6])


@pytest.mark.parametrize(
    ("setting", "message"), (({"warmup": 1.5}, "warmup=1.5"), ({"micro_batch": 0}, "micro_batch=0"))
)
def test_settings_of_the_schedule_that_cannot_work_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Schedule(lr=1e-3, epochs=1, **setting)
