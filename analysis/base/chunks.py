"""Chunks of records for work on all pairs of them: few large blocks in place of many small ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    import xarray as xr

CHUNK_BYTES = 2**27
"""Size up to which chunks of records are united, and of what one pair of united chunks gives."""


def united(array: xr.DataArray, dim: str, core_dims: Collection[str], pair_size: int = 1) -> xr.DataArray:
    """Unite neighbouring chunks of records, before all pairs of chunks become a task each.

    The number of those tasks is the square of the number of chunks: of many small chunks
    the scheduling would cost more than the work.

    Parameters
    ----------
    array
        Records along `dim`, dask-backed or not (then it is returned as it is).
    dim
        Dim of the records.
    core_dims
        Dims of which a task sees all.
    pair_size
        How many numbers a pair of records gives.

    Returns
    -------
    xarray.DataArray
        The array with chunks of at most :data:`CHUNK_BYTES` in float64 (as what a pair of them
        gives), or its own where those are larger: none is cut.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> records = xr.DataArray(np.ones((6, 2)), dims=("step", "in")).chunk(step=2)
    >>> united(records, "step", ["in"]).chunksizes["step"]
    (6,)
    """
    if array.chunks is None or array.size == 0:
        return array
    sizes, beside = array.sizes, [d for d in array.dims if d not in (dim, *core_dims)]
    n_beside = math.prod(max(array.chunksizes[d]) for d in beside)
    n_numbers = CHUNK_BYTES // (8 * n_beside)
    n_records = min(n_numbers // math.prod(sizes[d] for d in core_dims), math.isqrt(n_numbers // pair_size))
    return array.chunk({dim: _merged(array.chunksizes[dim], n_records)})


def _merged(chunks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Unite neighbouring chunks as long as they stay within a size; none is cut."""
    merged = list(chunks[:1])
    for chunk in chunks[1:]:
        if merged[-1] + chunk <= size:
            merged[-1] += chunk
        else:
            merged.append(chunk)
    return tuple(merged)
