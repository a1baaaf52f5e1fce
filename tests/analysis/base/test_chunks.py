from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.base import chunks
from hild_xr.analysis.base.chunks import united


def records(*sizes: int) -> xr.DataArray:
    """Records of two runs with twelve numbers each: 96 bytes a record of a run, whatever the dtype."""
    return xr.DataArray(np.zeros((2, sum(sizes), 12), dtype="f4"), dims=("seed", "step", "in")).chunk(
        {"seed": 1, "step": sizes, "in": 2}
    )


@pytest.mark.parametrize(
    ("n_records", "expected"), [(0, (1, 1, 1, 4, 1)), (2, (2, 1, 4, 1)), (3, (3, 4, 1)), (8, (8,))]
)
def test_united__up_to_a_size_and_cuts_none(
    n_records: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 96 * n_records)
    assert united(records(1, 1, 1, 4, 1), "step", ["in"]).chunksizes["step"] == expected


def test_united__counts_what_pairs_give_and_all_that_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    array = records(*[1] * 8)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 4**2 * 5)  # five numbers for each of 4 x 4 pairs
    assert united(array, "step", ["in"], pair_size=5).chunksizes["step"] == (4, 4)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 96 * 4)
    assert united(array, "step", ["in"]).chunksizes["step"] == (4, 4)
    assert united(array.chunk(seed=2), "step", ["in"]).chunksizes["step"] == (2, 2, 2, 2)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), limit=st.integers(0, 40))
def test_united__keeps_the_records_and_leaves_no_two_that_fit(sizes: list[int], limit: int) -> None:
    found = chunks._merged(tuple(sizes), limit)
    assert sum(found) == sum(sizes)
    assert set(np.cumsum(found)) <= set(np.cumsum(sizes))
    assert all(size <= max(limit, *sizes) for size in found)
    assert all(a + b > limit for a, b in itertools.pairwise(found))


def test_united__leaves_arrays_in_memory_and_without_records_alone() -> None:
    array = records(2, 2)
    assert united(array.compute(), "step", ["in"]).chunks is None
    none = array.isel(step=slice(0))
    assert united(none, "step", ["in"]) is none
