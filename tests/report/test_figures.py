"""Figures draw what the result holds, and land as one whole PNG."""

import torch

from mech_unlearn import attribution
from mech_unlearn.attribution import Attribution
from mech_unlearn.report import figures as plots


def test_a_heatmap_shows_the_values_under_their_labels(tmp_path):
    values = torch.rand(2, 3)
    result = Attribution(
        name="causal trace",
        values=values,
        axes=("token", "layer"),
        labels={"token": ("last subject", "last"), "layer": (0, 1, 2)},
        unit="probability",
        n=7,
    )
    seen = {}

    def draw(ax):
        seen["ax"] = attribution.heatmap(result, ax)

    path = attribution.save(tmp_path / "figures" / "trace.png", draw)
    ax = seen["ax"]
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().data), values)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["last subject", "last"]
    assert "n = 7" in ax.get_title("left")
    assert path.read_bytes().startswith(b"\x89PNG") and len(list(path.parent.iterdir())) == 1


def test_verdict_bars_add_up_to_one(tmp_path):
    shares = {"deleted": 0.5, "suppressed": 0.25, "intact": 0.0, "collapsed": 0.0, "undetermined": 0.25}
    seen = {}
    attribution.save(
        tmp_path / "v.png", lambda ax: seen.update(ax=plots.verdict_bars([{"name": "m", "verdicts": shares}], ax))
    )
    widths = [patch.get_width() for patch in seen["ax"].patches]
    assert abs(sum(widths) - 1) < 1e-6 and widths[0] == 0.5


def long_result(width=200):
    values = torch.zeros(2, width)
    values[1, 7], values[0, 3] = 2.0, 1.0
    labels = {"layer": (0, 1), "neuron": tuple(range(width))}
    return Attribution(
        name="neurons <of> a layer", values=values, axes=("layer", "neuron"), labels=labels, unit="share of P", n=4,
        low=values - 0.1, high=values + 0.1, note="a & b",
    )  # fmt: skip


def test_a_result_is_drawn_as_its_axes_allow_and_long_axes_as_bars_of_the_largest_values():
    small = Attribution(
        name="x", values=torch.rand(3, 4), axes=("token", "layer"), unit="nats", n=2,
        labels={"token": ("a", "b", "c"), "layer": (0, 1, 2, 3)},
    )  # fmt: skip
    assert len(small.plot().images) == 1
    line = Attribution(
        name="x", values=torch.rand(4), axes=("layer",), unit="nats", n=2, labels={"layer": (0, 1, 2, 3)}
    )
    assert len(line.plot().lines) == 1
    bars = long_result().plot()
    assert bars.patches[0].get_width() == 2.0 and bars.get_yticklabels()[0].get_text() == "layer 1  neuron 7"
    assert bars.patches[1].get_width() == 1.0 and bars.get_xlabel() == "share of P"
    figure = attribution.new_axis().figure
    figure.clear()
    assert len(attribution.side_by_side([small, line], figure).axes) == 3  # two panels and a colour bar


def test_jupyter_sees_a_figure_a_table_n_and_the_note_with_marks_escaped():
    page = long_result()._repr_html_()
    assert page.count("<img src=") == 1 and "data:image/png;base64," in page
    assert "<td>7</td><td>2.0000</td>" in page and "n = 4; a &amp; b" in page
    assert "neurons &lt;of&gt; a layer" in page and "<of>" not in page


def test_a_saved_attribution_comes_back_with_its_gaps(tmp_path):
    result = long_result()
    result.values[0, 0] = float("nan")
    result.save(tmp_path / "deep" / "a.json")
    again = Attribution.load(tmp_path / "deep" / "a.json")
    torch.testing.assert_close(again.values, result.values, equal_nan=True)
    torch.testing.assert_close(again.low, result.low)
    assert (again.axes, again.labels, again.unit, again.n, again.note) == (
        result.axes, result.labels, result.unit, result.n, result.note,
    )  # fmt: skip


def test_the_grid_of_forms_takes_chance_off_and_leaves_unasked_forms_empty():
    numbers = {"prompt": (0.0, 0.0), "multiple_choice": (0.625, 0.25)}
    forms = {form: {"value": value, "chance": chance} for form, (value, chance) in numbers.items()}
    forms["reversed"] = {"value": None}
    rows = [{"name": "old"}, {"name": "npo", "forms": forms}]
    names = {"prompt": "main", "multiple_choice": "letters", "reversed": "reversed"}
    ax = plots.form_grid(rows, names, attribution.new_axis())
    drawn = torch.as_tensor(ax.images[0].get_array().filled(float("nan")))
    assert drawn[0, :2].tolist() == [0.0, 0.5] and drawn[0, 2].isnan() and len(drawn) == 1
    assert [t.get_text() for t in ax.get_yticklabels()] == ["npo"]
    assert [t.get_text() for t in ax.texts] == ["0.00", "0.50", ""]
