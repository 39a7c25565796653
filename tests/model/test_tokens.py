"""Subject spans point at the subject, answers are tokenized as the text has them, batches lose nothing."""

import pytest
import torch

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import unwritable_marks
from mech_unlearn.model.tokens import (
    buckets,
    encode,
    has_unknown,
    make_queries,
    make_query,
    pad,
    subject_spans,
    token_span,
)
from tests.tiny import tiny_facts, tiny_tokenizer


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.fixture(scope="module")
def byte_level():
    """A GPT-2-like byte-level BPE tokenizer, whose tokens carry the space in front of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Anna Lee was born in Oslo", "The birthplace of Anna Lee is Rome", "Anna Leeward works for Acme"] * 9
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("bos", [True, False])
def test_a_span_covers_the_subject_with_and_without_bos(bos):
    tokenizer = tiny_tokenizer(bos)
    text = "The birthplace of Anna Lee is"
    ((a, b),) = subject_spans(tokenizer, text, "Anna Lee")
    ids = encode(tokenizer, text).ids
    assert words(tokenizer, ids[a:b]) == ["Anna", "Lee"] and a == 3 + bos
    assert (ids[0] == tokenizer.bos_token_id) == bos


def test_spans_of_subjects_of_several_pieces_and_in_byte_level_tokens(byte_level):
    tokenizer = tiny_tokenizer()
    ((a, b),) = subject_spans(tokenizer, "Annabel was born in", "Annabel")
    assert (
        b - a > 1
        and "".join(w.removeprefix("##") for w in words(tokenizer, encode(tokenizer, "Annabel").ids[1:])) == "Annabel"
    )
    text = "The birthplace of Anna Lee is"
    ((a, b),) = subject_spans(byte_level, text, "Anna Lee")
    assert byte_level.decode(list(encode(byte_level, text).ids[a:b])).strip() == "Anna Lee"


def test_first_last_and_all_occurrences():
    tokenizer = tiny_tokenizer()
    text = "Anna Lee and Anna Lee works for Anna Lee ."
    every = subject_spans(tokenizer, text, "Anna Lee", "all")
    assert len(every) == 3 and all(
        words(tokenizer, encode(tokenizer, text).ids[a:b]) == ["Anna", "Lee"] for a, b in every
    )
    assert subject_spans(tokenizer, text, "Anna Lee", "first") == every[:1]
    assert (
        subject_spans(tokenizer, text, "Anna Lee") == subject_spans(tokenizer, text, "Anna Lee", "last") == every[-1:]
    )


def test_a_subject_that_is_not_in_the_prompt_is_refused():
    with pytest.raises(ValueError, match="subject 'Ben Hill' not found in prompt 'Anna Lee was'"):
        subject_spans(tiny_tokenizer(), "Anna Lee was", "Ben Hill")
    encoding = encode(tiny_tokenizer(), "Anna Lee")
    with pytest.raises(ValueError, match="no token covers characters 8..12"):
        token_span(encoding, 8, 12)


def test_a_bos_that_is_the_unknown_token_is_no_unknown_word_but_a_word_without_tokens_is():
    plain, shared = tiny_tokenizer(), tiny_tokenizer(unk="<s>")
    assert shared.unk_token_id == shared.bos_token_id == encode(shared, "Anna").ids[0]
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    asked = [[(q.prompt, q.answers) for q in make_queries(tokenizer, facts)] for tokenizer in (plain, shared)]
    assert asked[0] == asked[1]
    for tokenizer in (plain, shared):
        assert [has_unknown(tokenizer, encode(tokenizer, text)) for text in ("Anna .", "Anna 7", "")] == [0, 1, 0]
        assert unwritable_marks(tokenizer) == ";!_"
        with pytest.raises(ValueError, match="no tokens for part of 'Anna 7 was' or its answers"):
            make_query(
                tokenizer, Fact(id="1", subject="Anna 7", relation="r", object="Oslo", prompt="{} was"), "{} was"
            )


def test_padding_on_either_side_shifts_a_span_onto_the_same_tokens():
    tokenizer = tiny_tokenizer()
    texts = ["Anna Lee was born in", "The birthplace of Anna Lee is", "Anna Lee works for"]
    rows = [encode(tokenizer, text).ids for text in texts]
    for side in ("left", "right"):
        ids, mask, shifts = pad(rows, tokenizer.pad_token_id, side)
        assert ids.shape == mask.shape == (3, 7) and mask.sum(1).tolist() == [len(row) for row in rows]
        for i, text in enumerate(texts):
            ((a, b),) = subject_spans(tokenizer, text, "Anna Lee")
            a, b = a + shifts[i], b + shifts[i]
            assert words(tokenizer, ids[i, a:b].tolist()) == ["Anna", "Lee"] and mask[i, a:b].all()
            assert tuple(ids[i][mask[i].bool()].tolist()) == rows[i]
    assert (pad(rows, 0, "right")[2] == 0).all() and pad(rows, 0, "left")[2].tolist() == [1, 0, 2]


def test_an_eos_that_the_tokenizer_appends_is_dropped():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    plain = encode(tokenizer, "Anna Lee was").ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    assert tokenizer("Anna Lee was")["input_ids"][-1] == 3
    assert encode(tokenizer, "Anna Lee was").ids == plain
    assert encode(tokenizer, "Anna Lee was").offsets[0] == (0, 0)


@pytest.mark.parametrize("tokens", ["words", "bytes"])
def test_prompt_and_answers_together_are_the_tokens_of_the_whole_text(tokens, byte_level):
    tokenizer = tiny_tokenizer() if tokens == "words" else byte_level
    fact = Fact(
        id="1", subject="Anna Lee", relation="born", object="Oslo", prompt="{} was born in",
        paraphrases=("The birthplace of {} is",), distractors=("Rome", "West Oslo"),
    )  # fmt: skip
    for query in make_queries(tokenizer, [fact]):
        text = query.template.replace("{}", "Anna Lee")
        assert query.prompt == encode(tokenizer, text).ids
        for answer, ids in zip(("Oslo", "Rome", "West Oslo"), query.answers, strict=True):
            assert query.prompt + ids == encode(tokenizer, f"{text} {answer}").ids
        a, b = query.span
        assert tokenizer.decode(list(query.prompt[a:b])).strip() == "Anna Lee"
        assert query.full == query.prompt + query.answers[0]


def test_an_answer_that_merges_with_the_prompt_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = [*"bornOsl ", "n O"]
    bpe = models.BPE({c: i for i, c in enumerate([*letters, "n "])}, [("n", " "), ("n ", "O")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    fact = Fact(id="7", subject="ss", relation="r", object="Oslo", prompt="{} born")
    with pytest.raises(ValueError, match="fact '7': the tokens of 'Oslo' merge with the end of the prompt 'ss born'"):
        make_query(tokenizer, fact, fact.prompt)


def test_another_subject_in_the_slot_moves_the_span_with_it():
    tokenizer = tiny_tokenizer()
    (fact,) = tiny_facts(["Anna Lee"], ["born"])
    query = make_query(tokenizer, fact, "The birthplace of {} is", subject="Annabel Stone")
    a, b = query.span
    assert (
        tokenizer.decode(list(query.prompt[a:b])) == "Annabel Stone"
        and query.answers == make_query(tokenizer, fact, fact.prompt).answers
    )


def test_which_phrasings_are_asked_for():
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    tokenizer = tiny_tokenizer()
    asked = {
        which: [q.template for q in make_queries(tokenizer, facts, which)]
        for which in ("templates", "prompt", "heldout")
    }
    assert len(asked["templates"]) == 8 and asked["prompt"] == [f.prompt for f in facts]
    assert not set(asked["heldout"]) & set(asked["templates"]) and len(asked["heldout"]) == 4


def test_buckets_hold_every_row_once_in_equal_lengths_within_the_bound():
    rows = [(1,) * n for n in (3, 5, 3, 9, 3, 5, 3)]
    found = list(buckets(rows, max_tokens=7))
    assert sorted(i for members in found for i in members) == list(range(7))
    for members in found:
        lengths = {len(rows[i]) for i in members}
        assert len(lengths) == 1 and (len(members) == 1 or len(members) * lengths.pop() <= 7)
    assert torch.tensor([len(m) for m in found]).max() == 2
