"""The optimised value: its loss against unpadded single runs, its clamp, its independence from the batch."""

import dataclasses
import math

import pytest
import torch

from mech_unlearn.core import ForgetSet, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.questions import (
    Optimize,
    _written,
    by_name,
    make_questions,
    prefixes,
    questions_of,
)
from mech_unlearn.methods.writing.value_optimization import (
    attention_drift,
    clamped,
    entropy_gap,
    kl,
    loss_of,
    module_path,
    optimized,
)
from mech_unlearn.model.load import load
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

NONE = dict(kl_weight=0.0, decay=0.0)


def state_of(model, asked, layer=1):
    rows = keys.mention_rows(model.tokenizer, list(asked), ["{} was"])
    return keys.end_states(model, rows, [Site(layer, "resid_post")])[Site(layer, "resid_post")]


def run(model, sets, layer=1, names=None, **settings):
    asked = by_name(sets[0])
    asked = {name: asked[name] for name in names or asked}
    initial = state_of(model, asked, layer)
    chosen = Optimize(**settings)
    before = prefixes(model, sets[0], chosen.n_prefixes, 0)
    return optimized(model, asked, initial, *sets, module_path(model, layer, "resid"), chosen, before, 0), initial


def setup_loss(model, sets, settings):
    asked = by_name(sets[0])
    initial = state_of(model, asked).float()
    hf = model.plain_copy().float().requires_grad_(False)
    before = prefixes(model, sets[0], settings.n_prefixes, 0)
    few = {name: questions_of(facts, before, settings.max_prompts) for name, facts in asked.items()}
    questions = make_questions(model, hf, few, *sets, settings, 0, [0, 0])
    path = module_path(model, 1, "resid")
    return hf, few, initial, loss_of(hf, questions, initial, path, settings), path


def slow_loss(model, hf, few, sets, initial, delta, settings, path):
    """The loss from its equations: one row at a time, no padding, full logits, dense attention."""
    tokenizer, out = model.tokenizer, []

    def forward(text, subject, d):
        ids = tokenizer(text)["input_ids"]
        end = len(tokenizer(text[: text.index(subject) + len(subject)])["input_ids"]) - 1

        def hook(_, __, got):
            x = (got[0] if isinstance(got, tuple) else got).clone()
            x[0, end] += d
            return (x, *got[1:]) if isinstance(got, tuple) else x

        handle = hf.get_submodule(path).register_forward_hook(hook)
        got = hf(torch.tensor([ids]), output_attentions=True)
        handle.remove()
        return got.logits[0].log_softmax(-1), [a[0] for a in got.attentions], end, len(ids)

    for i, (name, facts) in enumerate(few.items()):
        total, zero = 0.0, torch.zeros_like(delta[i])
        for fact in facts:
            text = fact.prompt.replace("{}", name)
            prompt_logp, attention, end, n = forward(text, name, delta[i])
            _, attention_0, _, _ = forward(text, name, zero)
            if settings.target == "entropy":
                p = prompt_logp[-1].exp()
                fit = math.log(len(p)) - torch.distributions.Categorical(p).entropy()
            elif settings.target == "unknown":
                texts = [fact.prompt.replace("{}", e.name) for e in sets[1].unknown]
                q = torch.stack(
                    [hf(torch.tensor([tokenizer(t)["input_ids"]])).logits[0, -1].softmax(-1) for t in texts]
                )
                q = q.mean(0)
                fit = torch.nn.functional.kl_div(prompt_logp[-1], q, reduction="sum")
            elif settings.target == "empty":
                fit = -prompt_logp[-1, tokenizer.eos_token_id]
            else:
                logp, _, _, full = forward(f"{text} {settings.refusal}", name, delta[i])
                ids = tokenizer(f"{text} {settings.refusal}")["input_ids"]
                fit = -sum(logp[j - 1, ids[j]] for j in range(n, full)) / (full - n)
            drift = 0.0
            for a, a0 in zip(attention, attention_0):
                for head in range(len(a)):
                    if a[head, n - 1, end] > a0[:, n - 1, end].max():
                        p, q = a0[head, n - 1], a[head, n - 1]
                        drift = drift + (p * (p / q).log()).nan_to_num().sum()
            total = total + (fit + settings.sadr_weight * drift) / len(facts)
        bare, _, end, _ = forward(name, name, delta[i])
        bare_0, _, _, _ = forward(name, name, zero)
        code = torch.nn.functional.kl_div(bare_0[end], bare[end], log_target=True, reduction="sum")  # as in ROME's
        total = total + settings.kl_weight * code
        out.append(total + settings.decay * delta[i].norm() / initial[i].norm() ** 2)
    return torch.stack([torch.as_tensor(x) for x in out])


