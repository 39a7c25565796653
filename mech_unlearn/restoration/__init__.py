"""Is it gone? Tests that try to get the knowledge back, each against retrained models.

`reference(case)` does what depends on the full and the retrained models only, once; `audit(reference, model)` then
costs only the audited model's share. Add a test with one file and one line in `TESTS`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from mech_unlearn.restoration.engine.audit import Entry, Reference, audit, prepared
from mech_unlearn.restoration.engine.case import Case, Relearn
from mech_unlearn.restoration.outputs import membership, output, trace
from mech_unlearn.restoration.profiles import sae, steering_anonymised
from mech_unlearn.restoration.prompts import forms, in_context, keyword, sink_trigger, soft_prompt, suffix
from mech_unlearn.restoration.states import (
    components,
    hidden_knowledge,
    logit_lens,
    patchscopes,
    probe,
    similarity,
    tuned_lens,
    uds,
    writeback,
)
from mech_unlearn.restoration.states.probe_tasks import kept_facts
from mech_unlearn.restoration.weights import noise, pruning, quantize, relearn
from mech_unlearn.verdict.result import Result

__all__ = ["CORE", "TESTS", "Case", "Reference", "Relearn", "Result", "Entry", "audit", "core_of", "reference"]


def _entry(test: ModuleType, paper: str, summary: str, **settings: Any) -> Entry:
    """A test with its settings, from its file."""
    return Entry(partial(test.prepare, **settings), test.audit, paper, summary)


TESTS: dict[str, Entry] = {
    "output": _entry(output, "-", "margin, choice and recall of the answers"),
    "uds": _entry(uds, "arXiv 2605.24614", "its answer-row states patched into full"),
    "uds_subject": _entry(uds, "arXiv 2605.24614", "its last subject state patched into full", rows="subject"),
    "writeback": _entry(writeback, "arXiv 2605.24614", "full's states of the prompt put into it"),
    "writeback_subject": _entry(writeback, "arXiv 2605.24614", "of the subject only", where="subject"),
    "sae": _entry(sae, "arXiv 2602.18505", "the entity's profile written back"),
    "relearn": _entry(relearn, "arXiv 2410.08827", "teach some facts, score the others"),
    "int8": _entry(quantize, "arXiv 2410.16454", "rounded to 8 bits", bits=8),
    "int4": _entry(quantize, "arXiv 2410.16454", "rounded to 4 bits", bits=4),
    "noise": _entry(noise, "arXiv 2412.01784", "a little noise in its weights"),
    "activation_noise": _entry(noise, "arXiv 2412.01784", "a little noise in its states", where="states"),
    "pruning": _entry(pruning, "arXiv 2402.05162", "some of its weights taken out"),
    "int3_group64": _entry(quantize, "arXiv 2410.16454", "rounded to 3 bits by groups", bits=3, group=64),
    "nf4": _entry(quantize, "arXiv 2305.14314", "rounded to NF4", bits=4, group=64, code="nf4"),
    "nf4_bitsandbytes": _entry(
        quantize,
        "arXiv 2305.14314",
        "rounded to NF4 by bitsandbytes, as people load models",
        bits=4,
        group=64,
        code="bitsandbytes",
    ),
    "relearn_lora": _entry(
        relearn, "arXiv 2410.08827", "teach some facts by low-rank factors, score the others", rank=16
    ),
    "relearn_direct": _entry(relearn, "arXiv 2410.08827", "teach the facts themselves: an upper bound", teach="direct"),
    "relearn_benign": _entry(relearn, "arXiv 2410.08827", "teach statements about other subjects", teach="benign"),
    "relearn_unrelated": _entry(relearn, "arXiv 2409.18025", "train on ten unrelated texts", teach="unrelated"),
    "relearn_syntax": _entry(
        relearn, "arXiv 2602.03379", "teach the same questions about unknown names", teach="syntax"
    ),
    "forms": _entry(forms, "ORT; arXiv 2309.12288", "asked in other forms"),
    "prefix": _entry(forms, "arXiv 2406.11614", "jailbreak openings", kind="prefix"),
    "steps": _entry(forms, "arXiv 2506.17279", "asked step by step", kind="steps"),
    "in_context": _entry(in_context, "arXiv 2407.00106", "told other facts first"),
    "soft_prompt": _entry(soft_prompt, "arXiv 2402.09063", "a trained prompt before it"),
    "membership": _entry(membership, "arXiv 2407.06460", "membership scores, by group"),
    "suffix": _entry(suffix, "arXiv 2307.15043", "a trained suffix of tokens"),
    "keyword": _entry(keyword, "arXiv 2509.24675", "the subject emphasised in the prompt", focus_too=True),
    "keyword_attention": Entry(
        keyword.prepare_attention, keyword.audit_attention, "arXiv 2509.24675", "more attention to the subject"
    ),
    "trace": _entry(trace, "arXiv 2506.14003", "was it unlearned at all? a control"),
    "sink_trigger": _entry(sink_trigger, "arXiv 2510.17021", "a trigger at the front"),
    "logit_lens": _entry(logit_lens, "arXiv 2605.24614", "its states read out at each layer"),
    "tuned_lens": _entry(tuned_lens, "arXiv 2303.08112", "read through full's tuned lens"),
    "tuned_lens_self": _entry(tuned_lens, "arXiv 2303.08112", "through its own tuned lens", decoder="self"),
    "probe": _entry(probe, "arXiv 1909.03368", "a linear probe trained on kept facts"),
    "probe_mlp": _entry(probe, "arXiv 1909.03368", "the same, not linear", kind="mlp"),
    "hidden_knowledge": _entry(hidden_knowledge, "arXiv 2503.15299", "true statements ranked inside"),
    "patchscopes": _entry(patchscopes, "arXiv 2401.06102", "its subject states in other prompts of full"),
    "patchscopes_self": _entry(patchscopes, "arXiv 2401.06102", "in other prompts of itself", target="self"),
    "similarity": _entry(similarity, "arXiv 1905.00414", "CKA and neighbours; description"),
    "components": _entry(components, "arXiv 2410.06606", "parts of full put back"),
    "steering_anonymised": _entry(steering_anonymised, "arXiv 2411.02631", "pushed from somebody to this name"),
}

CORE = ("output", "uds", "uds_subject", "writeback", "sae", "logit_lens", "probe", "relearn", "int4")
"""The tests an audit runs by default: cheap, and between them not blind anywhere."""


def core_of(case: Case) -> tuple[str, ...]:
    """`CORE` without the probe where the case has no kept facts to train one on."""
    return tuple(name for name in CORE if name != "probe" or kept_facts(case))


def reference(case: Case, tests: Sequence[str] = CORE, refused: Callable[[str, str], None] | None = None) -> Reference:
    """Prepare the tests of an audit on the full and the retrained models.

    Args:
        refused: told (test, why) of each test that the case does not allow, which is then left out; without it the
            first such test ends the work.

    Raises:
        KeyError: an unknown test.
        ValueError: a test that the case does not allow.
    """
    if unknown := [name for name in tests if name not in TESTS]:
        raise KeyError(f"unknown restoration test {unknown[0]!r}; choose from {', '.join(TESTS)}")
    return prepared(case, {name: TESTS[name] for name in tests}, refused)
