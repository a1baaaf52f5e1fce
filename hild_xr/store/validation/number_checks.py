"""What the numbers of a record must obey: finite where claimed, sorted, orthonormal.

Plain arrays in, faults out; nothing here reads a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hild_xr.plan import ArrayPlan
from hild_xr.variables import DIM_EIG, DIM_SKETCH

ORTHONORMAL_WITHIN = 1e-3
r"""Largest entry of :math:`|VV^T - I|` that passes, or ten rounding units if that is more.

The solvers reach 1e-5 in float32 and 1e-12 in float64; float16 rounds at 1e-3, so 1e-2 passes
there.
"""

SKETCH_STANDARD_ERRORS = 10
"""Sketched vectors keep inner products up to a standard error of sqrt(2 / m): so many of them pass."""

ORDERS = ("magnitude", "largest", "smallest", "both")
"""Orders of eigenvalues that can be checked; the group's attribute ``which`` names one."""

_PAIRWISE = ("eigenvalues", "eigenvectors", "residuals")
_NEVER_INFINITE = ("eigenvalues", "eigenvectors", "matrix", "trace")
_NAN_MEANS_NOT_COMPUTED = ("trace",)


class FaultKind(StrEnum):
    """What can be wrong, or worth knowing, of the numbers of a record."""

    claimed = "a pair that is flagged converged is not finite"
    infinite = "infinity"
    unsorted = "eigenvalues are out of order"
    skewed = "eigenvectors are not orthonormal"
    skewed_unconverged = "eigenvectors that did not converge are not orthonormal"
    missing = "NaN"


@dataclass(frozen=True)
class Fault:
    """A fault of some records of a block.

    Parameters
    ----------
    kind
        What it is.
    records
        Which records have it, shape (records,).
    worst
        Largest deviation, where there is one to measure; 0 otherwise.
    """

    kind: FaultKind
    records: NDArray[np.bool_]
    worst: float = 0.0


def faults(
    array: ArrayPlan, values: NDArray[Any], *, converged: NDArray[np.bool_] | None, which: str | None
) -> Iterator[Fault]:
    """Judge the records of one array.

    Parameters
    ----------
    array
        Plan of the array.
    values
        Its records, shape (records, *array.shape).
    converged
        Which eigenpairs are claimed to be converged, shape (records, *batch, pairs);
        None where the run holds no such flag, and then all finite pairs are.
    which
        One of :data:`ORDERS`, in which eigenvalues are sorted; None to leave the order unchecked.

    Yields
    ------
    Fault
        One a kind that occurs.

    Examples
    --------
    >>> array = ArrayPlan(variable="eigenvalues", dims=("eig",), shape=(3,), dtype="float64")
    >>> values = np.array([[3.0, -2.0, 1.0], [1.0, 2.0, np.nan]])
    >>> for fault in faults(array, values, converged=None, which="magnitude"):
    ...     print(fault.kind.name, fault.records)
    missing [False True]
    unsorted [False True]
    """
    if values.dtype.kind != "f" or not len(values):
        return
    finite = np.isfinite(values)
    if not finite.all():
        yield from _not_finite(array, values, finite, converged)
    if array.variable == "eigenvalues" and DIM_EIG in array.dims and which is not None:
        yield from _unsorted(np.moveaxis(values, 1 + array.dims.index(DIM_EIG), -1), which)
    if array.variable == "eigenvectors" and vector_layout(array) is not None:
        yield from _skewed(_as_vectors(array, values), converged, _orthonormal_within(array))


def vector_layout(array: ArrayPlan) -> tuple[tuple[str, ...], str, tuple[str, ...]] | None:
    """Return batch dims, the dim that numbers the vectors, and those a vector spans; None if they do not fit.

    Examples
    --------
    >>> vector_layout(ArrayPlan(variable="eigenvectors", dims=("eig", "out", "in"), shape=(2, 3, 4)))
    ((), 'eig', ('out', 'in'))
    """
    number = str(array.attrs.get("number_dim", DIM_EIG))
    if number not in array.dims:
        return None
    given = array.attrs.get("vector_dims")
    spanned = array.dims[array.dims.index(number) + 1 :]
    if isinstance(given, list | tuple):
        spanned = tuple(str(dim) for dim in given)
    batch = tuple(dim for dim in array.dims if dim not in {number, *spanned})
    return (batch, number, spanned) if spanned and set(spanned) <= set(array.dims) else None


