r"""Spectral densities from stored quadratures.

A density probe stores for each of its random vectors z a rule
(``quadrature_nodes``, ``quadrature_weights``; stochastic Lanczos quadrature,
B. Ghorbani, S. Krishnan and Y. Xiao, ICML 2019, arXiv:1901.10159) with

.. math:: \sum_j w_j f(\theta_j) \approx z^T f(A) z, \qquad
          \mathbb{E}\, z^T f(A) z = \frac1p \mathrm{tr} f(A).

The mean over the probes is the estimate, and their spread its standard error.
Errors that all probes share (too few Lanczos steps, low precision) are not in
it: the store has them as ``quadrature_error`` and ``product_error``.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    apply_kernel,
    declared,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.base.checks import real_number
from hild_xr.variables import DIM_EIGENVALUE, DIM_NODE, DIM_ORDER, DIM_PROBE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray

RULE = (DIM_PROBE, DIM_NODE)

BLOCK_BYTES = 2**26
"""Size of the temporary arrays of one pass over many records."""


# ---------------------------------------------------------------------------- kernels


def spectral_density_kernel(
    nodes: FloatArray, weights: FloatArray, width: FloatArray, *, points: FloatArray
) -> tuple[FloatArray, FloatArray]:
    r"""Density smoothed by a Gaussian, and its standard error.

    Parameters
    ----------
    nodes, weights
        Arrays of shape (..., probes, nodes).
    width
        Standard deviations of the Gaussian: array that broadcasts with (...).
    points
        Array of shape (q,).

    Returns
    -------
    density, standard_error
        Arrays of shape (..., q). NaN where a rule is missing or the width is
        not positive; the error also where there is one probe only.

    Examples
    --------
    >>> density, error = spectral_density_kernel(
    ...     np.zeros((2, 1)), np.ones((2, 1)), np.array(0.5), points=np.array([0.0, 0.5])
    ... )
    >>> density.round(4), error
    (array([0.7979, 0.4839]), array([0., 0.]))
    """
    width = np.where(width > 0, width, np.nan)

    def gaussian(x: FloatArray, sigma: FloatArray) -> FloatArray:
        z = (x[..., None] - points) / sigma[..., None, None, None]
        heights: FloatArray = np.exp(-0.5 * np.square(z)) / (
            sigma[..., None, None, None] * math.sqrt(2 * math.pi)
        )
        return heights

    return _expectations(gaussian, nodes, weights, len(points), width)


def spectral_distribution_kernel(
    nodes: FloatArray, weights: FloatArray, *, points: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Fraction of the eigenvalues up to each point, and its standard error.

    Parameters
    ----------
    nodes, weights
        Arrays of shape (..., probes, nodes).
    points
        Array of shape (q,).

    Returns
    -------
    fraction, standard_error
        Arrays of shape (..., q); NaN as in :func:`spectral_density_kernel`.

    Examples
    --------
    >>> fraction, error = spectral_distribution_kernel(
    ...     np.array([[1.0, 3.0], [1.0, 2.0]]), np.full((2, 2), 0.5), points=np.array([1.0, 2.5])
    ... )
    >>> fraction, error
    (array([0.5 , 0.75]), array([0.  , 0.25]))
    """

    def up_to(x: FloatArray, _: FloatArray) -> FloatArray:
        return (x[..., None] <= points).astype(np.float64)

    return _expectations(up_to, nodes, weights, len(points))


def spectral_moments_kernel(
    nodes: FloatArray, weights: FloatArray, *, orders: Sequence[int]
) -> tuple[FloatArray, FloatArray]:
    """Means of powers of the eigenvalues, and their standard errors.

    Parameters
    ----------
    nodes, weights
        Arrays of shape (..., probes, nodes).
    orders
        Exponents, q of them.

    Returns
    -------
    moment, standard_error
        Arrays of shape (..., q); NaN as in :func:`spectral_density_kernel`.

    Examples
    --------
    >>> spectral_moments_kernel(np.array([[1.0, 3.0]]), np.full((1, 2), 0.5), orders=[1, 2])[0]
    array([2., 5.])
    """

    def powers(x: FloatArray, _: FloatArray) -> FloatArray:
        power: FloatArray = x[..., None] ** np.asarray(orders)
        return power

    return _expectations(powers, nodes, weights, len(orders))


