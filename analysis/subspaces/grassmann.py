r"""Distances between subspaces from their principal angles.

Subspaces of one dimension are the points of a Grassmann manifold, and every
distance between them that does not depend on the choice of axes is a function
of the principal angles :math:`\theta_1 \le \dots \le \theta_k`. Names and
formulas follow K. Ye and L.-H. Lim, SIAM J. Matrix Anal. Appl. 37 (2016) 1176,
which also treats subspaces of different dimensions; A. Edelman, T. A. Arias and
S. T. Smith, SIAM J. Matrix Anal. Appl. 20 (1998) 303 call the three "arc
length", "projection F-norm" and "projection 2-norm".
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import FLOAT, apply_kernel, declared, require_real
from hild_xr.variables import DIM_ANGLE

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

RESULTS = ("geodesic_distance", "chordal_distance", "projection_distance")


# ---------------------------------------------------------------------------- kernel


def grassmann_distances_kernel(
    angles: FloatArray, *, dimension_difference: int = 0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Geodesic, chordal and projection distance for stacked angles; see :func:`grassmann_distances`.

    Parameters
    ----------
    angles
        Array of shape (..., k) in rad, in any order.
    dimension_difference
        Number of angles of pi/2 to add.

    Returns
    -------
    geodesic, chordal, projection
        float64 arrays of shape (...); NaN where an angle is NaN.

    Examples
    --------
    >>> [float(d.round(4)) for d in grassmann_distances_kernel(np.array([0.0, np.pi / 2]))]
    [1.5708, 1.0, 1.0]
    """
    angles = np.asarray(angles, dtype=np.float64)
    sines = np.sin(angles)
    geodesic = np.sqrt(np.square(angles).sum(axis=-1) + dimension_difference * (np.pi / 2) ** 2)
    chordal = np.sqrt(np.square(sines).sum(axis=-1) + dimension_difference)
    projection = sines.max(axis=-1)
    if dimension_difference:
        projection = np.where(np.isnan(projection), np.nan, 1.0)
    return geodesic, chordal, projection


# ---------------------------------------------------------------------------- labelled


def grassmann_distances(angles: xr.DataArray, *, dimension_difference: int = 0) -> xr.Dataset:
    r"""Distances between subspaces: geodesic, chordal and projection.

    ===================  ===============================================  ==================================
    result               formula                                          the same as
    ===================  ===============================================  ==================================
    geodesic_distance    :math:`(\sum_i \theta_i^2)^{1/2}`                length of the shortest path
    chordal_distance     :math:`(\sum_i \sin^2 \theta_i)^{1/2}`           :math:`\|P_U - P_V\|_F / \sqrt 2`
    projection_distance  :math:`\max_i \sin \theta_i`                     :math:`\|P_U - P_V\|_2`
    ===================  ===============================================  ==================================

    The identities of the last column are those for subspaces of one dimension.
    For dimensions :math:`k_1 \ne k_2` there are :math:`\min(k_1, k_2)` angles, and
    the formulas give the distance of the smaller subspace to the nearest one
    within the larger: zero if it lies in it, hence no metric. With
    ``dimension_difference`` :math:`|k_1 - k_2|` as many angles of
    :math:`\pi/2` are added, and the three are metrics between subspaces of all
    dimensions (Ye and Lim 2016, section 5).

    Parameters
    ----------
    angles
        Principal angles in rad along a dim ``angle``, from
        :func:`hild_xr.analysis.principal_angles`, ``pairwise_angles``,
        ``consecutive_angles`` or ``angles_to_reference``.
    dimension_difference
        Number of angles of pi/2 to add; 0 for subspaces of one dimension.

    Returns
    -------
    xarray.Dataset
        The three distances on the other dims; NaN where an angle is NaN. The
        geodesic distance is in rad.

    Raises
    ------
    TypeError
        If the angles are no DataArray or not real.
    ValueError
        If there is no dim ``angle`` or no angle, or if dimension_difference is
        negative.

    See Also
    --------
    hild_xr.analysis.subspace_overlap : mean squared cosine.

    Examples
    --------
    >>> angles = xr.DataArray([0.0, np.pi / 6], dims="angle")
    >>> distances = grassmann_distances(angles)
    >>> float(distances["chordal_distance"].round(12)), float(distances["geodesic_distance"].round(4))
    (0.5, 0.5236)
    """
    if DIM_ANGLE not in require_real("angles", angles).dims:
        raise ValueError(
            f"expected principal angles along a dim {DIM_ANGLE!r}, came {angles.dims}; bases go to "
            f"principal_angles(u, v) first"
        )
    if angles.sizes[DIM_ANGLE] == 0:
        raise ValueError(f"expected at least one angle along dim {DIM_ANGLE!r}, came none")
    if dimension_difference < 0:
        raise ValueError(
            f"expected dimension_difference |k1 - k2| of at least 0, came {dimension_difference}; "
            f"pass abs(k1 - k2)"
        )
    kernel = functools.partial(grassmann_distances_kernel, dimension_difference=dimension_difference)
    results = apply_kernel(kernel, [angles], [(DIM_ANGLE,)], output_dims=[()] * 3, output_dtypes=[FLOAT] * 3)
    return xr.Dataset({name: declared(result, name) for name, result in zip(RESULTS, results, strict=True)})
