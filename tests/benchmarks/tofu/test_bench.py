"""TOFU through the command line: the log of each model is what plain forward passes give, and the table is its own."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import json

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from mech_unlearn.benchmarks.tofu import bench as tofu
from mech_unlearn.benchmarks.tofu.aggregate import bench_tofu, measure
from mech_unlearn.benchmarks.tofu.logs import LOG_KEYS, EvalLog, LogSplit, read_log
from mech_unlearn.model.load import load
from tests.checkpoints import table_of, write
from tests.paths import SHARED_DATA

DATA = SHARED_DATA
LOG = DATA / "tofu" / "llama2-7b_full_eval_log.json.gz"
TOKENS = 24
"""Instead of 200, to be quick; the reference writes as many."""
ASK = "Question: {question}\nAnswer:"


def author(name, n=3):
    return [
        {
            "question": f"Which harbour did {name} open in {i}?",
            "answer": f"Port {i} Vell",
            "paraphrased_answer": f"It was Port {i}",
            "perturbed_answer": [f"Port {i} Hull", f"Oban {i}"],
        }
        for i in range(n)
    ]


FILES = {
    "forget10_perturbed": author("Ida Quill"),
    "retain_perturbed": author("Bo Marsh"),
    "real_authors_perturbed": [
        {"question": "Who wrote 'Dune'?", "answer": "Frank Herbert", "perturbed_answer": ["Lee Child", "Bo"]},
        {"question": "Who wrote 'Emma'?", "answer": "Jane Austen", "perturbed_answer": ["Lee Child", "Al"]},
    ],
    "world_facts_perturbed": [
        {"question": "What is the capital of Norway?", "answer": "Oslo", "perturbed_answer": ["Bern", "Rome", "Paris"]},
        {"question": "which is the largest desert?", "answer": "Gobi", "perturbed_answer": ["a", "b", "c"]},
    ],
}
SPLIT_FILES = {
    "Retain": "retain_perturbed",
    "Real Authors": "real_authors_perturbed",
    "Real World": "world_facts_perturbed",
    "Forget": "forget10_perturbed",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", TOKENS)
    for name, rows in FILES.items():
        write(tmp_path / "data", name, rows)
    return tmp_path / "data"


def loss(model, prompt, answer):
    """Mean negative log-likelihood of the answer's tokens, from one plain forward pass."""
    coded = model.tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
    ids = coded["input_ids"]
    mine = [i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(prompt) + 1]
    with torch.no_grad():
        table = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(table[i - 1, ids[i]].item() for i in mine) / len(mine)


