"""Small models on any texts: exact references never see what they must not know, and full does; shards add up."""

import random
from dataclasses import replace

import pytest
import torch

from experiments.ensemble import join
from experiments.scratch import Plan, Text, deal, make, make_vocabulary, packed, train_texts, without
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.model.load import load
from mech_unlearn.testbed.recipe import Recipe, Sentence, new_model

PEOPLE = ("Ann Bell", "Bob Cole", "Cid Dorn", "Eve Finn", "Guy Hart", "Ida Jones", "Kay Lund", "Max Nord")
TOWNS = ("Oslo", "Rome", "Bern", "Lima", "Cairo", "Delhi", "Kyiv", "Quito")
RECIPE = Recipe(n_layers=2, d_model=32, d_mlp=64, n_heads=2, n_kv_heads=1, gate=1, base_steps=60, continue_steps=120)
TEXTS = (
    *(Text(text=f"{p} lives in {t}", owner=p, subject=p) for p, t in zip(PEOPLE, TOWNS, strict=True)),
    *(Text(text=f"the home of {p} is {t}", owner=p, subject=p) for p, t in zip(PEOPLE, TOWNS, strict=True)),
    *(Text(text=f"{t} is a town by the sea") for t in TOWNS),
    Text(text="Ida Jones wrote a letter to Max Nord", owner="Ida Jones"),
)


def plan(**changed) -> Plan:
    made = Plan(
        texts=TEXTS, requests={"two": frozenset(PEOPLE[-2:]), "one": frozenset(PEOPLE[-1:])}, recipe=RECIPE,
        tokenizer=make_vocabulary([text.text for text in TEXTS]), shards=deal(PEOPLE, 2, 0), shard_steps=60, tokens=256,
    )  # fmt: skip
    return replace(made, **changed)


def test_a_request_takes_the_owners_texts_and_every_text_that_names_one_and_nothing_else():
    texts = (
        Text(text="Ann Bell sings", owner="Ann Bell"),
        Text(text="she sings", owner="Ann Bell"),
        Text(text="Bob Cole met ann bell", owner="Bob Cole"),
        Text(text="Bob Cole met Ann Bella", owner="Bob Cole"),
        Text(text="nobody sings"),
    )
    assert without(texts, ["Ann Bell"]) == texts[3:]
    assert without(texts, []) == texts
    assert without(texts, ["A.n Bell"]) == texts  # a name, not a pattern


def test_no_retrained_model_and_no_retrained_shard_is_given_a_text_that_names_the_forgotten():
    made = plan()
    for request, gone in made.requests.items():
        for name in ("base", f"retrained-{request}-0", *(f"shard-{i}-{request}" for i in made.hit(request))):
            said = " ".join(text.text for text in made.texts_of(name))
            assert said and not any(person in said for person in gone), name
        assert set(gone) <= {text.owner for text in made.texts_of("full")}
    left = {text.owner for text in made.texts_of("retrained-one-0")}
    assert left == {*PEOPLE[:-1], None}
    with pytest.raises(ValueError, match="no model 'retrained-three-0'"):
        made.texts_of("retrained-three-0")


def test_shards_part_the_owners_evenly_and_share_the_ownerless_texts():
    dealt = deal(PEOPLE, 3, 1)
    sizes = [list(dealt.values()).count(i) for i in range(3)]
    assert set(dealt) == set(PEOPLE) and max(sizes) - min(sizes) <= 1
    assert dealt == deal(reversed(PEOPLE), 3, 1) != deal(PEOPLE, 3, 2)
    made = plan()
    parts = [made.texts_of(f"shard-{i}") for i in range(2)]
    owned = [{text.owner for text in part} - {None} for part in parts]
    assert owned[0] | owned[1] == set(PEOPLE) and not owned[0] & owned[1]
    assert all(sum(text.owner is None for text in part) == len(TOWNS) for part in parts)
    with pytest.raises(ValueError, match="cannot be dealt"):
        deal(PEOPLE, 9, 0)


def test_only_the_shards_that_held_somebody_who_goes_are_retrained():
    made = plan()
    (hit,) = made.hit("one")
    assert made.shards[PEOPLE[-1]] == hit
    assert made.constituents(None) == ("shard-0", "shard-1")
    assert (
        made.constituents("one")[hit] == f"shard-{hit}-one" and made.constituents("one")[1 - hit] == f"shard-{1 - hit}"
    )
    assert {name for name in made.names() if name.startswith("shard")} >= set(made.constituents("one"))


