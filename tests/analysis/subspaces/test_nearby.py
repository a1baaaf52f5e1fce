from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis.subspaces.bases import FloatArray
from hild_xr.analysis.subspaces.nearby import nearby_sines_kernel
from hild_xr.analysis.subspaces.sines import sines_kernel


def walk(seed: int, n: int, k: int, p: int, drift: float) -> FloatArray:
    """Orthonormal rows on a random walk, each in a basis of its own."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((p, k)))[0]
    rows = np.empty((n, k, p))
    for row in rows:
        row[:] = np.linalg.qr(rng.standard_normal((k, k)))[0] @ U.T
        U = np.linalg.qr(U + drift * rng.standard_normal((p, k)))[0]
    return rows


def one_by_one(Q: FloatArray, R: FloatArray) -> FloatArray:
    return sines_kernel(R, None, Q, R @ Q.swapaxes(1, 2))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    exponent=st.floats(-12, -2.5),
    k=st.integers(1, 4),
    p=st.sampled_from([9, 200]),
    same=st.booleans(),
)
def test_nearby_sines_kernel__is_the_kernel_pair_by_pair_where_it_says_so(
    seed: int, exponent: float, k: int, p: int, same: bool
) -> None:
    Q = walk(seed, 20, k, p, 10**exponent / np.sqrt(p))
    R = Q if same else Q[::2].copy()
    i, j = np.indices((len(Q), len(R))).reshape(2, -1)
    i, j = i[i != j * (len(Q) // len(R))], j[i != j * (len(Q) // len(R))]
    sines, right = nearby_sines_kernel(Q, R, i, j)
    np.testing.assert_allclose(sines[right], one_by_one(Q[i], R[j])[right], rtol=0, atol=4e-15)
    assert right.mean() > 0.5


def test_nearby_sines_kernel__gives_back_tiny_angles_far_from_the_reference() -> None:
    Q = walk(0, 12, 3, 50, 1e-3)
    Q[7] = Q[6]  # a frozen record: the angle is zero, the rounding that of the distance to the reference
    i, j = np.triu_indices(12, 1)
    _, right = nearby_sines_kernel(Q, Q, i, j)
    frozen = (i == 6) & (j == 7)
    assert not right[frozen].any()
    assert right[~frozen].all()


def test_nearby_sines_kernel__gives_back_what_is_far_from_the_reference() -> None:
    Q = walk(0, 12, 3, 50, 1e-4)
    Q[9:] = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 50, 3)))[0].swapaxes(1, 2)
    i, j = np.triu_indices(12, 1)
    _, right = nearby_sines_kernel(Q, Q, i, j)
    np.testing.assert_array_equal(right, j < 9)


@pytest.mark.parametrize("n_pairs", [0, 5])
def test_nearby_sines_kernel__is_not_worth_it_for_a_few_pairs(n_pairs: int) -> None:
    Q = walk(0, 12, 3, 50, 1e-4)
    at = np.arange(n_pairs)
    sines, right = nearby_sines_kernel(Q, Q, at, at + 1)
    assert sines.shape == (n_pairs, 3)
    assert not right.any()


def test_nearby_sines_kernel__takes_what_is_orthogonal_to_the_reference() -> None:
    turn = 1e-6 * np.arange(9.0)
    Q = np.stack([np.cos(turn), np.sin(turn), np.zeros(9)], axis=-1)[:, None, :]
    Q[8] = [0.0, 0.0, 1.0]  # A is zero and has no inverse
    i, j = np.triu_indices(9, 1)
    sines, right = nearby_sines_kernel(Q, Q, i, j)
    np.testing.assert_array_equal(right, j < 8)
    np.testing.assert_allclose(sines[right, 0], np.sin(turn[j] - turn[i])[right], rtol=0, atol=1e-15)
