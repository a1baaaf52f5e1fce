r"""Intensive principal component analysis: an embedding that keeps distances exactly.

Distances :math:`D_{ij}` that need not be Euclidean, such as the Bhattacharyya distance, are
centred doubly, :math:`W = -L D L / 2` with :math:`L = I - 1 1^T / m`, and decomposed,
:math:`W = \sum_k e_k v_k v_k^T` with :math:`|e_1| \ge |e_2| \ge \dots`. The coordinates
:math:`x_{ik} = \sqrt{|e_k|}\, v_{ik}` carry a sign each:

.. math:: D_{ij} = \sum_k \mathrm{sign}(e_k) (x_{ik} - x_{jk})^2 .

K. Quinn, C. Clement, F. De Bernardis, M. Niemack, J. Sethna (2019), arXiv:1810.02877; for
networks J. Mao and others (2023), arXiv:2305.01604.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import FLOAT, apply_kernel, declared, require_dims, require_real
from hild_xr.analysis.subspaces.bases import finite_matrices
from hild_xr.variables import DIM_COMPONENT, DIM_MODEL

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

ASYMMETRY = 1e-6
"""Largest |D - D^T|, and diagonal of D, by the largest distance."""

# ---------------------------------------------------------------------------- kernel


def inpca_kernel(distances: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    r"""Coordinates, eigenvalues and explained stress of stacked distances.

    Parameters
    ----------
    distances
        Array of shape (..., m, m), symmetric with zero diagonal.

    Returns
    -------
    coordinates, eigenvalues, stress
        Arrays of shapes (..., m, m) (point, component), (..., m) and (..., m). NaN where
        the distances are not finite, not symmetric, or not zero on the diagonal; the
        stress also where all distances are zero. The sign of a component is fixed by its
        entry of largest size, which is positive.

    Examples
    --------
    >>> coordinates, eigenvalues, stress = inpca_kernel(np.array([[0.0, 4.0], [4.0, 0.0]]))
    >>> coordinates[:, 0].round(9), eigenvalues.round(9), stress.round(9)
    (array([ 1., -1.]), array([2., 0.]), array([1., 1.]))
    """
    D = distances.astype(np.float64)
    finite = finite_matrices(D)
    D = np.where(finite[..., None, None], D, 0.0)
    transposed = np.swapaxes(D, -1, -2)
    diagonal = np.diagonal(D, axis1=-2, axis2=-1)
    allowed = ASYMMETRY * np.abs(D).max(axis=(-2, -1), initial=0.0)
    usable = finite & (np.abs(D - transposed).max(axis=(-2, -1), initial=0.0) <= allowed)
    usable &= np.abs(diagonal).max(axis=-1, initial=0.0) <= allowed
    D = (D + transposed) / 2
    W = D - D.mean(axis=-1, keepdims=True)
    W = -(W - W.mean(axis=-2, keepdims=True)) / 2
    e, v = np.linalg.eigh(W)
    order = np.argsort(-np.abs(e), axis=-1, kind="stable")
    e = np.take_along_axis(e, order, axis=-1)
    v = np.take_along_axis(v, order[..., None, :], axis=-1)
    largest = np.take_along_axis(v, np.abs(v).argmax(axis=-2)[..., None, :], axis=-2)
    coordinates = v * np.sqrt(np.abs(e))[..., None, :] * np.where(largest < 0, -1.0, 1.0)
    stress = _explained_stress(e)
    return (
        np.where(usable[..., None, None], coordinates, np.nan),
        np.where(usable[..., None], e, np.nan),
        np.where(usable[..., None], stress, np.nan),
    )


def _explained_stress(e: FloatArray) -> FloatArray:
    r"""Return :math:`1 - \sqrt{1 - \sum_{j \le k} e_j^2 / \sum_j e_j^2}`, the rest summed from its end."""
    largest = np.abs(e).max(axis=-1, keepdims=True, initial=0.0)
    squares = np.divide(e, largest, out=np.zeros_like(e), where=largest > 0) ** 2
    from_here = np.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    rest = np.concatenate([from_here[..., 1:], np.zeros_like(from_here[..., :1])], axis=-1)
    total = from_here[..., :1]
    part: FloatArray = np.divide(rest, total, out=np.full_like(rest, np.nan), where=total > 0)
    return 1 - np.sqrt(part)


# ---------------------------------------------------------------------------- labelled


def inpca(distances: xr.DataArray, *, dim: str = DIM_MODEL, n_components: int | None = None) -> xr.Dataset:
    r"""Embed points by their distances, with signed coordinates that reproduce them exactly.

    Every component depends on all distances: the matrix over `dim` is one block, which has
    to fit in memory. Lazy on dask-backed distances.

    Parameters
    ----------
    distances
        Symmetric array with dims (..., `dim`, `dim` + "\_"), for example of
        :func:`~hild_xr.analysis.features.pairwise_bhattacharyya` over ``("seed", "step")``.
        Distances as they are, not squared.
    dim
        Dim of the points.
    n_components
        Number of components to return; all by default.

    Returns
    -------
    xarray.Dataset
        ``inpca_coordinates``
            On (..., `dim`, component). The distance of two points is the sum of
            sign(eigenvalue) times the squared difference of coordinates.
        ``inpca_eigenvalues``
            On (..., component), by decreasing size; negative ones are timelike.
        ``explained_stress``
            :math:`1 - \sqrt{1 - \sum_{j \le k} e_j^2 / \|W\|_F^2}`, on (..., component).

        NaN where a distance is missing or infinite, or the matrix is not symmetric with
        zero diagonal.

    Raises
    ------
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If dims are missing or differ in size or labels, or there are not so many components.

    Examples
    --------
    >>> points = xr.DataArray([0.0, 3.0, 4.0], dims="model")
    >>> found = inpca((points - points.rename(model="model_")) ** 2)
    >>> found.inpca_coordinates.isel(component=0).diff("model").values.round(9)
    array([-3., -1.])
    >>> float(found.explained_stress[0].round(6))
    1.0
    """
    lagged = f"{dim}_"
    require_dims("distances", require_real("distances", distances), (dim, lagged), "dim")
    m = distances.sizes[dim]
    same = m == distances.sizes[lagged]
    if dim in distances.indexes and lagged in distances.indexes:
        same = same and bool(np.array_equal(distances.indexes[dim], distances.indexes[lagged]))
    if not same or m == 0:
        raise ValueError(
            f"expected the same points along {dim!r} and {lagged!r}, came sizes {m} and "
            f"{distances.sizes[lagged]} or other labels: embed distances of one set of points to itself"
        )
    if n_components is not None and not 1 <= n_components <= m:
        raise ValueError(f"expected 1 <= n_components <= {m}, the number of points, came {n_components}")
    coordinates, eigenvalues, stress = apply_kernel(
        inpca_kernel,
        [distances],
        [(dim, lagged)],
        output_dims=[(dim, DIM_COMPONENT), (DIM_COMPONENT,), (DIM_COMPONENT,)],
        output_sizes={dim: m, DIM_COMPONENT: m},
        output_dtypes=[FLOAT] * 3,
    )
    kept = {c: v for c, v in distances.coords.items() if v.dims == (dim,)}
    results = {
        "inpca_coordinates": coordinates.assign_coords(kept),
        "inpca_eigenvalues": eigenvalues,
        "explained_stress": stress,
    }
    found = xr.Dataset({name: declared(a, name) for name, a in results.items()})
    return found.isel({DIM_COMPONENT: slice(n_components)})
