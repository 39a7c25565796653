"""The command line: quick help, and each of a user's mistakes ends with status 2 and one line that names it."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mech_unlearn.commands.unlearn import notes, unlearn
from mech_unlearn.core import RetainSet
from mech_unlearn.data.jsonl import load_facts, save_facts
from mech_unlearn.model.checkpoint import parameters
from tests.checkpoints import byte_tokenizer
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


@pytest.fixture
def files(tmp_path, tiny_folder):
    """A folder with a model, facts to forget and to keep, and names of unknown people."""
    save_facts(tiny_facts(["Anna Lee", "Ben Hill"]), tmp_path / "forget.jsonl")
    save_facts(tiny_facts(["Cara Moss", "Dan Park", "Eva Reed", "Finn Stone"]), tmp_path / "retain.jsonl")
    (tmp_path / "unknown.txt").write_text("Gina Vale\nHugo West\nGina West\nHugo Vale\n")
    return {
        "model": tiny_folder("llama"),
        "forget": tmp_path / "forget.jsonl",
        "retain": tmp_path / "retain.jsonl",
        "unknown": tmp_path / "unknown.txt",
        "out": tmp_path / "out",
    }


def unlearn_words(files, **changes):
    words = {k: files[k] for k in ("model", "forget", "retain", "unknown", "out")} | {"method": "rocr"} | changes
    return ["unlearn", *(part for key, value in words.items() for part in (f"--{key}", value))]


def refused(result, *parts):
    status, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, err
    for part in parts:
        assert str(part) in lines[0], lines[0]


def test_help_answers_without_importing_anything_slow():
    slow = "('torch', 'transformers', 'pandas')"
    code = f"import sys, mech_unlearn.commands.cli; print([m for m in {slow} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    helped = subprocess.run(
        [sys.executable, "-m", "mech_unlearn.commands.cli", "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "demo" in helped.stdout


def test_every_command_can_answer_in_json():
    from typer.main import get_command

    from mech_unlearn.commands.cli import app

    def leaves(command, path=()):
        for name, inner in getattr(command, "commands", {}).items():
            yield from leaves(inner, (*path, name))
        if not hasattr(command, "commands"):
            yield path, [option for parameter in command.params for option in parameter.opts]

    found = dict(leaves(get_command(app)))
    assert {("unlearn",), ("report",), ("calibrate",), ("testbed", "build"), ("testbed", "pools")} <= found.keys()
    assert [path for path, options in found.items() if "--json" not in options] == []


def test_building_a_world_whose_models_are_there_answers_in_json(call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    status, out, err = call("testbed", "build", "--only", "full", "--out", tmp_path, "--json")
    assert status == 0, err
    assert json.loads(out) == {"world": "biographies", "folder": str(tmp_path)}


def test_a_report_answers_in_json_and_a_run_without_a_page_says_where_its_result_is(call, tmp_path):
    done, where = tmp_path / "done", tmp_path / "where"
    for folder, command in ((done, "audit"), (where, "locate")):
        (folder / "figures").mkdir(parents=True)
        (folder / "spec.yaml").write_text(f"command: {command}\n")
        (folder / "provenance.json").write_text("{}")
        (folder / "figures" / "1_some.png").write_bytes(b"")
    (done / "verdicts.json").write_text("{}")
    summary = {"command": "audit", "world": None, "seconds": 1, "peak_rss_mib": 1, "rows": []}
    (done / "summary.json").write_text(json.dumps(summary))
    status, out, err = call("report", done, "--json")
    assert status == 0, err
    assert json.loads(out) == {"report": str(done / "report.html"), "figures": [str(done / "figures" / "1_some.png")]}
    assert call("report", done)[1].strip() == str(done / "report.html")
    refused(call("report", where), "a run of `locate`", "locate.json and figures/")
    (done / "summary.json").unlink()
    refused(call("report", done), "not a finished run directory: summary.json is missing")


@pytest.mark.parametrize("kind", ["methods", "locators", "tests", "datasets", "worlds"])
def test_list_gives_name_paper_and_summary(call, kind):
    status, out, _ = call("list", kind, "--json")
    rows = json.loads(out)
    assert status == 0 and rows
    for row in rows:
        assert set(row) == {"name", "paper", "summary"} and row["summary"]


def test_methods_without_evidence_of_their_own_are_marked(call):
    rows = {row["name"]: row for row in json.loads(call("list", "methods", "--json")[1])}
    ours, nothing = {"catnip", "klue", "sae_iru", "shred", "srmu"}, {"knowledge_neuron_erase", "ssd"}
    assert {name for name, row in rows.items() if row["summary"].startswith("Experimental. ")} == ours | nothing
    marked = {line.split()[0] for line in call("list", "methods")[1].splitlines() if " Experimental. " in line}
    assert marked == ours | nothing
    assert rows["r_rome"]["summary"].startswith("RRome: ") and "2403.07175" in rows["r_rome"]["paper"]


def test_every_data_set_is_listed_with_its_source_and_those_that_bench_asks_are_marked(call):
    from mech_unlearn.benchmarks import BENCHMARKS
    from mech_unlearn.data import DATASETS

    rows = {row["name"]: row for row in json.loads(call("list", "datasets", "--json")[1])}
    assert rows.keys() == {*DATASETS, *BENCHMARKS} and len(rows) == len(DATASETS) + len(BENCHMARKS) == 16
    assert {name for name, row in rows.items() if "arXiv" not in row["paper"]} == {"jsonl"}
    assert all(benchmark.paper in rows[name]["paper"] for name, benchmark in BENCHMARKS.items())
    lines = {line.split()[0]: line for line in call("list", "datasets")[1].splitlines()}
    assert lines.keys() == rows.keys() and all(row["paper"] in lines[name] for name, row in rows.items())
    assert {name for name, line in lines.items() if line.endswith("(see `bench`)")} == {*BENCHMARKS}


def test_an_unknown_command_or_kind_is_refused(call):
    refused(call("frobnicate"), "frobnicate")
    refused(call("list", "bananas"), "bananas")


def test_an_unknown_model_is_refused(call, files):
    refused(call(*unlearn_words(files, model="/no/such/model")), "/no/such/model", "no such folder")
    refused(call(*unlearn_words(files, model="nobody/nothing")), "nobody/nothing")


def test_a_model_that_is_not_causal_is_refused(call, files, tmp_path):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(tiny).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    vit = tmp_path / "clip"
    vit.mkdir()
    (vit / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(call(*unlearn_words(files, model=vit)), "'vit'", "not a causal language model")


def test_a_model_without_tokenizer_is_refused(call, files, tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path / "bare")
    refused(call(*unlearn_words(files, model=tmp_path / "bare")), "bare", "tokenizer")


def test_nan_weights_are_refused_by_name(call, files, tmp_path):
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    hf.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    refused(call(*unlearn_words(files, model=tmp_path / "nan")), "model.layers.1.mlp.down_proj.weight", "NaN")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", ":1:"),
        ('{"subject": "A", "relation": "r", "object": "B", "prompt": "no slot"}', "exactly one {}"),
        ('{"subject": "A", "relation": "r", "object": "A", "prompt": "{} is"}', "object equals subject"),
        ("", "holds no facts"),
    ],
)
def test_a_bad_facts_file_is_refused_before_anything_is_written(call, files, line, reason):
    files["forget"].write_text(line)
    refused(call(*unlearn_words(files)), files["forget"], reason)
    assert not files["out"].exists()


def test_a_fact_to_be_forgotten_and_kept_is_refused_by_the_command_and_the_verb(call, files, tiny_model):
    both = tiny_facts(["Anna Lee", "Cara Moss"])
    save_facts(both, files["retain"])
    refused(call(*unlearn_words(files)), "to be forgotten and kept: ", both[0].id, "take them out of one")
    assert not files["out"].exists()
    with pytest.raises(ValueError, match="to be forgotten and kept"):
        unlearn(tiny_model, tiny_facts(["Anna Lee", "Ben Hill"]), both)


def test_an_output_folder_that_is_taken_or_cannot_be_written_is_refused(call, files):
    files["out"].mkdir()
    (files["out"] / "precious").write_text("mine")
    refused(call(*unlearn_words(files)), "not empty")
    refused(call(*unlearn_words(files, out="/proc/nowhere/out")), "cannot be written")
    assert [p.name for p in files["out"].iterdir()] == ["precious"]


def test_an_unknown_method_or_setting_is_refused_with_the_nearest(call, files):
    refused(call(*unlearn_words(files, method="roccr")), "roccr", "rocr")
    refused(call(*unlearn_words(files, set="rigde=3")), "rigde", "ridge")
    refused(call(*unlearn_words(files, set="ridge=much")), "ridge=much")
    refused(call(*unlearn_words(files, set="ridge")), "key=value")
    refused(call(*unlearn_words(files, dtype="float12")), "float12")
    refused(call(*unlearn_words(files, device="tpu9")), "tpu9")


def test_an_sae_of_another_width_or_layer_is_refused(call, files, tmp_path):
    from sae_lens import SAE, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    def save(name, d_in, hook):
        config = TopKSAEConfig(d_in=d_in, d_sae=64, k=4, metadata=SAEMetadata(hook_name=hook))
        sae = TopKSAE(config)
        assert isinstance(sae, SAE)
        sae.save_model(tmp_path / name)
        return tmp_path / name

    narrow = save("narrow", 16, "blocks.1.hook_resid_post")
    refused(call(*unlearn_words(files, method="sae_shift", sae=narrow)), "narrow", "16")
    deep = save("deep", 32, "blocks.9.hook_resid_post")
    refused(call(*unlearn_words(files, method="sae_shift", sae=deep)), "blocks.9")


def test_unlearn_writes_an_edit_and_a_folder_that_plain_transformers_loads(call, files):
    from transformers import AutoModelForCausalLM

    status, out, err = call(*unlearn_words(files), "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["parity"]["max_abs_logit_difference"] <= result["parity"]["bound"]
    edited = AutoModelForCausalLM.from_pretrained(files["out"] / "model")
    before = AutoModelForCausalLM.from_pretrained(files["model"])
    changed = [k for k, w in edited.state_dict().items() if not torch.equal(w, before.state_dict()[k])]
    assert changed and all("down_proj" in name for name in changed)
    assert (files["out"] / "edit.safetensors").is_file()
    assert json.loads((files["out"] / "unlearn.json").read_text())["after"] == result["after"]
    for said in (result["before"], result["after"]):
        kept = {form: number["value"] for form, number in said["forms"].items() if number["value"] is not None}
        assert {"prompt", "cloze", "question", "multiple_choice"} <= kept.keys()
        assert said["worst_form"]["form"] in kept and said["worst_form"]["n"] > 0


def test_unlearn_prints_recall_by_form_and_the_worst_form(call, files):
    status, out, err = call(*unlearn_words(files))
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["recall", "by", "form,", "greedy:"] in lines and any(line[:1] == ["cloze"] for line in lines)
    assert sum(line[:2] == ["worst", "form"] and line[-2:] == ["above", "chance"] for line in lines) == 1


def test_an_edit_for_another_base_model_is_refused(call, files, tmp_path, tiny_folder):
    status, _, err = call(*unlearn_words(files))
    assert status == 0, err
    edit = files["out"] / "edit.safetensors"
    words = ["audit", "--full", tiny_folder("qwen3"), "--unlearned", edit, "--facts", files["forget"]]
    refused(call(*words, "--out", tmp_path / "audit"), "another base model")
    assert not (tmp_path / "audit").exists()


def trained_words(files, *settings, **changes):
    words = unlearn_words(files, method="gu", **changes)
    settings = ("base=npo", "base.epochs=2", "base.lr=1e-3", "base.batch_size=4", *settings)
    return [*words, *(part for setting in settings for part in ("--set", setting)), "--json"]


def test_training_that_was_cut_goes_on_from_the_checkpoint_in_its_folder(call, files, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from mech_unlearn.training import checkpoint

    status, _, err = call(*trained_words(files, out=tmp_path / "whole"))
    assert status == 0, err
    save, step, steps = checkpoint.Saver.save, torch.optim.AdamW.step, []

    def at_once(self, *args):
        self.seconds = 0.0
        save(self, *args)

    def counted(self, *args, **settings):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **settings)

    monkeypatch.setattr(checkpoint.Saver, "save", at_once)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert call(*trained_words(files))[0] == 130
    assert [path.name for path in files["out"].iterdir()] == ["checkpoint.safetensors"]
    refused(call(*trained_words(files, "base.lr=1e-2")), "checkpoint.safetensors", "settings differ")
    refused(call(*trained_words(files), "--sequential", 1), "not empty")
    status, _, err = call(*trained_words(files))
    assert status == 0, err
    assert not (files["out"] / "checkpoint.safetensors").exists()
    whole, again = (load_file(folder / "edit.safetensors") for folder in (tmp_path / "whole", files["out"]))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    refused(call(*trained_words(files)), "not empty")


@pytest.mark.slow
def test_what_was_fitted_is_kept_when_writing_the_model_fails_and_the_same_call_goes_on(call, files, monkeypatch):
    from mech_unlearn.edit.edit import Edit
    from mech_unlearn.methods import Rocr

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Edit, "export", cut)
        assert call(*unlearn_words(files))[0] == 130
    kept = (files["out"] / "edit.safetensors").read_bytes()
    assert not (files["out"] / "unlearn.json").exists()
    refused(call(*unlearn_words(files, set="ridge=0.5")), "another spec")
    refused(call(*unlearn_words(files), "--sequential", 1), "another spec")
    with monkeypatch.context() as fitted:
        fitted.setattr(Rocr, "fit", cut)
        status, out, err = call(*unlearn_words(files), "--json")
    assert status == 0, err
    assert (files["out"] / "edit.safetensors").read_bytes() == kept
    resumed = json.loads(out)
    assert resumed["parity"]["max_abs_logit_difference"] <= resumed["parity"]["bound"]
    _, out, _ = call(*unlearn_words(files, out=files["out"].with_name("whole")), "--json")
    whole = json.loads(out)
    for result in (resumed, whole):
        result["recipe"]["report"].pop("seconds")
    assert resumed == whole
    refused(call(*unlearn_words(files)), "not empty")


def test_a_model_that_cannot_be_measured_is_told_before_anything_is_fitted(call, files, monkeypatch):
    from mech_unlearn.methods import Rocr

    def late(*_):
        raise AssertionError("fitted before the model was measured")

    def bad(*_):
        raise ValueError("cannot be measured")

    monkeypatch.setattr(Rocr, "fit", late)
    monkeypatch.setattr("mech_unlearn.commands.row.measure_outputs", bad)
    refused(call(*unlearn_words(files)), "cannot be measured")
    assert not files["out"].exists()


def test_entities_can_be_forgotten_one_request_after_another(call, files):
    status, out, err = call(*unlearn_words(files), "--sequential", 1, "--json")
    assert status == 0, err
    recipe = json.loads(out)["recipe"]
    assert recipe["report"]["requests"] == len(recipe["composed_of"]) == 2
    refused(call(*unlearn_words(files, out=files["out"] / "other"), "--sequential", 0), "sequential")


def test_an_audit_of_two_models_that_do_not_belong_together_is_refused_before_any_work(call, files, tmp_path):
    made = (("full", 4, tiny_tokenizer()), ("deep", 5, tiny_tokenizer()), ("other", 4, byte_tokenizer()))
    for name, layers, words in made:
        tiny_hf("llama", layers=layers).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    for name, why in (("deep", "n_layers 5"), ("other", "different tokenizers")):
        words = ["audit", "--full", tmp_path / "full", "--unlearned", tmp_path / name, "--facts", files["forget"]]
        refused(call(*words, "--out", tmp_path / "out"), why)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_method_was_not_shown_does_not_change_the_edit_and_health_is_measured_on_it(call, files, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"The sea is in {place} .\n" for place in ("Oslo", "Rome", "Bern", "Paris")))
    status, told, err = call(*unlearn_words(files, texts=texts, unseen=0.5), "--json")
    assert status == 0, err
    found = json.loads(told)["after"]
    assert found["neighbor_recall"]["n"] == 4 == found["seen"]["neighbor_recall"]["n"]
    assert found["general_kl"]["value"] > 0 < found["seen"]["general_kl"]["value"]
    kept = load_facts(files["retain"])
    _, unseen = RetainSet(neighbors=kept, texts=tuple(texts.read_text().splitlines())).split(0.5, seed=0)
    others = [dataclasses.replace(fact, object=fact.distractors[0], distractors=()) for fact in kept]
    save_facts([o if f in unseen.neighbors else f for f, o in zip(kept, others, strict=True)], files["retain"])
    texts.write_text(texts.read_text().replace(unseen.texts[0], "hills hills hills"))
    assert call(*unlearn_words(files, texts=texts, unseen=0.5, out=tmp_path / "other"))[0] == 0
    one, other = (load_file(out / "edit.safetensors") for out in (files["out"], tmp_path / "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_kept_facts_written_out_are_not_called_general_text(call, files):
    status, told, _ = call(*unlearn_words(files))
    assert status == 0 and "general_kl       not measured: no --texts" in told
    assert "unseen, n = 2" in told and "seen by the method" in told


def test_a_note_says_that_recall_did_not_move_or_that_more_moved_than_should():
    def said(forget, neighbors, drift):
        values = {"forget_recall": forget, "neighbor_recall": neighbors, "general_kl": drift}
        return {key: None if value is None else {"value": value} for key, value in values.items()}

    assert notes(said(1.0, 1.0, 0.0), said(0.1, 0.95, 0.05)) == []
    assert notes(said(1.0, None, None), said(0.1, None, None)) == []
    (stuck,) = notes(said(0.9, 1.0, 0.0), said(0.8, 1.0, 0.0))
    assert stuck.startswith("forget recall hardly moved (0.90 -> 0.80)")
    drift, lost = notes(said(1.0, 0.9, 0.0), said(0.0, 0.5, 0.85))
    assert "drifted by 0.85 nats" in drift and "lost 0.40" in lost
    assert notes(said(0.0, 1.0, 0.0), said(0.0, 1.0, 0.0)) == []


def test_models_that_the_machine_cannot_hold_are_refused_before_one_is_loaded(files, call, monkeypatch):
    status, _, err = call(*unlearn_words(files))
    assert status == 0 and "2 models in float32 take 0.0 GiB" in err, err
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    monkeypatch.setattr("mech_unlearn.model.load.load", None)
    words = unlearn_words(files, out=files["out"].parent / "other")
    refused(call(*words), "2 models in float32 take", "use --dtype bfloat16")
    assert not (files["out"].parent / "other").exists()


def test_the_numbers_of_a_folder_are_counted_by_the_heads_of_its_files(files, tmp_path):
    hf = tiny_hf("llama")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    counted = sum(weight.numel() for weight in hf.parameters())
    assert parameters(str(files["model"])) == parameters(str(tmp_path / "shards")) == counted
    assert parameters("someones/hub-id") is None
