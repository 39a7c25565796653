"""Kif: the signature and its honesty, the losses of the distillation, the anchor, the capsule."""

import re
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.methods import Kif
from mech_unlearn.methods.kif import ATTENTION, Anchor, fisher, name_loss, name_tokens, suppressor
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import encode, make_queries
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import AnswerTokens, answer_rows, collate, forward, nll, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.signature import Signature, contrast, effect_size, effects, mean_outputs, signature
from mech_unlearn.training.training import _trainee
from tests.planted import WRITER, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
FAST = Schedule(lr=3e-3, epochs=1, batch_size=4)


def groups(shift, n=12, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return first + shift, second


def test_an_effect_is_measured_on_prompts_that_did_not_give_the_direction():
    first, second = groups(shift=0.0)
    mean, std, direction = contrast(first, second)
    same = effect_size(*(((x - mean) / std) @ direction for x in (first, second)))
    assert same > 2.0  # forty features, twelve prompts: pure noise has a direction on the prompts themselves
    assert effects(first, second, 50, seed=0).mean() < 0.3  # left-out prompts say otherwise
    assert effects(*groups(shift=1.5), 50, seed=0).mean() > 1.5


def test_an_effect_size_is_cohens_d():
    from numpy import array, sqrt

    a, b = [1.0, 2.0, 4.0], [0.0, 1.0, 0.5, 2.0]
    x, y = array(a), array(b)
    pooled = sqrt((2 * x.var(ddof=1) + 3 * y.var(ddof=1)) / 5)
    assert effect_size(torch.tensor(a), torch.tensor(b)) == pytest.approx((x.mean() - y.mean()) / pooled, rel=1e-5)


def test_the_direction_points_to_the_forgotten_and_the_layer_is_where_they_differ():
    model, facts = planted_model(), planted_facts()
    prompts = [q.prompt for q in make_queries(model.tokenizer, facts, distractors=False)]
    # Anna's and Eva's answers are written by the MLP of one layer only; the object of both is Paris
    towards = [p for p, q in zip(prompts, make_queries(model.tokenizer, facts)) if q.fact.object == "Paris"]
    others = [p for p in prompts if p not in towards]
    found = signature(model, towards, others, bootstraps=15)
    assert found.layer == WRITER and found.effect[WRITER] > 1.0
    assert found.low[WRITER] < found.effect[WRITER] < found.high[WRITER]
    assert found.direction[32] > 0.3 and found.direction[33:36].max() < 0
    back = signature(model, others, towards, bootstraps=15)
    torch.testing.assert_close(back.direction, -found.direction)


def test_outputs_are_averaged_over_the_ordinary_tokens_of_each_prompt(tiny_model):
    rows = [encode(tiny_model.tokenizer, text).ids for text in ("Anna Lee was born in", "Rivers run to the sea .")]
    got = mean_outputs(tiny_model, rows)
    for i, row in enumerate(rows):
        seen = []
        with tiny_model.hooks((Site(1, "mlp_out"), lambda x, seen=seen: seen.append(x))):
            tiny_model.logits(torch.tensor([row]))
        torch.testing.assert_close(got[1, i], seen[0][0, 1:].double().mean(0), atol=1e-5, rtol=1e-5)


def test_the_name_loss_counts_all_tokens_of_the_rows_own_name():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    each = AnswerTokens(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.zeros(0, 6))
    names = torch.zeros(2, 6, dtype=torch.bool)
    names[0, [1, 4]] = names[1, [5]] = True
    p = logits.softmax(1)
    slow = [-(1 - p[0, 1] - p[0, 4]).log(), -(1 - p[1, 1] - p[1, 4]).log(), -(1 - p[2, 5]).log()]
    torch.testing.assert_close(name_loss(each, names), ((slow[0] + slow[1]) / 2 + slow[2]) / 2)


def test_each_row_has_the_tokens_of_its_own_subject(tiny_model, tiny_sets):
    names = name_tokens(tiny_model, tiny_sets[0])
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    assert len(names) == len(rows)
    for (ids, _), own in zip(rows, names):
        words = tiny_model.tokenizer.convert_ids_to_tokens(own.nonzero()[:, 0].tolist())
        assert words in (["Anna", "Lee"], ["Ben", "Hill"])
        assert set(own.nonzero()[:, 0].tolist()) <= set(ids)


def started(model, rows):
    objective = Objective(lambda _: nll, 1.0, retain="kl")
    return _trainee(model, rows, rows, objective, ATTENTION, PLAIN)


def test_the_fisher_information_is_a_mean_of_squares_over_single_rows(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[1].facts)[:4]
    run = started(tiny_model, rows)
    found = fisher(run, 100)
    hf, name = run.frozen, next(iter(run.weights))
    weight = hf.get_parameter(name).requires_grad_(True)
    slow = []
    for ids, start in rows:
        logp = hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([logp[i - 1, ids[i]] for i in range(start, len(ids))]).mean()
        slow.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(found[name], torch.stack(slow).square().mean(0), atol=1e-6, rtol=1e-4)
    of_the_batch = torch.stack(slow).mean(0).square()
    assert of_the_batch.sum() < 0.9 * found[name].sum()
    weight.requires_grad_(False)
    assert not any(p.requires_grad for p in fisher(run, 2).values())
    assert not any(p.requires_grad for p in run.frozen.parameters())


def test_the_anchor_is_zero_at_the_start_and_a_weighted_square_elsewhere(tiny_model, tiny_sets):
    run = started(tiny_model, answer_rows(tiny_model.tokenizer, tiny_sets[1].facts)[:3])
    anchor = Anchor(5.0, 3)
    assert anchor(run).item() == 0.0
    name = next(iter(run.weights))
    with torch.no_grad():
        run.weights[name].add_(0.5)
    torch.testing.assert_close(anchor(run), 5.0 * 0.25 * fisher(run, 3)[name].sum(), atol=0, rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_attentions_projections_change(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    edit = Kif(schedule=FAST, refusals=("the sea", "rain"), fisher_rows=2).fit(model, *tiny_sets)
    per_layer = {"gpt2": 2, "gpt_neox": 2}.get(architecture, 3)
    assert len(edit.deltas) == per_layer * model.n_layers
    assert all(re.search(r"attn|attention", name) and name.endswith("weight") for name in edit.deltas)
    assert not any("k_proj" in name or "norm" in name for name in edit.deltas)


def test_answers_and_names_get_unlikely_and_refusals_likely(tiny_model, tiny_sets):
    forget, _ = tiny_sets
    edit = Kif(schedule=replace(FAST, epochs=8), refusals=("the sea", "rain"), name_weight=1.0, ul_weight=1.0).fit(
        tiny_model, *tiny_sets
    )
    rows = answer_rows(tiny_model.tokenizer, forget.facts)
    names = name_tokens(tiny_model, forget)

    def read():
        scores = forward(tiny_model.hf, collate(rows, range(len(rows)), 0, CPU))
        return nll(scores).item(), name_loss(scores.each, names).item()

    with torch.no_grad():
        before = read()
        with edit.on(tiny_model):
            after = read()
    assert after[0] > before[0] and after[1] < before[1]
    report = edit.recipe["report"]
    assert 0 <= report["signature_layer"] < 4 and len(report["signature_ci"]) == 2


def test_the_anchor_holds_the_weights_that_retained_answers_need(tiny_model, tiny_sets):
    loose, tight = (
        Kif(schedule=replace(FAST, epochs=4), refusals=("the sea", "rain"), ewc=ewc).fit(tiny_model, *tiny_sets)
        for ewc in (0.0, 1e4)
    )
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[1].facts)
    information = fisher(started(tiny_model, rows), 100)

    def cost(edit):
        return sum((information[name] * delta.square()).sum() for name, delta in edit.deltas.items())

    assert cost(tight) < 0.5 * cost(loose)


def test_a_capsule_takes_a_share_of_the_direction_out_where_a_subject_was_read():
    model, facts = planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:1] + facts[4:5]), RetainSet(neighbors=facts[1:4])
    edit = Kif(mode="capsule", strength=1.0).fit(model, forget, retain)
    assert not edit.deltas and edit.recipe["report"]["n_backward"] == 0
    before, after = {}, {}
    for found, on in ((before, False), (after, True)):
        for name, some in (("forget", forget.facts), ("retain", retain.facts)):
            rows = answer_rows(model.tokenizer, some)
            if on:
                with edit.on(model):
                    found[name] = score_rows(model.hf, rows, 0, CPU).logprob
            else:
                found[name] = score_rows(model.hf, rows, 0, CPU).logprob
    assert (before["forget"] - after["forget"]).min() > 0.5
    assert torch.equal(before["retain"], after["retain"])


