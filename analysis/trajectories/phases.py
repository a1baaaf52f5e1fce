r"""Phases of the loss landscape: sharp or flat, connected or not, alike or not.

Y. Yang, L. Hodgkinson, R. Theisen, J. Zou, J. E. Gonzalez, K. Ramchandran and M. W. Mahoney,
"Taxonomizing local versus global structure in neural network loss landscapes", NeurIPS 2021,
arXiv:2107.11228. Of two runs of a configuration one asks three things: whether their minima are
sharp (largest eigenvalue or trace of the Hessian), whether a path of low loss leads from one to the
other (mode connectivity), and whether they compute the same (CKA of their outputs).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hild_xr.analysis.base.arguments import apply_kernel, declared, require_real, require_same_labels

if TYPE_CHECKING:
    import xarray as xr

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

PHASES = ("I", "II", "III", "IV-A", "IV-B")
"""Names of the phases 1 to 5."""


def landscape_phase_kernel(
    sharpness: FloatArray,
    mode_connectivity: FloatArray,
    similarity: FloatArray,
    *,
    sharp_above: float,
    barrier_below: float,
    similar_above: float,
) -> IntArray:
    """Phase 1 to 5 of each landscape, -1 where one of the numbers is missing.

    Parameters
    ----------
    sharpness, mode_connectivity, similarity
        Arrays that broadcast.
    sharp_above, barrier_below, similar_above
        Thresholds.

    Returns
    -------
    phase
        int64 array.

    Examples
    --------
    >>> options = {"sharp_above": 10.0, "barrier_below": -0.1, "similar_above": 0.9}
    >>> landscape_phase_kernel(np.array([50.0, 1.0]), np.array([-1.0, 0.0]), np.array([0.5, 0.95]), **options)
    array([1, 5])
    """
    sharp, barrier = sharpness > sharp_above, mode_connectivity < barrier_below
    connected_and_flat = np.where(similarity > similar_above, 5, 4)
    phase = np.where(sharp, np.where(barrier, 1, 2), np.where(barrier, 3, connected_and_flat))
    known = np.isfinite(sharpness) & np.isfinite(mode_connectivity) & np.isfinite(similarity)
    return np.where(known, phase, -1).astype(np.int64)


def landscape_phase(
    sharpness: xr.DataArray,
    mode_connectivity: xr.DataArray,
    similarity: xr.DataArray,
    *,
    sharp_above: float,
    barrier_below: float,
    similar_above: float,
) -> xr.DataArray:
    r"""Phase of the loss landscape by thresholds (arXiv:2107.11228).

    ===== ====== ========= ============ ===========================
    value phase  minima    connectivity outputs
    ===== ====== ========= ============ ===========================
    1     I      sharp     barrier
    2     II     sharp     no barrier
    3     III    flat      barrier
    4     IV-A   flat      no barrier   differ
    5     IV-B   flat      no barrier   alike
    ===== ====== ========= ============ ===========================

    The phases are a vocabulary, not a law: thresholds depend on the problem, and go into the attributes
    of the result.

    Parameters
    ----------
    sharpness
        Largest eigenvalue or trace of the Hessian, of one run or averaged over both.
    mode_connectivity
        mc of two runs, below zero where a barrier of loss stands between them, above where training
        has not come to its end; see ``hild_xr.recorders.landscape.mode_connectivity``.
    similarity
        CKA of the outputs of the two runs in [0, 1]; see :func:`hild_xr.analysis.cka`.
    sharp_above
        Minima of a larger sharpness are sharp.
    barrier_below
        A smaller mc is a barrier; 0 or a little less.
    similar_above
        Outputs of a larger similarity are alike.

    Returns
    -------
    xarray.DataArray
        Integers 1 to 5, -1 where a number is missing; named in the attr ``flag_meanings``.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If labels differ along a shared dim, or a threshold is no finite number.

    Examples
    --------
    >>> import xarray as xr
    >>> numbers = [40.0, 2.0], [-0.8, 0.0], [0.4, 0.97]
    >>> sharpness, mc, cka = (xr.DataArray(x, dims="temperature") for x in numbers)
    >>> phase = landscape_phase(sharpness, mc, cka, sharp_above=10, barrier_below=-0.1, similar_above=0.9)
    >>> [phase.attrs["flag_meanings"].split()[value - 1] for value in phase.values]
    ['I', 'IV-B']
    """
    arrays = {"sharpness": sharpness, "mode_connectivity": mode_connectivity, "similarity": similarity}
    for name, array in arrays.items():
        require_real(name, array)
    require_same_labels(arrays)
    thresholds: dict[str, Any] = {
        "sharp_above": float(sharp_above),
        "barrier_below": float(barrier_below),
        "similar_above": float(similar_above),
    }
    for name, threshold in thresholds.items():
        if not math.isfinite(threshold):
            raise ValueError(f"{name} is a threshold: expected a finite number, got {threshold}")
    kernel = functools.partial(landscape_phase_kernel, **thresholds)
    result = apply_kernel(kernel, list(arrays.values()), [(), (), ()], output_dtypes=[np.dtype(np.int64)])
    values, meanings = list(range(1, len(PHASES) + 1)), " ".join(PHASES)
    return declared(result, "landscape_phase", flag_values=values, flag_meanings=meanings, **thresholds)
