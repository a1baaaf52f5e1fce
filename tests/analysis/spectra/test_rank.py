from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import effective_rank, numerical_rank, participation_ratio, rank, stable_rank
from hild_xr.analysis.spectra.rank import (
    effective_rank_kernel,
    numerical_rank_kernel,
    participation_ratio_kernel,
    stable_rank_kernel,
)

NAN = np.nan


def weights() -> xr.DataArray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 4, 6))
    values[1] = values[1, :, :, :2] @ rng.standard_normal((3, 2, 6))
    coords = {"seed": [0, 1], "step": [0, 5, 9]}
    return xr.DataArray(values, dims=("seed", "step", "out", "in"), coords=coords)


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("n", [5, 9])
def test_ranks__of_a_projector_are_all_its_dimension(r: int, n: int) -> None:
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, r)))[0]
    ds = rank(xr.DataArray(3 * Q @ Q.T, dims=("param", "param_")), ("param", "param_"))
    np.testing.assert_allclose([float(ds[name]) for name in ds], r, rtol=1e-10)


def test_ranks__of_known_spectra() -> None:
    assert float(stable_rank_kernel(np.array([2.0, 1.0, 1.0]))) == 1.5
    p = np.array([0.5, 0.25, 0.25])
    assert float(effective_rank_kernel(8 * p)) == pytest.approx(2**1.5, rel=1e-15)
    assert float(participation_ratio_kernel(8 * p)) == pytest.approx(1 / 0.375, rel=1e-15)
    assert int(numerical_rank_kernel(np.array([1.0, 1e-3, 1e-5, 1e-8]), rtol=1e-5)) == 2


@given(
    values=st.lists(st.floats(0, 1e3).filter(lambda x: x == 0 or x > 1e-3), min_size=1, max_size=8).filter(
        any
    ),
    scale=st.sampled_from([1e-200, 1e-3, 7.0, 1e200]),
    seed=st.integers(0, 99),
)
def test_ranks__laws(values: list[float], scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    s = np.array(values)
    changed = scale * rng.permutation(s) * rng.choice([-1, 1], len(s))
    padded = np.concatenate([changed, [0.0], [NAN, NAN]])
    kernels = (stable_rank_kernel, effective_rank_kernel, participation_ratio_kernel)
    for kernel in (lambda a: numerical_rank_kernel(a, 1e-9), *kernels):
        np.testing.assert_allclose(kernel(padded), kernel(s), rtol=1e-12)
    numerical, stable, effective = (
        numerical_rank_kernel(s, 1e-9),
        stable_rank_kernel(s),
        effective_rank_kernel(s),
    )
    assert numerical == np.count_nonzero(s)
    assert 1 - 1e-12 <= stable <= numerical + 1e-12
    assert 1 - 1e-12 <= effective <= numerical + 1e-9
    participation = participation_ratio_kernel(s)
    assert 1 - 1e-12 <= participation <= numerical + 1e-9
    assert participation == pytest.approx(s.sum() ** 2 / np.sum(s**2), rel=1e-12)
    assert effective == pytest.approx(np.exp(scipy.stats.entropy(s)), rel=1e-12)
    assert stable == pytest.approx(np.sum((s / s.max()) ** 2), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], (0, NAN, NAN, NAN)),
        ([NAN, NAN], (-1, NAN, NAN, NAN)),
        ([NAN, 1.0], (-1, NAN, NAN, NAN)),
        ([2.0, NAN], (1, 1.0, 1.0, 1.0)),
        ([-2.0], (1, 1.0, 1.0, 1.0)),
    ],
)
def test_rank__of_zero_and_missing_spectra(values: list[float], expected: tuple[float, ...]) -> None:
    ds = rank(xr.DataArray(values, dims="eig"))
    assert tuple(float(ds[name]) for name in ds) == pytest.approx(expected, nan_ok=True)


def test_rank__of_matrices_is_that_of_numpy() -> None:
    w = weights()
    ds = rank(w, ("out", "in"))
    assert ds["numerical_rank"].dims == ("seed", "step")
    np.testing.assert_array_equal(ds["numerical_rank"], np.linalg.matrix_rank(w.values))
    assert ds["numerical_rank"].values.tolist() == [[4] * 3, [2] * 3]
    squared = np.linalg.norm(w.values, axis=(-2, -1)) ** 2 / np.linalg.norm(w.values, 2, axis=(-2, -1)) ** 2
    np.testing.assert_allclose(ds["stable_rank"], squared, rtol=1e-12)


def test_rank__is_the_same_from_matrix_transpose_and_singular_values() -> None:
    w = weights()
    s = xr.DataArray(np.linalg.svd(w.values, compute_uv=False), dims=("seed", "step", "eig"), coords=w.coords)
    expected = rank(w, ("out", "in"), rtol=1e-9)
    xr.testing.assert_allclose(rank(w, ("in", "out"), rtol=1e-9), expected)
    xr.testing.assert_allclose(rank(s, rtol=1e-9), expected)


def test_rank__of_a_symmetric_matrix_is_that_of_its_eigenvalues_whatever_their_sign() -> None:
    A = np.random.default_rng(0).standard_normal((6, 6))
    A += A.T
    eigenvalues = xr.DataArray(np.linalg.eigvalsh(A), dims="eig")
    assert float(eigenvalues.min()) < 0
    expected = rank(xr.DataArray(A, dims=("param", "param_")), ("param", "param_"))
    xr.testing.assert_allclose(rank(eigenvalues), expected)


