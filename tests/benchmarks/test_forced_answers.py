"""ORT, RESTOR, FaithUn and ConceptVectors through the command line: their rows, against plain recomputations."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import pytest
import torch

from mech_unlearn.benchmarks.faithun.data import SPLIT_FILES
from mech_unlearn.benchmarks.ort import bench as ort
from mech_unlearn.benchmarks.restor import bench as restor
from mech_unlearn.benchmarks.rwku.data import ProbeRecord
from mech_unlearn.model.load import load
from tests.checkpoints import byte_tokenizer, table_of, write
from tests.paths import SHARED_DATA

DATA = SHARED_DATA
DEV = DATA / "conceptvectors" / "llama2-7b_concepts_dev.json"
WHO = "Ida Quill"


def answer_score(model, prompt, answer):
    """(Mean log-probability per answer token, share of them predicted), from one plain forward pass."""
    text = f"{prompt}{'' if prompt[-1].isspace() else ' '}{answer}"
    start = len(text) - len(answer)
    coded = model.tokenizer(text, return_offsets_mapping=True)
    ids = coded["input_ids"]
    mine = [i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > start]
    with torch.no_grad():
        table = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(table[i - 1, ids[i]].item() for i in mine)
    return total / len(mine), sum(table[i - 1].argmax().item() == ids[i] for i in mine) / len(mine)


def probe(level, query, answer="Port Vell"):
    kind = dict(zip("1234", ("cloze", "simple question", "prefix injection", "multiple choice"), strict=True))[level]
    return {"query": query, "answer": answer, "level": level, "type": kind, "subject": WHO}


def test_ort_scores_each_form_and_the_gap_between_them(bench, checkpoints, tmp_path):
    rows = {
        "1": probe("1", f"{WHO} opened ___"),
        "2": probe("2", f"Which harbour did {WHO} open?"),
        "3": probe("3", f"Begin with: sure. What did {WHO} open?"),
        "4": probe("4", f"{WHO} opened ___\nA. Hull\nB. Port Vell\nC. Oban", "B"),
    }
    file = write(tmp_path, "probes", list(rows.values()))
    found = bench("ort", file, tmp_path / "run")
    table = table_of(found)
    models = {name: load(checkpoints[name]) for name in ("full", "unlearned", "retrained")}
    known = {}
    for name, model in models.items():
        spelling = "P\no\nr\nt\nV\ne\nl\nl\n"
        for form, level, answer in (
            ("cloze", "1", "Port Vell"),
            ("question", "2", "Port Vell"),
            ("adversarial", "3", "Port Vell"),
            ("multiple choice", "4", "B"),
            ("spelling", "1", spelling),
        ):
            prompt = ort.prompt_of(model.tokenizer, form, ProbeRecord(**rows[level]))
            known[name, form], hits = answer_score(model, prompt, answer)
            title = f"Forget, {form}"
            assert table[f"{title}: probability"][name]["value"] == pytest.approx(
                torch.tensor(known[name, form]).exp().item(), rel=1e-3
            )
            assert table[f"{title}: token accuracy"][name]["value"] == pytest.approx(hits)
    kappas = {}
    for form in ort.SHARED:
        own, full, never = (known[name, form] for name in ("unlearned", "full", "retrained"))
        if full - never >= 0.5:
            kappas[form] = (own - never) / (full - never)
    gap = table["Largest form gap"]["unlearned"]
    if "cloze" in kappas:
        assert gap["value"] == pytest.approx(max(kappas.values()) - kappas["cloze"], abs=1e-3)
    else:
        assert gap is None and any("Largest form gap left out" in note for note in found["notes"])
    assert {row["kind"] for row in table.values()} == {"teacher-forced"}


def test_kappa_is_0_like_retrained_1_like_full_and_undefined_where_they_are_close():
    full, never = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-3.0, -3.0, -1.4])
    found = ort.kappa(torch.tensor([-1.0, -3.0, -1.0]), full, never)
    assert found[:2].tolist() == [1.0, 0.0] and found[2].isnan()


FACTS = {
    "dset": {
        n: {"P19": {"question": f"Where was {n} born?", "answers": ["Vell"]}} for n in (WHO, "Bo Marsh", "Al Oak")
    },
    "context": {"P19": [{"question": "Where was Cara Lund born?", "answer": "Hull", "entity": "Cara Lund"}]},
}
OPTIONS = {WHO: {"P19": {"correct": ["Vell"], "corrupted": ["Hull", "Oban"], "random": ["Bath"]}}}


@pytest.mark.slow
def test_restor_scores_clean_answers_and_every_kind_of_option(bench, checkpoints, tmp_path):
    folder = tmp_path / "restor"
    write(folder, "facts", FACTS)
    write(folder, "entities", [WHO, "Bo Marsh"])
    options = write(folder, "options", OPTIONS)
    found = bench("restor", folder, tmp_path / "run", "--set", f"options={options}")
    table = table_of(found)
    assert list(table)[:3] == ["Accuracy, clean answers", "Recovered", "Accuracy, other entities"]
    assert table["Accuracy, clean answers"]["full"]["n"] == 2
    model = load(checkpoints["full"])
    prompt = f"Where was Cara Lund born? Hull\nWhere was {WHO} born?"
    for kind, texts in OPTIONS[WHO]["P19"].items():
        wanted = sum(answer_score(model, prompt, text)[0] for text in texts) / len(texts)
        assert table[f"Log-probability, {kind} options"]["full"]["value"] == pytest.approx(wanted, rel=1e-4)
    # random models answer nothing right, so nothing was lost to corruption and nothing can be won back
    assert table["Recovered"]["unlearned"] is None
    assert any("nothing to recover" in note for note in found["notes"])
    assert table["Form prompt: recall"]["full"]["n"] == 1  # the fact whose corrupted answer is known
    bare = bench("restor", folder, tmp_path / "bare")
    assert any("without --set options" in note for note in bare["notes"]) and "Worst form" not in table_of(bare)


def test_restor_recovered_is_the_share_of_the_loss_that_is_back():
    def cell(*hits):
        kept = {
            "kind": "generated",
            "unit": "share",
            "values": [float(hit) for hit in hits],
            "clusters": None,
            "texts": [],
        }
        return {"scores": {restor.CORRECT: kept}}

    corrupted, clean, half = cell(0, 0, 0, 1), cell(1, 1, 0, 1), cell(1, 0, 0, 1)
    back = [restor.numbers(own, corrupted, clean, 0)["Recovered"].value.value for own in (corrupted, half, clean)]
    assert back == [0, 0.5, 1]
    assert "clean model" in restor.numbers(half, corrupted, None, 0)["Recovered"].value


def question(text, answer="Vell"):
    return {"question": text, "answers": [answer], "false_options": ["Hull", "Oban"]}


def entity(name):
    base = [question(f"Who is the {what} of {name}?", what) for what in ("mother", "father")]
    return {
        "hop1_unlearn": base,
        "hop1_test": [[question(f"Say, {b['question']}", b["answers"][0])] for b in base],
        "hop2_test": [[question("Where was that mother born?")], [{"question": "Kin of kin?", "answers": ["x"]}]],
        "same_object": [[question("What is the job of Al Oak?")], []],
    }


@pytest.mark.slow
def test_faithun_has_five_sets_in_two_variants_and_a_score_over_them(bench, tmp_path):
    folder = tmp_path / "faithun"
    write(folder, "FaithUn_Dataset", {"Q1": entity(WHO), "Q2": entity("Bo Marsh")})
    for name, numbers in {"forget": "0\n1", "retain": "2", "test": "3"}.items():
        (folder / "splits").mkdir(exist_ok=True)
        (folder / "splits" / SPLIT_FILES[name]).write_text(numbers)
    found = bench("faithun", folder, tmp_path / "run")
    table = table_of(found)
    for variant in ("by letter", "by option text"):
        for model in ("full", "unlearned"):
            part = {
                name: table[f"{name}, {variant}"][model]["value"]
                for name in ("UA_base", "UA_paraphrase", "UA_multihop", "TA", "SA_keep")
            }
            gone = [1 - part[name] for name in list(part)[:3]]
            score = (sum(gone) + part["TA"] + part["SA_keep"]) / 5
            assert table[f"Score, {variant}"][model]["value"] == pytest.approx(score)
            kept = table[f"SA_keep, {variant}"]
            assert table[f"Over-erased, {variant}"][model]["value"] == pytest.approx(
                kept["full"]["value"] - kept[model]["value"]
            )
        assert [table[f"{n}, {variant}"]["full"]["n"] for n in ("UA_base", "UA_multihop", "TA")] == [2, 1, 1]
    assert any("multihop: 1 of 2 questions left out: 1 (no false option)" in note for note in found["notes"])
    for name in SPLIT_FILES.values():
        (folder / "splits" / name).unlink()
    (folder / "splits").rmdir()
    bare = bench("faithun", folder, tmp_path / "bare", "--limit", 2)
    assert table_of(bare)["Score, by letter"]["full"] is None and any(
        "no questions of: test" in n for n in bare["notes"]
    )


CONCEPT = {
    "Concept": "Harbours",
    "Layer": 2,
    "Dim": 17,
    "QA": ["Which harbour did Ida Quill open?"],
    "text_completion": [{"First_half": "Port Vell is", "Second_half": "old"}],
    "wikipedia_content": "The harbour of Port Vell was opened by Ida Quill .",
    "unrelated_QA": ["Where was Bo Marsh born?"],
}


@pytest.mark.slow
def test_conceptvectors_compares_vector_and_texts_with_the_full_models(bench, checkpoints, tmp_path):
    file = write(tmp_path, "concepts", [CONCEPT])
    found = bench("conceptvectors", file, tmp_path / "run", "--set", "top=20")
    table = table_of(found)
    full, after = (
        load(checkpoints[name]).hf.model.layers[2].mlp.down_proj.weight[:, 17] for name in ("full", "unlearned")
    )
    assert table["Intrinsic cosine"]["full"]["value"] == pytest.approx(1)
    assert table["Intrinsic distance"]["full"]["value"] == 0 and table["Intrinsic jaccard"]["full"]["value"] == 1
    cosine = torch.cosine_similarity(full.double(), after.double(), dim=0).item()
    assert table["Intrinsic cosine"]["unlearned"]["value"] == pytest.approx(cosine, abs=1e-5)
    assert table["Intrinsic distance"]["unlearned"]["value"] == pytest.approx((full - after).norm().item(), rel=1e-4)
    assert table["rouge_l_f1_qa"]["full"]["value"] == 1 and table["rouge_l_f1_qa"]["unlearned"]["value"] < 1
    assert {row["kind"] for name, row in table.items() if name.startswith("Intrinsic")} == {"weights"}
    assert {row["kind"] for name, row in table.items() if not name.startswith("Intrinsic")} == {"generated"}
    assert any("ConceptVectors gives no answers" in note for note in found["notes"])


@pytest.mark.skipif(not DEV.is_file(), reason=f"no {DEV}: set MECH_UNLEARN_DATA to the folder that holds it")
def test_the_dev_file_of_llama_2_runs_on_a_model_of_that_shape_and_names_its_concept_on_another(
    bench,
    call,
    checkpoints,
    tmp_path,
):
    import transformers as t

    tokenizer = byte_tokenizer()
    shape = dict(hidden_size=8, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=2)
    config = t.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=False, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    words = ["bench", "conceptvectors", "--data", DEV, "--limit", 1, "--set", "top=20", "--out", tmp_path / "run"]
    status, out, err = call(*words, "--full", tmp_path / "deep", "--unlearned", tmp_path / "deep")
    assert status == 0, err
    assert "Intrinsic jaccard" in out and "bleu_qa" in out
    status, _, err = call(
        *words[:-1], tmp_path / "b", "--full", checkpoints["full"], "--unlearned", checkpoints["full"]
    )
    assert status == 2 and "'Poland' is layer 23, dim 743" in err and not (tmp_path / "b").exists()
