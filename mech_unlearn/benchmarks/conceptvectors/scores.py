"""ConceptVectors, behavioural part: how much of what the full model says about a concept the unlearned one still says.

Paper: Hong et al. 2024, arXiv 2406.11614, section 4: BLEU (smoothing method 3) and ROUGE-L F1 between the two models'
    greedy answers to questions on the concept, to beginnings of passages on it, and to unrelated questions. Low on the
    first two and high on the third is better. The intrinsic part is locate/neurons/concept_causal.py.
Needs: greedy text of both models, 100 tokens per prompt.
Differs: the layout of questions is a setting (the paper uses the chat format of its models). BLEU words are split at
    blanks; ROUGE is without a stemmer.
Fails: the reference is the full model's text, right or wrong; any change of style lowers both scores, which is why the
    unrelated questions are the control. A text of fewer than four words has a BLEU below 1 even with itself.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.benchmarks.conceptvectors.data import ConceptEntry
from mech_unlearn.benchmarks.muse.scores import rouge_l_f1
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.bridge import Model

KINDS = ("qa", "completion", "unrelated_qa")
MAX_NEW_TOKENS = 100
"""Source: released code of 2406.11614."""
LAYOUT = "Question: {question}\nAnswer:"


def bleu_method3(generated: Sequence[str], references: Sequence[str]) -> Float[Tensor, " row"]:
    """Sentence BLEU-4 with smoothing method 3 of each text against its reference; float64, 0 for no common word.

    Source: Papineni et al. 2002; smoothing: Chen and Cherry 2014, through NLTK.

    Raises:
        ValueError: another number of texts than of references, or none at all.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if len(generated) != len(references) or not generated:
        raise ValueError(f"{len(generated)} generated texts but {len(references)} references; give as many, and one")
    smooth = SmoothingFunction().method3
    found = [
        sentence_bleu([reference.split()], text.split(), smoothing_function=smooth)
        for text, reference in zip(generated, references, strict=True)
    ]
    return torch.tensor([float(value) for value in found], dtype=torch.float64)  # pyright: ignore


def answers(
    model: Model,
    entries: Sequence[ConceptEntry],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    layout: str = LAYOUT,
) -> dict[str, dict[str, tuple[str, ...]]]:
    """What a model says about each concept: kind of prompt -> concept -> greedy texts in the entry's order.

    Args:
        layout: what a question is asked in; `{question}` stands for it.

    Raises:
        ValueError: no entries, a concept that occurs twice, a layout without `{question}`, or as
            `generation.continuations`.
    """
    if "{question}" not in layout:
        raise ValueError(f"layout {layout!r} lacks {{question}}")
    names = [entry.concept for entry in entries]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"give entries of one or more concepts, each once; got {names}")
    out: dict[str, dict[str, tuple[str, ...]]] = {kind: {} for kind in KINDS}
    for entry in entries:
        asked = {
            "qa": [layout.replace("{question}", question) for question in entry.qa],
            "completion": [first for first, _ in entry.completions],
            "unrelated_qa": [layout.replace("{question}", question) for question in entry.unrelated_qa],
        }
        for kind, prompts in asked.items():
            out[kind][entry.concept] = continuations(model, prompts, max_new_tokens) if prompts else ()
    return out


def behaviour(
    unlearned: Mapping[str, Mapping[str, Sequence[str]]], full: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, RowScores]:
    """BLEU and ROUGE-L F1 of the unlearned model's texts against the full model's: `bleu_KIND` and `rouge_l_f1_KIND`.

    Rows are prompts, clusters are concepts. Arguments as `answers` gives them. A kind without any text is left out.

    Raises:
        ValueError: other kinds, concepts or numbers of texts in the two.
    """
    if set(unlearned) != set(full):
        raise ValueError(f"texts of {', '.join(sorted(unlearned))} against texts of {', '.join(sorted(full))}")
    out = {}
    for kind, by_concept in unlearned.items():
        if {c: len(t) for c, t in by_concept.items()} != {c: len(t) for c, t in full[kind].items()}:
            raise ValueError(f"{kind}: the two models were not asked the same concepts and prompts")
        clusters = tuple(concept for concept, texts in by_concept.items() for _ in texts)
        mine = [text for texts in by_concept.values() for text in texts]
        theirs = [text for concept in by_concept for text in full[kind][concept]]
        if not mine:
            continue
        for name, score, unit in (
            ("bleu", bleu_method3, "BLEU-4 (smoothing 3) against the full model's text"),
            ("rouge_l_f1", rouge_l_f1, "ROUGE-L F1, no stemmer, against the full model's text"),
        ):
            values = score(mine, theirs)
            out[f"{name}_{kind}"] = RowScores(values=values, unit=unit, clusters=clusters, texts=tuple(mine))
    return out
