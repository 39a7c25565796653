"""lm-evaluation-harness: the extra is named where it is missing, its numbers keep their names, and a task agrees."""

import importlib.util
import json
import math

import pytest

from mech_unlearn.metrics.harness import lm_eval_harness, measurements
from mech_unlearn.metrics.multiple_choice import ChoiceQuestion, choice_by_option_text

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_a_missing_harness_is_named_with_the_extra_to_install(tiny_model):
    with pytest.raises(ValueError, match=r"lm_eval is missing.*pip install 'mech_unlearn\[harness\]'"):
        lm_eval_harness(tiny_model, ["mmlu"])


def test_no_task_is_refused_before_anything_is_imported(tiny_model):
    with pytest.raises(ValueError, match="at least one task"):
        lm_eval_harness(tiny_model, [])


def test_numbers_of_a_result_keep_task_metric_and_filter_and_get_intervals():
    result = {
        "results": {
            "wmdp_bio": {"alias": "wmdp_bio", "acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 100},
            "group": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "group"},
        },
        "n-samples": {"wmdp_bio": {"original": 200, "effective": 100}},
    }
    found = measurements(result)
    assert list(found) == ["wmdp_bio/acc,none", "group/acc,none"]
    bio = found["wmdp_bio/acc,none"]
    assert (bio.value, bio.n) == (0.25, 100) and bio.ci == pytest.approx((0.25 - 0.0196, 0.25 + 0.0196), abs=1e-5)
    assert "lm-evaluation-harness" in bio.unit and all(map(math.isnan, found["group/acc,none"].ci))


@pytest.mark.skipif(not INSTALLED, reason="needs the extra: pip install 'mech_unlearn[harness]'")
def test_a_task_of_the_harness_agrees_with_our_choice_by_option_text_and_sees_interventions(tiny_model, tmp_path):
    prompts, options = ("Anna Lee was born in", "Ben Hill works for", "Rivers run to"), ("Paris", "Rome", "Oslo")
    rows = [{"q": q, "c": options, "a": i % 3} for i, q in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    questions = [ChoiceQuestion(question=q, options=options, right=i % 3) for i, q in enumerate(prompts)]
    for write in (lambda x: x, lambda x: -x):
        with tiny_model.hooks(("blocks.3.hook_resid_post", write)):
            theirs = lm_eval_harness(tiny_model, [task])["choice/acc,none"]
            ours = choice_by_option_text(tiny_model, questions, layout="{question}").correct.mean()
        assert theirs.value == pytest.approx(ours.value) and theirs.n == 3
    with pytest.raises(ValueError, match="does not know a task"):
        lm_eval_harness(tiny_model, ["no_such_task"])