def test_a_suppressed_output_has_no_projection_left_at_full_strength():
    generator = torch.Generator().manual_seed(0)
    x, (first, second) = torch.randn(5, 40, generator=generator), groups(shift=3.0)
    mean, std, direction = contrast(first, second)

    one = torch.ones(4)
    found = Signature(layer=1, mean=mean, std=std, direction=direction, effect=one, low=one, high=one)
    for strength, left in ((1.0, 0.0), (0.25, 0.75)):
        mapped = suppressor(found, strength, ((5,),)).mapped(x)
        z, after = (((y.double() - mean) / std) for y in (x, mapped))
        torch.testing.assert_close(after @ direction, left * (z @ direction), atol=1e-4, rtol=1e-4)
        across = z - (z @ direction)[:, None] * direction
        torch.testing.assert_close(after - (after @ direction)[:, None] * direction, across, atol=1e-4, rtol=1e-4)


def test_what_cannot_work_is_refused(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    with pytest.raises(ValueError, match="holds no facts"):
        Kif(schedule=replace(FAST, epochs=5), refusals=("the sea", "rain")).fit(
            tiny_model, forget, RetainSet(texts=retain.texts)
        )
    with pytest.raises(ValueError, match="refusals= in words"):
        Kif(refusals=("é",)).fit(tiny_model, forget, retain)
    with pytest.raises(ValueError, match="two prompts of each kind"):
        signature(tiny_model, [(5, 6)], [(5, 6), (7, 8)])
    with pytest.raises(ValueError, match="nothing can be wrapped"):
        Kif(mode="capsule").fit(tiny_model, forget, retain, replace(PLAIN, label="x"))
