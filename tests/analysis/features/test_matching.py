from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import (
    matched_correlation,
    matched_correlation_baseline,
    neuron_correlation,
    random_rotation,
)
from hild_xr.analysis.features.matching import matching_kernel


def gaussian(n: int, h: int, seed: int = 0) -> xr.DataArray:
    values = np.random.default_rng(seed).standard_normal((n, h))
    return xr.DataArray(values, dims=("sample", "unit"))


def relu(n: int = 400, h: int = 12, seed: int = 0) -> xr.DataArray:
    """Features with a privileged basis: sparse and not Gaussian."""
    return gaussian(n, h, seed).clip(min=0) ** 2


def test_correlation__is_that_of_numpy() -> None:
    u, v = gaussian(30, 4) * [1, 5, 1e-3, 1e3] + 7, gaussian(30, 3, 1) - 100
    v[:, 0] += u[:, 2] * 1e3
    expected = np.corrcoef(u.values.T, v.values.T)[:4, 4:]
    found = neuron_correlation(u, v)
    assert found.dims == ("unit", "unit_")
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(seed=st.integers(0, 9999), h=st.integers(1, 8))
def test_a_permuted_copy__is_matched_with_correlation_one(seed: int, h: int) -> None:
    u = relu(40, h, seed)
    order = np.random.default_rng(seed).permutation(h)
    v = u.isel(unit=order) * np.random.default_rng(seed).uniform(0.1, 10, h) + 3
    found = matched_correlation(u, v)
    assert float(found["mean_matched_correlation"]) == pytest.approx(1, abs=1e-12)
    assert order[found["matched_unit"].values].tolist() == list(range(h))


@given(seed=st.integers(0, 9999), h1=st.integers(1, 5), h2=st.integers(1, 5), absolute=st.booleans())
def test_matching__is_the_best_of_all_assignments(seed: int, h1: int, h2: int, absolute: bool) -> None:
    rho = np.random.default_rng(seed).uniform(-1, 1, (2, h1, h2))
    mean, matched, position = matching_kernel(rho, absolute)
    k = min(h1, h2)
    for r, m, values, places in zip(rho, mean, matched, position, strict=True):
        size = np.abs(r) if absolute else r
        best = max(
            size[list(rows), list(columns)].mean()
            for rows in itertools.combinations(range(h1), k)
            for columns in itertools.permutations(range(h2), k)
        )
        assert m == pytest.approx(best)
        there = places >= 0
        assert there.sum() == k
        np.testing.assert_array_equal(values[there], r[np.flatnonzero(there), places[there]])
        assert np.isnan(values[~there]).all()


def test_dead_units__take_no_part() -> None:
    u = relu().copy()
    u[:, 3] = 0.3  # constant up to the rounding of a mean
    found = matched_correlation(u, u.isel(unit=slice(None, None, -1)))
    assert float(found["mean_matched_correlation"]) == pytest.approx(1)
    assert found["matched_unit"].values.tolist() == [11, 10, 9, -1, 7, 6, 5, 4, 3, 2, 1, 0]
    assert np.isnan(found["matched_correlation"].values[3])
    assert neuron_correlation(u, u).isnull().sum() == 2 * 12 - 1
    rounded = u.copy()
    rounded[0, 3] = np.nextafter(0.3, 1)  # varies by rounding only
    assert np.isnan(matched_correlation(rounded, rounded)["matched_correlation"].values[3])
    dead = matched_correlation(u * 0, u)
    assert np.isnan(float(dead["mean_matched_correlation"]))
    assert (dead["matched_unit"] == -1).all()


def test_absolute__matches_a_neuron_with_its_negative() -> None:
    u = gaussian(100, 6)
    v = u * [1, -1, 1, -1, -1, 1]
    assert float(matched_correlation(u, v, absolute=True)["mean_matched_correlation"]) == pytest.approx(1)
    assert float(matched_correlation(u, v)["mean_matched_correlation"]) < 0.7
    signs = matched_correlation(u, v, absolute=True)["matched_correlation"]
    np.testing.assert_allclose(signs, [1, -1, 1, -1, -1, 1])


