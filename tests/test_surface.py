"""The Python surface: the verbs of the package, lazy, with real signatures, and objects that show themselves."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import mech_unlearn
from mech_unlearn.core import Fact, Verdict
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.verdict.verdicts import Verdicts
from tests.planted import planted_facts, planted_model

HOSTILE = "<script>alert(1)</script>"


def fresh(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_is_free():
    slow = "('torch', 'transformers', 'numpy', 'typer')"
    assert fresh(f"import sys, mech_unlearn; print([m for m in {slow} if m in sys.modules])") == "[]"


def test_every_verb_is_there_and_callable_whatever_was_imported_before():
    verbs = "load, load_facts, check, find_unknown, locate, unlearn, audit, judge, open_world, report"
    names, told = f"from mech_unlearn import {verbs}", f"print([callable(f) for f in ({verbs})])"
    before = "import mech_unlearn.locate.patching.causal_trace, mech_unlearn.report.page; "
    for first in ("", before):
        assert fresh(f"{first}{names}; {told}") == str([True] * 10)
    rooms = "from mech_unlearn.locate import LOCATORS; from mech_unlearn.report import tables; import mech_unlearn"
    assert fresh(f"{rooms}; print(callable(mech_unlearn.locate), len(LOCATORS) > 10)") == "True True"


def test_the_surface_is_what_all_says_and_no_other_name_is_made_up():
    assert mech_unlearn.__all__ == sorted(mech_unlearn.__all__) and set(mech_unlearn.__all__) <= set(dir(mech_unlearn))
    assert mech_unlearn.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="'forget'; its verbs: audit, check"):
        mech_unlearn.forget  # noqa: B018
    for verb in mech_unlearn.__all__:
        assert "kwargs" not in inspect.signature(getattr(mech_unlearn, verb)).parameters
    assert "how" in inspect.signature(mech_unlearn.locate).parameters


def test_the_verbs_do_the_main_job_on_objects():
    model, facts = planted_model(), planted_facts()
    found = mech_unlearn.locate(model, facts[:2], how="logit_lens")
    assert found.n == 2
    with pytest.raises(ValueError, match="unknown setting of logit_lens 'layrs'"):
        mech_unlearn.locate(model, facts[:2], how="logit_lens", layrs=1)
    edit = mech_unlearn.unlearn(model, facts[:2], facts[4:], method="grad_diff", epochs=1, lr=1e-3)
    assert edit.base == model.hash() and edit.recipe["method"] == "grad_diff"
    with pytest.raises(ValueError, match="unknown method 'rocket'"):
        mech_unlearn.unlearn(model, facts[:2], facts[4:], method="rocket")
    retrained = [planted_model("retrained", seed) for seed in (0, 1)]
    audited = mech_unlearn.audit(model, planted_model("late"), facts[:4], retrained=retrained, tests="uds,writeback")
    verdicts = mech_unlearn.judge(audited)
    assert {v.label for v in verdicts} == {"suppressed"} and verdicts.shares()["suppressed"] == 1.0
    assert set(audited.results) == {"output", "uds", "writeback"}
    for shown in (found, edit, audited, verdicts, audited.results["uds"], model):
        assert len(repr(shown)) < 300 and "tensor(" not in repr(shown)
    for shown in (edit, audited, verdicts, audited.results["uds"]):
        assert "<table>" in shown._repr_html_()


def test_what_shows_itself_in_a_notebook_escapes_what_others_wrote():
    verdict = Verdict(
        fact_id=HOSTILE, label="deleted", sentence=HOSTILE, tests=(), scores={}, grade="A", flags=(HOSTILE,)
    )
    weight = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    edit = Edit(name=HOSTILE, base="0", deltas={HOSTILE: weight}, recipe={"method": HOSTILE})
    for shown in (verdict, Verdicts([verdict]), edit):
        assert "<script>" not in shown._repr_html_() and "&lt;script&gt;" in shown._repr_html_()


def test_verdicts_are_a_tuple_with_shares_and_a_frame():
    fact = Fact(id="1", subject="Anna", relation="born", object="Paris", prompt="{} was born in")
    verdicts = Verdicts(
        Verdict(fact_id=name, label=label, sentence="", tests=(), scores={"output": 0.1}, grade="A", flags=flags)
        for name, label, flags in ((fact.id, "deleted", ()), ("2", "undetermined", ("not_testable",)))
    )
    assert verdicts[0].label == "deleted" and len(verdicts) == 2 and json.dumps([v.to_json() for v in verdicts])
    assert verdicts.shares()["deleted"] == 1.0 and verdicts.shares(testable_only=False)["deleted"] == 0.5
    assert verdicts.to_frame().loc["1", "label"] == "deleted"


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "mech_unlearn", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"mech-unlearn {mech_unlearn.__version__}"
