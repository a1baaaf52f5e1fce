"""Print how long hild-xr and its peers take for the curvature tasks, one result a line, as they come.

For example ``python -m tests.benchmarks.peer_table T1 T3 --states M100 R0``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.curvature_states import SETTINGS, state
from tests.benchmarks.curvature_tasks import TASKS, Comparison, Facts, Gemm, RowBlocks, gemms, one_thread
from tests.benchmarks.curvature_training import TRAININGS, compare
from tests.benchmarks.density_tasks import DensityComparison
from tests.benchmarks.peers import missing

KINDS = (*TASKS, "T4", "rows", "training")


def measure(kind: str, name: str, gemm: Gemm, rounds: int) -> Facts:
    """Measure one task, or the rows, on one state."""
    at = state(SETTINGS[name])
    measured: Comparison | DensityComparison | RowBlocks
    if kind == "rows":
        measured = RowBlocks(at, 5, gemm)
    elif kind == "T4":
        measured = DensityComparison(at, gemm)
    else:
        measured = Comparison(TASKS[kind], at, gemm)
    for _ in range(rounds):
        measured.others()
        measured.ours()
    return measured.facts()


def results(arguments: argparse.Namespace) -> Iterator[tuple[str, Facts]]:
    """Measure all that was asked for, and yield it with its title."""
    for kind in arguments.kinds:
        if kind == "training":
            for name, training in TRAININGS.items():
                asked = replace(training, records=arguments.records or training.records)
                with tempfile.TemporaryDirectory() as folder:
                    yield f"training {name}", compare(asked, Path(folder))
            continue
        for name in arguments.states:
            for gemm in gemms():
                yield f"{kind} {name}, GEMM {gemm}", measure(kind, name, gemm, arguments.rounds)


def _line(title: str, facts: Facts) -> str:
    solvers = [key.removesuffix(": CPU seconds") for key in facts if key.endswith(": CPU seconds")]
    cells = []
    for solver in solvers:
        cell = f"{solver} {facts[f'{solver}: seconds']:.3g} s"
        if f"{solver}: products" in facts:
            cell += f" ({facts[f'{solver}: products']})"
        if f"{solver}: probes" in facts:
            cell += f" ({facts[f'{solver}: probes']} probes) W1 {facts[f'{solver}: Wasserstein error']:.1e}"
        if f"{solver}: true residual" in facts:
            cell += f" {facts[f'{solver}: true residual']:.1e}"
        if facts.get(f"{solver}: top k complete") is False:
            cell += " MISSED ONE OF THE TOP K"
        cells.append(cell)
    ratios = [f"{key}: {_short(value)}" for key, value in facts.items() if "times" in key or not solvers]
    return "\n    ".join([f"{title}:", " | ".join(cells), *ratios])


def _short(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--states", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--rounds", type=int, default=3, help="interleaved repeats, of which medians are taken"
    )
    parser.add_argument("--records", type=int, help="of a training, 200 by default")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds or list(KINDS)
    unknown = set(arguments.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    reason = missing("curvlinops", "hessian_eigenthings", "nngeometry")
    if reason is not None:
        parser.error(reason)
    everything = {}
    with one_thread():
        print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        if len(gemms()) == 1:
            print("GEMM: torch's default for all; none is faster on this machine, so this is as shipped")
        for title, facts in results(arguments):
            everything[title] = facts | {"load average": os.getloadavg()[0]}
            print(_line(title, facts), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