def test_rank__default_tolerance_follows_the_dtype() -> None:
    w = weights().astype(np.float32)
    assert numerical_rank(w, ("out", "in")).sel(seed=1).values.tolist() == [2, 2, 2]
    assert numerical_rank(w, ("out", "in")).attrs["rtol"] == 6 * np.finfo(np.float32).eps
    # the same numbers taken for exact: rounding to float32 has given the matrices full rank
    assert numerical_rank(w.astype(float), ("out", "in")).sel(seed=1).values.tolist() == [4, 4, 4]


def test_rank__of_a_missing_matrix_is_marked_and_the_others_are_not() -> None:
    w = weights()
    w[{"seed": 0, "step": 1, "out": 2, "in": 3}] = NAN
    ds = rank(w, ("out", "in"))
    assert ds["numerical_rank"].values.tolist() == [[4, -1, 4], [2, 2, 2]]
    for name in ("stable_rank", "effective_rank", "participation_ratio"):
        np.testing.assert_array_equal(ds[name].isnull(), ds["numerical_rank"] == -1)


def test_single_ranks__are_the_variables_of_rank() -> None:
    w, dims = weights(), ("out", "in")
    ds = rank(w, dims, rtol=1e-3)
    xr.testing.assert_identical(numerical_rank(w, dims, rtol=1e-3), ds["numerical_rank"])
    xr.testing.assert_identical(stable_rank(w, dims), ds["stable_rank"])
    xr.testing.assert_identical(effective_rank(w, dims), ds["effective_rank"])
    xr.testing.assert_identical(participation_ratio(w, dims), ds["participation_ratio"])


@pytest.mark.parametrize(
    ("dim", "rtol", "message"),
    [
        ("eig", None, r"missing \['eig'\]"),
        (("out", "out"), None, "two different dims"),
        (("out", "in", "step"), None, "one dim of singular values or two different dims"),
        (("out", "in"), 1.5, "expected rtol in"),
        (("out", "in"), -1e-3, "expected rtol in"),
    ],
)
def test_rank__refuses_bad_arguments(dim: tuple[str, str], rtol: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(weights(), dim, rtol=rtol)


def test_rank__refuses_complex_and_empty_arrays() -> None:
    with pytest.raises(TypeError, match="complex128"):
        rank(weights() * 1j, ("out", "in"))
    with pytest.raises(ValueError, match="at least one value along"):
        rank(weights().isel(out=slice(0)), ("out", "in"))


def test_rank__with_a_regulariser_is_that_of_the_matrix_without() -> None:
    lam, beta = np.array([[3.0, 2.0, 0.0, -1.0], [4.0, 0.0, 0.0, NAN]]), np.array([0.1, 0.3])
    plain = xr.DataArray(lam, dims=("step", "eig"))
    moved = plain + xr.DataArray(beta, dims="step")
    assert rank(moved)["numerical_rank"].values.tolist() == [4, 3]
    expected = rank(plain)
    found = rank(moved, regularizer=xr.DataArray(beta, dims="step"))
    xr.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found["numerical_rank"].values.tolist() == [3, 1]
    xr.testing.assert_allclose(rank(moved[0], regularizer=0.1), expected.isel(step=0), rtol=1e-12)
    for single in (numerical_rank, stable_rank, effective_rank, participation_ratio):
        one = single(moved, regularizer=xr.DataArray(beta, dims="step"))
        xr.testing.assert_identical(one, found[single.__name__])


def test_rank__from_an_unknown_regulariser_is_unknown() -> None:
    found = rank(xr.DataArray([2.0, 1.0], dims="eig"), regularizer=NAN)
    assert int(found["numerical_rank"]) == -1
    assert np.isnan(float(found["stable_rank"]))


@given(k=st.integers(1, 6), seed=st.integers(0, 999))
def test_rank__of_the_leading_eigenvalues_is_a_lower_bound(k: int, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).exponential(size=6) ** 3)[::-1]
    eigenvalues = xr.DataArray(values, dims="eig")
    part, whole = (rank(a, rtol=1e-12) for a in (eigenvalues[:k], eigenvalues))
    for name in whole:
        assert float(part[name]) <= float(whole[name]) * (1 + 1e-12)


def test_rank__refuses_regularisers_of_matrices_and_options_that_are_no_numbers() -> None:
    eigenvalues = xr.DataArray([[2.0, 1.0]], dims=("step", "eig"))
    for beta in (0.1, xr.DataArray(0.0)):
        with pytest.raises(ValueError, match="no regularizer of matrices"):
            rank(weights(), ("out", "in"), regularizer=beta)
    with pytest.raises(TypeError, match="real number as regularizer"):
        rank(eigenvalues, regularizer="0.1")
    with pytest.raises(TypeError, match="real number as rtol"):
        rank(eigenvalues, rtol="0.1")
    with pytest.raises(ValueError, match="one regularizer for a spectrum"):
        rank(eigenvalues, regularizer=eigenvalues)
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        rank(eigenvalues, regularizer=xr.DataArray([0.1, 0.2], dims="step"))
