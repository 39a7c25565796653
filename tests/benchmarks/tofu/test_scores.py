"""TOFU's metrics: closed forms, slow references, the published logs to 1e-9; no batch changes teacher forcing."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp

from mech_unlearn.benchmarks.tofu.aggregate import (
    ORDER,
    aggregate,
    bench_tofu,
    measure,
    question_note,
    same_questions,
)
from mech_unlearn.benchmarks.tofu.logs import LOG_KEYS, EvalLog, LogSplit, read_log
from mech_unlearn.benchmarks.tofu.scores import (
    forget_quality,
    model_utility,
    probability_among_options,
    resample,
    resampled_forget_quality,
    resampled_utility,
)
from mech_unlearn.metrics.memorization import (
    answer_loss,
    answer_probability,
    exact_memorization,
    extraction_strength,
    labels_of,
)
from mech_unlearn.metrics.rouge import rouge_recall
from mech_unlearn.metrics.truth_ratio import (
    closeness_to_one,
    true_preferred,
    truth_ratio_arithmetic,
    truth_ratio_geometric,
    truth_ratio_normalized,
)
from tests.paths import SHARED_DATA
from tests.tiny import tiny_hf

DATA = SHARED_DATA / "tofu"
LOGS = {name: DATA / f"llama2-7b_{name}_eval_log.json.gz" for name in ("full", "retain90")}
published = pytest.mark.skipif(
    not LOGS["full"].is_file(), reason=f"no logs in {DATA}: set MECH_UNLEARN_DATA to the folder that holds tofu/"
)


def random_split(n=40, seed=0, texts=None, **shift):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return LogSplit(
        rows=tuple(map(str, range(n))),
        gt_loss=rand(n) + shift.get("gt", 0),
        paraphrased_loss=rand(n) + shift.get("paraphrased", 0),
        perturbed_loss=2 * rand(n, 3),
        rouge_l_recall=rand(n),
        texts=texts,
    )


def random_log(seed=0, n=40, texts=None, **shift):
    return EvalLog(path="", splits={name: random_split(n, seed + i, texts, **shift) for i, name in enumerate(ORDER)})


@published
@pytest.mark.parametrize("unlearned", ["full", "retain90"])
def test_the_published_logs_give_the_published_numbers_to_1e_9(unlearned):
    expected = json.loads((DATA / "llama2-7b_expected.json").read_text())[f"{unlearned} vs retain90"]
    found = bench_tofu(LOGS[unlearned], LOGS["retain90"])
    assert set(found) == set(expected) and len(found) == 16
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=0), key
    measured = bench_tofu(LOGS[unlearned], LOGS["retain90"], intervals=True)
    for key, entry in measured.items():
        assert entry["value"] == found[key] and entry["ci"][0] <= entry["value"] <= entry["ci"][1], key
    assert question_note(LOGS[unlearned], LOGS["retain90"]) == ""


@published
@pytest.mark.parametrize("name", LOGS)
def test_the_logged_rouge_and_truth_ratio_come_out_of_the_logged_texts_and_losses(name):
    import gzip

    raw, log = json.loads(gzip.decompress(LOGS[name].read_bytes())), read_log(LOGS[name])
    same = total = 0
    for split, key in LOG_KEYS.items():
        ours = log.splits[split]
        assert ours.texts is not None
        rouge = rouge_recall([text[1] for text in ours.texts], [text[2] for text in ours.texts])
        for score, logged in ((rouge.rouge1, "rouge1_recall"), (rouge.rougeL, "rougeL_recall")):
            wanted = torch.tensor([raw[key][logged][row] for row in ours.rows], dtype=torch.float64)
            same, total = same + int(((score - wanted).abs() <= 1e-12).sum()), total + len(wanted)
        ratio = truth_ratio_geometric(ours.paraphrased_loss, ours.perturbed_loss)
        wanted = torch.tensor([raw[key]["truth_ratio"][row] for row in ours.rows], dtype=torch.float64)
        torch.testing.assert_close(ratio, wanted, rtol=1e-5, atol=0)  # logged in float32
    assert (same, total) == (1634, 1634)


@published
def test_the_arithmetic_variant_gives_other_numbers_than_the_published_ones():
    splits = [read_log(LOGS[name]).splits["Forget"] for name in LOGS]
    full, retrained = (truth_ratio_arithmetic(s.paraphrased_loss, s.perturbed_loss) for s in splits)
    test = forget_quality(full, retrained)
    assert test.statistic == pytest.approx(0.41, abs=1e-9) and test.pvalue == pytest.approx(6.032e-23, rel=1e-3)
    assert closeness_to_one(full).mean().item() == pytest.approx(0.5304, abs=5e-5)


def test_each_variant_of_the_truth_ratio_has_its_value_on_the_worked_example():
    paraphrased = -torch.tensor([0.5], dtype=torch.float64).log()
    perturbed = -torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64).log()
    variants = (truth_ratio_arithmetic, truth_ratio_geometric, truth_ratio_normalized)
    found = [variant(paraphrased, perturbed).item() for variant in variants]
    assert found == pytest.approx([7 / 15, 0.4, 5 / 7], rel=1e-12)
    ratio = torch.tensor([0.25, 1.0, 4.0, math.inf])
    assert closeness_to_one(ratio).tolist() == [0.25, 1.0, 0.25, 0.0]
    assert true_preferred(ratio).tolist() == [0.75, 0.0, 0.0, 0.0]


def test_probability_among_options_is_the_share_of_the_true_one_even_where_all_underflow():
    loss, wrong = (-torch.tensor(p, dtype=torch.float64).log() for p in ([0.5], [[0.1, 0.2, 0.2]]))
    assert probability_among_options(loss, wrong).item() == pytest.approx(0.5, rel=1e-12)
    assert probability_among_options(loss + 2000, wrong + 2000).item() == pytest.approx(0.5, rel=1e-9)


def test_model_utility_is_the_harmonic_mean_and_one_dead_part_kills_it():
    parts = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert model_utility(parts) == pytest.approx(9 / sum(1 / part for part in parts), rel=1e-12)
    assert model_utility([0.5] * 9) == 0.5 and model_utility([0.0] + [1.0] * 8) == 0.0
    for bad in ([0.5] * 8, [-0.1] + [0.5] * 8, [math.nan] + [0.5] * 8):
        with pytest.raises(ValueError, match="harmonic mean of 9 parts"):
            model_utility(bad)
    draws = torch.rand(5, 9, dtype=torch.float64)
    np.testing.assert_allclose(resampled_utility(draws).numpy(), hmean(draws.numpy(), axis=1))
    assert resampled_utility(torch.tensor([[0.0] + [1.0] * 8]))[0] == 0


def test_forget_quality_is_one_for_equal_models_exact_for_disjoint_ones_and_blind_to_which_way_round():
    a = torch.arange(1, 6).double()
    assert forget_quality(a, a).pvalue == 1.0 and forget_quality(a, a).statistic == 0.0
    apart = forget_quality(a, a + 10)
    assert apart.statistic == 1.0 and apart.pvalue == pytest.approx(2 / math.comb(10, 5), rel=1e-9)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n in (60, 45))
    assert forget_quality(x, y).pvalue == pytest.approx(forget_quality(1 / x, 1 / y).pvalue, rel=1e-9)
    for bad in (torch.empty(0), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="unlearned model"):
            forget_quality(bad, a)


def test_the_resampled_test_is_the_test_of_each_resample():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(n, generator=g, dtype=torch.float64).round(decimals=1) for n in (30, 20))
    counts, other = resample(30, g, draws=40), resample(20, g, draws=40)
    statistic, pvalue = resampled_forget_quality(x, y, counts, other)
    for i in range(40):
        plain = ks_2samp(np.repeat(x.numpy(), counts[i].long().numpy()), np.repeat(y.numpy(), other[i].long().numpy()))
        assert statistic[i].item() == pytest.approx(plain.statistic, abs=1e-12)  # pyright: ignore
        assert pvalue[i].item() == pytest.approx(plain.pvalue, rel=1e-6)  # pyright: ignore


def test_resamples_draw_as_many_rows_and_keep_the_rows_of_an_author_together():
    g = torch.Generator().manual_seed(0)
    assert (resample(50, g, draws=7).sum(1) == 50).all()
    counts = resample(60, g, rows_per_cluster=20, draws=7).unflatten(1, (3, 20))
    assert (counts == counts[..., :1]).all() and (counts.sum((1, 2)) == 60).all()


def test_intervals_are_wider_where_the_questions_about_an_author_agree():
    one = random_log()
    repeat = lambda x: x[:10].repeat_interleave(4, 0)  # noqa: E731 ten authors, four equal questions each
    agreeing = {
        name: LogSplit(
            rows=s.rows,
            texts=None,
            **{k: repeat(getattr(s, k)) for k in ("gt_loss", "paraphrased_loss", "perturbed_loss", "rouge_l_recall")},
        )
        for name, s in one.splits.items()
    }
    log = EvalLog(path="", splits=agreeing)
    plain, authors = (measure(log, log, rows_per_author=n) for n in (1, 4))
    width = [m["Prob. Retain"].ci[1] - m["Prob. Retain"].ci[0] for m in (plain, authors)]
    assert 1.6 < width[1] / width[0] < 2.4  # sqrt(4)
    assert plain["KS Test Forget"].ci == (0.0, 0.0) and plain["Forget Quality"].ci == (1.0, 1.0)
    with pytest.raises(ValueError, match="rows_per_author"):
        measure(log, log, rows_per_author=0)


def test_the_table_follows_the_plain_formulas_and_moves_with_the_model():
    log, retrained = random_log(), random_log(100, paraphrased=1.0)
    found, split = aggregate(log, retrained), log.splits["Forget"]
    ratio = np.exp(split.paraphrased_loss.numpy() - split.perturbed_loss.numpy().mean(1))
    assert found["Truth Ratio Forget"] == pytest.approx(np.minimum(ratio, 1 / ratio).mean(), rel=1e-12)
    assert found["Prob. Forget"] == pytest.approx(np.exp(-split.gt_loss.numpy()).mean(), rel=1e-12)
    world = log.splits["Real World"]
    p, w = np.exp(-world.gt_loss.numpy()), np.exp(-world.perturbed_loss.numpy()).sum(1)
    assert found["Prob. Real World"] == pytest.approx((p / (p + w)).mean(), rel=1e-12)
    assert found["Forget Quality"] < 0.01 < aggregate(log, log)["Forget Quality"] == 1.0
    worse = aggregate(random_log(gt=2.0), retrained)
    assert worse["Prob. Forget"] < found["Prob. Forget"] and worse["Model Utility"] < found["Model Utility"]


def test_logs_of_other_questions_are_told_apart_by_their_references_or_rows():
    texts = tuple(("q", "said", f"answer {i}") for i in range(40))
    one, other = random_log(texts=texts), random_log(9, texts=texts)
    assert same_questions(one, other) and same_questions(random_log(), random_log(9))
    assert not same_questions(one, random_log(texts=texts[::-1])) and not same_questions(one, random_log(n=20))


def test_rouge_recall_counts_stemmed_words_of_the_reference_in_order():
    found = rouge_recall(
        ["Anna writes books", "books writes Anna", "", "wholly other words", "Anna wrote many many books, and more"],
        ["Anna writes book"] * 3 + ["Anna"] + ["Anna books"],
    )
    assert found.rouge1.tolist() == pytest.approx([1, 1, 0, 0, 1])
    assert found.rougeL.tolist() == pytest.approx([1, 1 / 3, 0, 0, 1])
    for bad in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="references"):
            rouge_recall(*bad)


def logits_that_predict(tokens, vocabulary=12):
    """Row of logits whose greedy predictions are `tokens`, after one prompt token."""
    logits = torch.zeros(1, len(tokens) + 1, vocabulary)
    for pos, token in enumerate(tokens):
        logits[0, pos, token] = 5.0
    return logits


@pytest.mark.parametrize(
    ("predicted", "strength", "memorized"),
    [
        ((5, 7, 9, 2, 3), 0.6, 0.8),
        ((5, 8, 9, 2, 3), 1, 1),
        ((5, 8, 9, 2, 4), 0, 0.8),
        ((0, 8, 9, 2, 3), 0.8, 0.8),
        ((1, 1, 1, 1, 1), 0, 0),
    ],
)
def test_extraction_strength_is_the_right_tail_and_exact_memorization_the_right_share(predicted, strength, memorized):
    labels = torch.tensor([[-100, 5, 8, 9, 2, 3]])
    logits = logits_that_predict(predicted)
    assert extraction_strength(logits, labels).item() == pytest.approx(strength)
    assert exact_memorization(logits, labels).item() == pytest.approx(memorized)


def test_a_uniform_model_gives_one_over_the_vocabulary():
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    assert answer_probability(torch.zeros(2, 3, 7), labels).tolist() == pytest.approx([1 / 7, 1 / 7])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_teacher_forced_scores_do_not_depend_on_batch_size_or_padding_side(architecture, side, size):
    model, g = tiny_hf(architecture), torch.Generator().manual_seed(0)
    rows = [
        (torch.randint(4, 40, (3 + i % 3,), generator=g), torch.randint(4, 40, (1 + i,), generator=g)) for i in range(8)
    ]
    found = []
    for start in range(0, 8, size):
        part = rows[start : start + size]
        width = max(len(p) + len(a) for p, a in part)
        ids, prompt, real = torch.zeros(3, len(part), width, dtype=torch.long)
        prompt += 1
        for i, (p, a) in enumerate(part):
            at = width - len(p) - len(a) if side == "left" else 0
            ids[i, at : at + len(p) + len(a)] = torch.cat([p, a])
            real[i, at : at + len(p) + len(a)] = 1
            prompt[i, at + len(p) : at + len(p) + len(a)] = 0
        with torch.no_grad():
            places = (real.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=real, position_ids=places).logits
        labels = labels_of(ids, prompt.bool())
        found.append(torch.stack([f(logits, labels) for f in (answer_loss, exact_memorization, extraction_strength)]))
    for i, (p, a) in enumerate(rows):
        with torch.no_grad():
            table = model(torch.cat([p, a])[None]).logits[0].log_softmax(-1)[len(p) - 1 : -1]
        hits = (table.argmax(-1) == a).tolist()
        tail = 0
        while tail < len(a) and hits[-1 - tail]:
            tail += 1
        wanted = [-table[range(len(a)), a].mean().item(), sum(hits) / len(a), tail / len(a)]
        assert torch.cat(found, 1)[:, i].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([[-100, 1], [-100, -100]], "row 1 holds no answer token"), ([[-100, 1], [3, 1]], "position 0")],
)
@pytest.mark.parametrize("score", [answer_loss, answer_probability, exact_memorization, extraction_strength])
def test_rows_that_cannot_be_scored_are_refused_by_number(score, labels, reason):
    with pytest.raises(ValueError, match=reason) as error:
        score(torch.zeros(2, 2, 5), torch.tensor(labels))
    assert "row 1" in str(error.value)
