from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import cka, conjugate_kernel, kernel_alignment, relative_drift, spike_alignment
from hild_xr.analysis.features.kernels import cka_kernel, kernel_alignment_kernel, spike_alignment_kernel

NAN = np.nan


def activations(seed: int = 0, shape: tuple[int, ...] = (2, 3, 12, 5)) -> xr.DataArray:
    values = np.random.default_rng(seed).standard_normal(shape) + 1.0
    dims = ("seed", "step", "sample", "unit")[-len(shape) :]
    return xr.DataArray(values, dims=dims)


def kernels(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("step", "sample", "sample_")[-values.ndim :])


def rotation(n: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def test_conjugate_kernel__is_the_product_of_activations_by_the_width() -> None:
    acts = activations().assign_coords(sample=np.arange(12) * 10)
    found = conjugate_kernel(acts)
    assert found.dims == ("seed", "step", "sample", "sample_")
    assert found["sample_"].values.tolist() == found["sample"].values.tolist() == list(range(0, 120, 10))
    expected = np.einsum("...ah,...bh->...ab", acts.values, acts.values) / 5
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert "sample_" not in conjugate_kernel(activations()).coords


def test_conjugate_kernel__of_a_relu_layer_is_that_of_its_weights() -> None:
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((9, 4)), rng.standard_normal((6, 4))
    phi = xr.DataArray(np.maximum(X @ W.T, 0), dims=("sample", "unit"))
    np.testing.assert_allclose(conjugate_kernel(phi), np.maximum(X @ W.T, 0) @ np.maximum(W @ X.T, 0) / 6)


def test_conjugate_kernel__drifts_as_its_norm_says_and_not_without_steps() -> None:
    acts = activations().assign_coords(step=[0, 5, 9])
    K = conjugate_kernel(acts)
    found = relative_drift(K, 0)
    norms = np.linalg.norm(K.values - K.values[:, :1], axis=(2, 3)) / np.linalg.norm(
        K.values[:, :1], axis=(2, 3)
    )
    np.testing.assert_allclose(found, norms, rtol=1e-12)
    assert (found.sel(step=0) == 0).all()


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-120, 2.0, 1e120]))
def test_kernel_alignment__is_the_formula_for_one_target(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    phi, y = rng.standard_normal((7, 4)), rng.standard_normal(7)
    K = phi @ phi.T
    expected = y @ K @ y / (np.linalg.norm(K) * (y @ y))
    found = kernel_alignment(kernels(scale * K), xr.DataArray(-y / scale, dims="sample"))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    Q = rotation(7, seed)
    assert float(kernel_alignment_kernel(Q @ K @ Q.T, (Q @ y)[:, None])) == pytest.approx(expected, rel=1e-10)


def test_kernel_alignment__of_classes_is_the_cosine_with_their_kernel() -> None:
    labels = np.eye(3)[[0, 1, 2, 0, 1, 0]]
    Y = xr.DataArray(labels, dims=("sample", "class_"))
    K = np.random.default_rng(0).standard_normal((6, 6))
    K = K @ K.T
    ideal = labels @ labels.T
    expected = np.sum(K * ideal) / np.linalg.norm(K) / np.linalg.norm(ideal)
    assert float(kernel_alignment(kernels(K), Y, target_dim="class_")) == pytest.approx(expected, rel=1e-13)
    assert float(kernel_alignment(kernels(5 * ideal), Y, target_dim="class_")) == pytest.approx(
        1.0, rel=1e-14
    )
    y = Y.isel(class_=0)
    alone = kernel_alignment(kernels(K), y.expand_dims("class_"), target_dim="class_")
    assert float(kernel_alignment(kernels(K), y)) == pytest.approx(float(alone), rel=1e-14)


def test_kernel_alignment__of_missing_and_zero_kernels_is_unknown() -> None:
    K = np.stack([np.eye(4)] * 3)
    K[1, 2, 2] = NAN
    K[2] = 0.0
    found = kernel_alignment(kernels(K), xr.DataArray(np.ones(4), dims="sample"))
    np.testing.assert_allclose(found, [0.5, NAN, NAN])
    assert kernel_alignment(kernels(K), xr.DataArray(np.zeros(4), dims="sample")).isnull().all()


def by_centring_matrix(A: np.ndarray, B: np.ndarray) -> float:
    """CKA by its definition with the Hilbert-Schmidt independence criterion."""
    H = np.eye(len(A)) - 1 / len(A)
    K, L = H @ A @ A.T @ H, H @ B @ B.T @ H
    return float(np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L)))


