"""Fixtures of all tests; what they are made of lies in `tiny.py`, `planted.py` and `checkpoints.py`."""

import json
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.checkpoints import PLANTED, SEEDS, byte_tokenizer, random_hf, write
from tests.planted import FORGOTTEN, NAMES, OBJECTS, object_of, planted_hf
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `thorough` the first case runs with all tests, the others with the slow ones."""
    seen = set()
    for item in items:
        if item.get_closest_marker("thorough"):
            if (case := (item.path, item.originalname)) in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(case)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """architecture -> a folder with a random model and its tokenizer, made by plain transformers."""
    made = {}

    def folder(architecture: str = "llama"):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture) / "model"
            tiny_hf(architecture).save_pretrained(made[architecture])
            tiny_tokenizer().save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.fixture
def tiny_model():
    """A fresh random Llama with grouped-query attention, loaded into a Model."""
    from mech_unlearn.model.load import load

    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture
def tiny_sets():
    """(ForgetSet of two people, RetainSet of four neighbors with unknown people and texts)."""
    from mech_unlearn.core import Entity, ForgetSet, RetainSet

    forget = ForgetSet(facts=tiny_facts(["Anna Lee", "Ben Hill"]))
    retain = RetainSet(
        neighbors=tiny_facts(["Cara Moss", "Dan Park", "Eva Reed", "Finn Stone"]),
        texts=("Rivers run to the sea .", "rain falls on hills and the sea .", "The sea is in Oslo .") * 4,
        unknown=tuple(Entity(name=n, kind="person") for n in ("Gina Vale", "Hugo West", "Gina West", "Hugo Vale")),
    )
    return forget, retain


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process: (status, stdout, stderr)."""

    def run(*words):
        from mech_unlearn.commands import cli

        monkeypatch.setattr(sys, "argv", ["mech-unlearn", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        return done.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of four random models of one shape: name -> path."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, seed in SEEDS.items():
        random_hf(seed).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in SEEDS}


@pytest.fixture
def bench(call, checkpoints):
    """Run `bench NAME` on the full, unlearned and first retrained checkpoint: its JSON summary."""

    def run(name, data, out, *more, tests="none", retrained=("retrained",)):
        words = ["bench", name, "--data", data, "--out", out, "--tests", tests, "--json"]
        words += ["--full", checkpoints["full"], "--unlearned", checkpoints["unlearned"]]
        words += [word for each in retrained for word in ("--retrained", checkpoints[each])]
        status, told, err = call(*words, *more)
        assert status == 0, err
        return json.loads(told)

    return run


@pytest.fixture(scope="session")
def planted_checkpoints(tmp_path_factory):
    """Folders of planted models with room for RWKU's prompts, and a file of probes about the forgotten names."""
    root = tmp_path_factory.mktemp("planted_checkpoints")
    for name, (truth, seed) in PLANTED.items():
        hf = planted_hf(truth, seed)
        hf.config.max_position_embeddings = 512
        hf.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    rows = [
        {"query": query, "answer": OBJECTS[object_of(e)], "level": "1", "type": "cloze", "subject": NAMES[e]}
        for e in range(FORGOTTEN)
        for query in (f"The birthplace of {NAMES[e]}", f"rain falls on {NAMES[e]}")
    ]
    write(root, "probes", rows)
    return root
