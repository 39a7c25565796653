"""MUSE, DUSK and RWKU through the command line: their own rows, the same as a plain recomputation gives."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from mech_unlearn.benchmarks.dusk.data import DOCUMENTS
from mech_unlearn.benchmarks.muse.data import PART_SPLITS
from mech_unlearn.benchmarks.rwku import utility as rwku_utility
from mech_unlearn.model.load import load
from tests.checkpoints import table_of, write


def told(model, prompt, tokens, stops=()):
    """What transformers' own greedy decoding writes, cut at the first stop."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    new = model.hf.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


def f1(text, reference):
    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, text)["rougeL"].fmeasure


def min_k(model, text):
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        table = model.hf(ids).logits[0, :-1].log_softmax(-1)
    found = sorted(table[i, token].item() for i, token in enumerate(ids[0, 1:].tolist()))
    count = max(1, int(0.4 * len(found)))
    return -sum(found[:count]) / count


def auc(member, other):
    return sum((a < b) + 0.5 * (a == b) for a in member for b in other) / (len(member) * len(other))


TEXTS = {
    "forget": ["Ida Quill opened Port Vell in 1801.", "The harbour of Vell is old."],
    "holdout": ["Nobody knows where Bo Marsh was born.", "Rivers run to the sea.", "A pot was blue."],
}


@pytest.fixture
def muse(tmp_path):
    folder = tmp_path / "muse"
    for split in PART_SPLITS["knowmem"]:
        asked = {"question": f"Which harbour did Ida Quill open for {split}?", "answer": "Port Vell"}
        rows = [{"question": "Who was Bo Marsh?", "answer": "a mayor"}] if split.endswith("icl") else [asked]
        write(folder, f"knowmem/{split}", rows + ([] if split.endswith("icl") else [asked | {"question": "who?"}]))
    write(folder, "verbmem/forget", [{"prompt": "Ida Quill opened", "gt": "the old harbour of Port Vell in May."}])
    for split in PART_SPLITS["privleak"]:
        write(folder, f"privleak/{split}", [{"text": text} for text in TEXTS.get(split, ["kept"])])
    return folder


def test_muse_is_a_plain_recomputation_of_its_four_numbers(bench, checkpoints, muse, tmp_path):
    found = bench("muse", muse, tmp_path / "run")
    table = table_of(found)
    assert list(table)[:5] == ["VerbMem forget", "KnowMem forget", "AUC Min-40 %", "PrivLeak", "KnowMem retain"]
    models = {name: load(checkpoints[name]) for name in ("full", "retrained")}
    aucs = {}
    for name, model in models.items():
        text = told(model, "Ida Quill opened", 128)
        assert table["VerbMem forget"][name]["value"] == pytest.approx(f1(text, "the old harbour of Port Vell in May."))
        values = []
        for question in ("Which harbour did Ida Quill open for forget_qa?", "who?"):
            prompt = f"Question: Who was Bo Marsh?\nAnswer: a mayor\n\nQuestion: {question}\nAnswer: "
            values.append(f1(told(model, prompt, 32, ("\n\n", "\nQuestion", "Question:")), "Port Vell"))
        assert table["KnowMem forget"][name]["value"] == pytest.approx(sum(values) / 2)
        aucs[name] = auc(*([min_k(model, text) for text in TEXTS[part]] for part in ("forget", "holdout")))
        assert table["AUC Min-40 %"][name]["value"] == pytest.approx(aucs[name])
    if aucs["retrained"] < 1:
        leak = 100 * (aucs["retrained"] - aucs["full"]) / (1 - aucs["retrained"])
        assert table["PrivLeak"]["full"]["value"] == pytest.approx(leak)
    assert table["PrivLeak"]["retrained"] is None
    assert {row["kind"] for name, row in table.items() if "Mem" in name} == {"generated"}
    assert any("1 of 2 forget questions are no facts" in note for note in found["notes"])
    assert "Form prompt: recall" in table


@pytest.mark.slow
def test_muse_takes_privleak_against_the_published_models_only_when_told_to(bench, muse, tmp_path):
    left = bench("muse", muse, tmp_path / "a", retrained=())
    assert table_of(left)["PrivLeak"]["full"] is None and any("PrivLeak left out" in note for note in left["notes"])
    table = table_of(bench("muse", muse, tmp_path / "b", "--set", "corpus=news", retrained=()))
    number, area = table["PrivLeak"]["full"], table["AUC Min-40 %"]["full"]
    assert number["value"] == pytest.approx(100 * ((1 - area["value"]) - 0.4772) / 0.4772)
    assert number["ci"] == pytest.approx([100 * ((1 - x) - 0.4772) / 0.4772 for x in area["ci"][::-1]])


