"""`python -m speed [NAME ...]`: how fast the package is against a stated reference, measured in one run.

A name is a case on a shape (causal_tracing/gpt2_small) or a case (causal_tracing).
"""

import argparse
import sys
from functools import partial

from speed import (
    activation_patching,
    capturing,
    causal_tracing,
    key_statistics,
    knowledge_neurons,
    rocr,
    sae,
    scoring,
    training_loop,
    uds,
)
from speed.run import Case, Row, measure, peak_here
from speed.shapes import SHAPES

CASES = {
    "causal_tracing": Case(
        reference="one forward pass per token and layer, as ROME's code (HF)",
        plain=causal_tracing.plain, ours=causal_tracing.ours, bar=6.0,
    ),
    "knowledge_neurons": Case(
        reference="one forward and backward pass per layer, as the paper's code (HF)",
        plain=knowledge_neurons.plain, ours=knowledge_neurons.ours, bar=10.0,
    ),
    "uds": Case(
        reference="27 forward passes per example, as the paper's code, both stages (HF)",
        plain=partial(uds.plain, sources=(1, 2)), ours=partial(uds.ours, sources=(1, 2)), bar=6.0,
        frugal=partial(uds.one_at_a_time, sources=(1, 2)),
    ),
    "uds_one_source": Case(
        reference="14 forward passes per example, as the paper's code, one source (HF)",
        plain=uds.plain, ours=uds.ours, frugal=uds.one_at_a_time,
    ),
    "activation_patching": Case(
        reference="transformer_lens.patching on a TransformerBridge",
        plain=activation_patching.plain, ours=activation_patching.ours,
    ),
    "capture": Case(
        reference="the limit: the needed layers alone, bare (HF blocks)",
        plain=capturing.plain, ours=capturing.ours, bar=1 / 1.05,
    ),
    "rocr_edit": Case(
        reference="15 bare forward passes over the edit's own mentions (HF)",
        plain=rocr.plain, ours=rocr.ours, bar=1.0,
    ),
    "key_statistics": Case(
        reference="bare forward passes over the same texts (HF)",
        plain=key_statistics.whole, ours=key_statistics.ours, bar=0.8, finish=key_statistics.moments,
    ),
    "key_statistics_limit": Case(
        reference="the limit: the needed layers alone, bare, no products (HF blocks)",
        plain=key_statistics.limit, ours=key_statistics.ours, finish=key_statistics.moments,
    ),
    "scoring": Case(
        reference="the limit: forward passes over the same tokens in the same batches, bare, no scoring (HF)",
        plain=scoring.plain, ours=scoring.ours, bar=1 / 1.2, finish=scoring.losses, data=scoring.LOG,
    ),
    **{
        f"training_loop_{loss}": Case(
            reference="a bare torch loop with the same losses, batches, optimiser and clipping (HF)",
            plain=partial(training_loop.plain, loss=loss), ours=partial(training_loop.ours, loss=loss), bar=1 / 1.15,
        )
        for loss in ("grad_diff", "npo")
    },
    **{
        f"sae_encode_{kind}": Case(
            reference="the limit: one dense matmul with bias",
            plain=partial(sae.matmul, kind=kind), ours=partial(sae.encode, kind=kind), bar=1 / 1.1,
            finish=partial(sae.chosen, kind=kind),
        )
        for kind in ("standard", "topk")
    },
    **{
        f"ablate_latents_{kind}": Case(
            reference="sae-lens's splice with its error term",
            plain=partial(sae.splice, kind=kind), ours=partial(sae.ablated, kind=kind),
        )
        for kind in ("standard", "topk")
    },
}  # fmt: skip
NAMES = tuple(f"{case}/{shape}" for case in CASES for shape in SHAPES)


def wanted(names: list[str], shapes: list[str]) -> list[str]:
    """The full names that were asked for, all by default.

    Raises:
        ValueError: a case or a shape that does not exist.
    """
    unknown = [name for name in names if name not in NAMES and name not in CASES]
    unknown += [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: choose cases of {', '.join(CASES)}; shapes of {', '.join(SHAPES)}")
    asked = [name for name in NAMES if not names or name in names or name.split("/")[0] in names]
    return [name for name in asked if not shapes or name.split("/")[1] in shapes or name in names]


def print_table(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, caption="ratio: reference over ours; medians; memory of a process that runs ours"
    )
    for column in ("case", "ratio", "bar", "reference s", "ours s", "error", "peak MiB", "grew MiB"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:.2f}"
        speed = (f"{row.ratio:.2f}", bar, f"{row.reference_s:.3f}", f"{row.ours_s:.3f}", f"{row.max_rel_error:.0e}")
        table.add_row(row.name, *speed, f"{row.memory.peak_mib:.0f}", f"{row.memory.growth_mib:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, reference in dict.fromkeys((row.name.split("/")[0], row.reference) for row in rows):
        console.print(f"{name}: {reference}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(CASES)}; with /SHAPE or without")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; medians are reported (3)")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all")
    parser.add_argument("--peak", metavar="NAME", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak = peak_here(given.peak, CASES[given.peak.split("/")[0]])
        print([peak.peak_mib, peak.growth_mib])
        return
    try:
        names = wanted(given.names, given.shapes)
    except ValueError as problem:
        parser.error(str(problem))
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: at least 1")
    rows = []
    for name in names:
        case = CASES[name.split("/")[0]]
        if case.lacks:
            print(f"{name}: {case.lacks}", file=sys.stderr, flush=True)
            continue
        row = measure(name, case, given.repeats)
        rows.append(row)
        if given.json:
            print(row.as_json(), flush=True)
        else:
            print(f"{name}: {row.ratio:.2f}", file=sys.stderr, flush=True)
    if not given.json:
        print_table(rows)


if __name__ == "__main__":
    main()
