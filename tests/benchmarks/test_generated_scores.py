"""RWKU, DUSK, fluency, ConceptVectors behaviour: slow loops, scipy and nltk called by hand, both directions."""

import math
from dataclasses import replace

import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy.stats import entropy

from mech_unlearn.benchmarks.conceptvectors.data import ConceptEntry, load_concepts
from mech_unlearn.benchmarks.conceptvectors.scores import KINDS, answers, behaviour, bleu_method3
from mech_unlearn.benchmarks.dusk.scores import NAMES, Stratum, dusk
from mech_unlearn.benchmarks.muse.scores import knowmem_rouge_l_f1, verbmem_rouge_l_f1
from mech_unlearn.benchmarks.rwku.fluency import (
    fluency_ngram_entropy,
    ngram_entropy,
    weighted_ngram_entropy,
)
from mech_unlearn.benchmarks.rwku.scores import (
    AFFIRMATIVE,
    IN_CONTEXT,
    LEVELS,
    RwkuProbe,
    probe_prompt,
    rouge_l_recall_rwku,
    rwku_rouge_l_recall,
)
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.load import load
from tests.paths import SHARED_DATA
from tests.tiny import tiny_hf, tiny_tokenizer

CONCEPTS = SHARED_DATA / "conceptvectors" / "llama2-7b_concepts_dev.json"


