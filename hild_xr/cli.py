"""The command line: ``hild-xr``. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hild_xr import __version__

app = typer.Typer(
    name="hild-xr",
    help="Record how networks train, analyse the records, reproduce the theory's experiments.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_WRONG = 1
EXIT_USAGE = 2


class ExperimentName(StrEnum):
    """Experiments that ``reproduce`` knows."""

    kgmm = "kgmm"
    xor = "xor"
    digits = "digits"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hild-xr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    del version


@app.command()
def reproduce(
    experiment: Annotated[ExperimentName, typer.Argument(help="Experiment of arXiv 2310.03010 to run.")],
    out: Annotated[Path, typer.Option(help="Folder for the stores and the report; made if missing.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, recorded into one store.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table of claims as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Train an experiment of the theory, record it, and hold the claims against the records.

    Seeds that the folder holds already are not trained again. The exit code is 0
    if every claim holds and 1 if one does not.
    """
    from hild_xr.reproduce import reproduce as run_experiment

    done = run_experiment(experiment.value, out, seeds=seeds, progress=not quiet)
    if as_json:
        typer.echo(json.dumps(done.to_dict(), indent=2, allow_nan=False))
    else:
        _print_table([claim.as_row() for claim in done.claims])
        typer.echo(f"report: {done.report}")
        for store in done.stores:
            typer.echo(f"store:  {store}")
    if not done.all_hold:
        raise typer.Exit(EXIT_WRONG)


