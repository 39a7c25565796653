"""The trace detector: chance where nothing differs, high where everything does, silent about single facts."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.metrics.membership import BATCH_TOKENS, text_scores
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import encode
from mech_unlearn.restoration.engine.case import irrelevant_texts
from mech_unlearn.restoration.outputs import trace
from tests.planted import fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

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
    case = planted_case(sae=None, texts=TEXTS, retrained=(fresh_planted_model(), fresh_planted_model()))
    changed = fresh_planted_model()
    with torch.no_grad():
        changed.held["lm_head.weight"].mul_(3)
    found = trace.audit(case, trace.prepare(case), changed, "changed")
    assert found.recoverability.isnan().all() and all("model_level_only" in f for f in found.flags)
    assert (found.score_raw > 0.95).all() and (found.columns["auc_R"] == 0.5).all()
    torch.testing.assert_close(found.columns["excess"], found.score_raw - 0.5)


def test_names_and_answers_count_as_whole_words_only_and_in_any_case():
    (fact,) = tiny_facts(["Al of Lee"], ("born",))
    case = planted_case(sae=None, facts=(replace(fact, aliases=("Mr. Al", "Lee")),))
    fine = ("Also hills of Leeds", "al or the rest of it", "Parisian rain")
    named = ("so said AL OF LEE.", "it was Mr. Al, again", "Lee's hills", "in paris: rain")
    assert irrelevant_texts(replace(case, texts=(*fine, *named, *fine))) == list(fine)


def test_a_text_longer_than_the_models_positions_is_read_in_pieces_to_its_end():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    short, long = "rain falls on the hills", " ".join(["Rivers run to the sea and"] * 25)
    ids = encode(model.tokenizer, long).ids
    assert len(ids) > 2 * 64
    got = trace.features(model, [long, short])
    pieces = [[ids[0], *ids[i : i + 63]] for i in range(1, len(ids), 63)]  # each begins with the BOS
    tables = [tiny_hf("llama")(torch.tensor([piece])).logits[0].log_softmax(-1) for piece in pieces]
    table = torch.cat(tables).detach()
    want = torch.cat([table.topk(trace.TOP_LOGPROBS).values.mean(0), -(table.exp() * table).sum(-1).mean()[None]])
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], trace.features(model, [short])[0])


def test_no_batch_holds_more_distributions_than_allowed(monkeypatch):
    model, seen, plain = load(tiny_hf("llama"), tokenizer=tiny_tokenizer()), [], Model.logits

    def watched(self, ids, *rest):
        seen.append(ids.numel())
        return plain(self, ids, *rest)

    monkeypatch.setattr(Model, "logits", watched)
    texts = [
        f"{a} {b} {c} rain falls on the hills" for a in TEXTS for b in ("Rome", "Oslo") for c in ("of", "is", "in")
    ]
    for read in (trace.features, text_scores):
        seen.clear()
        read(model, texts)
        assert len(seen) > 1 and max(seen) <= BATCH_TOKENS


def test_texts_that_name_the_forgotten_are_left_out_and_too_few_are_refused():
    case = planted_case(sae=None, texts=(*TEXTS, "Anna and Ben", "run to Paris"))
    assert set(irrelevant_texts(case)) == set(TEXTS)
    with pytest.raises(ValueError, match="Case\\(texts"):
        trace.prepare(planted_case(sae=None, texts=TEXTS[:3]))
