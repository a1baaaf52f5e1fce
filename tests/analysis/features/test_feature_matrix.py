from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import feature_matrix_alignment

NAN = np.nan


def weight(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("step", "out", "in")[-values.ndim :])


def agop(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("step", "in", "in_")[-values.ndim :])


def cosine(A: np.ndarray, B: np.ndarray) -> float:
    return float(np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B))


def descend(W: np.ndarray, steps: int = 50) -> np.ndarray:
    """Gradient descent of a linear layer on least squares."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
    for _ in range(steps):
        W = W - 0.1 * (X @ W.T - Y).T @ X / 30
    return W


@pytest.mark.parametrize("centred", [False, True])
def test_alignment__of_a_linear_layer_trained_from_zero_is_one(centred: bool) -> None:
    start = np.zeros((3, 4))
    W = descend(start)
    jacobian = W  # of outputs W x by the input x, the same for all samples
    found = feature_matrix_alignment(
        weight(W), agop(jacobian.T @ jacobian), initial=weight(start) if centred else None
    )
    assert float(found) == pytest.approx(1.0, abs=1e-12)
    assert found.attrs["centered"] is centred


def test_alignment__of_the_change_is_that_of_the_weights_less_those_of_the_start() -> None:
    start = np.random.default_rng(1).standard_normal((3, 4))
    W = descend(start)
    M = W.T @ W
    found = feature_matrix_alignment(weight(W), agop(M), initial=weight(start))
    assert float(found) == pytest.approx(cosine((W - start).T @ (W - start), M), rel=1e-12)
    assert float(found) < 0.99
    assert np.isnan(feature_matrix_alignment(weight(start), agop(M), initial=weight(start)))


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-120, -3.0, 1e120]))
def test_alignment__is_the_cosine_and_does_not_know_scale_and_basis(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    W, J = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
    expected = cosine(W.T @ W, J.T @ J)
    assert float(feature_matrix_alignment(weight(W), agop(J.T @ J))) == pytest.approx(expected, rel=1e-12)
    Q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    R = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    turned = feature_matrix_alignment(weight(scale * (R @ W @ Q)), agop(7 * Q.T @ J.T @ J @ Q))
    assert float(turned) == pytest.approx(expected, rel=1e-10)


def test_alignment__of_a_convolution_is_that_of_its_unfolded_weight() -> None:
    rng = np.random.default_rng(0)
    W, J = rng.standard_normal((5, 3, 2, 2)), rng.standard_normal((7, 12))
    M = J.T @ J
    kernels = xr.DataArray(W, dims=("out", "in", "kh", "kw"))
    products = xr.DataArray(M.reshape(3, 2, 2, 3, 2, 2), dims=("in", "kh", "kw", "in_", "kh_", "kw_"))
    expected = cosine(W.reshape(5, 12).T @ W.reshape(5, 12), M)
    for dims in (products.dims, products.dims[::-1]):
        found = feature_matrix_alignment(kernels, products.transpose(*dims))
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_alignment__of_missing_and_zero_matrices_is_unknown() -> None:
    W = np.random.default_rng(0).standard_normal((4, 3, 4))
    M = np.stack([np.eye(4)] * 4)
    W[1, 0, 0] = NAN
    M[2, 1, 3] = NAN
    M[3] = 0.0
    found = feature_matrix_alignment(weight(W), agop(M))
    assert found.isnull().values.tolist() == [False, True, True, True]


def test_alignment__refuses_bad_arguments() -> None:
    W, M = weight(np.ones((3, 4))), agop(np.eye(4))
    with pytest.raises(ValueError, match="expected agop with sizes"):
        feature_matrix_alignment(W, M.isel(in_=[0, 1]))
    with pytest.raises(ValueError, match=r"missing \['in_'\]"):
        feature_matrix_alignment(W, M.rename(in_="other"))
    with pytest.raises(ValueError, match="differ along dim 'in'"):
        feature_matrix_alignment(W, agop(np.eye(5)).isel(in_=slice(4)))
    with pytest.raises(ValueError, match="differ along dim 'out'"):
        feature_matrix_alignment(W, M, initial=weight(np.ones((2, 4))))
    with pytest.raises(TypeError, match="complex"):
        feature_matrix_alignment(W, M * 1j)
