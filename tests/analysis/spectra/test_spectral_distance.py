from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import bulk_distance
from hild_xr.analysis.spectra.spectral_distance import bulk_distance_kernel

NAN = np.nan
numbers = st.lists(st.integers(-4, 4).map(lambda i: i / 2), min_size=1, max_size=9)


def spectrum(values: object) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    return xr.DataArray(values, dims=("step", "eig")[-values.ndim :])


def both(a: object, b: object, **options: object) -> tuple[float, float]:
    found = bulk_distance(spectrum(a), spectrum(b), **options)
    return float(found["wasserstein_distance"]), float(found["kolmogorov_smirnov_distance"])


def plain(a: object, b: object) -> tuple[float, float]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    wasserstein, ks = bulk_distance_kernel(a, b, np.ones(len(a)), np.ones(len(b)))
    return float(wasserstein), float(ks)


def largest_step(a: object, b: object) -> float:
    """Kolmogorov-Smirnov statistic by its definition (scipy's warns of samples that are equal)."""
    pooled = np.union1d(a, b)
    return max(float(abs(np.mean(np.asarray(a) <= x) - np.mean(np.asarray(b) <= x))) for x in pooled)


@given(a=numbers, b=numbers)
def test_distances__are_those_of_scipy_for_unequal_sizes_and_ties(a: list[float], b: list[float]) -> None:
    wasserstein, ks = plain(a, b)
    assert wasserstein == pytest.approx(scipy.stats.wasserstein_distance(a, b), abs=1e-13)
    assert ks == pytest.approx(largest_step(a, b), abs=1e-13)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (40, 70)])
