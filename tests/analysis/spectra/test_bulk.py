from __future__ import annotations

import functools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import marchenko_pastur_fit, outliers
from hild_xr.analysis.spectra.bulk import marchenko_pastur_fit_kernel
from hild_xr.analysis.theory import bbp_spike, marchenko_pastur_edges
from hild_xr.variables import VARIABLES

NAN = np.nan


@functools.cache
def spectrum(N: int, n: int, spikes: tuple[float, ...] = (), seed: int = 0) -> np.ndarray:
    """Eigenvalues of the sample covariance of N samples with the covariance diag(1 + spikes, 1, ...)."""
    variance = 1 + np.r_[spikes, np.zeros(n - len(spikes))]
    Y = np.random.default_rng(seed).standard_normal((N, n)) * np.sqrt(variance)
    values = np.linalg.eigvalsh(Y.T @ Y / N)
    values.flags.writeable = False
    return values


def fit(values: np.ndarray, **options: float) -> tuple[float, float, float, float]:
    found = marchenko_pastur_fit(xr.DataArray(values, dims="eig"), **options)
    scale, ratio, edge, distance = (float(a) for a in found.values())
    return scale, ratio, edge, distance


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spikes", [(), (3.0, 5.0, 10.0, 50.0), (1e6,)])
def test_fit__recovers_scale_and_ratio_whatever_the_spikes(spikes: tuple[float, ...], seed: int) -> None:
    """800 samples of 400 dimensions, as stated in the docstring: 1 % and 2 %."""
    scale, ratio, edge, distance = fit(2.5 * spectrum(800, 400, spikes, seed))
    assert scale == pytest.approx(2.5, rel=0.01)
    assert ratio == pytest.approx(0.5, rel=0.02)
    assert distance < 0.012
    assert edge == pytest.approx(marchenko_pastur_edges(0.5, 2.5)[1], rel=0.04)


@pytest.mark.parametrize("spikes", [(5.0,) * 40, (4.0,) * 80, (3.0,) * 100])
def test_fit__stands_many_outliers(spikes: tuple[float, ...]) -> None:
    """A fit that starts from all eigenvalues takes a tenth of spikes for bulk."""
    lam = spectrum(800, 400, spikes)
    scale, ratio, edge, _ = fit(lam)
    assert scale == pytest.approx(1.0, rel=0.06)
    assert ratio == pytest.approx(0.5, rel=0.04)
    assert abs(int((lam > edge).sum()) - len(spikes)) <= 1
    naive = np.mean(lam**2) / np.mean(lam) ** 2 - 1
    assert naive > 0.6


@pytest.mark.parametrize(("N", "n"), [(400, 400), (200, 400), (150, 600)])
def test_fit__of_as_many_or_fewer_samples_than_dimensions(N: int, n: int) -> None:
    lam = spectrum(N, n, (20.0, 40.0))
    scale, ratio, edge, _ = fit(lam)
    assert scale == pytest.approx(1.0, rel=0.03)
    assert ratio == pytest.approx(n / N, rel=0.03)
    assert int((lam > edge).sum()) == 2
    known = fit(lam, ratio=n / N)
    assert known[0] == pytest.approx(1.0, rel=0.03)
    assert known[1] == pytest.approx(n / N)


def test_fit__false_alarms_are_as_rare_as_stated() -> None:
    """Pure noise exceeds its fitted edge in about one of a hundred draws, and not in none of ten."""
    rng = np.random.default_rng(0)
    Y = rng.standard_normal((300, 120, 60)) / np.sqrt(120)
    lam = np.linalg.eigvalsh(np.swapaxes(Y, -1, -2) @ Y)
    scale, ratio, edge, _ = marchenko_pastur_fit_kernel(lam)
    assert np.isfinite(scale).all()
    assert np.mean(lam[:, -1] > edge) <= 0.03
    assert np.mean(lam[:, -1] > 0.95 * edge) >= 0.02
    assert abs(scale.mean() - 1) < 0.005
    assert abs(ratio.mean() - 0.5) < 0.01


def test_fit__with_the_spikes_it_finds_gives_the_covariance_back() -> None:
    lam = spectrum(4000, 400, (3.0, 5.0))
    scale, ratio, edge, _ = fit(lam)
    np.testing.assert_allclose(bbp_spike(lam[lam > edge], ratio, scale), [3.0, 5.0], rtol=0.1)


def test_fit__of_the_spectral_evolution_check() -> None:
    """Item 7: 800 x 400 with N(0, 1 / N) entries has the edges .0858 and 2.9142."""
    scale, ratio, *_ = fit(spectrum(800, 400))
    np.testing.assert_allclose(marchenko_pastur_edges(ratio, scale), (0.0858, 2.9142), rtol=0.03)


def test_fit__of_what_is_no_such_bulk_says_so() -> None:
    rng = np.random.default_rng(0)
    assert fit(rng.uniform(1, 2, 400))[3] > 0.03  # far from the law: the distance tells
    heavy = fit(rng.pareto(0.6, 400) + 1e-3)
    assert not np.isfinite(heavy[0]) or heavy[3] > 0.03


