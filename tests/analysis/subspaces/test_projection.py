from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import alignment, projection, updates
from hild_xr.analysis.subspaces.projection import projection_kernel

LAYER = {"vector_dims": ["out", "in"], "number_dim": "eig"}


def run(seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Gradients (seed, step, out, in) and eigenvectors (seed, step, eig, out, in) of a layer."""
    rng = np.random.default_rng(seed)
    coords = {"seed": [0, 1], "step": [0, 5, 9]}
    gradient = xr.DataArray(
        rng.standard_normal((2, 3, 4, 5)),
        dims=("seed", "step", "out", "in"),
        coords={**coords, "out": list("abcd")},
        attrs={"vector_dims": ["out", "in"], "units": "1"},
    )
    rows = np.swapaxes(np.linalg.qr(rng.standard_normal((2, 3, 20, 3)))[0], -1, -2).reshape(2, 3, 3, 4, 5)
    dims = ("seed", "step", "eig", "out", "in")
    return gradient, xr.DataArray(rows, dims=dims, coords={**coords, "out": list("abcd")}, attrs=LAYER)


# ---------------------------------------------------------------------------- kernel


@settings(max_examples=60)
@given(seed=st.integers(0, 999), p=st.integers(1, 12), k=st.integers(1, 6))
def test_projection_kernel__is_the_least_squares_fit_and_its_residual(seed: int, p: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    v, B = rng.standard_normal((3, p)), rng.standard_normal((3, p, k))
    dominant, bulk, chi, f_top = projection_kernel(v, B)
    for i in range(3):
        fitted = B[i] @ np.linalg.lstsq(B[i], v[i], rcond=None)[0]
        np.testing.assert_allclose(dominant[i], fitted, rtol=0, atol=1e-9)
        ratio = np.linalg.norm(fitted) / np.linalg.norm(v[i])
        np.testing.assert_allclose([chi[i], f_top[i]], [ratio, ratio**2], rtol=0, atol=1e-9)
    np.testing.assert_allclose(dominant + bulk, v, rtol=0, atol=1e-14)


def test_projection_kernel__random_vectors_are_dominant_to_k_of_p() -> None:
    # science.md C2: E f_top = k / p; f_top is Beta(k/2, (p-k)/2)
    p, k, n = 30, 3, 20_000
    rng = np.random.default_rng(0)
    *_, f_top = projection_kernel(rng.standard_normal((n, p)), rng.standard_normal((p, k)))
    a, b = k / 2, (p - k) / 2
    error = np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1) * n))
    assert abs(f_top.mean() - k / p) < 4 * error


def test_projection_kernel__gradient_descent_near_the_edge_ends_in_the_dominant_direction() -> None:
    # science.md C2: H = diag(1, 0.5) and learning rate 1.9 have the factors -0.9 and 0.05
    H = np.diag([1.0, 0.5])
    theta, chis = np.array([1e-3, 1.0]), []
    for _ in range(20):
        gradient = H @ theta
        chis.append(float(projection_kernel(gradient, np.eye(2)[:, :1])[2]))
        theta = theta - 1.9 * gradient
    assert chis[0] == pytest.approx(1e-3 / np.hypot(1e-3, 0.5), rel=1e-12)
    expected = 0.9**19 * 1e-3 / np.hypot(0.9**19 * 1e-3, 0.5 * 0.05**19)
    assert chis[-1] == pytest.approx(expected, rel=1e-12)
    assert chis[-1] == pytest.approx(1, abs=1e-12)


def test_projection_kernel__a_tiny_bulk_part_is_orthogonal_to_the_subspace() -> None:
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((1000, 6)))[0]
    inside, outside = Q[:, :5] @ rng.standard_normal(5), 1e-10 * Q[:, 5]
    _, bulk, _, _ = projection_kernel(inside + outside, Q[:, :5])
    np.testing.assert_allclose(bulk, outside, rtol=0, atol=1e-15)
    # one projection would leave rounding of the size of the vector: 1e-6 of the bulk part
    assert np.abs(Q[:, :5].T @ bulk).max() < 1e-14 * np.linalg.norm(bulk)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_projection_kernel__of_vectors_of_any_length(scale: float) -> None:
    dominant, bulk, chi, f_top = projection_kernel(scale * np.array([0.3, 0.4]), np.array([[2.0], [0.0]]))
    np.testing.assert_allclose(dominant, [0.3 * scale, 0], rtol=1e-14)
    np.testing.assert_allclose(bulk, [0, 0.4 * scale], rtol=1e-14)
    np.testing.assert_allclose([chi, f_top], [0.6, 0.36], rtol=1e-14)


def test_projection_kernel__marks_what_is_missing_or_undefined() -> None:
    v = np.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [3.0, 4.0]])
    dominant, bulk, chi, f_top = projection_kernel(v, np.eye(2)[:, :1])
    np.testing.assert_array_equal(np.isnan(dominant).all(axis=1), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(bulk).all(axis=1), [False, True, True, False])
    np.testing.assert_array_equal(dominant[0], 0)
    np.testing.assert_allclose(chi, [np.nan, np.nan, np.nan, 0.6])
    np.testing.assert_allclose(f_top, [np.nan, np.nan, np.nan, 0.36])
    for part in projection_kernel(v[3], np.array([[np.nan], [1.0]])):
        assert np.isnan(part).all()


def test_projection_kernel__dependent_columns_count_once() -> None:
    rng = np.random.default_rng(0)
    v, B = rng.standard_normal(9), rng.standard_normal((9, 2))
    twice = np.concatenate([B, B @ [[1.0], [2.0]]], axis=1)
    for found, expected in zip(projection_kernel(v, twice), projection_kernel(v, B), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------- labelled


def test_projection__record_by_record_on_the_dims_of_the_layer() -> None:
    gradient, vectors = run()
    found = projection(gradient, vectors)
    assert set(found) == {"dominant", "bulk", "chi", "f_top"}
    assert found["dominant"].dims == ("seed", "step", "out", "in")
    assert found["chi"].dims == ("seed", "step")
    assert found["out"].values.tolist() == list("abcd")
    assert found["bulk"].attrs["vector_dims"] == ["out", "in"]
    for seed, step in itertools.product([0, 1], [0, 5, 9]):
        v, B = gradient.sel(seed=seed, step=step), vectors.sel(seed=seed, step=step)
        expected = xr.dot(B, xr.dot(B, v, dim=["out", "in"]), dim="eig")
        np.testing.assert_allclose(found["dominant"].sel(seed=seed, step=step), expected, atol=1e-14)
    xr.testing.assert_allclose((found["dominant"] + found["bulk"]).drop_attrs(), gradient.drop_attrs())
    xr.testing.assert_allclose(found["chi"].drop_attrs(), alignment(gradient, vectors).drop_attrs())
    xr.testing.assert_allclose(found["f_top"].drop_attrs(), (found["chi"] ** 2).drop_attrs())


def test_projection__parts_are_vectors_again() -> None:
    gradient, vectors = run()
    parts = projection(gradient, vectors)
    again = projection(parts["dominant"], vectors)
    np.testing.assert_allclose(again["chi"], 1, atol=1e-14)
    np.testing.assert_allclose(projection(parts["bulk"], vectors)["chi"], 0, atol=1e-14)


def test_projection__does_not_depend_on_the_basis_of_the_subspace() -> None:
    gradient, vectors = run()
    mix = xr.DataArray([[1.0, 0.2, 0.0], [0.0, -2.0, 0.3], [0.5, 0.0, 1.0]], dims=("other", "eig"))
    mixed = xr.dot(mix, vectors, dim="eig").rename(other="eig").assign_attrs(LAYER)
    xr.testing.assert_allclose(projection(gradient, mixed), projection(gradient, vectors), atol=1e-13)


def test_projection__broadcasts_a_fixed_subspace() -> None:
    gradient, vectors = run()
    first = vectors.isel(step=0, drop=True)
    found = projection(gradient, first)
    assert found["dominant"].dims == ("seed", "step", "out", "in")
    expected = projection(gradient.sel(step=0), vectors.sel(step=0))
    xr.testing.assert_allclose(found.sel(step=0), expected)


def test_projection__refuses_different_cadences_and_layers() -> None:
    gradient, vectors = run()
    with pytest.raises(ValueError, match=r"vector and basis differ along dim 'step': 3 labels .* 2 labels"):
        projection(gradient, vectors.isel(step=[0, 2]))
    layered = [a.expand_dims(layer=names) for a, names in ((gradient, ["a", "b"]), (vectors, ["a", "c"]))]
    with pytest.raises(ValueError, match="differ along dim 'layer'"):
        projection(*layered, vector_dims=["out", "in"], number_dim="eig")


@pytest.mark.parametrize("which", ["vector", "basis"])
def test_projection__refuses_complex_numbers(which: str) -> None:
    arrays: dict[str, Any] = dict(zip(("vector", "basis"), run(), strict=True))
    arrays[which] = arrays[which] * 1j
    with pytest.raises(TypeError, match=f"expected real numbers in {which}, came dtype complex128"):
        projection(**arrays)


def test_updates__are_differences_labelled_by_the_later_step() -> None:
    weight, vectors = run()
    found = updates(weight)
    assert found.dims == weight.dims
    assert found["step"].values.tolist() == [5, 9]
    np.testing.assert_array_equal(found.sel(step=9), weight.sel(step=9).values - weight.sel(step=5).values)
    assert found.attrs["vector_dims"] == ["out", "in"]
    assert projection(found, vectors.sel(step=found["step"]))["chi"].shape == (2, 2)


def test_updates__do_not_reach_across_a_missing_record() -> None:
    weight, _ = run()
    weight[{"seed": 1, "step": 1}] = np.nan
    missing = updates(weight).isnull()
    assert bool(missing.sel(seed=1).all())
    assert not bool(missing.sel(seed=0).any())


def test_updates__of_float32_weights_are_exact() -> None:
    weight = xr.DataArray(np.array([1.0, 1.0 + 2.0**-23, 3e-9], dtype=np.float32), dims="step")
    found = updates(weight)
    assert found.dtype == np.float64
    assert found.values.tolist() == [2.0**-23, float(np.float32(3e-9)) - (1.0 + 2.0**-23)]


def test_updates__refuses_steps_out_of_order() -> None:
    weight, _ = run()
    with pytest.raises(ValueError, match="came 5 after 9"):
        updates(weight.isel(step=[0, 2, 1]))
    with pytest.raises(ValueError, match=r"several for \[5\]"):
        updates(weight.isel(step=[0, 1, 1]))
