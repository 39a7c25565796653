"""The contexts listed are those of a slow search through every token, each once."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.latents import top_contexts as module
from mech_unlearn.locate.latents.top_contexts import top_contexts
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.load import load
from tests.tiny import WORDS, tiny_hf, tiny_tokenizer

SITE = Site(1, "resid_post")


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def sae():
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    made = StandardSAE(StandardSAEConfig(d_in=32, d_sae=16, dtype="float32", device="cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(32, 16, generator=generator))
        made.b_enc.fill_(-1.0)
        made.b_enc[7] = -1e4  # never fires
    return Sae(SITE, made.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def texts():
    """60 random texts of different lengths, a third of them repeated."""
    generator = torch.Generator().manual_seed(1)

    def one():
        length = int(torch.randint(3, 12, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    made = [one() for _ in range(40)]
    return [*made, *made[:20]]


def slow(model, sae, texts, latent, k, window):
    """Every ordinary token of every text, sorted; contexts of equal tokens once."""
    entries = []
    for number, text in enumerate(texts):
        out = model.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = out["input_ids"], out["offset_mapping"]
        seen = []
        with torch.no_grad(), model.hooks((SITE, lambda x, s=seen: s.append(x[0]))):
            model.logits(torch.tensor([ids]))
        for position, act in enumerate(sae.encode(seen[0])[:, latent].tolist()):
            if position and act > 1e-6:  # position 0 is BOS
                a, b = max(1, position - window), min(len(ids), position + window + 1)
                key = (tuple(ids[a:b]), position - a)
                entries.append((act, key, number, position, text[offsets[a][0] : offsets[b - 1][1]]))
    best = {}
    for act, key, number, position, snippet in sorted(entries, key=lambda e: (-e[0], e[2], e[3])):
        best.setdefault(key, (act, number, position, snippet))
    return list(best.values())[:k]


@pytest.mark.thorough
@pytest.mark.parametrize("window", [0, 2, 20])
def test_the_contexts_are_those_of_a_search_through_every_token(model, sae, texts, window, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)  # texts come in chunks: the best of all chunks is kept
    found = top_contexts(model, sae, iter(texts), [3, 0, 11], k=6, window=window, max_tokens=30)
    assert list(found["latent"].unique()) == [3, 0, 11]
    for latent, rows in found.groupby("latent"):
        expected = slow(model, sae, texts, latent, 6, window)
        assert rows["rank"].tolist() == list(range(1, len(expected) + 1))
        assert rows["activation"].tolist() == pytest.approx([e[0] for e in expected], rel=1e-4)
        assert rows["snippet"].tolist() == [e[3] for e in expected]
        for row in rows.itertuples():
            ids = model.tokenizer(texts[row.text])["input_ids"]
            assert model.tokenizer.convert_ids_to_tokens(ids[row.position]) == row.token and row.token in row.snippet


def test_repeated_texts_are_listed_once_and_a_silent_latent_not_at_all(model, sae, texts):
    once, often = (top_contexts(model, sae, t, [2], k=5) for t in (texts[:4], texts[:4] * 300))
    assert once["snippet"].tolist() == often["snippet"].tolist() and often["text"].max() < 4
    assert once["activation"].tolist() == pytest.approx(often["activation"].tolist(), rel=1e-4)
    assert top_contexts(model, sae, texts, [7]).empty
    few = top_contexts(model, sae, ["sea"], [0, 1, 2, 3], k=10)
    assert (few.groupby("latent").size() <= 1).all()


def test_long_texts_are_read_in_pieces_with_their_places_in_the_text(model, sae):
    text = " ".join(WORDS[:30])
    found = top_contexts(model, sae, [text], [0, 1, 2], k=50, window=1, context=8)
    ids = model.tokenizer(text)["input_ids"]
    assert found["position"].max() > 8
    assert [model.tokenizer.convert_ids_to_tokens(ids[p]) for p in found["position"]] == found["token"].tolist()


def test_an_intervention_in_force_is_seen(model, sae):
    tokens = tuple(model.tokenizer("Anna Lee", add_special_tokens=False)["input_ids"])
    shift = Shift(Site(0, "resid_post"), (tokens,), 30 * sae.sae.W_enc.detach()[:, :1].T)
    edit = Edit(name="shift", base=model.hash(), interventions=(shift,))
    plain = top_contexts(model, sae, ["Anna Lee was born"], [0], k=1)
    with edit.on(model):
        shifted = top_contexts(model, sae, ["Anna Lee was born"], [0], k=1)
    assert shifted["token"].tolist() == ["Lee"]
    assert plain.empty or shifted["activation"][0] > plain["activation"][0] + 1


def test_bad_requests_are_refused(model, sae, texts):
    for latents in ([], [16], [-1]):
        with pytest.raises(ValueError, match="name some of 0..15"):
            top_contexts(model, sae, texts, latents)
    with pytest.raises(ValueError, match="k must be 1 or more"):
        top_contexts(model, sae, texts, [0], k=0)
    with pytest.raises(ValueError, match="sits at L9"):
        top_contexts(model, Sae(Site(9, "resid_post"), sae.sae), texts, [0])
