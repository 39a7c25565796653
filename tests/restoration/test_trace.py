"""The trace detector: chance where nothing differs, high where everything does, silent about single facts."""

import pytest
import torch
from conftest import tiny_hf, tiny_tokenizer
from planted import fresh_planted_model, planted_case, planted_model

from mech_unlearn.model import load
from mech_unlearn.restoration import trace

TEXTS = tuple(
    f"{a} {b} {c}" for a in ("Rivers", "rain", "hills") for b in ("falls", "run", "on") for c in ("sea", "and")
)


def test_a_model_against_itself_is_at_chance_and_a_heldout_retrained_one_exceeds_the_others_by_nothing():
    case = planted_case(sae=None, texts=TEXTS)
    ready = trace.prepare(case)
    assert trace.audit(case, ready, planted_model(), "full").columns["auc"][0].item() == pytest.approx(0.5)
    assert trace.audit(case, ready, case.retrained[0], "R").columns["excess"].abs().max() < 0.1


def test_two_unlike_models_are_told_apart_and_labels_dealt_at_random_are_not():
    sharp = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        sharp.held["lm_head.weight"].mul_(3)
    a, b = (trace.features(m, TEXTS) for m in (sharp, load(tiny_hf("llama"), tokenizer=tiny_tokenizer())))
    assert trace.trace_auc(a, b) > 0.95
    noise = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert abs(trace.trace_auc(noise[:200], noise[200:]) - 0.5) < 0.1


def test_a_model_changed_everywhere_leaves_a_trace_and_no_fact_is_spoken_of():
    case, changed = planted_case(sae=None, texts=TEXTS), fresh_planted_model()
    with torch.no_grad():
        changed.held["lm_head.weight"][:, :9].add_(1.0)
    found = trace.audit(case, trace.prepare(case), changed, "changed")
    assert found.recoverability.isnan().all() and all("model_level_only" in f for f in found.flags)


def test_texts_that_name_the_forgotten_are_left_out_and_too_few_are_refused():
    case = planted_case(sae=None, texts=(*TEXTS, "Anna and Ben", "run to Paris"))
    assert set(trace.irrelevant_texts(case)) == set(TEXTS)
    with pytest.raises(ValueError, match="Case\\(texts"):
        trace.prepare(planted_case(sae=None, texts=TEXTS[:3]))
