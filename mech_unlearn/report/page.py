"""One self-contained HTML page from a run directory, and the table that the command line prints."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mech_unlearn.core import WORTH
from mech_unlearn.files import inside, read_json, read_text, write_atomic
from mech_unlearn.report.tables import IN_SAMPLE, corrected_text, form_table, table

WITHOUT_PAGE = {"locate": "locate.json and figures/", "unlearn": "unlearn.json"}
"""Command -> where its result stands, of those whose run directories hold no table."""


def _kinds(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the verdicts of the rows are, calibrated or provisional; both where an older run does not say."""
    kinds = dict.fromkeys(row.get("judged") for row in rows if row["verdicts"])
    return ("calibrated", "provisional") if None in kinds else tuple(kind for kind in kinds if kind)


def _unfinished(folder: Path, missing: str) -> str:
    """Why there is no page to be made of a folder, in one line."""
    begun = folder / "spec.yaml"
    command = str(yaml.safe_load(begun.read_text(encoding="utf-8")).get("command")) if begun.is_file() else ""
    if result := WITHOUT_PAGE.get(command):
        return f"{str(folder)!r} is a run of `{command}`, of which there is no page: see {result} in it"
    return f"{str(folder)!r} is not a finished run directory: {missing} is missing"


def write_report(folder: Path) -> Path:
    """(Re)draw report.html from what lies in a run directory.

    Raises:
        ValueError: the folder is no finished run, or one of a command that makes no page.
    """
    from importlib.resources import files

    from jinja2 import Environment

    from mech_unlearn.report.bench import sections

    for name in ("summary.json", "provenance.json", "verdicts.json", "spec.yaml"):
        if not inside(folder, name).is_file():
            raise ValueError(_unfinished(folder, name))
    summary = read_json(folder / "summary.json")
    header, body = table(summary["rows"])
    forms_header, forms_body = form_table(summary["rows"])
    figures = [
        {"name": path.stem, "data": base64.b64encode(inside(folder, f"figures/{path.name}").read_bytes()).decode()}
        for path in sorted((folder / "figures").glob("*.png"))
    ]
    captions = inside(folder, "captions.json")
    template = Environment(autoescape=True).from_string(
        (files("mech_unlearn.report") / "page.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        summary=summary,
        bench=sections(summary) if "benchmark_rows" in summary else (),
        header=header,
        body=body,
        worth={kind: WORTH[kind] for kind in _kinds(summary["rows"])},
        in_sample=IN_SAMPLE if any(row.get("in_sample") for row in summary["rows"]) else "",
        forms_header=forms_header,
        forms_body=forms_body,
        figures=figures,
        captions=read_json(captions) if captions.is_file() else {},
        corrected={row["name"]: corrected_text(row.get("corrected")) for row in summary["rows"]},
        verdicts=read_json(folder / "verdicts.json"),
        provenance=read_json(folder / "provenance.json"),
        spec=read_text(folder / "spec.yaml"),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"
