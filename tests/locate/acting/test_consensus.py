"""The consensus of several locators, in closed form."""

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.locate.acting.consensus import consensus, ranks


def found(values, tokens=("a", "b"), unit="nats"):
    values = torch.tensor(values)
    labels = {"token": tokens, "layer": tuple(range(values.shape[1]))}
    return Attribution(name="x", values=values, axes=("token", "layer"), labels=labels, unit=unit, n=3)


def test_ranks_run_from_zero_to_one_share_ties_and_leave_out_what_was_not_measured():
    values = torch.tensor([[3.0, float("nan"), 1.0], [2.0, 2.0, 5.0]])
    expected = torch.tensor([[0.75, float("nan"), 0.0], [0.375, 0.375, 1.0]])
    torch.testing.assert_close(ranks(values), expected, equal_nan=True)


def test_what_all_locators_put_first_is_first_whatever_their_units():
    both = consensus({"p": found([[0.0, 0.9], [0.1, 0.2]]), "q": found([[10.0, 900.0], [30.0, 20.0]])})
    assert both.top(1) == [({"token": "a", "layer": 1}, 1.0)]
    torch.testing.assert_close(both.values[1], torch.tensor([(1 / 3 + 2 / 3) / 2, (2 / 3 + 1 / 3) / 2]))
    assert both.low is not None and both.low[1, 0].item() == pytest.approx(1 / 3)
    one = consensus({"p": found([[0.0, 0.9], [0.1, 0.2]]), "q": found([[9.0, 0.0], [1.0, 2.0]])}, weights={"q": 0.0})
    torch.testing.assert_close(one.values, ranks(torch.tensor([[0.0, 0.9], [0.1, 0.2]])))


def test_labels_are_matched_by_name_and_those_of_one_locator_only_are_left_out():
    both = consensus({"p": found([[0.0, 1.0], [2.0, 3.0]]), "q": found([[2.0, 3.0], [0.0, 1.0]], ("b", "a"))})
    assert both.labels["token"] == ("a", "b") and torch.equal(
        both.values, ranks(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    )
    cut = consensus({"p": found([[0.0, 1.0], [2.0, 3.0]]), "q": found([[2.0, 3.0], [0.0, 1.0]], ("b", "c"))})
    assert cut.labels["token"] == ("b",)


def test_results_that_cannot_be_compared_are_refused():
    one = found([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="give two or more"):
        consensus({"p": one})
    with pytest.raises(ValueError, match="no token in common"):
        consensus({"p": one, "q": found([[0.0], [1.0]], ("c", "d"))})
    with pytest.raises(ValueError, match="weights name"):
        consensus({"p": one, "q": one}, weights={"r": 1.0})