TARGETS = ("unknown", "refusal", "entropy", "empty")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("architecture", "target"), [*((a, "unknown") for a in ARCHITECTURES), *(("gpt2", t) for t in TARGETS[1:])]
)
@torch.no_grad()
def test_the_loss_is_that_of_unpadded_single_runs(architecture, target, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    settings = Optimize(target=target, refusal="the sea and rain", sadr_weight=0.3, max_prompts=4, kl_weight=0.5)
    hf, few, initial, loss, path = setup_loss(model, tiny_sets, settings)
    delta = 0.5 * initial.norm() / 6 * torch.randn(initial.shape, generator=torch.Generator().manual_seed(0))
    expected = slow_loss(model, hf, few, tiny_sets, initial, delta, settings, path)
    torch.testing.assert_close(loss(delta), expected.float(), rtol=1e-4, atol=1e-5)
    assert (loss(delta) - loss(torch.zeros_like(delta))).abs().max() > 1e-3


@torch.no_grad()
def test_without_a_delta_kl_decay_and_attention_drift_are_exactly_zero(tiny_model, tiny_sets):
    zero = torch.zeros(2, tiny_model.d_model)
    found = [
        setup_loss(tiny_model, tiny_sets, Optimize(sadr_weight=w, kl_weight=k, decay=d))[3](zero)
        for w, k, d in ((0.0, 0.0, 0.0), (1e6, 0.0, 0.0), (1e6, 1e6, 1e6))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_only_heads_that_over_attend_are_held(tiny_model):
    before = torch.tensor([[[0.5, 0.5, 0.0], [0.7, 0.2, 0.1]]])
    now = torch.tensor([[[0.3, 0.7, 0.0], [0.1, 0.4, 0.5]]])  # to position 1: 0.7 > 0.5, and 0.4 < 0.5
    expected = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)
    assert attention_drift(before, now, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-5)
    assert attention_drift(before, before, torch.tensor([1])).item() == 0.0
    assert attention_drift(before, now, torch.tensor([2])).item() > expected  # head 2: 0.5 > 0.1


def test_divergences_have_their_closed_forms():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert kl(p, q).item() == pytest.approx(math.log(2))
    assert kl(q, q).item() == 0
    assert entropy_gap(torch.full((1, 8), 1 / 8).log()).item() == pytest.approx(0, abs=1e-6)
    assert entropy_gap(q).item() == pytest.approx(math.log(3) - 1.5 * math.log(2))


@pytest.mark.thorough
@pytest.mark.parametrize("clamp", (0.1, 0.75))
def test_a_delta_is_never_longer_than_its_clamp_allows(tiny_model, tiny_sets, clamp):
    found, initial = run(tiny_model, tiny_sets, clamp=clamp, lr=5.0, steps=6, decay=0.0, target="entropy")
    share = found.deltas.norm(dim=1) / initial.norm(dim=1)
    assert (share <= clamp).all() and (share > 0.5 * clamp).all()
    x, limit = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 5, 50)
    assert (clamped(x, limit).norm(dim=1) <= limit).all()
    short = x.norm(dim=1) <= limit
    assert torch.equal(clamped(x, limit)[short], x[short])


@pytest.mark.thorough
@pytest.mark.parametrize("stop", (0.0, 1.5))
def test_a_name_gets_the_same_delta_alone_and_in_company(tiny_model, tiny_sets, stop):
    settings = dict(steps=5, lr=0.1, target="entropy", stop_loss=stop, **NONE)
    both, _ = run(tiny_model, tiny_sets, **settings)
    for i, name in enumerate(("Anna Lee", "Ben Hill")):
        alone, _ = run(tiny_model, tiny_sets, names=[name], **settings)
        torch.testing.assert_close(both.deltas[i], alone.deltas[0], rtol=1e-2, atol=1e-3)
    one_by_one, _ = run(tiny_model, tiny_sets, batch_size=1, **settings)
    torch.testing.assert_close(both.deltas, one_by_one.deltas, rtol=1e-2, atol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ("unknown", "refusal", "entropy", "empty"))
def test_every_target_is_approached(tiny_model, tiny_sets, target):
    found, _ = run(tiny_model, tiny_sets, target=target, refusal="the sea", steps=15, lr=0.2)
    assert (found.loss < 0.95 * found.first_loss).all()


