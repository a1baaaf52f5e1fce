from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.subspaces.bases import FloatArray, full_rank_basis, orthonormal_basis, singular_values


def projector(Q: FloatArray) -> FloatArray:
    return Q @ np.swapaxes(Q, -1, -2)


@given(
    seed=st.integers(0, 999),
    p=st.integers(1, 30),
    k=st.integers(1, 6),
    noise=st.sampled_from([1e-12, 1e-7, 1e-3, 0.3, 10.0]),
)
def test_orthonormal_basis__is_orthonormal_and_has_the_same_span(
    seed: int, p: int, k: int, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, p)
    U = np.linalg.qr(rng.standard_normal((4, p, k)))[0] + noise * rng.standard_normal((4, p, k))
    Q, rank = orthonormal_basis(U)
    assert (rank == k).all()
    np.testing.assert_allclose(np.swapaxes(Q, -1, -2) @ Q, np.broadcast_to(np.eye(k), (4, k, k)), atol=1e-13)
    np.testing.assert_allclose(projector(Q) @ U, U, atol=1e-9 * max(1, noise))


def test_orthonormal_basis__drops_dependent_columns() -> None:
    rng = np.random.default_rng(0)
    independent = rng.standard_normal((50, 3))
    U = np.concatenate([independent, independent @ rng.standard_normal((3, 2)), np.zeros((50, 1))], axis=1)
    Q, rank = orthonormal_basis(U)
    assert rank == 3
    np.testing.assert_allclose(projector(Q), projector(np.linalg.qr(independent)[0]), atol=1e-13)
    assert (Q[:, 3:] == 0).all()


def test_orthonormal_basis__judges_rank_at_the_precision_of_the_dtype() -> None:
    means = np.random.default_rng(0).standard_normal((4, 200)).astype(np.float32)
    centred = (means - means.mean(axis=0)).T  # sums to zero up to rounding in float32
    assert orthonormal_basis(centred)[1] == 3
    assert orthonormal_basis(centred.astype(np.float64))[1] == 4


def test_orthonormal_basis__keeps_directions_that_are_nearly_dependent() -> None:
    U = np.array([[1.0, 1.0], [0.0, 1e-9], [0.0, 0.0]])
    Q, rank = orthonormal_basis(U)
    assert rank == 2
    np.testing.assert_allclose(projector(Q), np.diag([1.0, 1.0, 0.0]), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-20, 1e20, 1e160, 1e300])
def test_orthonormal_basis__does_not_depend_on_the_lengths_of_the_columns(scale: float) -> None:
    U = np.random.default_rng(0).standard_normal((6, 3))
    Q, rank = orthonormal_basis(U * [1.0, scale, 1.0])
    assert rank == 3
    np.testing.assert_allclose(projector(Q), projector(np.linalg.qr(U)[0]), atol=1e-12)


def test_orthonormal_basis__takes_more_vectors_than_dims() -> None:
    Q, rank = orthonormal_basis(np.random.default_rng(0).standard_normal((2, 3, 5)))
    assert Q.shape == (2, 3, 3)
    assert rank.tolist() == [3, 3]
    np.testing.assert_allclose(projector(Q), np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-13)


def test_orthonormal_basis__marks_what_is_not_finite_and_only_that() -> None:
    U = np.random.default_rng(0).standard_normal((3, 5, 2))
    U[0, 3, 1], U[1, 0, 0] = np.nan, np.inf
    Q, rank = orthonormal_basis(U)
    assert rank.tolist() == [-1, -1, 2]
    assert np.isnan(Q[:2]).all()
    assert np.isfinite(Q[2]).all()


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 4, 2), (0, 2, 4)])
def test_orthonormal_basis__takes_empty_stacks(shape: tuple[int, ...]) -> None:
    Q, rank = orthonormal_basis(np.empty(shape))
    assert Q.shape == (*shape[:-1], min(shape[-2:]))
    assert rank.shape == shape[:-2]


def test_full_rank_basis__is_nan_where_columns_are_dependent() -> None:
    U = np.stack([np.eye(3)[:, :2], np.ones((3, 2))])
    Q = full_rank_basis(U)
    np.testing.assert_array_equal(np.isnan(Q).any(axis=(1, 2)), [False, True])


def test_singular_values__of_a_stack_with_one_bad_matrix() -> None:
    A = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    A[1, 0, 0] = np.nan
    values = singular_values(A)
    assert values.dtype == np.float64
    assert np.isnan(values[1]).all()
    np.testing.assert_allclose(values[2], np.sqrt(np.linalg.eigvalsh(A[2].T @ A[2])[::-1]), rtol=1e-5)
