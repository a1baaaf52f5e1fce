"""Analyses by name: those of this package and those that others install.

``hild-xr analyze RUN --what angles,outliers`` and ``run.hild.analyze(["angles"])`` find what
they run here. A package adds an analysis by an entry point of the group ``hild_xr.analyses``
that names a :class:`NamedAnalysis`::

    [project.entry-points."hild_xr.analyses"]
    loss_drop = "my_package:LOSS_DROP"

It is listed and called like those of this package. One that cannot be loaded is reported
with the distribution it comes from, and disturbs no other.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from hild_xr.analysis import whole_run

ENTRY_POINT_GROUP = "hild_xr.analyses"

OWN = "hild-xr"
"""Distribution of the analyses of this package."""

SPECTRA = "rec.Hessian(k=...), rec.GMatrix(k=...) or another probe of eigenpairs"


class AnalysisError(ValueError):
    """An analysis cannot be made as asked."""


class UnknownAnalysisError(AnalysisError):
    """There is no analysis of that name."""


class BrokenAnalysisError(AnalysisError):
    """The analysis of another package cannot be loaded, or fails."""


class NotRecordedError(AnalysisError):
    """The run does not hold what the analysis needs."""


@dataclass(frozen=True)
class NamedAnalysis:
    """An analysis of a whole run.

    Parameters
    ----------
    name
        Name by which it is asked for, and the group of its results in a store.
    sentence
        What it does, in one sentence.
    function
        Function of a run's tree and options by keyword that returns a Dataset or a DataTree.
        It should compute nothing: results on dask are written chunk by chunk.
    needs
        What the run has to hold, with what records it: the name of a variable in any group,
        or the path of a group or array, for example ``{"metrics/train_loss": "rec.Metrics()"}``.
    distribution
        Where it comes from; filled in for entry points.

    Examples
    --------
    >>> def final_loss(run, *, last=1):
    ...     return run["metrics"].to_dataset()[["train_loss"]].isel(step=slice(-last, None))
    >>> analysis = NamedAnalysis(
    ...     "final_loss", "Loss at the end.", final_loss, {"metrics/train_loss": "rec.Metrics()"}
    ... )
    >>> run = xr.DataTree.from_dict({"/metrics": xr.Dataset({"train_loss": ("step", [2.0, 1.0])})})
    >>> analysis(run)["train_loss"].values
    array([1.])
    """

    name: str
    sentence: str
    function: Callable[..., xr.Dataset | xr.DataTree]
    needs: Mapping[str, str] = field(default_factory=dict)
    distribution: str = OWN

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options with their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {
            parameter.name: None if parameter.default is parameter.empty else parameter.default
            for parameter in parameters
            if parameter.kind is not parameter.VAR_KEYWORD
        }

    def __call__(self, run: xr.DataTree, **options: Any) -> xr.DataTree:
        """Apply it to a run.

        Raises
        ------
        NotRecordedError
            If the run lacks what it needs, or nothing in the run can be analysed so.
        AnalysisError
            If there is no such option, or the function does not take its value.
        BrokenAnalysisError
            If the function of another package raises or returns anything else.
        """
        self._require_recorded(run)
        self._require_options(options)
        try:
            result = self.function(run, **options)
        except AnalysisError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            if self.distribution == OWN:
                raise AnalysisError(f"analysis {self.name!r}: {_text(error)}") from error
            raise self._broken(error) from error
        except Exception as error:
            if self.distribution == OWN:
                raise
            raise self._broken(error) from error
        return self._checked(result)

    def _require_recorded(self, run: xr.DataTree) -> None:
        missing = {need: by for need, by in self.needs.items() if not _holds(run, need)}
        if missing:
            listed = "; ".join(f"{need!r} is recorded by {by}" for need, by in missing.items())
            raise NotRecordedError(
                f"analysis {self.name!r} needs {', '.join(map(repr, missing))}, which the run does not hold: "
                f"{listed}. The groups of the run are {', '.join(run.children) or 'none'}"
            )

    def _require_options(self, options: Mapping[str, Any]) -> None:
        kinds = [parameter.kind for parameter in inspect.signature(self.function).parameters.values()]
        unknown = sorted(options.keys() - self.options.keys())
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise AnalysisError(
                f"analysis {self.name!r} has no option {', '.join(map(repr, unknown))}; "
                f"it takes {', '.join(self.options) or 'none'}"
            )

    def _checked(self, result: object) -> xr.DataTree:
        if isinstance(result, xr.Dataset):
            result = xr.DataTree(result)
        if not isinstance(result, xr.DataTree):
            raise BrokenAnalysisError(
                f"analysis {self.name!r} of {self.distribution} must return a Dataset or a DataTree, "
                f"came {type(result).__name__}"
            )
        if not any(node.data_vars for node in result.subtree):
            reasons = [f"{path}: {reason}" for path, reason in result.attrs.get("left_out", {}).items()]
            raise NotRecordedError(
                f"analysis {self.name!r} found nothing to work on in the run"
                + (f" ({'; '.join(reasons)})" if reasons else "")
            )
        return result

    def _broken(self, error: Exception) -> BrokenAnalysisError:
        return BrokenAnalysisError(
            f"analysis {self.name!r} of the distribution {self.distribution} failed: "
            f"{type(error).__name__}: {_text(error)}"
        )


def _holds(run: xr.DataTree, need: str) -> bool:
    if need in run.children or any(need in node.data_vars for node in run.subtree):
        return True
    try:
        run[need]
    except KeyError:
        return False
    return "/" in need


def _text(error: Exception) -> str:
    """Return what an error says in one line; a KeyError shows its text as a literal."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(said).split())


