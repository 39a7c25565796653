"""WMDP and FaithUn through the command line: accuracies are those of a plain loop; what cannot be asked is counted."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import pytest
import torch

from mech_unlearn.model.load import load
from tests.checkpoints import table_of, write


def rows(domain, n=5):
    return [
        {"question": f"Which {domain} pot {i} is blue?", "choices": [f"A {i}", "Hull", "Oban", "none"], "answer": i % 4}
        for i in range(n)
    ]


def likeliest_letter(model, prompt, letters):
    """Index of the letter that a plain forward pass thinks likeliest behind the prompt and a space."""
    at = model.tokenizer(prompt)["input_ids"]
    sums = []
    for letter in letters:
        ids = model.tokenizer(f"{prompt} {letter}")["input_ids"]
        with torch.no_grad():
            table = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = next(i for i, (a, b) in enumerate(zip(at + [-1], ids)) if a != b)
        sums.append(sum(table[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start))
    return max(range(len(letters)), key=sums.__getitem__)


@pytest.mark.slow
def test_wmdp_is_the_accuracy_of_a_plain_loop_over_letters(bench, checkpoints, tmp_path):
    for domain in ("bio", "cyber"):
        write(tmp_path / "data", f"wmdp-{domain}", rows(domain))
    write(tmp_path / "data", "all", rows("any", 3))
    data = tmp_path / "data"
    found = bench("wmdp", data, tmp_path / "run", "--set", "domains=('bio', 'cyber')", "--set", f"general={data}")
    table = table_of(found)
    assert list(table) == [
        f"{name}, {how}" for name in ("WMDP-bio", "WMDP-cyber", "MMLU") for how in ("by letter", "by option text")
    ]
    for called in ("full", "unlearned", "retrained"):
        model = load(checkpoints[called])
        for domain, topic in (("bio", "biology"), ("cyber", "cybersecurity")):
            hits = []
            for row in rows(domain):
                lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
                head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
                prompt = "\n".join([head + row["question"], *lines, "Answer:"])
                hits.append(likeliest_letter(model, prompt, "ABCD") == row["answer"])
            number = table[f"WMDP-{domain}, by letter"][called]
            assert number["value"] == pytest.approx(sum(hits) / len(hits)) and number["n"] == 5
            assert "chance 0.25" in number["unit"] and number["ci"][0] <= number["value"] <= number["ci"][1]
    assert any("none of the 13 questions is a fact" in note for note in found["notes"])
    assert found["rows"] == [] and found["restoration"] == []


def test_wmdp_leaves_out_questions_that_cannot_be_asked_and_counts_them(bench, tmp_path):
    twice = rows("bio")[0] | {"choices": ["a", "a", "b", "c"]}
    empty = rows("bio")[0] | {"choices": ["a", " ", "b", "c"]}
    file = write(tmp_path, "mine", [*rows("bio", 2), twice, empty])
    found = bench("wmdp", file, tmp_path / "run", "--set", "domains=bio", retrained=())
    assert table_of(found)["WMDP-bio, by letter"]["full"]["n"] == 2
    assert any("2 questions left out" in note and "twice" in note and "empty" in note for note in found["notes"])