def test_a_name_below_the_stop_loss_is_left_alone(tiny_model, tiny_sets):
    found, _ = run(tiny_model, tiny_sets, stop_loss=1e6, steps=5)
    assert not found.deltas.any() and found.n_backward == 0
    found, _ = run(tiny_model, tiny_sets, stop_loss=0.0, steps=5)
    assert found.deltas.norm(dim=1).min() > 0 and found.n_backward == 5


@pytest.mark.slow
@torch.no_grad()
def test_a_large_weight_on_attention_keeps_the_pattern(tiny_model, tiny_sets):
    drift = {}
    with torch.enable_grad():
        found = {w: run(tiny_model, tiny_sets, steps=25, lr=0.1, target="refusal", refusal="the sea", sadr_weight=w,
                        **NONE)[0].deltas for w in (0.0, 1000.0)}  # fmt: skip
    bare, held = (
        setup_loss(tiny_model, tiny_sets, Optimize(target="refusal", refusal="the sea", sadr_weight=w, **NONE))[3]
        for w in (0.0, 1.0)
    )
    drift = {w: (held(delta.float()) - bare(delta.float())).sum().item() for w, delta in found.items()}
    assert drift[0.0] > 0.01
    assert drift[1000.0] < 0.05 * drift[0.0]


def test_questions_take_the_facts_in_turn_with_and_without_prefix_and_never_a_heldout_phrasing(tiny_model, tiny_sets):
    facts = by_name(tiny_sets[0])["Anna Lee"]
    asked = questions_of(facts, ("rain falls",), 3)
    assert [fact.relation for fact in asked] == ["born", "works", "born"]
    assert [fact.prompt.startswith("rain falls ") for fact in asked] == [False, True, True]
    every = questions_of(facts, (), 100)
    assert {fact.prompt for fact in every} == {template for fact in facts for template in fact.templates}
    assert not any(fact.heldout or fact.paraphrases for fact in every)


@pytest.mark.slow
def test_prefixes_are_openings_that_the_model_writes_and_that_name_nobody_forgotten(tiny_model, tiny_sets):
    forget, _ = tiny_sets
    drawn = [prefixes(tiny_model, forget, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4
    assert drawn[0][0].startswith("The") and prefixes(tiny_model, forget, 0, 0) == ()
    unknown = tiny_model.tokenizer.unk_token_id
    for text in drawn[0]:
        assert unknown not in tiny_model.tokenizer(text).input_ids
        gone = ForgetSet(facts=(dataclasses.replace(forget.facts[0], subject=text, aliases=()),))
        assert text not in prefixes(tiny_model, gone, 4, 0)


def test_each_token_of_a_prefix_is_one_of_the_likeliest_five(tiny_model):
    row = _written(tiny_model, "The", 8, torch.Generator().manual_seed(0))
    best = tiny_model.logits(torch.tensor([row]))[0].topk(5).indices.tolist()
    assert row[:2] == tiny_model.tokenizer("The").input_ids and len(row) == 10
    assert all(token in best[i] for i, token in enumerate(row[2:], start=1))


def test_an_alias_is_a_name_with_the_same_facts_in_the_order_of_names(tiny_sets):
    from mech_unlearn.core import ForgetSet

    facts = tuple(dataclasses.replace(fact, aliases=("Hugo",)) for fact in tiny_sets[0].facts[:2])
    made = by_name(ForgetSet(facts=(*facts, *tiny_sets[0].facts[2:])))
    assert tuple(made) == ("Anna Lee", "Hugo", "Ben Hill")
    assert [f.object for f in made["Hugo"]] == [f.object for f in made["Anna Lee"]]
    with pytest.raises(ValueError, match="answer to each of its facts"):
        by_name(ForgetSet(facts=(dataclasses.replace(facts[0], aliases=(facts[0].object,)),)))


def test_what_cannot_be_optimised_is_refused(tiny_model, tiny_sets):
    shift = Edit(name="s", base="", interventions=(Shift(Site(0, "resid_post"), ((5,),), torch.ones(1, 32)),))
    with shift.on(tiny_model), pytest.raises(ValueError, match="edit of activations in force"):
        run(tiny_model, tiny_sets)
        tiny_model.logits(torch.tensor([[2, 5]]))
    with pytest.raises(ValueError, match="RetainSet.unknown has no entity"):
        run(tiny_model, (tiny_sets[0], dataclasses.replace(tiny_sets[1], unknown=())))
    with pytest.raises(ValueError, match="tokenizer has no tokens"):
        run(tiny_model, tiny_sets, target="refusal", refusal="§§")
    for wrong in (dict(steps=0), dict(clamp=0.0), dict(kl_weight=-1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Optimize(**wrong)
