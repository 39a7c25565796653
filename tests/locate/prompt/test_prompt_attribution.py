"""Attributions add up to the change of the answer's log-probability; the planted subject carries it, nothing else."""

import pytest
import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.prompt.prompt_attribution import (
    CLASSES,
    prompt_attribution,
    prompt_attribution_per_fact,
    prompt_attribution_tokens,
)
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_query
from tests.planted import planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACT = Fact(id="long", subject="Cara Moss", relation="born", object="West Oslo", prompt="The birthplace of {} is")
FACTS = tiny_facts(["Anna Lee", "Ben Hill"], relations=("born",))


def logprob(model, fact, change=None):
    """Mean log-probability of the answer's tokens; `change` rewrites the embeddings [pos, d]."""
    query = make_query(model.tokenizer, fact, fact.prompt)
    writes = [("hook_embed", lambda x: change(x[0].clone())[None])] if change else []
    with torch.no_grad(), model.hooks(*writes):
        rows = model.logits(torch.tensor([query.full[:-1]]))[0, len(query.prompt) - 1 :].log_softmax(-1)
    return rows.gather(1, torch.tensor(query.answers[0])[:, None]).mean().item()


def placed(value, a, b):
    def change(x):
        x[a:b] = value
        return x

    return change


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_gradients_add_up_to_the_change_of_the_log_probability(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    found = prompt_attribution_tokens(model, FACT, baseline="pad", steps=400)
    kept: list[torch.Tensor] = []
    with torch.no_grad(), model.hooks(("hook_embed", lambda x: kept.append(x[0, 0]))):
        model.logits(torch.tensor([[model.tokenizer.pad_token_id]]))
    expected = logprob(model, FACT) - logprob(model, FACT, placed(kept[0], 1, 7))
    assert found.values[0].isnan() and found.labels["token"][:2] == ("0 <s>", "1 The")
    assert found.values[1:].sum().item() == pytest.approx(expected, abs=0.01 + 0.01 * abs(expected))
    assert all(weight.grad is None for weight in model.held.values())


def test_more_steps_close_the_gap_and_the_note_tells_it(tiny_model):
    def gap(steps):
        found = prompt_attribution_tokens(tiny_model, FACT, baseline="zero", steps=steps)
        total = logprob(tiny_model, FACT) - logprob(tiny_model, FACT, placed(0.0, 1, 7))
        gap = abs(found.values[1:].sum().item() - total)
        assert float(found.note.split("gap ")[1].split(" ")[0]) == pytest.approx(gap, abs=2e-5, rel=0.1)
        return gap

    assert gap(800) < 0.01 < gap(4)


def test_gradients_are_those_of_a_slow_reference_by_finite_differences(tiny_model):
    anna, ben = FACTS  # every class of these prompts has one token, so each stands against one token of Ben Hill's
    settings = dict(baseline="resample", steps=2, max_tokens=20, samples=2)
    found = prompt_attribution_tokens(tiny_model, anna, others=[ben], **settings)
    table = tiny_model.held["model.embed_tokens.weight"].detach()
    clean, base = (table[list(make_query(tiny_model.tokenizer, f, f.prompt).prompt)] for f in (anna, ben))
    expected, step, token = 0.0, 2e-3, 2
    for alpha, weight in ((0.0, 1 / 16), (1 / 8, 1 / 2), (1.0, 7 / 16)):

        def along(shift, alpha=alpha):
            def change(e):
                e[1:] = base[1:] + alpha * (clean - base)[1:]
                e[token] += shift * (clean - base)[token]
                return e

            return logprob(tiny_model, anna, change)

        expected += weight * (along(step) - along(-step)) / (2 * step)
    assert found.values[token].item() == pytest.approx(expected, abs=5e-3, rel=1e-2)
    assert found.values[3:].abs().max() == 0  # the same tokens in both prompts


def test_an_ablated_token_is_replaced_by_the_baseline_and_by_nothing_else(tiny_model):
    mean = tiny_model.held["model.embed_tokens.weight"].detach().mean(0)
    found = prompt_attribution_tokens(tiny_model, FACT, how="ablation", baseline="mean", max_tokens=30)
    expected = [logprob(tiny_model, FACT) - logprob(tiny_model, FACT, placed(mean, i, i + 1)) for i in range(7)]
    torch.testing.assert_close(found.values[1:], torch.tensor(expected[1:]), atol=1e-5, rtol=1e-5)
    assert found.values[0].isnan()
    free = prompt_attribution_tokens(tiny_model, FACT, how="ablation", baseline="mean", keep_bos=False)
    assert free.values[0].item() == pytest.approx(expected[0], abs=1e-5)


def test_a_class_is_the_sum_of_its_gradients_or_the_ablation_of_all_its_tokens(tiny_model):
    tokens = prompt_attribution_tokens(tiny_model, FACT, steps=8).values
    classes = prompt_attribution_per_fact(tiny_model, [FACT], steps=8)
    at = {name: i for i, name in enumerate(CLASSES)}
    assert classes.labels["token"] == CLASSES and classes.values.shape == (1, 7)
    assert classes.values[0, at["before subject"]].item() == pytest.approx(tokens[1:4].sum().item(), abs=1e-5)
    assert classes.values[0, at["last subject"]].item() == pytest.approx(tokens[5].item(), abs=1e-5)
    assert classes.values[0].nansum().item() == pytest.approx(tokens.nansum().item(), abs=1e-5)
    assert classes.values[0, at["middle subject"]].isnan() and classes.values[0, at["further"]].isnan()
    zero = prompt_attribution_per_fact(tiny_model, [FACT], how="ablation", baseline="zero").values
    expected = logprob(tiny_model, FACT) - logprob(tiny_model, FACT, placed(0.0, 1, 4))
    assert zero[0, at["before subject"]].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["integrated_gradients", "ablation"])
