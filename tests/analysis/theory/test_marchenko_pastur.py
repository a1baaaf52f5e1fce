from __future__ import annotations

import dask.array
import numpy as np
import pytest
import scipy.integrate
import xarray as xr

from hild_xr.analysis.theory import (
    marchenko_pastur_cdf,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    marchenko_pastur_mass_at_zero,
)

LAWS = [(0.1, 1.0), (0.5, 2.5), (1.0, 1.0), (4.0, 0.3)]


def integral(power: int, ratio: float, scale: float) -> float:
    """Moment of the continuous part; the substitution takes the square roots off both edges."""
    lower, upper = marchenko_pastur_edges(ratio, scale)
    middle, half = (upper + lower) / 2, (upper - lower) / 2

    def integrand(t: float) -> float:
        x = middle + half * np.sin(t)
        return float(x**power * marchenko_pastur_density(x, ratio, scale) * half * np.cos(t))

    return float(scipy.integrate.quad(integrand, -np.pi / 2, np.pi / 2, epsabs=1e-12)[0])


@pytest.mark.parametrize(("ratio", "scale"), LAWS)
def test_density__has_the_moments_of_the_law(ratio: float, scale: float) -> None:
    assert integral(0, ratio, scale) == pytest.approx(1 - marchenko_pastur_mass_at_zero(ratio), abs=1e-9)
    assert integral(1, ratio, scale) == pytest.approx(scale, abs=1e-9)
    assert integral(2, ratio, scale) == pytest.approx(scale**2 * (1 + ratio), abs=1e-9)
    assert integral(3, ratio, scale) == pytest.approx(scale**3 * (1 + 3 * ratio + ratio**2), abs=1e-9)


@pytest.mark.parametrize(("ratio", "scale"), [*LAWS, (1.001, 1.0), (30.0, 2.0)])
def test_cdf__is_the_integral_of_the_density(ratio: float, scale: float) -> None:
    lower, upper = marchenko_pastur_edges(ratio, scale)
    middle, half = (upper + lower) / 2, (upper - lower) / 2

    def integrand(t: float) -> float:  # the substitution takes the square roots off both edges
        return float(marchenko_pastur_density(middle + half * np.sin(t), ratio, scale) * half * np.cos(t))

    for t in np.linspace(-np.pi / 2, np.pi / 2, 9):
        x = middle + half * np.sin(t)
        mass = scipy.integrate.quad(integrand, -np.pi / 2, t, epsabs=1e-13, limit=200)[0]
        expected = mass + marchenko_pastur_mass_at_zero(ratio)
        assert marchenko_pastur_cdf(x, ratio, scale) == pytest.approx(expected, abs=1e-11)


def test_cdf__outside_of_the_support_and_labelled() -> None:
    x = np.array([-1.0, 0.0, 0.01, 9.5, np.nan])
    np.testing.assert_array_equal(marchenko_pastur_cdf(x, 4.0), [0.0, 0.75, 0.75, 1.0, np.nan])
    np.testing.assert_array_equal(marchenko_pastur_cdf(x, 0.25), [0.0, 0.0, 0.0, 1.0, np.nan])
    labelled = marchenko_pastur_cdf(
        xr.DataArray(x, dims="bin").chunk(bin=2), xr.DataArray([0.5], dims="layer")
    )
    assert labelled.chunks is not None
    assert set(labelled.dims) == {"bin", "layer"}
    assert np.isnan(marchenko_pastur_cdf(1.0, np.nan))
    with pytest.raises(ValueError, match="expected ratio > 0"):
        marchenko_pastur_cdf(1.0, 0.0)


def test_edges__of_the_spectral_evolution_check() -> None:
    """800 x 400 with N(0, 1/800) entries: the paper's example of W^T W, one draw beside the law."""
    lower, upper = marchenko_pastur_edges(400 / 800)
    assert (round(lower, 4), round(upper, 4)) == (0.0858, 2.9142)
    W = np.random.default_rng(0).standard_normal((800, 400)) / np.sqrt(800)
    eigenvalues = np.linalg.eigvalsh(W.T @ W)
    assert eigenvalues[0] == pytest.approx(lower, abs=0.01)
    assert eigenvalues[-1] == pytest.approx(upper, abs=0.05)
    inside, _ = np.histogram(eigenvalues, bins=np.linspace(lower, upper, 6))
    grid = np.linspace(lower, upper, 5001)
    mass = np.diff(
        np.interp(np.linspace(lower, upper, 6), grid, np.cumsum(marchenko_pastur_density(grid, 0.5)))
    )
    np.testing.assert_allclose(inside / 400, mass * (grid[1] - grid[0]), atol=0.02)


@pytest.mark.parametrize(("samples", "dims"), [(30, 60), (60, 30)])
def test_mass_at_zero__is_the_rank_deficiency_of_a_sample_covariance(samples: int, dims: int) -> None:
    Y = np.random.default_rng(0).standard_normal((samples, dims))
    zero = np.mean(np.linalg.eigvalsh(Y.T @ Y / samples) < 1e-10)
    assert marchenko_pastur_mass_at_zero(dims / samples) == pytest.approx(zero)


def test_density__is_zero_outside_the_support_and_nan_at_nan() -> None:
    lower, upper = marchenko_pastur_edges(0.25, 2.0)
    x = np.array([-1.0, 0.0, lower, lower + 1e-9, upper - 1e-9, upper, 10.0, np.nan])
    density = marchenko_pastur_density(x, 0.25, 2.0)
    np.testing.assert_array_equal(density > 0, [False, False, False, True, True, False, False, False])
    assert np.isnan(density[-1])


def test_density__of_a_square_matrix_diverges_at_zero() -> None:
    assert marchenko_pastur_density(0.0, 1.0) == np.inf
    assert marchenko_pastur_density(1e-12, 1.0) == pytest.approx(1e6 / np.pi, rel=1e-6)


@pytest.mark.usefixtures("nothing_computes")
def test_density__keeps_labels_and_stays_lazy() -> None:
    x = xr.DataArray(np.linspace(0, 3, 7), dims="bin").chunk(bin=3)
    ratio = xr.DataArray([0.5, 2.0], dims="layer", coords={"layer": ["a", "b"]})
    density = marchenko_pastur_density(x, ratio)
    assert isinstance(density.data, dask.array.Array)
    assert set(density.dims) == {"bin", "layer"}
    values = density.compute(scheduler="synchronous")
    np.testing.assert_array_equal(values.sel(layer="b"), marchenko_pastur_density(np.linspace(0, 3, 7), 2.0))
    assert marchenko_pastur_edges(ratio)[1].dims == ("layer",)
    np.testing.assert_allclose(marchenko_pastur_mass_at_zero(ratio), [0.0, 0.5])


@pytest.mark.parametrize(("ratio", "scale"), [(0.0, 1.0), (-1.0, 1.0), (0.5, 0.0)])
def test_law__refuses_what_is_not_positive(ratio: float, scale: float) -> None:
    with pytest.raises(ValueError, match=r"expected (ratio|scale) > 0"):
        marchenko_pastur_edges(ratio, scale)
    with pytest.raises(ValueError, match=r"expected (ratio|scale) > 0"):
        marchenko_pastur_density(1.0, ratio, scale)
