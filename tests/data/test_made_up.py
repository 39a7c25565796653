"""Made-up names: new, in the manner of the given ones, the same for a seed, and none where none can be."""

import pytest

from mech_unlearn.data.made_up import made_up

COUNTRIES = ("France", "Germany", "Austria", "Norway", "Portugal", "Hungary", "Thailand", "Kenya", "Iceland", "Peru")
PEOPLE = ("Anna Lee", "Ben Hill", "Cara Moss", "Dan van Park", "Eva de Reed")


def test_new_names_have_no_word_of_the_given_ones_and_neither_holds_the_other():
    found = made_up(COUNTRIES, 40, seed=0)
    assert len(found) == len(set(found)) == 40
    for name in (one.casefold() for one in found):
        assert not any(name in known.casefold() or known.casefold() in name for known in COUNTRIES)
    assert all(4 <= len(name) <= 9 and name[0].isupper() and " " not in name for name in found)


def test_letters_follow_each_other_as_in_the_given_names_and_words_stand_where_theirs_do():
    pairs = {name[i : i + 2] for name in COUNTRIES for i in range(len(name) - 1)}
    assert all(one[i : i + 2] in pairs for one in made_up(COUNTRIES, 40, seed=1) for i in range(len(one) - 1))
    counts = {len(name.split()) for name in made_up(PEOPLE, 30, seed=0)}
    assert counts == {2, 3}
    assert all(name.split()[1].islower() for name in made_up(PEOPLE, 30, seed=0) if len(name.split()) == 3)


def test_combined_names_are_of_known_words_in_their_places_and_no_known_name():
    found = made_up(PEOPLE, 12, seed=0, manner="combined")
    assert len(found) == 12 and not set(found) & set(PEOPLE)
    assert {name.split()[0] for name in found} <= {name.split()[0] for name in PEOPLE}
    assert {name.split()[-1] for name in found} <= {name.split()[-1] for name in PEOPLE}


def test_the_seed_decides_and_fewer_are_given_where_no_more_can_be_made():
    assert made_up(COUNTRIES, 8, seed=3) == made_up(COUNTRIES, 8, seed=3) != made_up(COUNTRIES, 8, seed=4)
    assert made_up(("Ann Lee", "Bob Orr"), 9, seed=0, manner="combined") in (
        ("Ann Orr", "Bob Lee"),
        ("Bob Lee", "Ann Orr"),
    )
    assert made_up(("aa",), 5, seed=0) == ()
    with pytest.raises(ValueError, match="not empty"):
        made_up((), 3, seed=0)
    with pytest.raises(ValueError, match="one word"):
        made_up(COUNTRIES, 3, seed=0, manner="combined")