@pytest.mark.parametrize(("n", "h", "g"), [(30, 4, 6), (6, 30, 20), (10, 4, 40), (10, 10, 10)])
def test_cka__is_that_of_the_definition(n: int, h: int, g: int) -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((n, h)) + 3
    B = A[:, :2] @ rng.standard_normal((2, g)) + rng.standard_normal((n, g))
    found = cka(*(xr.DataArray(x, dims=("sample", "unit")) for x in (A, B)))
    assert float(found) == pytest.approx(by_centring_matrix(A, B), rel=1e-10)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-100, -3.0, 1e100]),
    n_units=st.sampled_from([3, 12]),
)
def test_cka__does_not_change_under_rotation_scale_shift_and_exchange(
    seed: int, scale: float, n_units: int
) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((8, n_units)), rng.standard_normal((8, 4))
    expected = float(cka_kernel(A, B))
    turned = scale * (A @ rotation(n_units, seed) + rng.standard_normal(n_units) / 3)
    assert float(cka_kernel(turned, B)) == pytest.approx(expected, rel=1e-9)
    assert float(cka_kernel(B, A)) == pytest.approx(expected, rel=1e-12)
    assert float(cka_kernel(A, turned)) == pytest.approx(1.0, abs=1e-12)
    order = rng.permutation(8)
    assert float(cka_kernel(A[order], B[order])) == pytest.approx(expected, rel=1e-11)


def test_cka__of_identical_runs_is_one_and_of_independent_features_small() -> None:
    acts = activations()
    np.testing.assert_allclose(cka(acts, acts), 1.0, rtol=1e-13)
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 5000, 4))
    assert float(cka_kernel(A, B)) < 0.005


def test_cka__compares_all_steps_with_one() -> None:
    acts = activations().assign_coords(step=[0, 5, 9], unit=list("abcde"))
    found = cka(acts, acts.sel(step=0, drop=True).isel(unit=slice(3)))
    assert found.dims == ("seed", "step")
    expected = by_centring_matrix(acts.values[1, 2], acts.values[1, 0, :, :3])
    assert float(found[1, 2]) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cka__of_features_that_do_not_depend_on_the_sample_is_unknown(dtype: str) -> None:
    constant = np.tile(np.array([0.1, 3e3, -0.7], dtype=dtype), (9, 1))
    A = np.random.default_rng(0).standard_normal((9, 3)).astype(dtype)
    assert np.isnan(cka_kernel(constant, A))
    assert np.isnan(cka_kernel(A, 0 * A))
    A[0, 0] = NAN
    assert np.isnan(cka_kernel(A, A))


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-150, 2.0, 1e150]))
def test_spike_alignment__is_that_of_the_leading_singular_vectors(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    W, y = rng.standard_normal((5, 7)), rng.standard_normal(5)
    found = spike_alignment(
        xr.DataArray(scale * W, dims=("out", "in")), xr.DataArray(y, dims="out"), dims=("out", "in"), k=3
    )
    expected = np.abs(np.linalg.svd(W)[0].T[:3] @ y) / np.linalg.norm(y)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


def test_spike_alignment__finds_a_planted_direction() -> None:
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], 60)
    noise = rng.standard_normal((60, 200))
    K = noise @ noise.T / 200 + 0.5 * np.outer(y, y)
    target = xr.DataArray(y, dims="sample")
    assert float(spike_alignment(kernels(K), target)[0]) > 0.98
    assert float(spike_alignment(kernels(noise @ noise.T), target)[0]) < 0.5
    # theory: squared overlap of a spike t over noise of ratio c (Benaych-Georges and Nadakuditi 2011)
    t, c = 0.5 * 60, 60 / 200
    assert float(spike_alignment(kernels(K), target)[0]) ** 2 == pytest.approx(
        (1 - c / t**2) / (1 + c / t), abs=0.01
    )


def test_spike_alignment__without_target_matrix_or_singular_value_is_unknown() -> None:
    K = np.stack([np.diag([2.0, 0.0]), np.zeros((2, 2)), np.diag([NAN, 1.0])])
    y = xr.DataArray([1.0, 0.0], dims="sample")
    found = spike_alignment(kernels(K), y, k=2)
    np.testing.assert_allclose(found, [[1.0, NAN], [NAN, NAN], [NAN, NAN]])
    assert np.isnan(spike_alignment_kernel(np.eye(2), np.zeros(2))).all()


def test_functions__refuse_bad_arguments() -> None:
    acts, K, y = activations(), kernels(np.eye(3)), xr.DataArray(np.ones(3), dims="sample")
    with pytest.raises(ValueError, match="missing"):
        conjugate_kernel(acts, unit_dim="neuron")
    with pytest.raises(ValueError, match="at least one value"):
        conjugate_kernel(acts.isel(unit=slice(0)))
    with pytest.raises(ValueError, match="square"):
        kernel_alignment(K.isel(sample_=[0]), y)
    with pytest.raises(ValueError, match="missing"):
        kernel_alignment(K, y, target_dim="class_")
    with pytest.raises(ValueError, match="differ along dim 'sample'"):
        kernel_alignment(K, y.isel(sample=[0, 1]))
    with pytest.raises(ValueError, match="differ along dim 'sample'"):
        cka(acts, acts.isel(sample=slice(5)))
    with pytest.raises(ValueError, match="1 <= k <= 3"):
        spike_alignment(K, y, k=4)
    with pytest.raises(ValueError, match="no dim 'sample_' on target"):
        spike_alignment(K, K)
    with pytest.raises(TypeError, match="complex"):
        conjugate_kernel(acts * 1j)
    with pytest.raises(TypeError, match="complex"):
        cka(acts, acts * 1j)
    with pytest.raises(TypeError, match="complex"):
        kernel_alignment(K, y * 1j)
    with pytest.raises(TypeError, match="complex"):
        spike_alignment(K * 1j, y)
