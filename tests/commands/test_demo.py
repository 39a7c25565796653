"""What the demo shows of a part of the facts speaks for all of them."""

from mech_unlearn.commands.demo import drawn
from tests.tiny import tiny_facts


def test_facts_are_drawn_from_every_relation_in_their_order_and_by_the_seed():
    facts = tiny_facts([f"Anna {i}" for i in range(120)])  # born and works in turn, as a step of 6 would not show
    some = drawn(facts, 40, seed=0)
    places = [facts.index(fact) for fact in some]
    assert len(set(places)) == 40 and places == sorted(places)
    assert {fact.relation for fact in some} == {fact.relation for fact in facts[::6]} | {"works"} == {"born", "works"}
    assert some == drawn(facts, 40, seed=0) != drawn(facts, 40, seed=1)
    assert drawn(facts[:3], 40, seed=0) == list(facts[:3])