@pytest.mark.parametrize("baseline", ["zero", "mean", "pad", "resample"])
def test_in_the_planted_model_the_subject_carries_everything(how, baseline):
    facts, last = planted_facts()[:4], CLASSES.index("last subject")
    settings = dict(how=how, baseline=baseline, steps=32, samples=2)
    found = prompt_attribution(planted_model(), facts, **settings)
    assert found.top(1)[0][0] == {"token": "last subject"} and found.values[last] > 0.5
    assert found.low[last] > 0 and found.n == len(facts) and "nats" in found.unit
    rest = found.values.clone()
    rest[last] = 0
    assert rest.nan_to_num().abs().max() < 1e-5
    # a model that does not know the names has nothing to lose with them
    unknown = prompt_attribution(planted_model("retrained", 1, 8), facts, **settings)
    assert unknown.values[last].abs() < 0.3 * found.values[last]


def test_resampling_takes_tokens_of_other_subjects_only(tiny_model):
    # with one stranger of the same shape every draw is that stranger's token
    anna, ben = FACTS
    found = prompt_attribution_tokens(tiny_model, anna, others=[anna, ben], how="ablation", baseline="resample")
    plain = Fact(id="plain", subject=anna.subject, relation="born", object=anna.object, prompt=anna.prompt)
    for position, word in ((1, "Ben"), (2, "Hill")):
        token = tiny_model.held["model.embed_tokens.weight"].detach()[tiny_model.tokenizer.convert_tokens_to_ids(word)]
        expected = logprob(tiny_model, plain) - logprob(tiny_model, plain, placed(token, position, position + 1))
        assert found.values[position].item() == pytest.approx(expected, abs=1e-5)
    seeds = [
        prompt_attribution(tiny_model, FACTS, how="ablation", baseline="resample", seed=seed).values
        for seed in (0, 0, 1)
    ]
    torch.testing.assert_close(seeds[0], seeds[1], equal_nan=True)
    assert not torch.equal(seeds[0].nan_to_num(), seeds[2].nan_to_num())
    state = torch.get_rng_state()
    prompt_attribution(tiny_model, FACTS, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_intervention_in_force_changes_what_the_tokens_carry():
    model, fact = planted_model(), planted_facts()[0]
    (token,) = model.tokenizer("Anna", add_special_tokens=False).input_ids
    wipe = torch.zeros(1, 64)
    wipe[0, 32] = -100.0  # against the object's direction
    plain = prompt_attribution_tokens(model, fact, how="ablation", baseline="zero").values[-1]
    edit = Edit(name="s", base=model.hash(), interventions=(Shift(Site(3, "resid_post"), ((token,),), wipe),))
    with edit.on(model):
        shifted = prompt_attribution_tokens(model, fact, how="ablation", baseline="zero").values[-1]
    assert plain > 0.5 and shifted < 0.5 * plain


def test_bad_input_is_refused(tiny_model):
    for facts, settings, match in (
        ([], {}, "no facts"),
        (FACTS, {"how": "magic"}, "how='magic'"),
        (FACTS, {"baseline": "one"}, "baseline='one'"),
        (FACTS, {"steps": 0}, "steps=0"),
        (FACTS[:1], {"baseline": "resample"}, "facts of another subject"),
    ):
        with pytest.raises(ValueError, match=match):
            prompt_attribution(tiny_model, facts, **settings)
    tiny_model.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        prompt_attribution(tiny_model, FACTS, baseline="pad")
