from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import relative_drift
from hild_xr.analysis.trajectories.relative_drift import relative_drift_kernel

NAN = np.nan
LAYER = ["out", "in"]


def weights(seed: int = 0, dtype: str = "float64") -> xr.DataArray:
    values = np.random.default_rng(seed).standard_normal((2, 4, 3, 5)).astype(dtype)
    coords = {"seed": [1, 2], "step": [0, 10, 20, 30]}
    return xr.DataArray(
        values, dims=("seed", "step", "out", "in"), coords=coords, attrs={"vector_dims": LAYER}
    )


@pytest.mark.parametrize("reference", [0, 20])
def test_drift__is_the_ratio_of_frobenius_norms(reference: int) -> None:
    w = weights()
    found = relative_drift(w, reference)
    start = w.sel(step=reference).values[:, None]
    expected = np.linalg.norm(w.values - start, axis=(2, 3)) / np.linalg.norm(start, axis=(2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert (found.sel(step=reference) == 0).all()
    assert found.attrs["reference"] == reference


def test_drift__without_steps_is_zero() -> None:
    w = weights().isel(step=[0, 0, 0]).assign_coords(step=[0, 1, 2])
    assert (relative_drift(w, 0) == 0).all()


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-200, -3.0, 1e200]))
def test_drift__does_not_know_scale_and_basis(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    w = weights(seed)
    Q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    turned = (scale * xr.apply_ufunc(lambda a: a @ Q, w)).assign_attrs(w.attrs)
    np.testing.assert_allclose(relative_drift(turned, 0), relative_drift(w, 0), rtol=1e-12, atol=1e-14)


def test_drift__of_small_changes_of_float32_weights_is_that_of_the_numbers() -> None:
    w = weights(dtype="float32").isel(step=[0, 0]).assign_coords(step=[0, 1]).copy()
    w[:, 1, 0, 0] += np.float32(1e-5)
    exact = w.astype(float)
    expected = abs(exact[:, 1] - exact[:, 0]).max(LAYER) / np.sqrt((exact[:, 0] ** 2).sum(LAYER))
    np.testing.assert_allclose(relative_drift(w, 0).sel(step=1), expected, rtol=1e-12)


def test_drift__of_missing_records_and_from_zero_is_unknown() -> None:
    w = weights()
    w[0, 2, 1, 1] = NAN
    w[1, 1] = 0.0
    assert relative_drift(w, 0).isnull().values.tolist() == [[False, False, True, False], [False] * 4]
    assert relative_drift(w, 20).isnull().values.tolist() == [[True] * 4, [False] * 4]
    assert relative_drift(w, 10).isnull().values.tolist() == [[False, False, True, False], [True] * 4]


def test_kernel__broadcasts_the_reference() -> None:
    A = np.random.default_rng(0).standard_normal((4, 3, 2, 5))
    assert relative_drift_kernel(A, A[0], n_axes=2).shape == (4, 3)
    assert np.all(relative_drift_kernel(A, A[0], n_axes=2)[0] == 0)


def test_drift__refuses_bad_arguments() -> None:
    w = weights()
    with pytest.raises(KeyError, match=r"came 5; the labels are \[0, 10, 20, 30\]"):
        relative_drift(w, 5)
    with pytest.raises(ValueError, match="no vector dims"):
        relative_drift(w.drop_attrs(), 0)
    with pytest.raises(ValueError, match="beside the vector dims"):
        relative_drift(w, 0, vector_dims=["step"])
    with pytest.raises(ValueError, match="missing"):
        relative_drift(w, 0, dim="time")
    with pytest.raises(ValueError, match="expected labels along 'step'"):
        relative_drift(w.drop_vars("step"), 0)
    with pytest.raises(ValueError, match="expected one label 0"):
        relative_drift(w.assign_coords(step=[0, 0, 1, 2]), 0)
    with pytest.raises(TypeError, match="complex"):
        relative_drift(w * 1j, 0)


def test_drift__of_matrices_whose_attr_names_one_side_asks_for_both() -> None:
    matrices = weights().rename({"out": "in_"}).assign_attrs(vector_dims=["in"])
    with pytest.raises(ValueError, match=r"pass vector_dims=\['in', 'in_'\]"):
        relative_drift(matrices, 0)
    assert relative_drift(matrices, 0, vector_dims=["in", "in_"]).dims == ("seed", "step")
    assert relative_drift(matrices, 0, vector_dims="in").dims == ("seed", "step", "in_")
