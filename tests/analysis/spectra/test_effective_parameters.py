from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import effective_parameters

NAN = np.nan


def number(values: list[float], alpha: float, **options: float) -> float:
    return float(effective_parameters(xr.DataArray(values, dims="eig"), alpha, **options))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), alpha=st.floats(1e-3, 1e3))
def test_effective_parameters__of_ridge_are_the_trace_of_the_hat_matrix(seed: int, alpha: float) -> None:
    """Known answer of item 6."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((60, 40)) * np.geomspace(3, 0.01, 40)
    hat = X @ np.linalg.solve(X.T @ X + alpha * np.eye(40), X.T)
    eigenvalues = xr.DataArray(np.linalg.eigvalsh(X.T @ X), dims="eig")
    assert float(effective_parameters(eigenvalues, alpha)) == pytest.approx(np.trace(hat), rel=1e-9)
    shifted = effective_parameters(eigenvalues + alpha, alpha, regularizer=alpha)
    assert float(shifted) == pytest.approx(np.trace(hat), rel=1e-9)


@pytest.mark.parametrize(("n", "p", "rank"), [(30, 20, 20), (15, 20, 15), (30, 20, 3)])
def test_effective_parameters__tend_to_the_rank(n: int, p: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, p)) if rank < min(n, p) else None
    X = rng.standard_normal((n, p)) if X is None else X
    values = np.linalg.svd(X, compute_uv=False) ** 2
    lam = xr.DataArray(np.append(values, np.zeros(p - len(values))), dims="eig")
    assert float(effective_parameters(lam, 0.0)) == rank
    assert float(effective_parameters(lam, 1e-9)) == pytest.approx(rank, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "alpha", "expected"),
    [
        ([3.0, 1.0, -2.0], 1.0, 1.25),  # negative curvature does not count
        ([3.0, 1.0, NAN], 1.0, 1.25),
        ([-1.0, -2.0], 1.0, 0.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([1.0, 1e-17], 0.0, 1.0),  # rounding is no parameter
        ([NAN, 1.0], 1.0, NAN),
        ([NAN, NAN], 1.0, NAN),
        ([1.0, 1.0], NAN, NAN),
    ],
)
def test_effective_parameters__marks_what_is_missing(
    values: list[float], alpha: float, expected: float
) -> None:
    np.testing.assert_equal(number(values, alpha), expected)


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=8),
    alpha=st.floats(1e-3, 10),
)
def test_law__order_scale_and_padding_change_nothing(values: list[float], alpha: float) -> None:
    expected = number(values, alpha)
    assert expected == pytest.approx(sum(v / (v + alpha) for v in values if v > 0))
    assert number(values[::-1], alpha) == pytest.approx(expected)
    assert number([8 * v for v in values], 8 * alpha) == pytest.approx(expected)
    assert number([*values, NAN], alpha) == pytest.approx(expected)
    assert number(values, 2 * alpha) <= expected


def spectra() -> tuple[xr.DataArray, xr.DataArray]:
    values = np.random.default_rng(0).exponential(size=(2, 3, 5))
    lam = xr.DataArray(values, dims=("seed", "step", "eig"), coords={"step": [0, 5, 9]})
    return lam, xr.DataArray([0.1, 1.0, 10.0, 0.0], dims="prior")


def test_law__chunks_order_of_dims_and_float32_change_nothing() -> None:
    lam, alpha = spectra()
    curve = effective_parameters(lam, alpha)
    assert curve.dims == ("seed", "step", "prior")
    lazy = effective_parameters(
        lam.chunk(step=1, eig=2).transpose("eig", "step", "seed"), alpha.chunk(prior=2)
    )
    found = lazy.compute(scheduler="synchronous").transpose(*curve.dims)
    xr.testing.assert_allclose(found, curve, rtol=1e-14)
    xr.testing.assert_allclose(effective_parameters(lam.astype("f4"), alpha), curve, rtol=1e-6)
    one = effective_parameters(lam[1, 2], 1.0)
    assert float(one) == pytest.approx(float(curve[1, 2, 1]))


@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed() -> None:
    lam, alpha = spectra()
    assert effective_parameters(lam.chunk(step=1), alpha.chunk()).chunks is not None


def test_effective_parameters__refuses_what_does_not_fit() -> None:
    lam, _ = spectra()
    with pytest.raises(ValueError, match="alpha >= 0"):
        effective_parameters(lam, -1.0)
    with pytest.raises(ValueError, match="one alpha for a spectrum"):
        effective_parameters(lam, lam)
    with pytest.raises(ValueError, match=r"missing \['rank'\]"):
        effective_parameters(lam, 1.0, dim="rank")
    with pytest.raises(TypeError, match="complex"):
        effective_parameters(lam * 1j, 1.0)
