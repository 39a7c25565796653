"""The parts add up to the model's logit difference on every architecture, and a planted writer gets all of it."""

import pytest
import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.lenses.direct_logit_attribution import (
    direct_logit_attribution,
    direct_logit_attribution_per_fact,
)
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from tests.planted import FORGOTTEN, LAST, WRITER, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

LONG = Fact(
    id="long",
    subject="Cara Moss",
    relation="born",
    object="West Oslo Rome",
    prompt="{} was born in",
    distractors=("West Oslo Bern", "Paris", "West Rome Park Oslo"),
)
FACTS = (*tiny_facts(["Anna Lee", "Ben Hill"]), LONG)


def rough_model(architecture):
    """A random model whose biases and gains are random too, so that none of them can be forgotten."""
    hf = tiny_hf(architecture)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return load(hf, tokenizer=tiny_tokenizer())


def raw_logits(model, query, answer):
    """Logits of the unembedding at the positions that predict an answer, before soft-capping."""
    kept: list[torch.Tensor] = []
    ids = torch.tensor([query.prompt + answer[:-1]])
    with torch.no_grad(), model.hooks(("unembed.hook_out", lambda x: kept.append(x[0]))):
        model.logits(ids)
    return kept[0][len(query.prompt) - 1 :].double()


def difference(model, fact, against):
    """The slow way: run the prompt with each distractor, compare at the first token that differs."""
    values = []
    for query in make_queries(model.tokenizer, [fact]):
        right = query.answers[0]
        logits = raw_logits(model, query, right)
        if against == "vocabulary":
            values.append(sum(row[t] - row.mean() for row, t in zip(logits, right, strict=True)) / len(right))
            continue
        parts = []
        for wrong in query.answers[1:]:
            first = next(i for i in range(len(right)) if right[i] != wrong[i])
            row = raw_logits(model, query, wrong)[first]
            parts.append(row[right[first]] - row[wrong[first]])
        values.append(sum(parts) / len(parts))
    return (sum(values) / len(values)).item()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_parts_together_are_the_logit_difference_and_heads_are_the_attention(architecture):
    model = rough_model(architecture)
    for against in ("distractors", "vocabulary"):
        parts = direct_logit_attribution_per_fact(model, FACTS, against=against)
        total = parts.values.double().nansum((1, 2))
        expected = torch.tensor([difference(model, fact, against) for fact in FACTS], dtype=torch.float64)
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
        heads = direct_logit_attribution_per_fact(model, FACTS, by="head", against=against)
        attention = parts.values[:, 1:, parts.labels["component"].index("attn")]
        torch.testing.assert_close(heads.values.sum(-1), attention, atol=1e-4, rtol=1e-4)
        assert heads.values.shape == (len(FACTS), 4, 5) and (heads.values[..., :4].abs() > 1e-6).all()