@app.command()
def info(
    run: Annotated[str, typer.Argument(help="Path or URL of a stored run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a stored run holds: seeds, probes, records, configuration, provenance."""
    from hild_xr.store.summary import summarise

    summary = summarise(run)
    typer.echo(json.dumps(summary, indent=2) if as_json else _summary_text(summary))


@app.command()
def validate(
    run: Annotated[str, typer.Argument(help="Path or URL of a stored run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a stored run: metadata, labels, every chunk's checksum, and what the numbers must obey.

    Prints what is wrong, where, and what to do. The exit code is 0 if the run is
    sound, 1 if something is wrong, and 2 if there is no run.
    """
    from hild_xr.store import validate as check

    report = check(run)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for line in report.lines():
            typer.echo(line)
    if not report.ok:
        raise typer.Exit(EXIT_WRONG)


@app.command()
def analyze(
    run: Annotated[str | None, typer.Argument(help="Path or URL of a stored run.")] = None,
    what: Annotated[str | None, typer.Option(help="Analyses, with commas between: angles,outliers.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results, a labelled Zarr store.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of an analysis: outliers.method=relative. Repeatable.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Take this seed only. Repeatable.")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Take these layers only: a name or a pattern, fc1.*. Repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask scheduler, or its scheduler file.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the analyses and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Analyse a stored run and write the results as a labelled store.

    Everything is computed chunk by chunk, so neither the run nor the results have to fit
    into memory. The results get their name when all are written. Any xarray opens them:
    xr.open_datatree("RESULT.zarr", engine="zarr").

    The exit code is 1 if the run does not hold what an analysis needs, or an analysis that
    another package brings fails; 2 for wrong usage; 143 after SIGTERM. Nothing is written then.
    """
    from hild_xr.analysis.named import AnalysisError, BrokenAnalysisError, NotRecordedError

    if listing:
        _list_analyses(as_json=as_json)
        return
    if run is None or what is None or out is None:
        raise typer.BadParameter("give a run, --what and --out; or --list to see what there is")
    from hild_xr.analyze import analyze as run_analyses

    try:
        with _stopped_cleanly(), _cluster(scheduler):
            results = run_analyses(
                run,
                what,
                out,
                options=_options(option or []),
                seeds=seed,
                layers=layer,
                overwrite=overwrite,
                progress=not quiet,
            )
    except (NotRecordedError, BrokenAnalysisError) as error:
        _fail(error, exit_code=EXIT_WRONG)
    except AnalysisError as error:
        _fail(error)
    written = {
        node.path: {str(name): dict(array.sizes) for name, array in node.data_vars.items()}
        for node in results.subtree
        if node.data_vars
    }
    left_out = {name: node.attrs["left_out"] for name, node in results.items() if "left_out" in node.attrs}
    records = {node.path: node.attrs["records"] for node in results.subtree if "records" in node.attrs}
    for path, said in records.items():
        typer.echo(f"{path}: {said}", err=True)
    if as_json:
        told = {"out": out, "results": written, "left_out": left_out, "records": records}
        typer.echo(json.dumps(told, indent=2))
        return
    for path, arrays in written.items():
        typer.echo(f"{path}: {', '.join(arrays)}")
    for name, reasons in left_out.items():
        for path, reason in reasons.items():
            typer.echo(f"/{name}/{path} left out: {reason}")
    typer.echo(f"results: {out}")


def _list_analyses(*, as_json: bool) -> None:
    from hild_xr.analysis.named import NamedAnalysis, list_analyses

    found = list_analyses()
    if as_json:
        listed = {
            name: {
                "sentence": analysis.sentence,
                "needs": dict(analysis.needs),
                "options": analysis.options,
                "distribution": analysis.distribution,
            }
            if isinstance(analysis, NamedAnalysis)
            else {"error": str(analysis)}
            for name, analysis in found.items()
        }
        typer.echo(json.dumps(listed, indent=2, default=repr))
        return
    for name, analysis in found.items():
        if isinstance(analysis, NamedAnalysis):
            options = f" [{', '.join(analysis.options)}]" if analysis.options else ""
            typer.echo(f"{name}: {analysis.sentence}{options}")
        else:
            typer.echo(f"{name}: broken. {analysis}")


def _options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by analysis from ``analysis.option=value``; a value is JSON, or else text."""
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        analysis, dot, name = place.partition(".")
        if not (equals and dot and analysis and name):
            raise typer.BadParameter(f"expected analysis.option=value, came {text!r}")
        try:
            options.setdefault(analysis, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            options.setdefault(analysis, {})[name] = value
    return options


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """Turn the signals that end a job into SystemExit, so that what was begun is cleared away."""

    def stop(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the clearing away
        raise SystemExit(128 + number)

    # Windows has no SIGHUP; signals can be handled in the main thread only; nohup ignores SIGHUP
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if is_main and signal.getsignal(n) == signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cluster(scheduler: str | None) -> AbstractContextManager[object]:
    """Return a client of the cluster, to be active while it is entered."""
    if scheduler is None:
        return nullcontext()
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise ImportError(
            "--scheduler needs dask.distributed: pip install 'hild-xr[cluster]'", name="distributed"
        ) from error
    client: Any = distributed.Client
    if Path(scheduler).is_file():
        connected: AbstractContextManager[object] = client(scheduler_file=scheduler)
    else:
        connected = client(scheduler)
    return connected


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hild_xr.claims import COLUMNS

    table = Table(*COLUMNS, show_lines=False)
    for row in rows:
        table.add_row(*row, style=None if row[-1] == "yes" else "bold red")
    # a pipe has no width: rows must not be cut there
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def _summary_text(summary: dict[str, Any]) -> str:
    lines = [
        f"run          {summary['path']}",
        f"schema       {summary['schema_version']}",
        f"seeds        {', '.join(map(str, summary['seeds']))}",
        f"planned size {summary['nbytes'] / 1e6:.1f} MB",
    ]
    lines += [f"{name:<12} {value}" for name, value in summary["config"].items()]
    for name, probe in summary["probes"].items():
        first, last = probe["steps"]
        layers = f"; layers: {', '.join(probe['layers'])}" if probe["layers"] else ""
        lines.append(
            f"/{name}: {probe['committed']} of {probe['planned']} records, steps {first} to {last}{layers}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command line: exit code 0 if all is well, 1 if something is wrong, 2 for wrong usage."""
    try:
        app()
    except (OSError, ImportError) as error:
        _fail(error)
    except Exception as error:
        from hild_xr.store import StoreError
        from hild_xr.store.backends import in_one_line, transport_errors

        if isinstance(error, transport_errors()):
            _fail(error, f"the store cannot be read: {in_one_line(error)}")
        if not isinstance(error, StoreError):
            raise
        _fail(error)


def _fail(error: Exception, message: str | None = None, exit_code: int = EXIT_USAGE) -> NoReturn:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    typer.echo(f"hild-xr: {error if message is None else message}{notes}", err=True)
    raise SystemExit(exit_code) from error


if __name__ == "__main__":
    main()
