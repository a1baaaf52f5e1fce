"""What an experiment gives: claims beside measured numbers, and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from hild_xr.claims import Claim

if TYPE_CHECKING:
    from hild_xr.report import Figure


@dataclass(frozen=True)
class Findings:
    """The outcome of one experiment.

    Parameters
    ----------
    title
        Title of the report.
    introduction
        One paragraph: model, data, what was recorded.
    claims
        The theory's claims with the measured numbers.
    figures
        Figures in the order of the report.
    """

    title: str
    introduction: str
    claims: list[Claim]
    figures: list[Figure]


def array_at(run: xr.DataTree, path: str) -> xr.DataArray:
    """Return a stored array by its path, such as ``"hessian/eigenvalues"``.

    Raises
    ------
    KeyError
        If the run holds no such array; the groups it holds are listed.
    """
    node, _, name = path.rpartition("/")
    if node not in {other.path.lstrip("/") for other in run.subtree} or name not in run[node].data_vars:
        held = ", ".join(run.children)
        raise KeyError(f"the run holds no array {path!r}; its groups are {held}")
    found = run[path]
    if not isinstance(found, xr.DataArray):
        raise KeyError(f"{path!r} is a group, not an array")
    return found


def lowest(values: xr.DataArray) -> float:
    """Smallest value over all dims; NaN if any is NaN, so that no claim holds by omission."""
    return float(values.min(skipna=False).compute())


def highest(values: xr.DataArray) -> float:
    """Largest value over all dims; NaN if any is NaN."""
    return float(values.max(skipna=False).compute())


def principal(eigenvectors: xr.DataArray, k: int) -> xr.DataArray:
    """Return the k leading eigenvectors, which span the principal eigenspace E_k."""
    return eigenvectors.isel(eig=slice(k))


def data_part(eigenvalues: xr.DataArray, regularizer: float) -> xr.DataArray:
    """Return lambda - beta, loaded, for a logarithmic axis on which a bulk of size 1/lambda is seen.

    NaN where rounding left nothing above zero.
    """
    less = (eigenvalues - regularizer).load()
    label = "eigenvalue less β" if regularizer else "eigenvalue"
    return less.where(less > 0).assign_attrs({**eigenvalues.attrs, "long_name": label})
