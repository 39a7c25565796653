"""What the command `report` does: figures and page of a finished run, drawn anew from what lies in its folder."""

import os
from pathlib import Path

from mech_unlearn.files import inside, read_json


def report(run: str | os.PathLike) -> Path:
    """(Re)draw the figures and report.html of a run directory; gives the page's path.

    Raises:
        ValueError: the folder is no finished run, or one of a command that makes no page.
    """
    from mech_unlearn.report.bench_figure import draw_bench
    from mech_unlearn.report.figures import draw_figures
    from mech_unlearn.report.page import write_report

    folder = Path(run)
    if (bench := inside(folder, "bench.json")).is_file():
        draw_bench(read_json(bench), folder / "figures/0_benchmark.png")
    if (summary := inside(folder, "summary.json")).is_file() and read_json(summary)["rows"]:
        draw_figures(folder)
    return write_report(folder)
