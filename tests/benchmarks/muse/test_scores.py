"""MUSE's metrics against rouge-score by hand, a plain greedy loop and published numbers; AUC against scikit-learn."""

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from mech_unlearn.benchmarks.muse.privacy import membership_auc, privleak_min_k
from mech_unlearn.benchmarks.muse.scores import (
    STOPS,
    few_shot_prompt,
    knowmem_rouge_l_f1,
    privleak_against_published,
    rouge_l_f1,
    verbmem_rouge_l_f1,
)
from mech_unlearn.metrics.generation import continuations, cut
from mech_unlearn.metrics.membership import privleak, text_scores
from mech_unlearn.model.load import load
from tests.tiny import tiny_hf, tiny_tokenizer


def plain_greedy(hf, tokenizer, prompt, count):
    """Greedy text by the plain model, one token at a time."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = hf(ids).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_rouge_f1_is_of_unstemmed_words_in_order():
    found = rouge_l_f1(["Anna writes books", "Anna write a book", "", "books"], ["Anna writes books"] * 4)
    assert found.tolist() == pytest.approx([1, 2 / 7, 0, 0.5])  # stemmed, the second would be 6 / 7
    for bad in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="references"):
            rouge_l_f1(*bad)


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_verbmem_scores_the_greedy_continuation_against_the_cut_reference(architecture):
    model, hf, tokenizer = (
        load(tiny_hf(architecture), tokenizer=tiny_tokenizer()),
        tiny_hf(architecture),
        tiny_tokenizer(),
    )
    prompts = ("Anna Lee was born in", "Rivers run to", "rain falls on the")
    wanted = [plain_greedy(hf, tokenizer, prompt, 8) for prompt in prompts]
    assert continuations(model, prompts, 8) == tuple(wanted)
    references = (wanted[0], "the sea and the rivers run to the sea", wanted[2] + " rain" * 20)
    got = verbmem_rouge_l_f1(model, prompts, references, max_new_tokens=8, clusters=("a", "b", "b"))
    short = [str(tokenizer.decode(tokenizer(r)["input_ids"][:8], skip_special_tokens=True)) for r in references]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    slow = [scorer.score(r, w)["rougeL"].fmeasure for r, w in zip(short, wanted)]
    assert got.values.tolist() == pytest.approx(slow) and got.texts == tuple(wanted)
    assert got.mean().n == 3 and "VerbMem" in got.unit and "no stemmer" in got.unit
    assert len(references[2].split()) > 20 > len(short[2].split())


def test_a_model_that_knows_the_passage_scores_one_and_one_that_writes_something_else_less(tiny_model):
    prompts = ("Anna Lee was born in", "Rivers run to")
    own = continuations(tiny_model, prompts, 6)
    known = verbmem_rouge_l_f1(tiny_model, prompts, own, max_new_tokens=30)
    with tiny_model.hooks(("blocks.3.hook_resid_post", lambda x: -x)):
        lost = verbmem_rouge_l_f1(tiny_model, prompts, own, max_new_tokens=30)
    assert lost.mean().value < known.mean().value and lost.minus(known).value < 0


def test_an_answer_ends_at_a_blank_line_or_the_next_question():
    assert cut("Oslo\n\nQuestion: and?", STOPS) == "Oslo"
    assert cut("Oslo\nQuestion two", STOPS) == "Oslo" and cut("Oslo Question: two", STOPS) == "Oslo "
    assert cut("Oslo\nis it", STOPS) == "Oslo\nis it" and cut("", STOPS) == ""


def test_knowmem_asks_after_solved_examples(tiny_model):
    shown = (("Anna ?", "Paris"), ("Ben ?", "Rome"))
    prompt = few_shot_prompt("Cara ?", shown)
    assert prompt == "Question: Anna ?\nAnswer: Paris\n\nQuestion: Ben ?\nAnswer: Rome\n\nQuestion: Cara ?\nAnswer: "
    got = knowmem_rouge_l_f1(tiny_model, ["Cara ?"], ["Oslo"], shown[:1], max_new_tokens=4)
    text = plain_greedy(tiny_hf("llama"), tiny_tokenizer(), few_shot_prompt("Cara ?", shown[:1]), 4)
    assert got.texts == (cut(text, STOPS),) and "1-shot" in got.unit
    own = knowmem_rouge_l_f1(tiny_model, ["Cara ?"], list(got.texts), shown[:1], max_new_tokens=4)
    assert own.values.tolist() == [1.0]


def test_rows_that_do_not_match_and_prompts_that_are_missing_or_too_long_are_refused(tiny_model):
    with pytest.raises(ValueError, match="1 prompts but 2 references"):
        verbmem_rouge_l_f1(tiny_model, ["Anna"], ["a", "b"])
    with pytest.raises(ValueError, match="2 questions but 1 answers"):
        knowmem_rouge_l_f1(tiny_model, ["a", "b"], ["a"], ())
    with pytest.raises(ValueError, match="0 prompts"):
        continuations(tiny_model, [], 4)
    with pytest.raises(ValueError, match="has 64 positions"):
        verbmem_rouge_l_f1(tiny_model, ["Anna"], ["a"])
    with pytest.raises(ValueError, match="prompt 1 holds no token"):
        continuations(load(tiny_hf("llama"), tokenizer=tiny_tokenizer(bos=False)), ["Anna", " "], 2)


def test_privleak_has_the_published_orientation_and_retrained_aucs():
    assert privleak_against_published(1 - 0.4772, "news") == pytest.approx(0)
    assert privleak_against_published(1 - 0.5393, "books") == pytest.approx(0)
    # The published -99.81 (News) and -57.26 (Books) of the full models are AUCs of .9991 and .7695: members
    assert privleak_against_published(1 - 0.0009, "news") == pytest.approx(-99.81, abs=0.01)
    assert privleak_against_published(1 - 0.2305, "books") == pytest.approx(-57.26, abs=0.01)
    assert privleak_against_published(0.0, "news") > 100  # over-unlearned: held-out texts look more like members
    with pytest.raises(ValueError, match="news, books"):
        privleak_against_published(0.5, "papers")
    with pytest.raises(ValueError, match="between 0 and 1"):
        privleak_against_published(1.5, "news")


def auc(forget, heldout):
    return roc_auc_score([0] * len(forget) + [1] * len(heldout), torch.cat([forget, heldout]))


def groups(shift, n=60, m=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g).round(decimals=1) - shift, torch.randn(m, generator=g).round(decimals=1)


def test_the_auc_is_that_of_scikit_learn_with_ties_and_its_interval_that_of_slow_resampling():
    forget, heldout = groups(0.8)
    got = membership_auc(forget, heldout, "min_k")
    labels = [0] * 60 + [1] * 50
    assert got.value == pytest.approx(roc_auc_score(labels, torch.cat([forget, heldout])), abs=1e-9) and got.n == 110
    g, slow = torch.Generator().manual_seed(5), []
    for _ in range(500):
        a, b = (x[torch.randint(len(x), (len(x),), generator=g)] for x in (forget, heldout))
        slow.append(roc_auc_score(labels, torch.cat([a, b])))
    low, high = torch.tensor(slow).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert got.ci == pytest.approx((low, high), abs=0.02) and got.ci[0] > 0.5
    assert membership_auc(*groups(0.0), "min_k").ci[0] < 0.5 < membership_auc(*groups(0.0), "min_k").ci[1]


def test_privleak_is_zero_for_the_retrained_model_itself_and_negative_for_one_that_still_knows():
    retrained, member = groups(0.1), groups(2.0)
    same = privleak_min_k(*retrained, *retrained)
    assert same.value == 0 and same.ci == (0, 0)
    leak = privleak_min_k(*member, *retrained)
    assert leak.value == pytest.approx(privleak(auc(*member), auc(*retrained)), abs=1e-3) and leak.ci[1] < 0
    with pytest.raises(ValueError, match="same texts"):
        privleak_min_k(member[0][:5], member[1], *retrained)
    with pytest.raises(ValueError, match="undefined"):
        privleak_min_k(*member, retrained[0] - 100, retrained[1])


def test_scores_that_are_no_numbers_or_missing_are_refused():
    for bad in (torch.empty(0), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="held-out"):
            membership_auc(torch.ones(3), bad, "loss")
        with pytest.raises(ValueError, match="forget"):
            membership_auc(bad, torch.ones(3), "loss")


def test_the_attacks_of_the_audit_feed_the_metric(tiny_model):
    found = text_scores(tiny_model, ["Anna Lee was born in Paris", "rain falls on hills", "Rivers run to the sea ."])
    for attack, values in found.items():
        assert 0 <= membership_auc(values[:1], values[1:], attack).value <= 1