def _as_vectors(array: ArrayPlan, values: NDArray[Any]) -> NDArray[Any]:
    """Return records as (records, *batch, pairs, parameters)."""
    layout = vector_layout(array)
    if layout is None:
        return values
    batch, number, spanned = layout
    order = [1 + array.dims.index(dim) for dim in (*batch, number, *spanned)]
    moved = values.transpose(0, *order)
    return moved.reshape(*moved.shape[: 2 + len(batch)], -1)


def _not_finite(
    array: ArrayPlan, values: NDArray[Any], finite: NDArray[np.bool_], converged: NDArray[np.bool_] | None
) -> Iterator[Fault]:
    records = len(values)
    wrong: NDArray[np.bool_] = np.zeros(records, dtype=bool)
    if array.variable in _NEVER_INFINITE:
        wrong = _any_in_record(np.isinf(values))
        if wrong.any():
            yield Fault(FaultKind.infinite, wrong)
    if array.variable in _PAIRWISE and converged is not None:
        pairs = _as_vectors(array, finite).all(axis=-1) if array.variable == "eigenvectors" else finite
        if pairs.shape == converged.shape:
            claimed = _any_in_record(converged & ~pairs)
            if claimed.any():
                yield Fault(FaultKind.claimed, claimed)
            wrong = np.logical_or(wrong, claimed)
    missing = _any_in_record(~finite) & ~wrong
    if array.variable not in _NAN_MEANS_NOT_COMPUTED and missing.any():
        yield Fault(FaultKind.missing, missing)


def _unsorted(values: NDArray[Any], which: str) -> Iterator[Fault]:
    """Eigenvalues on the last axis; a NaN between two of them hides nothing."""
    # both ends in turn: the largest fall towards the smallest, which are read backwards
    ends = np.concatenate([values[..., ::2], values[..., 1::2][..., ::-1]], axis=-1)
    key = {"magnitude": np.abs(values), "largest": values, "smallest": -values, "both": ends}[which]
    so_far = np.fmin.accumulate(key, axis=-1)
    # rounding to the stored dtype keeps the order, so only writers that round twice need the slack
    slack = 4 * np.finfo(values.dtype).eps * np.abs(so_far[..., :-1])
    with np.errstate(invalid="ignore"):
        rises = key[..., 1:] > so_far[..., :-1] + slack
    wrong = _any_in_record(rises)
    if wrong.any():
        yield Fault(FaultKind.unsorted, wrong)


def _orthonormal_within(array: ArrayPlan) -> float:
    limit = max(ORTHONORMAL_WITHIN, 10 * float(np.finfo(array.dtype).eps))
    if DIM_SKETCH in array.dims:
        numbers = array.shape[array.dims.index(DIM_SKETCH)]
        limit += SKETCH_STANDARD_ERRORS * math.sqrt(2 / numbers)
    return limit


def _skewed(vectors: NDArray[Any], converged: NDArray[np.bool_] | None, limit: float) -> Iterator[Fault]:
    """Vectors (records, *batch, pairs, parameters); those with NaN are left out."""
    wide = vectors.astype(np.promote_types(vectors.dtype, np.float32), copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        deviation = np.abs(wide @ np.swapaxes(wide, -1, -2) - np.eye(wide.shape[-2], dtype=wide.dtype))
    deviation = np.where(np.isnan(deviation), 0.0, deviation)
    claimed = deviation
    if converged is not None and converged.shape == vectors.shape[:-1]:
        claimed = np.where(converged[..., :, None] & converged[..., None, :], deviation, 0.0)
    of_claimed, of_all = _largest_in_record(claimed), _largest_in_record(deviation)
    wrong = of_claimed > limit
    if wrong.any():
        yield Fault(FaultKind.skewed, wrong, float(of_claimed.max()))
    weak = (of_all > limit) & ~wrong
    if weak.any():
        yield Fault(FaultKind.skewed_unconverged, weak, float(of_all[weak].max()))


def _any_in_record(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether any entry of each record (first axis) is set."""
    return np.asarray(flags.reshape(len(flags), -1).any(axis=1))


def _largest_in_record(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values.reshape(len(values), -1).max(axis=1, initial=0.0))
