from __future__ import annotations

import dask.array
import numpy as np
import pytest
import xarray as xr

from hild_xr.plots.arguments import loaded, named_arrays, require_within


def test_loaded__computes_once_and_leaves_the_lazy_array_lazy() -> None:
    computed = []

    def block(values: np.ndarray) -> np.ndarray:
        computed.append(values.shape)
        return values + 1

    lazy = xr.DataArray(
        dask.array.zeros((2, 3), chunks=-1).map_blocks(block, dtype=float), dims=("seed", "step")
    )
    computed.clear()  # dask has tried the function on an empty block
    found = loaded("loss", lazy, ["step"], spread=True)
    assert (found.values == 1).all()
    assert (found.values == 1).all()
    assert computed == [(2, 3)]
    assert lazy.chunks is not None
    assert found.chunks is None


def test_loaded__puts_the_dims_asked_for_last() -> None:
    array = xr.DataArray(np.zeros((2, 3, 4), dtype=np.int16), dims=("eig", "seed", "step"))
    found = loaded("eigenvalues", array, ["step", "eig"], spread=True)
    assert found.dims == ("seed", "step", "eig")
    assert found.dtype == np.float64


def test_loaded__says_which_dims_are_missing_or_too_many() -> None:
    array = xr.DataArray(np.zeros((2, 3)), dims=("seed", "step"))
    with pytest.raises(ValueError, match=r"\['eig'\] missing"):
        loaded("overlap", array, ["step", "eig"])
    with pytest.raises(ValueError, match=r"\.isel\(seed=0\)"):
        loaded("overlap", array, ["step"])


def test_loaded__refuses_other_types() -> None:
    with pytest.raises(TypeError, match=r"expected overlap as xarray\.DataArray, came ndarray"):
        loaded("overlap", np.zeros(3), ["step"])
    with pytest.raises(TypeError, match="real numbers as overlap, came dtype complex128"):
        loaded("overlap", xr.DataArray([1j], dims="step"), ["step"])


def test_named_arrays__keeps_order_and_drops_the_label() -> None:
    array = xr.DataArray(np.eye(2), dims=("subspace", "step"), coords={"subspace": ["b", "a"]})
    found = named_arrays("alignments", array, "subspace")
    assert list(found) == ["b", "a"]
    assert found["a"].values.tolist() == [0.0, 1.0]
    assert "subspace" not in found["a"].coords


def test_named_arrays__refuses_nothing_and_nameless_arrays() -> None:
    with pytest.raises(ValueError, match="at least one array"):
        named_arrays("alignments", {}, "subspace")
    with pytest.raises(ValueError, match="the dim 'subspace' that names them"):
        named_arrays("alignments", xr.DataArray([1.0], dims="step"), "subspace")


def test_require_within__lets_rounding_and_nan_pass_and_nothing_else() -> None:
    require_within("overlap", np.array([0.0, 1.0 + 1e-9, np.nan]), 0, 1)
    with pytest.raises(ValueError, match=r"overlap between 0 and 1, came 1\.01"):
        require_within("overlap", np.array([0.5, 1.01]), 0, 1)
    with pytest.raises(ValueError, match=r"came -0\.1"):
        require_within("overlap", np.array([-0.1]), 0, 1)
