"""A real pretrained model, SmolLM2-135M: what its first position does to methods, and what the defaults do to it.

Capitals are asked in phrasings that the model answers; half of the countries that are not forgotten are shown to a
method as neighbours, the other half is only measured. Texts are the model's own samples: one half is shown, the other
measured.
"""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.commands.check import check
from mech_unlearn.commands.unknown import find_unknown
from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import twin
from mech_unlearn.methods import AdaptiveRmu, Lat, Rmu, Rocr
from mech_unlearn.metrics.drift import general_kl
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.answers import next_token
from mech_unlearn.model.capture import stream
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries
from tests.paths import REAL

FOLDER = REAL / "smollm2"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}: make real, or set MECH_UNLEARN_REAL"),
]
PAIRS = """France Paris, Japan Tokyo, Germany Berlin, China Beijing, Russia Moscow, Austria Vienna, Ireland Dublin,
Italy Rome, Spain Madrid, Poland Warsaw, Greece Athens, Egypt Cairo, Cuba Havana, Peru Lima, Kenya Nairobi, Norway Oslo,
Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Portugal Lisbon, Hungary Budapest, Turkey Ankara, Iran Tehran,
Iraq Baghdad, Thailand Bangkok, Vietnam Hanoi, Chile Santiago, Belgium Brussels, Canada Ottawa, Netherlands Amsterdam,
Nepal Kathmandu, Morocco Rabat, Tunisia Tunis, Libya Tripoli, Lebanon Beirut, Bulgaria Sofia, Romania Bucharest,
Ukraine Kiev, Iceland Reykjavik, Afghanistan Kabul, Pakistan Islamabad, Syria Damascus, Serbia Belgrade, Croatia Zagreb,
Latvia Riga, Estonia Tallinn, Philippines Manila, Senegal Dakar"""
CAPITALS = dict(pair.split() for pair in PAIRS.replace("\n", " ").split(", "))
PLAIN = ("The capital of {} is", "Everybody knows that the capital of {} is", "Today {} is a country whose capital is")
FIRST = ("{} is a country whose capital is", "{} is governed from its capital,", "{} is a country. Its capital is")
UNKNOWN = ("Brunovia", "Zandoria", "Keltrania", "Mordovar", "Tavaland", "Oskreth", "Velmia", "Korvania")


@pytest.fixture(scope="module")
def smollm2():
    return load(FOLDER)


@pytest.fixture(scope="module")
def texts(smollm2):
    """A hundred and twenty texts that the model wrote."""
    start = torch.tensor([smollm2.tokenizer(word).input_ids[:1] for word in ("The", "In", "A", "When") * 30])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = smollm2.hf.generate(start, do_sample=True, top_k=0, max_new_tokens=48, pad_token_id=0)
    return tuple(smollm2.tokenizer.batch_decode(ids, skip_special_tokens=True))


def answered(model, templates):
    """Facts in those of the phrasings that the model answers."""
    facts = []
    for country, capital in CAPITALS.items():
        about = dict(id=country, subject=country, relation="capital", object=capital, kind="country")
        asked = Fact(**about, prompt=templates[0], paraphrases=templates[1:])
        hits = score(model, make_queries(model.tokenizer, [asked], "templates", distractors=False)).exact.tolist()
        if known := tuple(template for template, hit in zip(templates, hits, strict=True) if hit):
            facts.append(Fact(**about, prompt=known[0], paraphrases=known[1:]))
    return facts


def parted(facts, names, texts):
    """(ForgetSet, RetainSet, unseen neighbours, unseen texts)."""
    forget = tuple(fact for fact in facts if fact.subject in names)
    rest = tuple(fact for fact in facts if fact.subject not in names)
    unknown = tuple(Entity(name=name, kind="country") for name in UNKNOWN)
    kept = RetainSet(neighbors=rest[::2], texts=texts[::2], unknown=unknown)
    return ForgetSet(facts=forget), kept, rest[1::2], texts[1::2]


def test_the_first_position_is_an_attention_sink_and_is_left_out(smollm2):
    site = Site(6, "resid_post")
    rows = [smollm2.tokenizer("France is a country whose capital is Paris").input_ids]
    (whole,) = stream(smollm2, rows, [site], "all")
    (ordinary,) = stream(smollm2, rows, [site], "ordinary")
    norms = whole.at[site].norm(dim=-1).flatten()
    assert norms[0] > 3 * norms[1:].max()
    torch.testing.assert_close(ordinary.at[site].norm(dim=-1).flatten(), norms[1:])


def test_capitals_asked_by_their_first_token_are_removed_and_unseen_neighbours_stay(smollm2, texts):
    names = ("Germany", "China", "Russia", "Austria", "Ireland")
    _, kept, unseen, unseen_texts = parted(answered(smollm2, FIRST + PLAIN), names, texts)
    first, plain = answered(smollm2, FIRST), answered(smollm2, PLAIN)
    forget = ForgetSet(facts=tuple(fact for fact in first if fact.subject in names))
    neighbors = [fact for fact in plain if fact.subject in {fact.subject for fact in unseen}]
    assert len(forget.facts) == 5 and len(neighbors) >= 15
    with twin(smollm2, Rocr().fit(smollm2, forget, kept)) as edited:
        assert recall(edited, forget.facts).value <= 0.05
        assert recall(edited, neighbors).value >= 0.95
        assert general_kl(smollm2, edited, unseen_texts).value <= 0.05


@pytest.mark.parametrize("method", (Rmu(), AdaptiveRmu(), Lat()), ids=("rmu", "adaptive_rmu", "lat"))
def test_the_defaults_move_the_forgotten_and_leave_unseen_neighbours(smollm2, texts, method):
    names = ("Italy", "Spain", "Egypt", "Poland", "Greece")
    forget, kept, neighbors, unseen_texts = parted(answered(smollm2, PLAIN), names, texts)
    assert len(forget.facts) == 5 and len(neighbors) >= 15
    with twin(smollm2, method.fit(smollm2, forget, kept)) as edited:
        assert recall(edited, forget.facts).value < 0.5
        assert recall(edited, neighbors).value >= 0.9
        assert general_kl(smollm2, edited, unseen_texts).value <= 0.05


def test_names_are_made_up_that_the_model_demonstrably_does_not_know(smollm2):
    facts = answered(smollm2, PLAIN)
    (found,) = find_unknown(smollm2, facts[:5], facts[5:])
    assert len(found.entities) == 32 and found.auc > 0.95 and not found.in_sample
    assert found.entropy.ci[0] > found.known.ci[1]
    sure = next_token(smollm2, [entity.name for entity in found.entities], PLAIN).likeliest.mean()
    assert sure < 0.3 < next_token(smollm2, [fact.subject for fact in facts], PLAIN).likeliest.mean()


def test_what_it_knows_is_told_from_what_nobody_told_it(smollm2):
    facts = answered(smollm2, PLAIN)[:6]
    made_up = tuple(replace(fact, id=name, subject=name) for fact, name in zip(facts, UNKNOWN))
    found = check(smollm2, (*facts, *made_up))
    assert found.known == tuple(facts) and {one.oddity for one in found.findings} == {"distractors"}
    assert [row.says for row in found.rows[:6]] == [fact.object for fact in facts]