def test_distances__of_samples_are_those_of_scipy(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(n), rng.standard_normal(m) + 0.3
    wasserstein, ks = both(a, b)
    assert wasserstein == pytest.approx(scipy.stats.wasserstein_distance(a, b), rel=1e-12)
    assert ks == pytest.approx(scipy.stats.ks_2samp(a, b).statistic, rel=1e-12)


@settings(max_examples=40)
@given(a=numbers, b=numbers, seed=st.integers(0, 999))
def test_distances__of_weighted_spectra(a: list[float], b: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = (rng.integers(0, 4, len(x)) + (np.arange(len(x)) == 0) for x in (a, b))
    wasserstein, ks = both(a, b, weights=(spectrum(p), spectrum(q)))
    assert wasserstein == pytest.approx(scipy.stats.wasserstein_distance(a, b, p, q), abs=1e-13)
    assert ks == pytest.approx(largest_step(np.repeat(a, p), np.repeat(b, q)), abs=1e-13)


@given(
    a=numbers, b=numbers, c=numbers, shift=st.floats(-5, 5), scale=st.floats(0.1, 9), seed=st.integers(0, 99)
)
def test_distances__laws(
    a: list[float], b: list[float], c: list[float], shift: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w, ks = plain(a, b)
    assert plain(a, rng.permutation(a)) == pytest.approx((0.0, 0.0), abs=1e-14)
    assert plain(b, a) == pytest.approx((w, ks), abs=1e-13)
    assert plain(np.array(a) + shift, a)[0] == pytest.approx(abs(shift), abs=1e-12)
    moved = plain(scale * np.array(a) + shift, scale * np.array(b) + shift)
    assert moved[0] == pytest.approx(scale * w, abs=1e-11)
    for total, first, second in zip(plain(a, c), (w, ks), plain(b, c), strict=True):
        assert total <= first + second + 1e-12


def test_distances__leave_out_what_lies_beyond_the_edges() -> None:
    bulk, other = [1.0, 2.0, 3.0], [1.5, 2.0, 2.5, 4.0]
    expected = both(bulk, other)
    assert both([*bulk, 9.0, -7.0], [*other, 30.0], lower=0.0, upper=5.0) == pytest.approx(expected)
    assert both([*bulk, 9.0], other, upper=(5.0, None)) == pytest.approx(expected)
    edges = xr.DataArray([5.0, 100.0], dims="step")
    found = bulk_distance(spectrum([[*bulk, 9.0]] * 2), spectrum(other), upper=(edges, None))
    assert float(found["wasserstein_distance"][0]) == pytest.approx(expected[0])
    assert float(found["wasserstein_distance"][1]) > 1


def test_distance__of_bulks_does_not_see_spikes_and_sees_another_bulk() -> None:
    rng = np.random.default_rng(0)
    n, N = 200, 400
    edge = (1 + (n / N) ** 0.5) ** 2
    noise, fresh = (rng.standard_normal((N, n)) / N**0.5 for _ in range(2))
    spiked = noise + 4 * np.outer(np.ones(N) / N**0.5, np.ones(n) / n**0.5)
    start, learned, again = (np.linalg.svd(W)[1] ** 2 for W in (noise, spiked, fresh))
    whole, bulk = both(start, learned), both(start, learned, upper=1.05 * edge)
    assert whole[0] > 5 * bulk[0]
    assert bulk[0] < 0.02
    assert bulk[1] < 0.02
    assert both(start, again, upper=1.05 * edge)[0] < 0.02
    assert both(start, 1.5 * again)[0] == pytest.approx(0.5, abs=0.03)


def test_distance__of_missing_spectra_is_unknown_and_padding_takes_no_part() -> None:
    a = spectrum([[3.0, 2.0, 1.0], [3.0, 2.0, NAN], [NAN, 2.0, 1.0], [NAN, NAN, NAN]])
    found = bulk_distance(a, spectrum([3.0, 2.0]))["wasserstein_distance"]
    np.testing.assert_allclose(found, [0.5, 0.0, NAN, NAN], atol=1e-15)
    nothing = bulk_distance(a, spectrum([3.0, 2.0]), upper=0.0)
    assert nothing["wasserstein_distance"].isnull().all()
    assert nothing["kolmogorov_smirnov_distance"].isnull().all()
    edges = xr.DataArray([NAN, 9.0, 9.0, 9.0], dims="step")
    assert np.isnan(bulk_distance(a, spectrum([3.0]), upper=edges)["wasserstein_distance"][0])


def test_distance__of_weights_that_say_nothing_is_unknown() -> None:
    one = np.ones(2)
    for weights in ([0.0, 0.0], [1.0, -1.0], [1.0, NAN]):
        found = bulk_distance_kernel(one, one, np.array(weights), one)
        assert all(np.isnan(x) for x in found)


def test_kernel__broadcasts_records() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 1, 6)), rng.standard_normal((3, 5))
    w, ks = bulk_distance_kernel(a, b, np.ones(6), np.ones(5))
    assert w.shape == ks.shape == (4, 3)
    assert w[2, 1] == pytest.approx(scipy.stats.wasserstein_distance(a[2, 0], b[1]), rel=1e-12)


def test_distance__of_a_run_without_records_is_empty() -> None:
    nodes = xr.DataArray(np.ones((0, 2, 3)), dims=("step", "probe", "node"))
    found = bulk_distance(nodes, nodes, weights=(nodes, None), dim=("probe", "node"))
    assert found["wasserstein_distance"].shape == (0,)


def test_distance__refuses_bad_arguments() -> None:
    a = spectrum([[2.0, 1.0], [2.0, 1.0]]).assign_coords(step=[0, 1])
    with pytest.raises(ValueError, match=r"missing \['node'\]"):
        bulk_distance(a, a, dim="node")
    with pytest.raises(ValueError, match="as many weights as values of b"):
        bulk_distance(a, a, weights=(None, a.isel(eig=[0])))
    with pytest.raises(ValueError, match="expected weights as a pair"):
        bulk_distance(a, a, weights=a)
    with pytest.raises(ValueError, match="expected upper as a pair"):
        bulk_distance(a, a, upper=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="one upper edge for a spectrum"):
        bulk_distance(a, a, upper=a)
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        bulk_distance(a, a.isel(step=[0]))
    with pytest.raises(ValueError, match="at least one value of a"):
        bulk_distance(a.isel(eig=slice(0)), a)
    with pytest.raises(TypeError, match="complex"):
        bulk_distance(a * 1j, a)
