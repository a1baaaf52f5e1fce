"""The papers' experiments end to end: train, record, analyse, hold the claims against the records, report.

Training needs torch and the report the plot extra; both load when
:func:`reproduce` is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hild_xr.claims import Claim, all_hold

if TYPE_CHECKING:
    from hild_xr.reproduce.findings import Findings

EXPERIMENTS = ("kgmm", "xor", "digits")
"""Names that :func:`reproduce` knows."""


@dataclass(frozen=True)
class Reproduction:
    """The outcome of :func:`reproduce`.

    Parameters
    ----------
    experiment
        Its name.
    claims
        The theory's claims with the measured numbers.
    report
        The HTML file.
    stores
        The recorded runs.
    """

    experiment: str
    claims: Sequence[Claim]
    report: Path
    stores: Sequence[Path]

    @property
    def all_hold(self) -> bool:
        """Whether every claim holds."""
        return all_hold(self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Return the table of claims and the paths as JSON values."""
        return {
            "experiment": self.experiment,
            "all_hold": self.all_hold,
            "claims": [claim.to_dict() for claim in self.claims],
            "report": str(self.report),
            "stores": [str(store) for store in self.stores],
        }


def reproduce(experiment: str, out: str | Path, *, seeds: int = 4, progress: bool = True) -> Reproduction:
    """Train an experiment, record it into ``out``, and report whether the theory's claims hold.

    Seeds that ``out`` holds already are not trained again, so an interrupted
    reproduction is taken up by calling it again.

    Parameters
    ----------
    experiment
        One of :data:`EXPERIMENTS`.
    out
        Folder for the stores ``<run>.zarr``, the report ``<experiment>.html``
        and the table ``<experiment>.json``; made if missing.
    seeds
        Number of seeds, 0 to ``seeds - 1``, in one store.
    progress
        Show progress bars.

    Returns
    -------
    Reproduction
        Claims, and where report and stores lie.

    Raises
    ------
    ValueError
        If the experiment is unknown or there is no seed.
    ImportError
        If torch or the plot extra is missing.
    hild_xr.store.PlanMismatchError
        If ``out`` holds the experiment with other seeds or settings.
    """
    if experiment not in _PIPELINES:
        raise ValueError(f"no experiment {experiment!r}; there are {', '.join(EXPERIMENTS)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {seeds}")
    from hild_xr.report import write_report

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found, stores = _PIPELINES[experiment](folder, range(seeds), progress)
    report = write_report(
        folder / f"{experiment}.html",
        title=found.title,
        introduction=found.introduction,
        claims=found.claims,
        figures=found.figures,
        provenance=_provenance(stores),
    )
    done = Reproduction(experiment, found.claims, report, stores)
    (folder / f"{experiment}.json").write_text(json.dumps(done.to_dict(), indent=2))
    return done


def _kgmm(folder: Path, seeds: range, progress: bool) -> tuple[Findings, list[Path]]:
    import hild_xr as hx
    from hild_xr.recorders import experiments
    from hild_xr.reproduce import kgmm

    settings = experiments.kgmm()
    (path,) = _record([settings], folder, seeds, progress)
    return kgmm.findings(hx.open(path), settings.problem.centres), [path]


def _xor(folder: Path, seeds: range, progress: bool) -> tuple[Findings, list[Path]]:
    import hild_xr as hx
    from hild_xr.recorders import experiments
    from hild_xr.reproduce import xor

    settings = [experiments.xor(), experiments.xor_wide()]
    paths = _record(settings, folder, seeds, progress)
    problem = settings[0].problem

    def covered_centres(first: Any, second: Any) -> Any:
        return problem.covered_centres(first, second, threshold=problem.fixed_point_margin / 2)

    return xor.findings(hx.open(paths[0]), hx.open(paths[1]), problem.span, covered_centres), paths


def _digits(folder: Path, seeds: range, progress: bool) -> tuple[Findings, list[Path]]:
    import hild_xr as hx
    from hild_xr.recorders import experiments
    from hild_xr.reproduce import digits

    paths = _record([experiments.digits_softmax(), experiments.digits_network()], folder, seeds, progress)
    return digits.findings(hx.open(paths[0]), hx.open(paths[1])), paths


def _record(settings: Sequence[Any], folder: Path, seeds: range, progress: bool) -> list[Path]:
    from hild_xr.recorders import experiments

    paths = [folder / f"{experiment.name}.zarr" for experiment in settings]
    for experiment, path in zip(settings, paths, strict=True):
        experiments.record(experiment, path, seeds=seeds, progress=progress)
    return paths


def _provenance(stores: Sequence[Path]) -> dict[str, Any]:
    from hild_xr.store.summary import summarise

    told = ("path", "seeds", "config", "provenance")
    return {path.name: {name: summarise(path)[name] for name in told} for path in stores}


_PIPELINES: dict[str, Callable[[Path, range, bool], tuple[Findings, list[Path]]]] = {
    "kgmm": _kgmm,
    "xor": _xor,
    "digits": _digits,
}