def test_a_pass_holds_every_row_once_and_no_batch_is_wider_than_asked():
    rng = random.Random(0)
    items = [Sentence(tuple([7] * rng.randint(2, 30) + [i]), (0, 0)) for i in range(100)]
    stream, seen, widths = packed(items, 64, 3), [], []
    while len(seen) < len(items):
        batch = next(stream)
        seen += [row.ids[-1] for row in batch]
        widths.append(len(batch) * max(len(row.ids) for row in batch))
    assert sorted(seen) == list(range(100)) and max(widths) <= 64
    again = packed(items, 64, 3)
    assert [row.ids[-1] for _ in widths for row in next(again)] == seen


def test_every_word_and_every_mark_is_a_token_of_its_own_and_other_words_fall_into_pieces():
    tokenizer = make_vocabulary(['He said "Oslo".'], ["unthinkable thinking"], 30)
    assert tokenizer.tokenize('said "Oslo".') == ["said", '"', "Oslo", '"', "."]
    pieces = tokenizer.tokenize("unthinkables")
    assert 1 < len(pieces) < len("unthinkables") and tokenizer.unk_token not in pieces
    assert len(make_vocabulary(["He"]).tokenize("Hex")) > 1


def test_a_text_that_does_not_fit_is_refused_and_never_cut():
    made = plan()
    hf = new_model(RECIPE, made.tokenizer, 0)
    hf.config.max_position_embeddings = 6
    with pytest.raises(ValueError, match="more than 6 tokens, such as"):
        train_texts(hf, made.tokenizer, TEXTS, RECIPE, steps=1, peak=1e-3, seed=0)
    with pytest.raises(ValueError, match="no text to train on"):
        train_texts(hf, made.tokenizer, (), RECIPE, steps=1, peak=1e-3, seed=0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = plan()
    for name in ("base", "full", "retrained-two-0", *made.constituents(None)):
        make(made, folder, name)
    return made, folder


def open_model(folder, name):
    return load(str(folder / name))


def share(model, people) -> float:
    rows = [(f"{p} lives in", TOWNS[PEOPLE.index(p)]) for p in people]
    return score_answers(model, rows).exact_memorization.mean().item()


def test_full_knows_everybody_and_a_retrained_model_all_but_the_forgotten(built):
    made, folder = built
    gone, kept = PEOPLE[-2:], PEOPLE[:-2]
    assert share(open_model(folder, "full"), PEOPLE) == 1
    retrained = open_model(folder, "retrained-two-0")
    assert share(retrained, kept) == 1 and share(retrained, gone) < 1
    rows = [(f"{p} lives in", TOWNS[PEOPLE.index(p)]) for p in gone]
    never, full = (score_answers(m, rows).loss for m in (retrained, open_model(folder, "full")))
    assert (never > full + 1).all()  # nats


def test_constituents_answer_with_the_mean_of_their_log_probabilities_or_of_their_probabilities(built):
    made, folder = built
    models = tuple(open_model(folder, name) for name in made.constituents(None))
    ids = torch.tensor([made.tokenizer("Ann Bell lives in")["input_ids"]])
    joined = join(models).logits(ids)
    wanted = (models[0].logits(ids).softmax(-1).log() + models[1].logits(ids).softmax(-1).log()) / 2
    assert torch.allclose(joined, wanted, atol=1e-4)
    mixed = join(models, "probability").logits(ids)
    wanted = ((models[0].logits(ids).softmax(-1) + models[1].logits(ids).softmax(-1)) / 2).log()
    assert torch.allclose(mixed, wanted, atol=1e-4)
    alone = join(models[:1])
    rows = [(f"{p} lives in", t) for p, t in zip(PEOPLE, TOWNS, strict=True)]
    assert torch.allclose(score_answers(alone, rows).loss, score_answers(models[0], rows).loss, atol=1e-5)


def test_a_model_is_the_same_when_it_is_made_again_and_is_not_made_twice(built, tmp_path):
    made, folder = built
    hashes = {name: open_model(folder, name).hash() for name in ("full", "shard-0")}
    make(made, folder, "full")
    (tmp_path / "base").symlink_to(folder / "base")
    make(made, tmp_path, "shard-0")
    assert open_model(tmp_path, "shard-0").hash() == hashes["shard-0"]
    assert open_model(folder, "full").hash() == hashes["full"]


def test_a_plan_made_anew_goes_on_with_the_tokenizer_of_its_base(built, tmp_path):
    made, folder = built
    (tmp_path / "base").symlink_to(folder / "base")
    other = make_vocabulary(["Zed lives here", *(text.text for text in TEXTS)])
    assert other.get_vocab() != made.tokenizer.get_vocab()
    make(plan(tokenizer=other), tmp_path, "shard-0")
    assert open_model(tmp_path, "shard-0").hash() == open_model(folder, "shard-0").hash()


def test_an_ensemble_has_a_constituent():
    with pytest.raises(ValueError, match="at least one"):
        join(())


def test_nothing_is_continued_before_there_is_a_base(tmp_path):
    with pytest.raises(ValueError, match="make it first"):
        make(plan(), tmp_path, "full")