# ---------------------------------------------------------------------------- of this package

_DECLARED = (
    NamedAnalysis(
        "angles",
        "Principal angles between the eigenspaces of all pairs of steps.",
        whole_run.angles,
        {"eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "angles_to_reference",
        "Principal angles between the eigenspaces at every step and at one step, by default the first.",
        whole_run.angles_to_reference,
        {"eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "consecutive_angles",
        "Principal angles between the eigenspaces of each record and of the record before.",
        whole_run.consecutive_angles,
        {"eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "overlap",
        "Overlap of the eigenspaces of two matrices, such as Hessian and G, of the same blocks.",
        whole_run.overlap,
        {"eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "alignment",
        "Alignment of the weights with the eigenspaces of their own blocks.",
        whole_run.alignment,
        {"weight": "rec.Weights()", "eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "projection",
        "Part of the gradient that lies in the dominant eigenspace of its own block.",
        whole_run.projection,
        {"gradient": "rec.Gradient()", "eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "outliers",
        "Number of outliers of every spectrum, the gap behind them and the edge of the bulk.",
        whole_run.outliers,
        {"eigenvalues": SPECTRA},
    ),
    NamedAnalysis(
        "tracks",
        "Eigenpairs followed along training, through crossings, with births and deaths.",
        whole_run.tracks,
        {"eigenvalues": SPECTRA, "eigenvectors": SPECTRA},
    ),
    NamedAnalysis(
        "rank",
        "Numerical, stable and effective rank and participation ratio of every spectrum and of the weight "
        "matrices.",
        whole_run.rank,
    ),
)

OWN_ANALYSES: dict[str, NamedAnalysis] = {analysis.name: analysis for analysis in _DECLARED}
"""The analyses of this package by name."""


# ---------------------------------------------------------------------------- of all packages


def find_analysis(name: str) -> NamedAnalysis:
    """Return the analysis of that name, of this package or of another one.

    Raises
    ------
    UnknownAnalysisError
        If there is none; the nearest name is suggested.
    BrokenAnalysisError
        If it cannot be loaded, or two packages claim the name.

    Examples
    --------
    >>> find_analysis("outliers").distribution
    'hild-xr'
    >>> find_analysis("outlier")
    Traceback (most recent call last):
    ...
    hild_xr.analysis.named.UnknownAnalysisError: no analysis 'outlier'; did you mean 'outliers'? ...
    """
    if name in OWN_ANALYSES:
        return OWN_ANALYSES[name]
    claims = _entry_points().get(name, [])
    if not claims:
        known = list(dict.fromkeys([*OWN_ANALYSES, *_entry_points()]))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownAnalysisError(f"no analysis {name!r}{hint} There are: {', '.join(known)}")
    return _loaded(name, claims)


def list_analyses() -> dict[str, NamedAnalysis | BrokenAnalysisError]:
    """Return all analyses by name; those that cannot be loaded as the error that says why.

    Examples
    --------
    >>> "angles" in list_analyses()
    True
    """
    found: dict[str, NamedAnalysis | BrokenAnalysisError] = dict(OWN_ANALYSES)
    for name, claims in _entry_points().items():
        if name in OWN_ANALYSES:
            for whose in map(_distribution, claims):
                found[f"{name} of {whose}"] = BrokenAnalysisError(
                    f"analysis {name!r} of the distribution {whose}: the name is taken by {OWN}"
                )
            continue
        try:
            found[name] = _loaded(name, claims)
        except BrokenAnalysisError as error:
            found[name] = error
    return found


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _loaded(name: str, claims: list[importlib.metadata.EntryPoint]) -> NamedAnalysis:
    if len(claims) > 1:
        raise BrokenAnalysisError(
            f"analysis {name!r} is claimed by the distributions {', '.join(map(_distribution, claims))}; "
            "uninstall all but one"
        )
    (point,) = claims
    whose = f"analysis {name!r} of the distribution {_distribution(point)}"
    try:
        found = point.load()
    except Exception as error:
        raise BrokenAnalysisError(
            f"{whose} cannot be loaded from {point.value!r}: {type(error).__name__}: {_text(error)}; "
            "update or uninstall it"
        ) from error
    if not isinstance(found, NamedAnalysis):
        raise BrokenAnalysisError(
            f"{whose}: expected a hild_xr.analysis.named.NamedAnalysis at {point.value!r}, came "
            f"{type(found).__name__}"
        )
    if found.name != point.name:
        raise BrokenAnalysisError(f"{whose}: its entry point has another name than itself, {found.name!r}")
    return NamedAnalysis(name, found.sentence, found.function, found.needs, _distribution(point))


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return "unknown" if point.dist is None else f"{point.dist.name} {point.dist.version}"