def test_soft_capped_logits_are_taken_apart_before_the_cap():
    model = rough_model("gemma2")
    assert model.hf.config.final_logit_softcapping
    with torch.no_grad():
        model.held["model.norm.weight"].add_(8.0)  # logits so large that the cap bites
    fact = FACTS[0]
    query = make_queries(model.tokenizer, [fact], "prompt")[0]
    with torch.no_grad():
        capped = model.logits(torch.tensor([query.prompt]))[0, -1]
    raw = raw_logits(model, query, query.answers[0])[0]
    assert (capped - raw).abs().max() > 1.0
    total = direct_logit_attribution_per_fact(model, [fact]).values.nansum().item()
    assert total == pytest.approx(difference(model, fact, "distractors"), abs=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_heads_part_is_its_rows_of_w_o_through_the_frozen_norm_and_the_unembedding(architecture):
    model = rough_model(architecture)
    one = Fact(
        id="x", subject="Anna Lee", relation="born", object="Oslo", prompt="{} was born in", distractors=("Rome",)
    )
    heads = direct_logit_attribution_per_fact(model, [one], by="head")
    (query,) = make_queries(model.tokenizer, [one])
    ids = torch.tensor([query.prompt])
    norm, unembed = model.bridge.ln_final.original_component, model.bridge.unembed.original_component
    kept: dict[str, torch.Tensor] = {}

    def keep(name):
        return (name, lambda x: kept.__setitem__(name, x[0, -1].double()))

    z, final = "blocks.3.attn.o.hook_in", "ln_final.hook_in"
    with torch.no_grad(), model.hooks(keep(z), keep(final)):
        model.logits(ids)
    name = {"gpt2": "transformer.h.3.attn.c_proj.weight", "llama": "model.layers.3.self_attn.o_proj.weight"}
    stored = model.held[name[architecture]].detach().double()
    w_o = stored if architecture == "gpt2" else stored.T
    u = (unembed.weight[query.answers[0][0]] - unembed.weight[query.answers[1][0]]).detach().double()
    x = kept[final]
    centred = x - x.mean() if architecture == "gpt2" else x
    scale = (centred.square().mean() + (1e-5 if architecture == "gpt2" else norm.variance_epsilon)).rsqrt()
    for head in range(4):
        part = kept[z].flatten()[8 * head : 8 * head + 8] @ w_o[8 * head : 8 * head + 8]
        part = part - part.mean() if architecture == "gpt2" else part
        expected = (part * scale * norm.weight.detach().double()) @ u
        assert heads.values[0, 3, head].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_planted_writer_gets_the_whole_difference_and_a_blocked_fact_shows_its_blocker():
    facts = planted_facts()[:FORGOTTEN]
    full = direct_logit_attribution(planted_model(), facts)
    mlp = full.labels["component"].index("mlp")
    assert full.top(1)[0][0] == {"layer": WRITER, "component": "mlp"}
    others = full.values.clone()
    others[1 + WRITER, mlp] = 0
    assert others.nan_to_num().abs().max() < 1e-5 and full.values[1 + WRITER, mlp] > 1
    assert full.n == FORGOTTEN and "logit" in full.unit and (full.low <= full.values + 1e-4)[1:, mlp].all()
    late = direct_logit_attribution(planted_model("late"), facts).values
    assert late[1 + WRITER, mlp] > 1 and late[1 + LAST, mlp] < -1
    unknown = direct_logit_attribution(planted_model("retrained", 1), facts).values
    assert unknown.nan_to_num().abs().max() < 0.2 * full.values[1 + WRITER, mlp]


def test_what_cannot_be_attributed_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no facts"):
        direct_logit_attribution(tiny_model, [])
    with pytest.raises(ValueError, match="by='neuron'"):
        direct_logit_attribution(tiny_model, FACTS, by="neuron")
    lone = Fact(id="lone", subject="Anna", relation="born", object="Rome", prompt="{} was born in")
    with pytest.raises(ValueError, match="'lone' has no distractor"):
        direct_logit_attribution(tiny_model, [lone])
    assert direct_logit_attribution(tiny_model, [lone], against="vocabulary").values.shape == (5, 4)
    shift = Shift(Site(3, "resid_post"), ((5,),), torch.ones(1, 32))
    with (
        pytest.raises(ValueError, match="interventions"),
        Edit(name="shift", base=tiny_model.hash(), interventions=(shift,)).on(tiny_model),
    ):
        direct_logit_attribution(tiny_model, FACTS)


def test_a_residual_stream_that_is_more_than_its_parts_is_refused(tiny_model):
    with (
        pytest.raises(ValueError, match="not the sum"),
        tiny_model.hooks((Site(2, "resid_post"), lambda x: x + 1.0)),
    ):
        direct_logit_attribution(tiny_model, FACTS)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt2"])
def test_in_bfloat16_the_parts_add_up_to_rounding(architecture):
    hf = tiny_hf(architecture)
    exact = load(hf, tokenizer=tiny_tokenizer())
    rounded = load(tiny_hf(architecture).bfloat16(), tokenizer=tiny_tokenizer())
    for by in ("layer", "head"):
        one, two = (direct_logit_attribution(m, FACTS, by=by).values for m in (exact, rounded))
        assert (one - two).nan_to_num().abs().max() < 0.1 * one.nan_to_num().abs().max()
