"""Tests lie where what they test lies: `tests/a/test_b.py` is about `mech_unlearn/a/b`, or says here why it is not."""

from pathlib import Path

from tests.paths import ROOT

TESTS = ROOT / "tests"
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
HELPERS = {
    "__init__.py",
    "conftest.py",
    "checkpoints.py",
    "damage.py",
    "paths.py",
    "planted.py",
    "simulated.py",
    "tiny.py",
    "zoo.py",
}
OF_SEVERAL = {
    "test_architecture.py": "docs/architecture.md and the README's map",
    "test_bars.py": "the shipped worlds, from methods to verdicts",
    "test_contract.py": "every method",
    "test_layout.py": "the tests themselves",
    "test_readme.py": "README.md",
    "test_real.py": "a real pretrained model",
    "test_surface.py": "the verbs of the package",
    "test_walls.py": "what may import what",
    "benchmarks/test_forced_answers.py": "the benches that score given answers",
    "benchmarks/test_generated_answers.py": "the benches that generate",
    "benchmarks/test_generated_scores.py": "the scores of generated text",
    "benchmarks/test_truth.py": "a bench beside verdicts, on known truth",
    "commands/test_strangers.py": "audit, calibrate and locate on folders of plain transformers",
    "experiments/test_experiments.py": "what all experiments keep to",
    "locate/test_planted_truth.py": "all locators on one planted fact",
    "methods/test_mixtures.py": "all methods on mixtures of experts",
    "methods/test_output_methods.py": "the methods with losses on outputs only",
    "model/test_architectures.py": "what `load` makes of sixty architectures",
    "model/test_joiner.py": "facts in scripts without spaces, from files to methods",
    "metrics/test_invariance.py": "all teacher-forced metrics",
    "restoration/test_audit.py": "all restoration tests together",
    "speed/test_speed.py": "all cases of speed",
    "restoration/prompts/test_controls.py": "all attacks on the prompt, on one locked model",
}


def module_of(test):
    """The module or folder whose name the test bears, in the package or beside it; an aspect may follow the name."""
    words = test.stem.removeprefix("test_").split("_")
    for end in range(len(words), 0, -1):
        for root in (ROOT / "mech_unlearn", ROOT):
            place = root / test.parent / "_".join(words[:end])
            if place.is_dir() or place.with_suffix(".py").is_file():
                return place
    return None


def test_every_test_bears_the_name_of_what_it_tests():
    assert {test.as_posix() for test in FILES if module_of(test) is None} <= OF_SEVERAL.keys()


def test_none_is_excepted_that_is_not_there_or_bears_a_name():
    assert not {name for name in OF_SEVERAL if module_of(Path(name)) or not (TESTS / name).is_file()}


def test_beside_tests_there_are_only_helpers_that_all_share():
    assert {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")} - {
        p.as_posix() for p in FILES
    } == HELPERS