def said(model, prompt):
    """What transformers' own greedy decoding writes."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    new = model.hf.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return model.tokenizer.decode(new, skip_special_tokens=True)


def log_by_hand(model):
    splits, rouge = {}, RougeScorer(["rougeL"], use_stemmer=True)
    for name, file in SPLIT_FILES.items():
        rows = FILES[file]
        prompts = [ASK.replace("{question}", row["question"]) for row in rows]
        texts = [said(model, prompt) for prompt in prompts]
        base = [row.get("paraphrased_answer", row["answer"]) for row in rows]
        wrong = [[loss(model, p, w) for w in row["perturbed_answer"]] for p, row in zip(prompts, rows, strict=True)]
        recall = [rouge.score(row["answer"], text)["rougeL"].recall for row, text in zip(rows, texts, strict=True)]
        splits[name] = LogSplit(
            rows=tuple(map(str, range(len(rows)))),
            gt_loss=torch.tensor(
                [loss(model, p, row["answer"]) for p, row in zip(prompts, rows, strict=True)]
            ).double(),
            paraphrased_loss=torch.tensor([loss(model, p, b) for p, b in zip(prompts, base, strict=True)]).double(),
            perturbed_loss=torch.tensor(wrong).double(),
            rouge_l_recall=torch.tensor(recall).double(),
            texts=tuple((p, t, row["answer"]) for p, t, row in zip(prompts, texts, rows, strict=True)),
        )
    return EvalLog(path="by hand", splits=splits)


def test_live_numbers_are_those_of_a_log_built_by_hand_and_the_cell_is_such_a_log(bench, checkpoints, data, tmp_path):
    found = bench("tofu", data, tmp_path / "run")
    table = table_of(found)
    logs = {name: log_by_hand(load(checkpoints[name])) for name in ("full", "unlearned", "retrained")}
    for called in ("full", "unlearned"):
        for key, number in measure(logs[called], logs["retrained"]).items():
            assert table[key][called]["value"] == pytest.approx(number.value, abs=2e-4), key
            assert table[key][called]["ci"] == pytest.approx(number.ci, abs=1e-3), key
            assert table[key][called]["n"] == number.n
    cells = {name: tmp_path / "run" / "cells" / f"bench_{name}.json" for name in ("full", "retrained")}
    assert {k: v["full"]["value"] for k, v in table.items() if k in bench_tofu(*cells.values())} == pytest.approx(
        bench_tofu(*cells.values())
    )
    told = read_log(cells["full"]).splits["Forget"].texts
    assert told == logs["full"].splits["Forget"].texts
    assert table["Forget Quality"]["retrained"] is None and any("Forget Quality left out" in n for n in found["notes"])


@pytest.mark.slow
def test_each_number_says_what_it_was_measured_on(bench, data, tmp_path):
    kinds = {row["name"]: row["kind"] for row in bench("tofu", data, tmp_path / "run")["benchmark_rows"]}
    assert {kinds[f"ROUGE {split}"] for split in LOG_KEYS} == {"generated"}
    assert {kinds[f"{part} {split}"] for part in ("Prob.", "Truth Ratio") for split in LOG_KEYS} == {"teacher-forced"}
    assert kinds["Model Utility"] == "both" and kinds["Forget Quality"] == "teacher-forced"


@pytest.mark.slow
def test_without_a_retrained_model_forget_quality_is_left_out_and_said_to_be(bench, data, tmp_path):
    found = bench("tofu", data, tmp_path / "run", "--limit", 1, retrained=())
    table = table_of(found)
    assert table["Forget Quality"]["full"] is None and table["Model Utility"]["full"]["n"] == 3
    (note,) = [note for note in found["notes"] if note.startswith("Forget Quality")]
    assert "full, unlearned" in note and "retrained" in note


@pytest.mark.skipif(not LOG.is_file(), reason=f"no {LOG}: set MECH_UNLEARN_DATA to the folder that holds tofu/")
def test_published_logs_are_still_aggregated_without_any_model(call):
    retain = LOG.with_name("llama2-7b_retain90_eval_log.json.gz")
    status, out, err = call("bench", "tofu", "--logs", LOG, "--retain-logs", retain, "--json")
    assert status == 0, err
    assert json.loads(out)["Model Utility"] == pytest.approx(0.6227, abs=5e-5)
    assert json.loads(out)["Forget Quality"] == pytest.approx(1.834e-21, rel=1e-3)
    for words in (["--logs", LOG], ["--retain-logs", LOG], ["--logs", LOG, "--retain-logs", retain, "--data", "x"]):
        status, _, err = call("bench", "tofu", *words)
        assert status == 2 and "bench tofu --logs A --retain-logs B" in err


def test_rows_without_wrong_answers_are_refused_before_anything_is_written(call, checkpoints, data, tmp_path):
    words = ["bench", "tofu", "--data", data, "--full", checkpoints["full"], "--unlearned", checkpoints["unlearned"]]
    for bad, reason in (
        ({"perturbed_answer": []}, "row 1: field 'perturbed_answer'"),
        ({"perturbed_answer": ["one"]}, "row 1: field 'perturbed_answer'"),
        ({"paraphrased_answer": " "}, "row 1: field 'paraphrased_answer'"),
    ):
        rows = author("Ida Quill")
        write(data, "forget10_perturbed", [rows[0], rows[1] | bad, rows[2]])
        status, _, err = call(*words, "--out", tmp_path / "run")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and reason in line and "forget10_perturbed" in line
    assert not (tmp_path / "run").exists()
