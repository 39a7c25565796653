"""Figures draw what the result holds, and land as one whole PNG."""

import torch

from mech_unlearn import plots
from mech_unlearn.core import Attribution


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
        seen["ax"] = plots.heatmap(result, ax)

    path = plots.save(tmp_path / "figures" / "trace.png", draw)
    ax = seen["ax"]
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().data), values)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["last subject", "last"]
    assert "n = 7" in ax.get_title("left")
    assert path.read_bytes().startswith(b"\x89PNG") and len(list(path.parent.iterdir())) == 1


def test_verdict_bars_add_up_to_one(tmp_path):
    shares = {"deleted": 0.5, "suppressed": 0.25, "intact": 0.0, "collapsed": 0.0, "undetermined": 0.25}
    seen = {}
    plots.save(
        tmp_path / "v.png", lambda ax: seen.update(ax=plots.verdict_bars([{"name": "m", "verdicts": shares}], ax))
    )
    widths = [patch.get_width() for patch in seen["ax"].patches]
    assert abs(sum(widths) - 1) < 1e-6 and widths[0] == 0.5