def longest(a, b):
    """Length of the longest common subsequence, by recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest(a[:-1], b[:-1])
    return max(longest(a[:-1], b), longest(a, b[:-1]))


def test_rwku_recall_keeps_letter_case_and_word_forms_and_matches_sentence_by_sentence():
    pairs = [
        ("the King of Maine", "King Maine"),
        ("the king of Maine", "King Maine"),
        ("Maine King", "King Maine"),
        ("he writes horror books now", "a writer of horror"),
        ("", "King"),
    ]
    found = rouge_l_recall_rwku(*zip(*pairs))
    slow = [longest(g.split(), r.split()) / len(r.split()) for g, r in pairs]
    assert found.tolist() == pytest.approx(slow) and slow == [1, 0.5, 0.5, 0.25, 0]
    assert rouge_l_recall_rwku(["Maine. King it is."], ["King of Maine."]).tolist() == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match="references"):
        rouge_l_recall_rwku(["a"], [])


def test_each_kind_of_probe_has_its_layout():
    told = {level: f"do {level}" for level in ("fill_in", "question", "adversarial")}
    plain = tiny_tokenizer()
    ask = lambda **k: probe_prompt(plain, RwkuProbe(**({"query": "who?", "answer": "x"} | k)), told)  # noqa: E731
    assert ask(level="fill_in") == "do fill_in\nQuestion: who?\nAnswer:"
    assert ask(level="adversarial", kind="synonym") == "do adversarial\nQuestion: who?\nAnswer:"
    assert ask(level="adversarial", kind=AFFIRMATIVE) == "do adversarial\nQuestion: who?"
    assert ask(level="adversarial", kind=IN_CONTEXT) == "do adversarial\nwho?\nAnswer:"
    chat = tiny_tokenizer()
    chat.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %} says :"
    got = probe_prompt(chat, RwkuProbe(query="who?", answer="x", level="question"), told)
    assert got == "[do question\nQuestion: who?\n] says :Answer:"
    assert chat(got)["input_ids"].count(chat.bos_token_id) == 1
    for bad, reason in (({"level": "other"}, "unknown level"), ({"answer": " "}, "query and an answer")):
        with pytest.raises(ValueError, match=reason):
            replace(RwkuProbe(query="who?", answer="x", level="question"), **bad)


def test_rwku_reports_levels_and_kinds_apart(tiny_model):
    kinds = ("synonym", "role play", "synonym")
    probes = [RwkuProbe(query=f"Anna Lee {i}", answer="x", level="adversarial", kind=k) for i, k in enumerate(kinds)]
    probes += [RwkuProbe(query="Ben Hill", answer="x", level="fill_in", cluster="Ben"), probes[0]]
    told: dict[str, str] = dict.fromkeys(LEVELS, "The")
    texts = rwku_rouge_l_recall(tiny_model, probes, instructions=told, max_new_tokens=5)
    assert set(texts) == {"adversarial", "fill_in", "adversarial: synonym", "adversarial: role play"}
    assert texts["adversarial"].mean().n == 4 and texts["adversarial: synonym"].mean().n == 3
    assert texts["fill_in"].clusters == ("Ben",) and texts["fill_in"].mean().value == 0
    knows = [replace(probes[3], answer=texts["fill_in"].texts[0])]
    assert rwku_rouge_l_recall(tiny_model, knows, instructions=told, max_new_tokens=5)["fill_in"].values.tolist() == [1]


@pytest.mark.slow
def test_dusk_is_muses_two_scores_on_its_strata(tiny_model):
    pairs = (("Anna ?", "Paris"), ("Ben ?", "Rome"))
    forget, shared, retain = (
        Stratum(pairs=pairs[:1]),
        Stratum(pairs=pairs, clusters=("a", "b")),
        Stratum(pairs=pairs[1:]),
    )
    short = (("Rivers", "run to the sea"),)
    with pytest.raises(ValueError, match="64 positions"):  # 128 greedy tokens do not fit into the tiny model
        dusk(tiny_model, forget, shared, retain, Stratum(pairs=short), ())
    hf = tiny_hf("llama")
    hf.config.max_position_embeddings = 512  # rotary positions: nothing to be learnt
    model = load(hf, tokenizer=tiny_tokenizer())
    found = dusk(model, forget, shared, retain, Stratum(pairs=short), pairs[:1])
    assert tuple(found) == NAMES and found["knowmem_shared"].mean().n == 2
    slow = knowmem_rouge_l_f1(model, ["Ben ?"], ["Rome"], pairs[:1])
    assert found["knowmem_unique_retain"].values.tolist() == slow.values.tolist()
    assert found["verbmem_forget"].texts == verbmem_rouge_l_f1(model, ["Rivers"], ["run to the sea"]).texts
    with pytest.raises(ValueError, match="two kinds"):
        found["verbmem_forget"].minus(found["knowmem_unique_forget"])
    for bad, reason in (({"pairs": ()}, "at least one pair"), ({"pairs": short, "clusters": ()}, "0 clusters")):
        with pytest.raises(ValueError, match=reason):
            Stratum(**bad)


def test_ngram_entropy_is_shannons_in_bits_and_zero_for_a_text_that_repeats_itself():
    assert ngram_entropy(["a", "b", "c", "d", "e"], 2) == 2.0
    assert ngram_entropy(["a"] * 50, 2) == 0.0 and ngram_entropy(["a"], 2) == 0.0
    words = ["a", "b", "a", "b", "a", "c", "a", "b"]
    assert ngram_entropy(words, 2) == pytest.approx(entropy([3, 2, 1, 1], base=2))
    text = "the sea is wide, the sea is deep"
    split = ["the", "sea", "is", "wide", ",", "the", "sea", "is", "deep"]
    two, three = ngram_entropy(split, 2), ngram_entropy(split, 3)
    assert weighted_ngram_entropy(text) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2)
    assert weighted_ngram_entropy("sea " * 200) == 0 and weighted_ngram_entropy("") == 0
    looping = " ".join(f"w{i % 10}" for i in range(200))
    assert weighted_ngram_entropy(looping) == pytest.approx(math.log2(10), rel=0.01)


def test_a_model_that_repeats_one_word_has_no_entropy_and_lies_below_the_full_one(tiny_model):
    prompts = ("Anna Lee was born in", "Rivers run to", "rain falls on the")
    full = fluency_ngram_entropy(tiny_model, prompts, max_new_tokens=20)
    assert full.texts == continuations(tiny_model, prompts, 20)
    assert full.values.tolist() == pytest.approx([weighted_ngram_entropy(text) for text in full.texts])
    varied = replace(full, values=torch.tensor([6.0, 7.0, 5.5], dtype=torch.float64))
    one = tiny_model.held["lm_head.weight"][tiny_model.tokenizer.convert_tokens_to_ids("sea")]
    with tiny_model.hooks(("ln_final.hook_out", lambda x: 0 * x + one)):
        stuck = fluency_ngram_entropy(tiny_model, prompts, max_new_tokens=20)
    assert stuck.values.tolist() == [0, 0, 0] and stuck.minus(varied).ci[1] < 0 == varied.minus(varied).value
    with pytest.raises(ValueError, match="two kinds"):
        fluency_ngram_entropy(tiny_model, prompts, max_new_tokens=3).minus(varied)


def entry(concept, questions, halves, unrelated):
    return ConceptEntry(
        concept=concept, layer=0, dim=0, qa=questions, completions=halves, text="rain", unrelated_qa=unrelated
    )


ENTRIES = (
    entry("sea", ("what is the sea ?", "is the sea in Oslo ?"), (("Rivers run to", "the sea"),), ("Anna ?",)),
    entry("rain", ("what is rain ?",), (), ("Ben ?", "Cara ?")),
)


def test_bleu_is_nltks_with_smoothing_three():
    texts = ["rain falls on the hills and the sea", "rain falls", "", "wholly other words here"]
    reference = "rain falls on hills and on the sea"
    smooth = SmoothingFunction().method3
    slow = [sentence_bleu([reference.split()], t.split(), smoothing_function=smooth) for t in texts]
    assert bleu_method3(texts, [reference] * 4).tolist() == pytest.approx(slow)
    assert bleu_method3([reference], [reference]).tolist() == pytest.approx([1]) and slow[2] == slow[3] == 0
    with pytest.raises(ValueError, match="references"):
        bleu_method3([], [])


def test_a_model_behaves_like_itself_and_less_so_when_it_is_changed(tiny_model):
    full = answers(tiny_model, ENTRIES, max_new_tokens=8)
    assert tuple(full) == KINDS and full["completion"]["rain"] == ()
    assert full["qa"]["rain"] == continuations(tiny_model, ["Question: what is rain ?\nAnswer:"], 8)
    assert full["completion"]["sea"] == continuations(tiny_model, ["Rivers run to"], 8)
    same = behaviour(full, full)
    assert set(same) == {f"{m}_{k}" for m in ("bleu", "rouge_l_f1") for k in KINDS}
    for scores in same.values():
        for value, text in zip(scores.values.tolist(), scores.texts):
            assert value == pytest.approx(1) or len(text.split()) < 4  # a short text has no 4-grams
    assert same["bleu_qa"].clusters == ("sea", "sea", "rain") and same["bleu_completion"].mean().n == 1
    with tiny_model.hooks(("blocks.3.hook_resid_post", lambda x: -x)):
        other = behaviour(answers(tiny_model, ENTRIES, max_new_tokens=8), full)
    assert other["bleu_qa"].minus(same["bleu_qa"]).value < 0
    with pytest.raises(ValueError, match="two kinds"):
        same["bleu_qa"].minus(same["rouge_l_f1_qa"])


def test_texts_of_other_concepts_repeated_concepts_and_bad_layouts_are_refused(tiny_model):
    with pytest.raises(ValueError, match="qa: the two models were not asked the same"):
        behaviour({"qa": {"sea": ("a",)}}, {"qa": {"sea": ("a", "b")}})
    with pytest.raises(ValueError, match="texts of completion against texts of qa"):
        behaviour({"completion": {}}, {"qa": {}})
    with pytest.raises(ValueError, match="each once"):
        answers(tiny_model, ENTRIES[:1] * 2)
    with pytest.raises(ValueError, match="lacks"):
        answers(tiny_model, ENTRIES, layout="Answer:")


@pytest.mark.skipif(not CONCEPTS.is_file(), reason=f"no concepts in {CONCEPTS}: set MECH_UNLEARN_DATA")
def test_the_published_concepts_can_be_asked():
    real = load_concepts(CONCEPTS)[:2]
    said = {kind: {e.concept: ("a b c d",) * 3 for e in real} for kind in KINDS}
    found = behaviour(said, said)
    assert all(isinstance(s, RowScores) and s.mean().n == 6 and s.mean().value == 1 for s in found.values())
