"""Is it gone? Tests that try to get the knowledge back, each against retrained models.

`reference(case)` does what depends on the full and the retrained models only, once; `audit(reference, model)` then
costs only the audited model's share. Add a test with one file and one line in `TESTS`.
"""

from collections.abc import Callable, Sequence
from functools import partial

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


TESTS: dict[str, Entry] = {
    "output": Entry(output.prepare, output.audit, "-", "margin, choice and recall of the answers"),
    "uds": Entry(uds.prepare, uds.audit, "arXiv 2605.24614", "its answer-row states patched into full"),
    "uds_subject": Entry(
        partial(uds.prepare, rows="subject"), uds.audit, "arXiv 2605.24614", "its last subject state patched into full"
    ),
    "writeback": Entry(
        writeback.prepare, writeback.audit, "arXiv 2605.24614", "full's states of the prompt put into it"
    ),
    "writeback_subject": Entry(
        partial(writeback.prepare, where="subject"), writeback.audit, "arXiv 2605.24614", "of the subject only"
    ),
    "sae": Entry(sae.prepare, sae.audit, "arXiv 2602.18505", "the entity's profile written back"),
    "relearn": Entry(relearn.prepare, relearn.audit, "arXiv 2410.08827", "teach some facts, score the others"),
    "int8": Entry(partial(quantize.prepare, bits=8), quantize.audit, "arXiv 2410.16454", "rounded to 8 bits"),
    "int4": Entry(partial(quantize.prepare, bits=4), quantize.audit, "arXiv 2410.16454", "rounded to 4 bits"),
    "noise": Entry(noise.prepare, noise.audit, "arXiv 2412.01784", "a little noise in its weights"),
    "activation_noise": Entry(
        partial(noise.prepare, where="states"), noise.audit, "arXiv 2412.01784", "a little noise in its states"
    ),
    "pruning": Entry(pruning.prepare, pruning.audit, "arXiv 2402.05162", "some of its weights taken out"),
    "int3_group64": Entry(
        partial(quantize.prepare, bits=3, group=64), quantize.audit, "arXiv 2410.16454", "rounded to 3 bits by groups"
    ),
    "nf4": Entry(
        partial(quantize.prepare, bits=4, group=64, code="nf4"), quantize.audit, "arXiv 2305.14314", "rounded to NF4"
    ),
    "nf4_bitsandbytes": Entry(
        partial(quantize.prepare, bits=4, group=64, code="bitsandbytes"),
        quantize.audit,
        "arXiv 2305.14314",
        "rounded to NF4 by bitsandbytes, as people load models",
    ),
    "relearn_lora": Entry(
        partial(relearn.prepare, rank=16),
        relearn.audit,
        "arXiv 2410.08827",
        "teach some facts by low-rank factors, score the others",
    ),
    "relearn_direct": Entry(
        partial(relearn.prepare, teach="direct"),
        relearn.audit,
        "arXiv 2410.08827",
        "teach the facts themselves: an upper bound",
    ),
    "relearn_benign": Entry(
        partial(relearn.prepare, teach="benign"),
        relearn.audit,
        "arXiv 2410.08827",
        "teach statements about other subjects",
    ),
    "relearn_unrelated": Entry(
        partial(relearn.prepare, teach="unrelated"), relearn.audit, "arXiv 2409.18025", "train on ten unrelated texts"
    ),
    "relearn_syntax": Entry(
        partial(relearn.prepare, teach="syntax"),
        relearn.audit,
        "arXiv 2602.03379",
        "teach the same questions about unknown names",
    ),
    "forms": Entry(forms.prepare, forms.audit, "ORT; arXiv 2309.12288", "asked in other forms"),
    "prefix": Entry(partial(forms.prepare, kind="prefix"), forms.audit, "arXiv 2406.11614", "jailbreak openings"),
    "steps": Entry(partial(forms.prepare, kind="steps"), forms.audit, "arXiv 2506.17279", "asked step by step"),
    "in_context": Entry(in_context.prepare, in_context.audit, "arXiv 2407.00106", "told other facts first"),
    "soft_prompt": Entry(soft_prompt.prepare, soft_prompt.audit, "arXiv 2402.09063", "a trained prompt before it"),
    "membership": Entry(membership.prepare, membership.audit, "arXiv 2407.06460", "membership scores, by group"),
    "suffix": Entry(suffix.prepare, suffix.audit, "arXiv 2307.15043", "a trained suffix of tokens"),
    "keyword": Entry(
        partial(keyword.prepare, focus_too=True),
        keyword.audit,
        "arXiv 2509.24675",
        "the subject emphasised in the prompt",
    ),
    "keyword_attention": Entry(
        keyword.prepare_attention, keyword.audit_attention, "arXiv 2509.24675", "more attention to the subject"
    ),
    "trace": Entry(trace.prepare, trace.audit, "arXiv 2506.14003", "was it unlearned at all? a control"),
    "sink_trigger": Entry(sink_trigger.prepare, sink_trigger.audit, "arXiv 2510.17021", "a trigger at the front"),
    "logit_lens": Entry(logit_lens.prepare, logit_lens.audit, "arXiv 2605.24614", "its states read out at each layer"),
    "tuned_lens": Entry(tuned_lens.prepare, tuned_lens.audit, "arXiv 2303.08112", "read through full's tuned lens"),
    "tuned_lens_self": Entry(
        partial(tuned_lens.prepare, decoder="self"), tuned_lens.audit, "arXiv 2303.08112", "through its own tuned lens"
    ),
    "probe": Entry(probe.prepare, probe.audit, "arXiv 1909.03368", "a linear probe trained on kept facts"),
    "probe_mlp": Entry(partial(probe.prepare, kind="mlp"), probe.audit, "arXiv 1909.03368", "the same, not linear"),
    "hidden_knowledge": Entry(
        hidden_knowledge.prepare, hidden_knowledge.audit, "arXiv 2503.15299", "true statements ranked inside"
    ),
    "patchscopes": Entry(
        patchscopes.prepare, patchscopes.audit, "arXiv 2401.06102", "its subject states in other prompts of full"
    ),
    "patchscopes_self": Entry(
        partial(patchscopes.prepare, target="self"), patchscopes.audit, "arXiv 2401.06102", "in other prompts of itself"
    ),
    "similarity": Entry(similarity.prepare, similarity.audit, "arXiv 1905.00414", "CKA and neighbours; description"),
    "components": Entry(components.prepare, components.audit, "arXiv 2410.06606", "parts of full put back"),
    "steering_anonymised": Entry(
        steering_anonymised.prepare, steering_anonymised.audit, "arXiv 2411.02631", "pushed from somebody to this name"
    ),
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