def bulk_weights_kernel(
    nodes: FloatArray, weights: FloatArray, lower: FloatArray, upper: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Weights of the nodes between two edges, normalised anew, and the mass that was left out.

    Parameters
    ----------
    nodes, weights
        Arrays of shape (..., probes, nodes).
    lower, upper
        Arrays that broadcast with (...).

    Returns
    -------
    weights
        Array of shape (..., probes, nodes): zero outside of the edges, the sum
        of each probe is 1; NaN where nothing lies inside.
    mass
        Array of shape (...): mean over the probes of the mass left out.

    Examples
    --------
    >>> weights, mass = bulk_weights_kernel(
    ...     np.array([[1.0, 2.0, 9.0]]), np.array([[0.3, 0.5, 0.2]]), np.array(-np.inf), np.array(3.0)
    ... )
    >>> weights, float(mass)
    (array([[0.375, 0.625, 0.   ]]), 0.2)
    """
    nodes, weights, known = _clean(nodes, weights)
    known = known & ~np.isnan(lower) & ~np.isnan(upper)
    inside = (nodes >= lower[..., None, None]) & (nodes <= upper[..., None, None])
    kept = np.where(inside, weights, 0.0)
    total, left = weights.sum(axis=-1), kept.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        bulk = np.where((known & (left > 0).all(axis=-1))[..., None, None], kept / left[..., None], np.nan)
        out = np.where(inside, 0.0, weights).sum(axis=-1) / total
    return bulk, np.where(known, out.mean(axis=-1), np.nan)


def _clean(nodes: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Rules in float64 without NaN, and which records are complete; unused nodes may hold anything."""
    nodes, weights = (np.asarray(a, dtype=np.float64) for a in (nodes, weights))
    used = weights > 0
    finite = np.isfinite(weights) & (weights >= 0) & (np.isfinite(nodes) | ~used)
    known = np.asarray(finite.all(axis=(-2, -1)) & used.any(axis=-1).all(axis=-1))
    use = used & known[..., None, None]
    return np.where(use, nodes, 0.0), np.where(known[..., None, None], weights, 0.0), known


def _expectations(
    function: Callable[[FloatArray, FloatArray], FloatArray],
    nodes: FloatArray,
    weights: FloatArray,
    q: int,
    parameter: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Mean over the probes of sum_j w_j f(theta_j), and its standard error, a block of records at a time."""
    nodes, weights, known = _clean(nodes, weights)
    lead, (probes, n) = nodes.shape[:-2], nodes.shape[-2:]
    parameter = np.broadcast_to(0.0 if parameter is None else parameter, lead).reshape(-1)
    nodes, weights = nodes.reshape(-1, probes, n), weights.reshape(-1, probes, n)
    values = np.empty((len(nodes), probes, q))
    length = max(1, BLOCK_BYTES // (8 * probes * n * max(q, 1)))
    for start in range(0, len(nodes), length):
        part = slice(start, start + length)
        values[part] = (weights[part, :, None, :] @ function(nodes[part], parameter[part]))[:, :, 0, :]
    values = np.where(known.reshape(-1)[:, None, None], values, np.nan).reshape(*lead, probes, q)
    if probes == 1:
        return values[..., 0, :], np.full((*lead, q), np.nan)
    return values.mean(axis=-2), values.std(axis=-2, ddof=1) / math.sqrt(probes)


# ---------------------------------------------------------------------------- labelled


def spectral_density(
    nodes: xr.DataArray, weights: xr.DataArray, points: ArrayLike, *, width: float | xr.DataArray
) -> xr.Dataset:
    r"""Density of the eigenvalues, smoothed by a Gaussian of a stated width.

    .. math:: \rho_\sigma(x) = \frac{1}{n_v} \sum_v \sum_j w_{vj}
        \frac{1}{\sqrt{2\pi}\sigma} e^{-(x - \theta_{vj})^2 / 2\sigma^2}

    with the :math:`n_v` probes of stochastic Lanczos quadrature
    (arXiv:1901.10159). It integrates to 1. Peaks narrower than the width are as
    wide as the width: choose it above the distance of neighbouring points, and
    state it with the plot (it is in the attrs).

    Parameters
    ----------
    nodes, weights
        Stored ``quadrature_nodes`` and ``quadrature_weights`` with the dims
        probe and node, in any order.
    points
        Eigenvalues at which the density is given, one list for all records.
    width
        Standard deviation :math:`\sigma` of the Gaussian in the unit of the
        eigenvalues: a number, or an array over dims of the records.

    Returns
    -------
    xarray.Dataset
        ``spectral_density`` and ``spectral_density_standard_error`` with the
        new last dim ``eigenvalue``. NaN where a rule is missing; the error is
        the standard deviation between probes by the root of their number, and
        NaN for one probe.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real, or points or the width are no real numbers.
    ValueError
        If a dim is missing, labels differ, points are not a list of numbers, or
        the width is not positive.

    Examples
    --------
    >>> nodes = xr.DataArray([[1.0, 3.0]], dims=("probe", "node"))
    >>> density = spectral_density(nodes, 0 * nodes + 0.5, np.linspace(-1, 5, 601), width=0.3)
    >>> round(float(density.spectral_density.integrate("eigenvalue")), 6)
    1.0
    """
    at = _points(points)
    labelled = _labelled("width", width)
    if labelled.chunks is None and bool((labelled <= 0).any()):
        raise ValueError(f"expected a width > 0, the standard deviation of the Gaussian, came {width}")
    # a NaN width leaves its record undefined
    said = {} if isinstance(width, xr.DataArray) else {"width": float(labelled)}
    return _estimate(
        "spectral_density",
        functools.partial(spectral_density_kernel, points=at),
        {"nodes": nodes, "weights": weights, "width": labelled},
        {DIM_EIGENVALUE: at},
        kernel="gaussian",
        **said,
    )


def spectral_distribution(nodes: xr.DataArray, weights: xr.DataArray, points: ArrayLike) -> xr.Dataset:
    """Cumulative distribution of the eigenvalues: the fraction up to each point.

    It needs no kernel width. Between two nodes it is constant, so its
    resolution is that of the quadrature.

    Parameters
    ----------
    nodes, weights, points
        As in :func:`spectral_density`.

    Returns
    -------
    xarray.Dataset
        ``spectral_distribution`` and ``spectral_distribution_standard_error``
        with the new last dim ``eigenvalue``, as in :func:`spectral_density`.

    Raises
    ------
    TypeError, ValueError
        As :func:`spectral_density`.

    Examples
    --------
    >>> nodes = xr.DataArray([[1.0, 3.0]], dims=("probe", "node"))
    >>> spectral_distribution(nodes, 0 * nodes + 0.5, [0.0, 1.0, 4.0]).spectral_distribution.values
    array([0. , 0.5, 1. ])
    """
    at = _points(points)
    kernel = functools.partial(spectral_distribution_kernel, points=at)
    return _estimate(
        "spectral_distribution", kernel, {"nodes": nodes, "weights": weights}, {DIM_EIGENVALUE: at}
    )


def spectral_moments(
    nodes: xr.DataArray, weights: xr.DataArray, orders: Iterable[int] = (1, 2, 3, 4)
) -> xr.Dataset:
    r"""Moments :math:`\frac1p \mathrm{tr} A^m` of the eigenvalues.

    A rule of k Lanczos steps is exact for :math:`z^T A^m z` up to m = 2k - 1, so
    the error of a low moment comes from the random probes alone.

    Parameters
    ----------
    nodes, weights
        As in :func:`spectral_density`.
    orders
        Exponents m, whole numbers of at least 0.

    Returns
    -------
    xarray.Dataset
        ``spectral_moment`` and ``spectral_moment_standard_error`` with the new
        last dim ``order``, as in :func:`spectral_density`.

    Raises
    ------
    TypeError, ValueError
        As :func:`spectral_density`, and for orders that are not whole numbers.

    Examples
    --------
    >>> nodes = xr.DataArray([[1.0, 3.0]], dims=("probe", "node"))
    >>> spectral_moments(nodes, 0 * nodes + 0.5, [1, 2]).spectral_moment.values
    array([2., 5.])
    """
    given = list(orders)
    if not given or any(int(order) != order or order < 0 for order in given):
        raise ValueError(f"expected orders as whole numbers of at least 0, at least one, came {given}")
    whole = [int(order) for order in given]
    kernel = functools.partial(spectral_moments_kernel, orders=whole)
    return _estimate("spectral_moment", kernel, {"nodes": nodes, "weights": weights}, {DIM_ORDER: whole})


def bulk_weights(
    nodes: xr.DataArray,
    weights: xr.DataArray,
    *,
    lower: float | xr.DataArray = -math.inf,
    upper: float | xr.DataArray = math.inf,
) -> xr.Dataset:
    """Leave known outliers out of a density: weights of the bulk alone.

    Nodes outside of [lower, upper] get weight 0, and the others of each probe
    are normalised to 1 anew. For a random vector that is uniform on the sphere
    its part in the bulk, normalised, is uniform again: the result is the
    density of the bulk. The edges have to lie in gaps of the spectrum, for
    example halfway between the last outlier and the first eigenvalue of the
    bulk; Lanczos resolves isolated eigenvalues to a node of their own.

    Parameters
    ----------
    nodes, weights
        As in :func:`spectral_density`.
    lower, upper
        Edges of the bulk: numbers, or arrays over dims of the records.

    Returns
    -------
    xarray.Dataset
        ``quadrature_weights`` of the bulk, for the functions of this module,
        and ``outlier_mass``, the fraction of eigenvalues left out, mean over
        the probes. NaN where a rule or an edge is missing; the weights also
        where a probe has nothing between the edges.

    Raises
    ------
    TypeError, ValueError
        As :func:`spectral_density`.

    Examples
    --------
    >>> nodes = xr.DataArray([[1.0, 2.0, 9.0]], dims=("probe", "node"))
    >>> weights = xr.DataArray([[0.3, 0.5, 0.2]], dims=("probe", "node"))
    >>> bulk = bulk_weights(nodes, weights, upper=3.0)
    >>> bulk.quadrature_weights.values, float(bulk.outlier_mass)
    (array([[0.375, 0.625, 0.   ]]), 0.2)
    """
    edges = {name: _labelled(name, edge) for name, edge in (("lower", lower), ("upper", upper))}
    arrays = _require_rule({"nodes": nodes, "weights": weights, **edges})
    bulk, mass = apply_kernel(
        bulk_weights_kernel,
        list(arrays.values()),
        [RULE, RULE, (), ()],
        output_dims=[RULE, ()],
        output_sizes={dim: nodes.sizes[dim] for dim in RULE},
        output_dtypes=[np.dtype(np.float64)] * 2,
    )
    return xr.Dataset(
        {
            "quadrature_weights": declared(bulk, "quadrature_weights"),
            "outlier_mass": declared(mass, "outlier_mass"),
        }
    )


def _points(points: ArrayLike) -> FloatArray:
    given = np.asarray(points)
    if given.dtype.kind not in "iuf":
        raise TypeError(f"expected points as real numbers, came dtype {given.dtype}")
    at = given.astype(np.float64)
    if at.ndim != 1 or not at.size or not np.isfinite(at).all():
        raise ValueError(
            f"expected points as a list of finite numbers, at least one, came shape {at.shape}; for example "
            "np.linspace(float(nodes.min()), float(nodes.max()), 500)"
        )
    return at


def _labelled(name: str, value: float | xr.DataArray) -> xr.DataArray:
    return value if isinstance(value, xr.DataArray) else xr.DataArray(real_number(name, value))


def _require_rule(arrays: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    for name, array in arrays.items():
        require_real(name, array)
        if name in ("nodes", "weights"):
            missing = [dim for dim in RULE if dim not in array.dims]
            if missing or 0 in (array.sizes[dim] for dim in RULE):
                raise ValueError(
                    f"expected dims {list(RULE)} on {name}, of size 1 at least, came {dict(array.sizes)}; "
                    "take quadrature_nodes and quadrature_weights of a density group"
                )
        elif set(RULE) & set(array.dims):
            raise ValueError(f"expected one {name} for a density, came one with dims {array.dims}")
    require_same_labels(arrays)
    return arrays


def _estimate(
    name: str,
    function: Callable[..., object],
    arrays: dict[str, xr.DataArray],
    axis: dict[str, ArrayLike],
    **said: object,
) -> xr.Dataset:
    arrays = _require_rule(arrays)
    (dim, labels), error = next(iter(axis.items())), f"{name}_standard_error"
    for argument, array in arrays.items():
        if dim in array.dims:
            raise ValueError(f"expected no dim {dim!r} on {argument}, came {array.dims}: rename it first")
    results = apply_kernel(
        function,
        list(arrays.values()),
        [RULE, RULE, ()][: len(arrays)],
        output_dims=[(dim,)] * 2,
        output_sizes={dim: np.size(np.asarray(labels))},
        output_dtypes=[np.dtype(np.float64)] * 2,
    )
    found = xr.Dataset({n: declared(a, n, **said) for n, a in zip((name, error), results, strict=True)})
    return found.assign_coords({dim: labels})
