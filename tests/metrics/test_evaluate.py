"""Teacher-forced scores of many rows: slow references, padding, batches, shared rows, and what is refused."""

import pytest
import torch

from mech_unlearn.metrics.evaluate import UNITS, TokenRow, encode_pairs, score_answers, score_options, score_tokens
from mech_unlearn.metrics.memorization import answer_loss, exact_memorization, extraction_strength, labels_of
from mech_unlearn.model.load import load
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

ROWS = (
    ("Anna Lee was born in", "Paris"),
    ("Ben Hill works for", "Acme and Globex"),
    ("The birthplace of Cara Moss is :", "Oslo , the sea"),
    ("Rivers run to the", "sea"),
    ("rain falls on ", "hills and the rivers . The rain falls"),
    ("Anna Lee was born in", "Rome"),
    ("The", "employer of Dan Park"),
)


def padded(architecture, rows, size, side):
    """The same scores from padded batches of a plain model and the functions of memorization.py."""
    hf, tokenizer, out = tiny_hf(architecture), tiny_tokenizer(), []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        joint = [p.rstrip() + " " + a for p, a in part]
        ids = [tokenizer(text)["input_ids"] for text in joint]
        first = [len(tokenizer(p)["input_ids"]) for p, _ in part]  # no merges across spaces in this tokenizer
        width = max(map(len, ids))
        table, prompt, real = torch.zeros(3, len(part), width, dtype=torch.long)
        prompt += 1
        for i, row in enumerate(ids):
            at = width - len(row) if side == "left" else 0
            table[i, at : at + len(row)] = torch.tensor(row)
            real[i, at : at + len(row)] = 1
            prompt[i, at + first[i] : at + len(row)] = 0
        places = (real.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = hf(table, attention_mask=real, position_ids=places).logits
        labels = labels_of(table, prompt.bool())
        out.append(torch.stack([f(logits, labels) for f in (answer_loss, exact_memorization, extraction_strength)]))
    return torch.cat(out, 1)


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_scores_are_those_of_padded_batches_of_any_size_on_either_side(architecture, side):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    found = score_answers(model, ROWS)
    ours = torch.stack([found.loss, found.exact_memorization, found.extraction_strength])
    for size in (1, 3, 7):
        torch.testing.assert_close(ours, padded(architecture, ROWS, size, side), rtol=1e-6, atol=1e-6)
    assert found.tokens.tolist() == [1, 3, 4, 1, 13, 1, 4]


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rows_scores_do_not_depend_on_the_other_rows_or_the_batch(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    together, apart = score_answers(model, ROWS), score_answers(model, ROWS, max_tokens=1)
    alone = torch.cat([score_answers(model, [row]).loss for row in ROWS])
    for other in (apart.loss, alone):
        torch.testing.assert_close(together.loss, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(together.exact_memorization, apart.exact_memorization)
    torch.testing.assert_close(together.probability, (-together.loss).exp())


def test_the_right_tail_and_the_right_share_follow_the_models_own_greedy_text(tiny_model):
    from mech_unlearn.model.scores import greedy
    from mech_unlearn.model.tokens import encode

    prompt = encode(tiny_model.tokenizer, "Anna Lee was born in").ids
    own = greedy(tiny_model, [prompt], 6)[0]
    wrong = tuple((t + 1) % 40 for t in own)
    mixed = own[:2] + wrong[2:3]  # the third token is wrong: nothing behind it is right
    found = score_tokens(tiny_model, [TokenRow(prompt + a, len(a)) for a in (own, mixed, wrong[:1])])
    assert found.exact_memorization.tolist() == pytest.approx([1, 2 / 3, 0])
    assert found.extraction_strength.tolist() == pytest.approx([1, 0, 0])


def test_rows_that_differ_in_their_last_token_share_one_forward_pass(tiny_model):
    seen = []
    with tiny_model.hooks(("blocks.0.hook_resid_post", lambda x: seen.append(tuple(x.shape[:2])))):
        table = score_options(
            tiny_model, [("Anna Lee was born in", ("Paris", "Rome", "Oslo")), ("Ben works", ("for",))]
        )
    assert sorted(seen) == [(1, 3), (1, 6)]  # with the first token of the tokenizer
    assert table.shape == (2, 3) and table[1].isnan().tolist() == [False, True, True]
    one = score_answers(tiny_model, [("Anna Lee was born in", "Rome")]).loss
    torch.testing.assert_close(-table[0, 1:2], one, rtol=1e-6, atol=1e-6)


def test_interventions_in_force_are_seen(tiny_model):
    plain = score_answers(tiny_model, ROWS).loss
    with tiny_model.hooks(("blocks.1.hook_resid_post", lambda x: x * 0)):
        assert not torch.allclose(score_answers(tiny_model, ROWS).loss, plain)


def test_each_measurement_carries_its_unit_count_and_interval(tiny_model):
    found = score_answers(tiny_model, ROWS)
    named = found.measurements([prompt for prompt, _ in ROWS])
    assert set(named) == set(UNITS)
    for m in named.values():
        assert m.n == 7 and m.unit and m.ci[0] <= m.value <= m.ci[1]
    assert named["answer_loss"].value == pytest.approx(found.loss.mean().item(), rel=1e-6)


def test_a_byte_level_tokenizer_scores_the_token_that_starts_with_the_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("A", ":", "ĠB", "B", "Ġ", "(", "(B", "C")
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "B"), ("(", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for prompt in ("A:", "A: "):
        row = encode_pairs(fast, [(prompt, "B")])[0]
        assert (row.ids, row.answer) == ((0, 1, 2), 1)
    assert encode_pairs(fast, [("A:", "BC")])[0].answer == 2


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no rows"),
        ([("Anna", "Paris"), ("Anna", "  ")], "row 1: the answer .* is empty"),
        ([("Anna", "Ω")], "row 0: the tokenizer has no tokens"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_by_number(tiny_model, rows, reason):
    with pytest.raises(ValueError, match=reason):
        score_answers(tiny_model, rows)


def test_a_question_without_options_or_a_prompt_that_nothing_precedes_is_refused(tiny_model):
    with pytest.raises(ValueError, match="row 1: no options"):
        score_options(tiny_model, [("Anna", ("Paris",)), ("Ben", ())])
    with pytest.raises(ValueError, match="row 0, option 1: the answer"):
        score_options(tiny_model, [("Anna", ("Paris", " "))])
    bare = load(tiny_hf("llama"), tokenizer=tiny_tokenizer(bos=False))
    with pytest.raises(ValueError, match="no token precedes"):
        score_answers(bare, [("", "Paris")])
