"""Path patching against hand-written hooks, and its two ends: paths that exist and paths that are cut."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.locate.patching.pairs import make_pairs
from mech_unlearn.locate.patching.path_patching import path_patching, path_patching_per_fact
from mech_unlearn.model.load import load
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FACTS = tiny_facts(["Anna Lee", "Ben Hill"], ["born"])


def states(model, ids, sites):
    kept = {}
    with torch.no_grad(), model.hooks(*((s, lambda x, s=s: kept.__setitem__(s, x)) for s in sites)):
        logits = model.logits(ids)
    return kept, logits


def logprob(logits, query):
    start = len(query.prompt) - 1
    table = logits.log_softmax(-1)[0]
    return torch.stack([table[start + t, token] for t, token in enumerate(query.answers[0])]).mean()


@torch.no_grad()
def plain(model, pair, sender, receivers, through, mlps):
    """The effect of one sender in the noise direction, by whole forward passes."""
    base, source = (torch.tensor([q.full[:-1]]) for q in (pair.own, pair.other))
    layers = range(model.n_layers)
    sites = [Site(i, kind) for i in layers for kind in ("z", "mlp_out")]
    own, clean = states(model, base, sites)
    theirs, _ = states(model, source, sites)
    layer, head = sender

    def send(x):
        x = x.clone()
        x[:, :, head] = theirs[Site(layer, "z")][:, :, head]
        return x

    writes = [(Site(layer, "z"), send)]
    writes += [(Site(i, "z"), lambda _, i=i: own[Site(i, "z")]) for i in layers if i > layer]
    if mlps == "frozen":
        writes += [(Site(i, "mlp_out"), lambda _, i=i: own[Site(i, "mlp_out")]) for i in layers]
    goals = sorted({Site(i, through) for i, _ in receivers})
    with model.hooks(*writes):
        got, logits = states(model, base, goals)
    if receivers:

        def receive(x, site):
            x = x.clone()
            for i, h in receivers:
                if Site(i, through) == site:
                    x[:, :, h] = got[site][:, :, h]
            return x

        with model.hooks(*((site, lambda x, site=site: receive(x, site)) for site in goals)):
            logits = model.logits(base)
    return logprob(logits, pair.own) - logprob(clean, pair.own)


CASES = [
    ("llama", (), "q", "frozen"),
    ("llama", ((3, 1), (2, 0)), "q", "recomputed"),
    ("llama", ((3, 1),), "v", "frozen"),
    ("gpt2", ((2, 3),), "k", "frozen"),
    ("gpt_neox", (), "q", "recomputed"),
    ("gemma2", ((3, 0),), "q", "frozen"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("architecture", "receivers", "through", "mlps"), CASES)
def test_every_direct_path_equals_whole_forward_passes_with_everything_else_held(
    architecture, receivers, through, mlps
):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    ours = path_patching_per_fact(model, FACTS, receivers=receivers, through=through, mlps=mlps)
    top = max((layer for layer, _ in receivers), default=model.n_layers)
    for i, pair in enumerate(make_pairs(model, FACTS)):
        for layer in range(model.n_layers):
            for head in range(4):
                value = ours.values[i, layer, head]
                if layer >= top:
                    assert value.isnan()
                else:
                    expected = plain(model, pair, (layer, head), receivers, through, mlps)
                    torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-3)
    assert ours.values.nan_to_num().abs().max() > 1e-3


def test_a_head_whose_output_is_not_read_has_no_path(tiny_model):
    """With the columns of its output matrix at zero, head 2 of layer 1 reaches nothing; the others do."""
    weight = tiny_model.held["model.layers.1.self_attn.o_proj.weight"]
    with torch.no_grad():
        weight[:, 16:24] = 0
    found = path_patching(tiny_model, FACTS, mlps="recomputed")
    assert found.axes == ("layer", "head") and found.n == 2
    assert found.values[1, 2].abs() < 1e-5 and found.values[1, [0, 1, 3]].abs().min() > 1e-5


def test_heads_that_do_not_exist_are_refused(tiny_model):
    with pytest.raises(ValueError, match="layers 1..3 that can receive, 2 heads at v"):
        path_patching(tiny_model, FACTS, receivers=[(1, 3)], through="v")
    with pytest.raises(ValueError, match="layers 1..3 that can receive"):
        path_patching(tiny_model, FACTS, receivers=[(0, 0)])
    with pytest.raises(ValueError, match="choose q, k or v"):
        path_patching(tiny_model, FACTS, through="z")
