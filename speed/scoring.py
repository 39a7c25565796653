"""Teacher-forced scores of 400 TOFU questions with their answers: what they cost above the forward passes alone.

Reference: the limit, namely one forward pass per batch on the bare Hugging Face model, with the attention that
transformers picks, over the same unpadded tokens in the same batches of equal length, and no scoring at all; so that
the two can be compared, the logits of the answers of every 25th row are kept. Ours is `score_answers` from text to
loss, tokenization included.

Questions and answers are those of TOFU's published evaluation log (arXiv 2401.06121, MIT): the forget split, then the
retain split, 400 in all. The tokenizer is a byte-level BPE of 4,096 pieces made from these texts, for that of GPT-2
would have to be downloaded; it cuts them into about as many tokens.
"""

import gzip
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.metrics.evaluate import TokenRow, encode_pairs, score_answers
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import buckets
from speed.shapes import Shape, Way

DATA = Path(os.environ.get("MECH_UNLEARN_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tofu"
LOG = DATA / "llama2-7b_full_eval_log.json.gz"
ROWS, PIECES, KEPT = 400, 4096, 25


@lru_cache
def _texts(vocabulary: int) -> tuple[tuple[str, str], ...]:
    """(Prompt, answer) of each row; a tenth of them for a vocabulary below 4,096, which is that of a test."""
    log = json.loads(gzip.decompress(LOG.read_bytes()))
    told = [
        texts for split in ("eval_log_forget.json", "eval_log.json") for texts in log[split]["generated_text"].values()
    ]
    asked = [(prompt.removeprefix("[INST] ").removesuffix(" [/INST]"), answer) for prompt, _, answer in told]
    rows = ROWS if vocabulary >= PIECES else ROWS // 10
    return tuple((f"Question: {question}\nAnswer: ", answer) for question, answer in asked[:rows])


@lru_cache
def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(PIECES, vocabulary - 1), special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator((prompt + answer for prompt, answer in _texts(vocabulary)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@lru_cache
def _rows(vocabulary: int) -> tuple[TokenRow, ...]:
    return encode_pairs(_tokenizer(vocabulary), _texts(vocabulary))


def plain(shape: Shape) -> Way:
    """Logits [token of an answer, d_vocab] of every 25th row."""
    hf, rows = shape.bare(), _rows(shape.vocabulary)
    inputs = [row.ids[:-1] for row in rows]
    batches = [(members, torch.tensor([inputs[i] for i in members])) for members in buckets(inputs)]

    @torch.no_grad()
    def run() -> Tensor:
        kept: dict[int, Tensor] = {}
        for members, ids in batches:
            logits = hf(input_ids=ids, use_cache=False).logits
            kept |= {i: logits[k, -rows[i].answer :].clone() for k, i in enumerate(members) if i % KEPT == 0}
        return torch.cat([kept[i] for i in sorted(kept)])

    return run


def losses(found: Tensor) -> Tensor:
    """Mean negative log-likelihood of every 25th row, from its logits."""
    rows = _rows(found.shape[1])[::KEPT]
    parts = found.split([row.answer for row in rows])
    return torch.stack([
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[-row.answer :]))
        for row, logits in zip(rows, parts, strict=True)
    ])  # fmt: skip


def ours(shape: Shape) -> Way:
    """`score_answers` of all rows; the losses of every 25th."""
    hf, texts = shape.bare(), _texts(shape.vocabulary)
    hf.set_attn_implementation("eager")
    model = load(hf, tokenizer=_tokenizer(shape.vocabulary))
    return lambda: score_answers(model, texts).loss[::KEPT]