@pytest.mark.slow
def test_dusk_has_a_row_per_stratum_and_privacy_over_paragraphs(bench, checkpoints, tmp_path):
    folder = tmp_path / "dusk"
    questions = {
        "eval_specific_forget_qa": [{"question": "Where does Dr. Ida Quill teach?", "answer": "Vell"}],
        "eval_general_qa": [{"question": "When was Prof. Bo Marsh born?", "answer": "1801"}],
        "eval_specific_retain_qa": [{"question": "What is Dr. Cara Lund's room?", "answer": "12"}],
        "eval_icl": [{"question": "What is Al Oak's age?", "answer": "7"}],
        "eval_icl_mcqa": [{"question": "Who?\n(1) Al\n(2) Bo", "answer": "(2)"}],
        "eval_verbatim": [{"prompt": "Ida Quill", "gt": "taught in Vell."}],
        "eval_holdout": [{"text": "\n".join(TEXTS["holdout"])}],
    }
    for name, rows in questions.items():
        write(folder, name, rows)
    for split in DOCUMENTS:
        write(folder, f"raw/{split}", [{"text": "\n\n".join(TEXTS["forget"])}])
    found = bench("dusk", folder, tmp_path / "run")
    table = table_of(found)
    assert list(table)[:4] == ["knowmem_unique_forget", "knowmem_shared", "knowmem_unique_retain", "verbmem_forget"]
    model = load(checkpoints["full"])
    area = auc(*([min_k(model, text) for text in TEXTS[part]] for part in ("forget", "holdout")))
    assert table["AUC Min-40 %"]["full"]["value"] == pytest.approx(area) and table["AUC Min-40 %"]["full"]["n"] == 5
    bare = bench("dusk", folder, tmp_path / "bare", "--set", "documents=False")
    assert table_of(bare)["PrivLeak"]["full"] is None and any("were not read" in note for note in bare["notes"])


def probe(level, subject, query, kind="cloze"):
    return {"query": query, "answer": "Port Vell", "level": level, "type": kind, "subject": subject}


@pytest.mark.slow
def test_rwku_has_levels_neighbors_membership_and_the_utility_sets_of_its_folder(
    bench,
    checkpoints,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(rwku_utility, "REASON_TOKENS", 16)
    folder, who = tmp_path / "rwku", "Ida Quill"
    write(folder, "forget_target", [{"target": who, "intro": "On her."}])
    for level in "123":
        kind = "prefix injection" if level == "3" else "cloze"
        rows = [probe(level, who, f"{who} opened {i} of", kind) for i in range(2)]
        write(folder, f"forget_level{level}", rows)
    for level in "12":
        write(folder, f"neighbor_level{level}", [probe(level, who, "Bo Marsh met")])
    for name in ("forget", "retain"):
        write(folder, f"mia_{name}", [{"text": text, "subject": who} for text in TEXTS["forget"]])
    choice = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    targets = {"choices": ["yes", "no", "perhaps not"], "labels": [1, 0, 0]}
    utility = {
        "general": choice | {"task": "anatomy", "examples": [choice], "subject": who},
        "reason": {
            "question": "q",
            "answer": "(A)",
            "cot": "Q: p\nA: So the answer is (B).",
            "task": "d",
            "subject": who,
        },
        "truthfulness": {"question": "q", "mc1_targets": targets, "mc2_targets": targets, "subject": who},
        "factuality": {"question": "q", "answers": ["x", "y"], "subject": who},
    }
    for name, row in utility.items():
        write(folder, f"utility_{name}", [row])
    table = table_of(bench("rwku", folder, tmp_path / "run", retrained=()))
    expected = ["Forget FB", "Forget QA", "Forget AA", "Forget All", "Forget AA, prefix injection"]
    expected += ["Neighbor FB", "Neighbor QA", "Neighbor All", "MIA FM loss", "MIA RM loss", "Utility Gen (MMLU)"]
    expected += ["Utility Rea (BBH)", "Utility Tru (MC1)", "Utility Tru (MC2)", "Utility Fac (TriviaQA)"]
    assert list(table)[: len(expected)] == expected
    parts = [table[f"Forget {level}"]["full"] for level in ("FB", "QA", "AA")]
    assert table["Forget All"]["full"]["value"] == pytest.approx(sum(p["value"] for p in parts) / 3)
    assert table["Forget All"]["full"]["n"] == 6
    model, losses = load(checkpoints["full"]), []
    for text in TEXTS["forget"]:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(model.hf(ids, labels=ids).loss.item())
    assert table["MIA FM loss"]["full"]["value"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    sums = []
    for option in targets["choices"]:
        ids = model.tokenizer(f"Q: q\nA: {option}")["input_ids"]
        with torch.no_grad():
            logprob = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        coded = model.tokenizer(f"Q: q\nA: {option}", return_offsets_mapping=True)["offset_mapping"]
        mine = [i for i, (_, end) in enumerate(coded) if end > len("Q: q\nA: ")]
        sums.append(sum(logprob[i - 1, ids[i]].item() for i in mine))
    share = torch.tensor(sums).softmax(0)[0].item()
    assert table["Utility Tru (MC2)"]["full"]["value"] == pytest.approx(share, abs=1e-4)
    assert table["Utility Tru (MC1)"]["full"]["value"] == float(sums[0] > max(sums[1:]))


def test_words_are_compared_as_squad_does_and_a_final_answer_is_cut_out():
    assert rwku_utility.word_f1("The Port of Vell!", ["port of vell"]) == 1
    assert rwku_utility.word_f1("port", ["port vell", "hull"]) == pytest.approx(2 / 3)
    assert rwku_utility.word_f1("", ["x"]) == 0 and rwku_utility.word_f1("the", ["a"]) == 1
    assert rwku_utility.final_answer("So the answer is (B). More.") == "(B)"
    assert rwku_utility.final_answer(" no such words ") == "no such words"
