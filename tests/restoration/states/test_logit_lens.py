"""Logit lens as a test: equal to the output at the top, to plain transformers below it, and right on planted truth."""

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.states import logit_lens
from tests.planted import UNKNOWN, fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


def tiny_case(architecture, dtype=torch.float32, **changes):
    models = [load(tiny_hf(architecture, seed=s).to(dtype), tokenizer=tiny_tokenizer()) for s in (0, 1, 2)]
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    return Case(full=models[0], retrained=tuple(models[1:]), facts=facts, **changes)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama", "gemma2", "qwen3", "olmo2"))
def test_at_the_last_layer_the_lens_is_the_output(architecture):
    case = tiny_case(architecture)
    asked = logit_lens.ask(case, None)
    curve = logit_lens.lens_curve(case, asked, logit_lens.read_states(case, asked, case.full), case.full)
    output = score(case.full, asked.queries).logprob[:, 0]
    torch.testing.assert_close(curve[-1], output, atol=1e-5, rtol=1e-5)


def test_below_the_last_layer_it_is_the_final_norm_and_unembedding_of_plain_transformers():
    case = tiny_case("llama")
    asked = logit_lens.ask(case, None)
    model = case.retrained[0]
    ours = logit_lens.lens_curve(case, asked, logit_lens.read_states(case, asked, model), case.full)
    decoder, source = tiny_hf("llama", seed=0), tiny_hf("llama", seed=1)
    for i, query in enumerate(asked.queries):
        answer, start = query.answers[0], len(query.prompt) - 1
        with torch.no_grad():
            states = source(torch.tensor([query.full[:-1]]), output_hidden_states=True).hidden_states[2][0]
            table = decoder.lm_head(decoder.model.norm(states)).log_softmax(-1)
        want = sum(table[start + t, token].item() for t, token in enumerate(answer)) / len(answer)
        assert ours[1, i].item() == pytest.approx(want, abs=1e-5)


def test_full_is_intact_and_a_heldout_retrained_model_is_not_in_both_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        case = tiny_case("llama", dtype)
        ready = logit_lens.prepare(case)
        found = logit_lens.audit(case, ready, case.full, "full")
        heard = found.recoverability[~found.recoverability.isnan()]
        assert len(heard) and (heard == 1).all()  # NaN where random models do not differ
        assert found.curves["logprob"].isfinite().all() and found.columns["top_k"].isfinite().all()
    case = planted_case(sae=None)
    ready = logit_lens.prepare(case)
    result = logit_lens.audit(case, ready, case.retrained[0], "R")
    assert (result.recoverability < 0.1).all() and len(result.score_retrained) == 2
    assert (result.null < 0.1).all() and result.null.shape == (3, 4)


def test_a_late_block_is_seen_below_it_and_an_early_block_is_not():
    case = planted_case(sae=None)
    ready = logit_lens.prepare(case)
    late, early = (logit_lens.audit(case, ready, planted_model(t), t) for t in ("late", "early"))
    assert (late.recoverability > 0.4).all() and (early.recoverability < 0.1).all()
    assert (late.curves["logprob"][2] > late.curves["logprob_R"][2] + 1).all()
    assert (late.curves["logprob"][3] < late.curves["logprob"][2] - 1).all()


def test_the_decoder_is_fulls_own_so_an_edit_of_the_unembedding_does_not_act_but_the_attack_reads_through_it():
    case, blind = planted_case(sae=None), fresh_planted_model()
    with torch.no_grad():
        blind.held["lm_head.weight"].zero_()
    ready = logit_lens.prepare(case, top_k=1)
    result = logit_lens.audit(case, ready, blind, "blind")
    assert (result.recoverability > 0.999).all()
    assert (result.columns["top_k"] == 0).all() and (result.columns["top_k_R"] == 0).all()
    assert (logit_lens.audit(case, ready, case.full, "full").columns["top_k"] == 1).all()
    assert (logit_lens.audit(case, ready, planted_model("late"), "late").columns["top_k"] == 1).all()


def test_a_leak_asks_for_every_token_of_the_answer_at_one_layer():
    case = tiny_case("llama")
    asked = logit_lens.ask(case, None)
    states = logit_lens.read_states(case, asked, case.full)
    everything = logit_lens.top_k_leaks(case, asked, states, case.full, top_k=10_000)
    assert (everything == 1).all()
    hf = tiny_hf("llama")
    for k in (1, 5, 20):
        got = logit_lens.top_k_leaks(case, asked, states, case.full, top_k=k)
        for i, query in enumerate(asked.queries):
            answer, start = query.answers[0], len(query.prompt) - 1
            with torch.no_grad():
                hidden = hf(torch.tensor([query.full[:-1]]), output_hidden_states=True).hidden_states
                tables = [hf.lm_head(hf.model.norm(hidden[3])[0]), hf.lm_head(hidden[4])[0]]  # the last is normed
            ranks = [[int((t[start + j] > t[start + j, a]).sum()) for j, a in enumerate(answer)] for t in tables]
            assert got[i].item() == float(any(max(r) < k for r in ranks))


def test_logits_that_are_no_numbers_are_no_leak():
    case, broken = planted_case(sae=None), fresh_planted_model()
    asked = logit_lens.ask(case, None)
    states = logit_lens.read_states(case, asked, broken)
    assert (logit_lens.top_k_leaks(case, asked, states, broken, top_k=1) == 1).all()
    states[-1] = torch.nan  # the answer stands in layer 2 already
    assert (logit_lens.top_k_leaks(case, asked, states, broken, top_k=1) == 1).all()
    with torch.no_grad():
        broken.held["lm_head.weight"][5] = torch.nan
    found = logit_lens.audit(case, logit_lens.prepare(case), broken, "broken")
    assert found.columns["top_k"].isnan().all()


@pytest.mark.parametrize("unknown", (UNKNOWN, ()))
def test_without_retrained_models_stand_ins_give_the_level_of_ignorance(unknown):
    names = tuple(Entity(name=n) for n in unknown)
    case = planted_case(sae=None, retrained=(), unknown=names)
    ready = logit_lens.prepare(case)
    late = logit_lens.audit(case, ready, planted_model("late"), "late")
    assert late.grade == "B" and (late.recoverability > 0.4).all()
    assert (logit_lens.audit(case, ready, planted_model("early"), "early").recoverability < 0.3).all()


def test_interventions_in_force_are_read():
    from mech_unlearn.core import Site
    from mech_unlearn.edit.interventions import Shift

    case, twin = planted_case(sae=None), fresh_planted_model()
    ready = logit_lens.prepare(case)
    tokens = tuple((twin.tokenizer.convert_tokens_to_ids(fact.subject),) for fact in case.facts)
    shift = Shift(Site(2, "resid_post"), tokens, torch.full((4, 64), -0.5) * (torch.arange(64) >= 32))
    with Edit(name="shift", base=twin.hash(), deltas={}, interventions=(shift,), recipe={}).on(twin):
        moved = logit_lens.audit(case, ready, twin, "moved")
    assert (moved.curves["logprob"][2:] != moved.curves["logprob_F"][2:]).any()
    with pytest.raises(ValueError, match="top_k"):
        logit_lens.prepare(case, top_k=0)
