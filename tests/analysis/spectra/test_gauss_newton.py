from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import gauss_newton_split
from hild_xr.analysis.spectra.gauss_newton import gauss_newton_split_kernel

NAN = np.nan


def labelled(matrices: np.ndarray) -> xr.DataArray:
    return xr.DataArray(matrices, dims=("step", "param", "param_")[-matrices.ndim :])


def symmetric(seed: int = 0, n: int = 6) -> np.ndarray:
    A = np.random.default_rng(seed).standard_normal((n, n))
    return A + A.T


def test_split__of_softmax_regression_finds_nothing_beyond_gauss_newton() -> None:
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((40, 3)), rng.standard_normal((4, 3))
    p = np.exp(X @ W.T)
    p /= p.sum(1, keepdims=True)
    loss_hessian = np.einsum("ia,ab->iab", p, np.eye(4)) - np.einsum("ia,ib->iab", p, p)
    # Gauss-Newton: J^T H_z J with the Jacobian of logits by the weights, sample by sample
    jacobians = [np.kron(np.eye(4), x[None]) for x in X]
    gauss_newton = sum(J.T @ H @ J for J, H in zip(jacobians, loss_hessian, strict=True)) / 40
    # Hessian: central differences of the gradient of the loss, which knows no Gauss-Newton
    labels = np.eye(4)[rng.integers(0, 4, 40)]

    def gradient(w: np.ndarray) -> np.ndarray:
        z = X @ w.reshape(4, 3).T
        q = np.exp(z)
        return np.asarray(((q / q.sum(1, keepdims=True) - labels).T @ X / 40).ravel())

    steps = 1e-5 * np.eye(12)
    hessian = np.stack([(gradient(W.ravel() + e) - gradient(W.ravel() - e)) / 2e-5 for e in steps])
    found = gauss_newton_split(labelled(hessian), labelled(gauss_newton), 3)
    assert float(found["gauss_newton_residual"]) < 1e-8
    assert float(found["gauss_newton_overlap"]) == pytest.approx(1.0, abs=1e-10)
    closed = np.einsum("iab,ij,ik->ajbk", loss_hessian, X, X).reshape(12, 12) / 40
    exact = gauss_newton_split(labelled(closed), labelled(gauss_newton), 3)
    assert float(exact["gauss_newton_residual"]) < 1e-14


@pytest.mark.parametrize("y", [1.0, 0.5, -3.0])
def test_split__of_a_product_of_two_weights_is_the_closed_form(y: float) -> None:
    u, v = 0.8, 0.6  # loss (uv - y)^2 / 2: H = g g^T + (uv - y) [[0, 1], [1, 0]], g = (v, u)
    gauss_newton = np.outer([v, u], [v, u])
    rest = (u * v - y) * np.array([[0.0, 1.0], [1.0, 0.0]])
    hessian = gauss_newton + rest
    found = gauss_newton_split(labelled(hessian), labelled(gauss_newton), 1)
    expected = 2**0.5 * abs(u * v - y) / np.linalg.norm(hessian)
    assert float(found["gauss_newton_residual"]) == pytest.approx(expected, rel=1e-13)
    values, vectors = np.linalg.eigh(hessian)
    top = vectors[:, np.argmax(np.abs(values))]
    assert float(found["gauss_newton_overlap"]) == pytest.approx((top @ [v, u]) ** 2, rel=1e-12)


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-150, -2.0, 1e150]), k=st.integers(1, 6))
def test_split__does_not_know_scale_and_basis(seed: int, scale: float, k: int) -> None:
    H, GN = symmetric(seed), symmetric(seed + 1)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 6)))[0]
    expected = gauss_newton_split_kernel(H, GN, k=k)
    found = gauss_newton_split_kernel(scale * (Q @ H @ Q.T), scale * (Q @ GN @ Q.T), k=k)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_split__of_the_whole_space_overlaps_fully() -> None:
    found = gauss_newton_split(labelled(symmetric(0)), labelled(symmetric(1)), 6)
    assert float(found["gauss_newton_overlap"]) == pytest.approx(1.0, rel=1e-12)


def test_split__takes_the_eigenvalues_of_largest_size_whatever_their_sign() -> None:
    H = labelled(np.diag([-9.0, 2.0, 1.0]))
    GN = labelled(np.diag([0.0, 2.0, 1.0]))
    assert float(gauss_newton_split(H, GN, 1)["gauss_newton_overlap"]) == 0.0
    assert float(gauss_newton_split(H, GN, 2)["gauss_newton_overlap"]) == pytest.approx(0.5)


@pytest.mark.parametrize("other", [[2.0, 2.0, 1.0], [2.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
def test_split__of_an_eigenspace_that_is_not_defined_is_unknown(other: list[float]) -> None:
    H = labelled(np.diag([3.0, 2.0, 1.0]))
    found = gauss_newton_split(H, labelled(np.diag(other)), 1)
    assert np.isnan(found["gauss_newton_overlap"])
    assert np.isfinite(found["gauss_newton_residual"])


def test_split__of_missing_and_zero_matrices_is_unknown() -> None:
    H = np.stack([symmetric()] * 3)
    H[1, 0, 3] = NAN
    H[2] = 0.0
    found = gauss_newton_split(labelled(H), labelled(symmetric(1)), 2)
    for array in found.data_vars.values():
        assert array.isnull().values.tolist() == [False, True, True]


def test_split__refuses_bad_arguments() -> None:
    H = labelled(symmetric())
    for k in (0, 7):
        with pytest.raises(ValueError, match="1 <= k <= 6"):
            gauss_newton_split(H, H, k)
    with pytest.raises(ValueError, match="square"):
        gauss_newton_split(H.isel(param=[0, 1]), H, 1)
    with pytest.raises(ValueError, match="missing"):
        gauss_newton_split(H, H, 1, dims=("out", "in"))
    with pytest.raises(ValueError, match="differ along dim 'param'"):
        gauss_newton_split(H, labelled(symmetric(0, 5)), 1)
    with pytest.raises(TypeError, match="complex"):
        gauss_newton_split(H * 1j, H, 1)