@pytest.mark.parametrize(
    "values",
    [
        np.full(50, NAN),
        np.r_[NAN, spectrum(100, 50)],  # NaN before a number
        np.r_[-1.0, spectrum(100, 50)],
        spectrum(100, 50)[:15],
        np.zeros(50),
        np.geomspace(1e-8, 1, 60),  # a power law: no part agrees with its own edge, or few enough
    ],
)
def test_fit__marks_what_has_no_bulk(values: np.ndarray) -> None:
    found = fit(values)
    assert np.isnan(found).all()
    count = outliers(xr.DataArray(values, dims="eig"), method="marchenko_pastur")
    assert int(count.outlier_count) == -1
    assert np.isnan(count.bulk_edge)
    assert not bool(count.bulk_reached)


def test_fit__zeros_contradict_a_known_ratio_below_one() -> None:
    lam = spectrum(200, 400)
    assert np.isnan(fit(lam, ratio=0.5)).all()
    assert np.isfinite(fit(lam, ratio=2.0)).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-9, 0.125, 1e9]))
def test_law__order_scale_and_padding(seed: int, factor: float) -> None:
    lam = spectrum(150, 75, (8.0, 4.0), seed % 5)
    expected = fit(lam)
    shuffled = np.random.default_rng(seed).permutation(lam)
    assert fit(shuffled) == pytest.approx(expected)
    assert fit(np.r_[lam, NAN, NAN]) == pytest.approx(expected)
    scale, ratio, edge, distance = fit(factor * lam)
    assert (scale / factor, ratio, edge / factor, distance) == pytest.approx(expected)


def spectra() -> xr.DataArray:
    values = np.stack([spectrum(150, 75, (8.0, 4.0), seed) for seed in range(4)]).reshape(2, 2, 75)
    lam = xr.DataArray(values.copy(), dims=("seed", "step", "eig"), coords={"seed": [1, 5], "step": [0, 10]})
    lam[1, 1] = NAN
    return lam


def test_law__chunks_order_of_dims_and_float32() -> None:
    lam = spectra()
    for function in (marchenko_pastur_fit, functools.partial(outliers, method="marchenko_pastur")):
        expected = function(lam, ratio=0.5)
        lazy = function(lam.chunk(seed=1, eig=10).transpose("eig", "step", "seed"), ratio=0.5)
        found = lazy.compute(scheduler="synchronous").transpose(*expected.dims)
        xr.testing.assert_allclose(found, expected, rtol=1e-13)
        xr.testing.assert_allclose(function(lam.astype("f4"), ratio=0.5), expected, rtol=1e-4)
        one = function(lam[0, 1], ratio=0.5)
        xr.testing.assert_allclose(one, expected.isel(seed=0, step=1))
        for name, array in expected.items():
            assert array.attrs.items() >= VARIABLES[str(name)].attrs().items()


@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed() -> None:
    lam = spectra().chunk(step=1)
    for found in (marchenko_pastur_fit(lam), outliers(lam, method="marchenko_pastur")):
        assert all(array.chunks is not None for array in found.data_vars.values())


def test_outliers__by_the_fitted_edge() -> None:
    lam = spectra()
    found = outliers(lam, method="marchenko_pastur")
    np.testing.assert_array_equal(found.outlier_count, [[2, 2], [2, -1]])
    np.testing.assert_array_equal(found.bulk_reached, [[True, True], [True, False]])
    edge = marchenko_pastur_fit(lam).bulk_edge
    np.testing.assert_allclose(found.bulk_edge, edge)
    by_edge = outliers(lam, method="edge", edge=edge)
    for name in ("outlier_count", "gap_ratio", "bulk_reached"):
        np.testing.assert_array_equal(found[name], by_edge[name])
    shifted = outliers(lam + 0.7, method="marchenko_pastur", regularizer=0.7)
    np.testing.assert_array_equal(shifted.outlier_count, found.outlier_count)
    np.testing.assert_allclose(shifted.bulk_edge, edge + 0.7)
    known = outliers(lam, method="marchenko_pastur", ratio=0.5, k=2)
    np.testing.assert_array_equal(known.outlier_count, found.outlier_count)
    assert known.gap_ratio.attrs["k"] == 2


def test_fit__refuses_what_does_not_fit() -> None:
    lam = spectra()
    with pytest.raises(ValueError, match="expected ratio > 0"):
        marchenko_pastur_fit(lam, ratio=0.0)
    with pytest.raises(ValueError, match="one ratio for a spectrum"):
        marchenko_pastur_fit(lam, ratio=lam)
    with pytest.raises(ValueError, match="with method 'marchenko_pastur' only"):
        outliers(lam, ratio=0.5)
    with pytest.raises(ValueError, match="no threshold with method 'marchenko_pastur'"):
        outliers(lam, method="marchenko_pastur", threshold=2.0)
    with pytest.raises(TypeError, match="complex"):
        marchenko_pastur_fit(lam * 1j)
