"""Eigenvalues of one block against the step: outliers leaving the bulk."""

from __future__ import annotations

import holoviews as hv
import numpy as np
import xarray as xr

from hild_xr.plots.arguments import loaded
from hild_xr.plots.axes import HorizontalAxis, horizontal_axis, label_of, value_dimension
from hild_xr.plots.series import areas_first, band, extremes, spread
from hild_xr.variables import DIM_EIG, DIM_SEED, DIM_STEP

OUTLIER, BULK, EDGE = "Outlier", "Bulk", "Edge"
"""HoloViews groups of the parts."""

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def spectrum(
    eigenvalues: xr.DataArray,
    outlier_count: xr.DataArray | int | None = None,
    edge: xr.DataArray | None = None,
    *,
    x: str = DIM_STEP,
    log_x: bool = False,
    log_y: bool = False,
    label: str = "",
) -> hv.Overlay:
    """Show the spectrum of one block along training.

    The first eigenvalues, as many as there ever are outliers, are lines over
    all steps, so that a line starts in the bulk and is seen to leave it. The
    rest is a band from its smallest to its largest recorded eigenvalue; where
    an eigenvalue counts as bulk, the band reaches up to it.

    Parameters
    ----------
    eigenvalues
        Dims (step, eig) and possibly ``seed``, in decreasing order of absolute
        value, as recorded. Only a part of the spectrum may be recorded: the
        band then ends at the smallest recorded eigenvalue.
    outlier_count
        Number of outliers, of dims (step) or (seed, step), such as
        ``outliers(eigenvalues).outlier_count``, or one number for all steps; a
        negative count says that it is not known. Without it every eigenvalue is
        a line.
    edge
        Edge of the bulk, of dims (step) or (seed, step), such as that of the
        theory.
    x, log_x
        Coordinate of the horizontal axis; see :mod:`hild_xr.plots`.
    log_y
        Show the eigenvalues on a logarithmic axis.
    label
        Title.

    Returns
    -------
    holoviews.Overlay
        Area of group ``Bulk``, curves of group ``Outlier`` (with areas of group
        ``Range`` over seeds) and ``Edge``.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If dims are missing or too many, if the arrays have different labels, if
        more outliers than eigenvalues are counted, or if an eigenvalue that is
        not positive would have to stand on a logarithmic axis.

    Examples
    --------
    >>> steps = {"step": [0, 10]}
    >>> eigenvalues = xr.DataArray([[1.0, 0.9, 0.8], [5.0, 0.9, 0.8]], dims=("step", "eig"), coords=steps)
    >>> count = xr.DataArray([0, 1], dims="step", coords=steps)
    >>> [(element.group, element.label) for element in spectrum(eigenvalues, count)]
    [('Bulk', 'bulk'), ('Outlier', 'λ₁')]
    """
    found = _loaded("eigenvalues", eigenvalues, (DIM_STEP, DIM_EIG))
    axis = horizontal_axis(found, x, log=log_x)
    y = value_dimension(found, "eigenvalue", log=log_y)
    counts = _counts(outlier_count, found)
    elements = [] if counts is None else [_bulk(found, counts, axis, y)]
    for index in range(found.sizes[DIM_EIG] if counts is None else max(0, int(counts.max()))):
        name = f"λ{str(index + 1).translate(_SUBSCRIPTS)}"
        elements += spread(axis, found.isel({DIM_EIG: index}), y, label=name, group=OUTLIER)
    if edge is not None:
        elements += _edge(edge, x=x, log_x=log_x, log_y=log_y)
    return hv.Overlay(areas_first(elements), label=label)


def _loaded(name: str, array: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    found = loaded(name, array, dims, spread=True)
    if not set(found.dims) <= {DIM_SEED, *dims}:
        raise ValueError(
            f"expected {name} of one block, with dims {dims} and possibly 'seed', came {array.dims}; "
            "pick a block with .sel"
        )
    return found


def _counts(given: xr.DataArray | int | None, eigenvalues: xr.DataArray) -> xr.DataArray | None:
    """Return the counts with the labels and leading dims of the eigenvalues, -1 where unknown."""
    if given is None:
        return None
    records = eigenvalues.isel({DIM_EIG: 0}, drop=True)
    if isinstance(given, xr.DataArray):
        found = _loaded("outlier_count", given, (DIM_STEP,)).fillna(-1)
        found, _ = xr.broadcast(*xr.align(found, records, join="exact"))
        found = found.transpose(*records.dims)
    else:
        found = xr.full_like(records, given)
    if found.max() > eigenvalues.sizes[DIM_EIG]:
        raise ValueError(
            f"expected no more outliers than eigenvalues, came {int(found.max())} outliers and "
            f"{eigenvalues.sizes[DIM_EIG]} eigenvalues; record more of the spectrum"
        )
    return found


def _bulk(eigenvalues: xr.DataArray, counts: xr.DataArray, axis: HorizontalAxis, y: hv.Dimension) -> hv.Area:
    index = xr.DataArray(np.arange(eigenvalues.sizes[DIM_EIG]), dims=DIM_EIG)
    bulk = eigenvalues.where((index >= counts) & (counts >= 0)).transpose(..., DIM_EIG, DIM_STEP)
    lower, upper = extremes(bulk.values.reshape(-1, bulk.sizes[DIM_STEP]))
    return band(axis, lower, upper, y, label="bulk", group=BULK)


def _edge(edge: xr.DataArray, *, x: str, log_x: bool, log_y: bool) -> list[hv.Element]:
    found = _loaded("edge", edge, (DIM_STEP,))
    y = value_dimension(found, "eigenvalue", log=log_y, label="eigenvalue")
    axis = horizontal_axis(found, x, log=log_x)
    return spread(axis, found, y, label=label_of(found), group=EDGE)
