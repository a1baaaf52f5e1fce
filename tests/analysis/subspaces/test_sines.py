from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis.subspaces.bases import FloatArray
from hild_xr.analysis.subspaces.sines import sines_kernel


def turned(p: int, sines: FloatArray, seed: int = 0, factor: bool = False) -> tuple[FloatArray, ...]:
    """Arguments of sines_kernel for two spans with the given sines, in mixed bases."""
    rng = np.random.default_rng(seed)
    k = len(sines)
    frame = np.linalg.qr(rng.standard_normal((p, 2 * k)))[0].T
    rows = np.sqrt(1 - sines**2)[:, None] * frame[:k] + sines[:, None] * frame[k:]
    mix = np.linalg.qr(rng.standard_normal((k, k)))[0]
    rows, others = mix @ rows, np.linalg.qr(rng.standard_normal((k, k)))[0] @ frame[:k]
    if not factor:
        return rows[None], None, others[None], (rows @ others.T)[None]  # type: ignore[return-value]
    skew = np.linalg.qr(rng.standard_normal((k, k)))[0] * np.linspace(0.8, 1.2, k)
    return (skew @ rows)[None], np.linalg.inv(skew)[None], others[None], (skew @ rows @ others.T)[None]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    exponents=st.lists(st.floats(-17, 0), min_size=1, max_size=6),
    p=st.sampled_from([12, 40, 3000]),
    factor=st.booleans(),
)
def test_sines_kernel__is_right_to_rounding_for_sines_of_any_size(
    seed: int, exponents: list[float], p: int, factor: bool
) -> None:
    sines = np.sort(10.0 ** np.array(exponents))
    found = sines_kernel(*turned(p, sines, seed, factor))[0]
    # the rounding of the rows themselves is of this size
    np.testing.assert_allclose(found, sines, rtol=3e-14, atol=2e-15)


@pytest.mark.parametrize("small", [1e-6, 1e-9, 1e-12])
def test_sines_kernel__one_gram_matrix_would_lose_the_small_ones(small: float) -> None:
    rows, _, others, coefficients = turned(40, np.array([small, 0.5]))
    left = rows - coefficients @ others
    by_gram = np.sqrt(np.abs(np.linalg.eigvalsh(left[0] @ left[0].T)[0]))
    found = sines_kernel(rows, None, others, coefficients)[0, 0]
    assert abs(by_gram - small) > 1e3 * abs(found - small)
    assert abs(found - small) < 1e-15


@pytest.mark.parametrize(("p", "k"), [(4, 4), (5, 4), (50, 4), (20_000, 10)])
def test_sines_kernel__of_identical_spans_is_rounding(p: int, k: int) -> None:
    rng = np.random.default_rng(0)
    others = np.linalg.qr(rng.standard_normal((8, p, k)))[0].swapaxes(1, 2)
    rows = np.linalg.qr(rng.standard_normal((8, k, k)))[0] @ others
    np.testing.assert_allclose(sines_kernel(rows, None, others, rows @ others.swapaxes(1, 2)), 0, atol=4e-15)
    same = sines_kernel(others, None, others, np.broadcast_to(np.eye(k), (8, k, k)))
    np.testing.assert_array_equal(same, 0)


def test_sines_kernel__of_spans_that_fill_the_space() -> None:
    rng = np.random.default_rng(0)
    others = np.linalg.qr(rng.standard_normal((5, 4)))[0].T[None]  # a hyperplane
    rows = np.linalg.qr(rng.standard_normal((5, 3)))[0].T[None]  # meets it in two dimensions at least
    found = sines_kernel(rows, None, others, rows @ others.swapaxes(1, 2))[0]
    np.testing.assert_allclose(found[:2], 0, atol=1e-15)
    assert found[2] > 1e-3


def test_sines_kernel__one_span_may_serve_all_rows() -> None:
    rng = np.random.default_rng(0)
    others = np.linalg.qr(rng.standard_normal((30, 4)))[0].T[None]
    rows = np.linalg.qr(others.swapaxes(1, 2) + 1e-3 * rng.standard_normal((7, 30, 4)))[0].swapaxes(1, 2)
    coefficients = rows @ others.swapaxes(1, 2)
    found = sines_kernel(rows, None, others, coefficients)
    each = sines_kernel(rows, None, np.repeat(others, 7, axis=0), coefficients)
    np.testing.assert_allclose(found, each, rtol=1e-12, atol=1e-16)
