"""Writeback: a plain reference with transformers hooks, and models of known truth seen from the other side than UDS."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.restoration.states import uds, writeback
from tests.planted import planted_case, planted_model
from tests.tiny import longer, plain_blocks, tiny_case, tiny_facts, tiny_hf, tiny_tokenizer


def plain_margins(full, model, query, where):
    """Margin of one query per layer (embeddings first), with HF hooks on one row per candidate, no code of ours."""

    def states(out):
        return out[0] if isinstance(out, tuple) else out

    def modules(hf):
        body = hf.base_model
        embedding = body.h[0] if hasattr(body, "h") else body.layers[0]
        return [embedding, *plain_blocks(hf)]

    margins = []
    for place in range(len(modules(full))):
        scores = []
        for answer in query.answers:
            ids = torch.tensor([[*query.prompt, *answer[:-1]]])
            a, b = query.span if where == "subject" else (0, len(query.prompt))
            kept = {}

            def keep(x, kept=kept):
                kept["x"] = x.clone()

            def swap(x, kept=kept, a=a, b=b):
                x = x.clone()
                x[0, a:b] = kept["x"][0, a:b]
                return x

            def before(act):
                def hook(module, args, kwargs):
                    x = args[0] if args else kwargs["hidden_states"]
                    new = act(x)
                    if new is None:
                        return None
                    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

                return hook

            def after(act):
                def hook(module, args, out):
                    new = act(states(out))
                    if new is None:
                        return None
                    return (new, *out[1:]) if isinstance(out, tuple) else new

                return hook

            for hf, act in ((full, keep), (model, swap)):
                module = modules(hf)[place]
                if place == 0:
                    handle = module.register_forward_pre_hook(before(act), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(after(act))
                with torch.no_grad():
                    table = hf(ids, use_cache=False).logits[0].log_softmax(-1)
                handle.remove()
            start = len(query.prompt) - 1
            scores.append(sum(table[start + t, token].item() for t, token in enumerate(answer)) / len(answer))
        true, wrong = scores[0], torch.tensor(scores[1:])
        margins.append(true - (wrong.logsumexp(0) - torch.tensor(len(wrong)).log()).item())
    return torch.tensor(margins)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2", "gpt_neox"))
@pytest.mark.parametrize("where", ("prompt", "subject"))
def test_margins_at_every_layer_agree_with_plain_transformers_hooks(architecture, where):
    case = tiny_case(architecture, longer(tiny_facts(["Anna Lee", "Hugo Vale"])), seeds=(1,))
    ready = writeback.prepare(case, where=where)
    assert all({len(a) for a in query.answers} == {1, 2, 3} for query in ready.levels.query_set.queries)
    full, model = tiny_hf(architecture, seed=0), tiny_hf(architecture, seed=1)
    for i, query in enumerate(ready.levels.query_set.queries):
        assert (ready.retrained[0, :, i] - plain_margins(full, model, query, where)).abs().max() < 1e-4


def test_an_early_block_is_seen_that_uds_is_blind_to_and_a_late_one_the_other_way_round():
    case = planted_case(sae=None)
    ready, source = writeback.prepare(case), uds.prepare(case)
    early, late = planted_model("early"), planted_model("late")
    assert (writeback.audit(case, ready, early, "early").recoverability > 0.9).all()
    assert (uds.audit(case, source, early, "early").recoverability < 0.1).all()
    assert (writeback.audit(case, ready, late, "late").recoverability < 0.1).all()
    assert (uds.audit(case, source, late, "late").recoverability > 0.5).all()


def test_full_lost_nothing_and_a_retrained_model_gets_what_the_others_get():
    case = planted_case(sae=None)
    ready = writeback.prepare(case)
    assert (writeback.audit(case, ready, case.full, "full").recoverability == 0).all()
    held = writeback.audit(case, ready, case.retrained[0], "R")
    assert (held.recoverability < 0.1).all() and len(held.score_retrained) == len(case.retrained) - 1
    assert (planted := writeback.audit(case, ready, planted_model("retrained", 9), "R9")).recoverability.max() < 0.1
    assert planted.null.max() < 0.1


def test_the_embeddings_of_the_prompt_written_back_bring_a_model_that_lacks_only_them_back_exactly():
    full = load(tiny_hf("llama", seed=0), tokenizer=tiny_tokenizer())
    changed = load(tiny_hf("llama", seed=0), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        changed.held["model.embed_tokens.weight"].mul_(-1)
    case = tiny_case("llama", tiny_facts(["Anna Lee", "Ben Hill"]), seeds=(1,))
    ready = writeback.prepare(case)
    queries = [q for q in ready.levels.query_set.queries if all(len(a) == 1 for a in q.answers)]
    assert queries
    for arm in ready.arms:
        scores = ready.levels.query_set.margins(changed, arm)[0]
        assert torch.allclose(scores, ready.levels.query_set.margins(full)[0], atol=1e-5)


def test_without_retrained_models_it_is_silent_and_says_why():
    case = planted_case(sae=None, retrained=())
    result = writeback.audit(case, writeback.prepare(case), planted_model("early"), "early")
    assert result.recoverability.isnan().all()
    assert all("needs_retrained" in flags for flags in result.flags)


def test_models_are_left_as_they_were():
    case = planted_case(sae=None)
    model = planted_model("early")
    before = {name: weight.clone() for name, weight in model.held.items()}
    plain = writeback.prepare(case).levels.query_set.margins(model)
    writeback.audit(case, writeback.prepare(case), model, "early")
    assert all(torch.equal(before[name], weight) for name, weight in model.held.items())
    assert torch.equal(plain, writeback.prepare(case).levels.query_set.margins(model))