def test_independent_gaussian_units__are_near_the_baseline() -> None:
    for h, n in ((100, 400), (300, 2000)):
        found = matched_correlation(gaussian(n, h), gaussian(n, h, 1))["mean_matched_correlation"]
        assert 0.7 < float(found) / matched_correlation_baseline(h, n) < 0.95
    with pytest.raises(ValueError, match="two samples at least, came 3 and 1"):
        matched_correlation_baseline(3, 1)


def test_a_rotation__destroys_the_match_of_a_privileged_basis() -> None:
    u = relu()
    copy = u.isel(unit=np.random.default_rng(1).permutation(12))
    rotated = random_rotation(copy, random_seed=0)
    assert float(matched_correlation(u, copy)["mean_matched_correlation"]) == pytest.approx(1)
    assert float(matched_correlation(u, rotated)["mean_matched_correlation"]) < 0.8


def test_rotation__is_orthogonal_the_same_for_all_records_and_named() -> None:
    u = gaussian(9, 5).expand_dims(step=[0, 1]).assign_coords(unit=list("abcde"), sample=np.arange(9) * 2)
    found = random_rotation(u, random_seed=7)
    assert found.dims == u.dims
    assert "unit" not in found.coords
    assert found.sample.values.tolist() == u.sample.values.tolist()
    assert found.attrs["rotated_by_random_seed"] == 7
    np.testing.assert_allclose(found[0], found[1])
    np.testing.assert_allclose(found[0].values @ found[0].values.T, u[0].values @ u[0].values.T, atol=1e-12)
    assert not np.allclose(found[0], u[0].values, atol=0.1)
    xr.testing.assert_identical(found, random_rotation(u, random_seed=7))
    assert not np.allclose(found, random_rotation(u, random_seed=8))
    one = random_rotation(gaussian(9, 1), random_seed=0)
    np.testing.assert_allclose(np.abs(one), np.abs(gaussian(9, 1)))


def test_rotation__is_drawn_from_the_haar_measure() -> None:
    unit = xr.DataArray(np.eye(3)[:1], dims=("sample", "unit"))
    first = [random_rotation(unit, random_seed=s).values[0, 0] for s in range(500)]
    # an entry of a random unit vector of R^3 is uniform on [-1, 1] (Archimedes)
    assert scipy.stats.kstest(first, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_all_pairs_of_seeds__are_matched_at_once() -> None:
    a = xr.concat([relu(seed=0), relu(seed=1)], dim=xr.DataArray([4, 9], dims="seed", name="seed"))
    found = matched_correlation(a, a.rename(seed="seed_"))["mean_matched_correlation"]
    assert found.sizes == {"seed": 2, "seed_": 2}
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found.sel(seed=4, seed_=9), found.sel(seed=9, seed_=4))
    alone = matched_correlation(a.sel(seed=4, drop=True), a.sel(seed=9, drop=True))
    assert float(found.sel(seed=4, seed_=9)) == pytest.approx(float(alone["mean_matched_correlation"]))


def test_matching__refuses_bad_arguments() -> None:
    u = gaussian(5, 3)
    with pytest.raises(ValueError, match=r"missing \['unit'\]"):
        neuron_correlation(u, u.rename(unit="in"))
    with pytest.raises(ValueError, match="differ along dim 'sample'"):
        matched_correlation(u, gaussian(6, 3))
    with pytest.raises(ValueError, match="two samples and one unit in v"):
        neuron_correlation(u, u[:1])
    with pytest.raises(ValueError, match="no dim 'unit_'"):
        neuron_correlation(u.expand_dims(unit_=2), u)
    with pytest.raises(TypeError, match="complex"):
        neuron_correlation(u, u * 1j)
    with pytest.raises(ValueError, match="at least one unit"):
        random_rotation(u[:, :0], random_seed=0)


def test_matching__leaves_out_units_with_a_missing_activation_and_marks_them() -> None:
    u = gaussian(20, 4)
    holed = u.copy()
    holed[3, 1] = np.nan
    found = matched_correlation(holed, u)
    assert found["matched_unit"].values.tolist() == [0, -1, 2, 3]
    assert np.isnan(found["matched_correlation"].values).tolist() == [False, True, False, False]
    assert float(found["mean_matched_correlation"]) == pytest.approx(1)


def test_baseline__refuses_numbers_that_are_not_whole() -> None:
    for numbers in ((2.5, 10), (True, 10), (2, "10")):
        with pytest.raises(TypeError, match="whole number as n_"):
            matched_correlation_baseline(*numbers)
