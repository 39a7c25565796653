"""Long texts are read in pieces that the model has positions for, and nothing of them is lost."""

import pytest
import torch

from mech_unlearn.core import RetainSet, Site
from mech_unlearn.locate.latents.latent_scores import concept_other
from mech_unlearn.locate.latents.latent_states import background
from mech_unlearn.methods.writing.protect import protected_rows
from mech_unlearn.model.load import load
from mech_unlearn.model.pieces import pieces, token_rows
from mech_unlearn.model.sae_training import train_sae
from mech_unlearn.model.tokens import encode
from mech_unlearn.restoration.weights.pruning import input_norms
from mech_unlearn.training.rows import text_rows
from tests.tiny import tiny_hf, tiny_tokenizer

SHORT = ("Rivers run to the sea .", "Anna Lee was born in Rome .")
LONG = " ".join(SHORT * 8)


@pytest.fixture(scope="module", params=(True, False), ids=("BOS", "no BOS"))
def model(request):
    return load(tiny_hf("gpt2", layers=2), tokenizer=tiny_tokenizer(bos=request.param))


@pytest.mark.parametrize(("context", "longest"), ((7, 7), (512, 64)))
def test_pieces_begin_as_the_text_does_and_hold_all_of_it(model, context, longest):
    whole = encode(model.tokenizer, LONG)
    head = whole.ids[:1] if whole.ids[0] == model.tokenizer.bos_token_id else ()
    assert len(whole.ids) > model.n_ctx == 64
    found = pieces(model, [SHORT[0], LONG], context)
    mine = [piece for piece in found if piece.text == 1]
    assert max(len(piece.ids) for piece in mine) == longest
    assert all(piece.ids[: len(head)] == head for piece in mine)
    assert head + tuple(token for piece in mine for token in piece.ids[len(head) :]) == whole.ids
    for piece in mine:
        for i in range(len(head), len(piece.ids)):
            assert piece.ids[i] == whole.ids[piece.start + i] and piece.offsets[i] == whole.offsets[piece.start + i]
    assert token_rows(model, SHORT) == [encode(model.tokenizer, text).ids for text in SHORT]


def test_a_piece_without_room_is_refused_and_an_empty_text_has_no_piece():
    model = load(tiny_hf("gpt2", layers=2), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no room behind 1 special"):
        pieces(model, [LONG], 1)
    assert pieces(model, [""]) == []


def test_what_reads_running_text_takes_texts_longer_than_the_models_positions(model):
    rows = token_rows(model, [LONG])
    assert len(rows) == 2
    assert [row for row, _ in text_rows(model, [LONG])] == rows
    sae = train_sae(model, [LONG], Site(1, "resid_post"), d_sae=64, k=4, training_tokens=512, batch_size=256)
    body = sum(b > a for a, b in encode(model.tokenizer, LONG).offsets)
    assert background(model, sae, [LONG]).tokens == body
    assert background(model, sae, [LONG], ["Anna Lee"]).tokens == body - 2 * LONG.count("Anna Lee")
    ((protected, at),) = protected_rows(model, RetainSet(texts=(LONG,)), (), ("texts",))
    assert (protected, at) == (rows, "ordinary")
    about, other = ([f"{LONG} {word} {extra}" for extra in "abcd"] for word in ("Rome", "Oslo"))
    assert concept_other(model, about, other, sae).first.n == 4  # half of the items only test
    assert all(torch.isfinite(norm).all() for norm in input_norms(model, rows).values())
