from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import tail_index
from hild_xr.analysis.spectra.tails import tail_index_kernel

NAN = np.nan


def spectrum(values: object) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    return xr.DataArray(values, dims=("step", "eig")[-values.ndim :])


@pytest.mark.parametrize("a", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("options", [{"minimum": 2.0}, {"k": 1000}, {}])
def test_tail_index__of_pareto_samples_is_their_exponent(a: float, options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    samples = 2.0 * (1 + rng.pareto(a, (20, 1001)))
    found = tail_index(spectrum(samples), **options)
    z = (found["tail_index"] - a) / found["tail_index_standard_error"]
    # the start that fits best is chosen after the fact: its estimates scatter more
    assert np.abs(z).max() < (3.5 if options else 6)
    pooled = found["tail_index"].mean() if options else found["tail_index"].median()
    assert float(pooled) == pytest.approx(a, rel=0.03 if options else 0.06)
    np.testing.assert_allclose(found["power_law_exponent"], found["tail_index"] + 1, rtol=1e-15)


def test_tail_index__is_the_formula() -> None:
    values = np.array([0.5, 8.0, 2.0, 3.0, 1.0])
    found = tail_index(spectrum(values), minimum=1.5)
    tail = values[values >= 1.5]
    expected = len(tail) / np.log(tail / 1.5).sum()
    assert float(found["tail_index"]) == pytest.approx(expected, rel=1e-14)
    assert float(found["tail_index_standard_error"]) == pytest.approx(expected / 3**0.5, rel=1e-14)
    assert int(found["tail_count"]) == 3
    assert float(found["tail_minimum"]) == pytest.approx(1.5)
    hill = tail_index(spectrum(values), k=2)
    assert float(hill["tail_index"]) == pytest.approx(2 / np.log(8 * 3 / 4), rel=1e-14)
    assert int(hill["tail_count"]) == 2
    assert float(hill["tail_minimum"]) == pytest.approx(2.0)


@given(seed=st.integers(0, 999))
def test_tail__is_the_closest_to_its_power_law_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.uniform(0, 2, 12)).round(1) + 0.1
    found = tail_index(spectrum(values))
    fits = {}
    for start in np.unique(values):
        tail = values[values >= start]
        total = np.log(tail / start).sum()
        if len(tail) > 1 and total > 0:
            a = len(tail) / total
            fits[start] = a, scipy.stats.kstest(tail, scipy.stats.pareto(a, scale=start).cdf).statistic
    closest = min(distance for _, distance in fits.values())
    start = min(fits, key=lambda s: abs(s - float(found["tail_minimum"])))
    assert start == pytest.approx(float(found["tail_minimum"]), rel=1e-12)
    assert float(found["tail_distance"]) == pytest.approx(closest, abs=1e-12)
    assert float(found["tail_distance"]) == pytest.approx(fits[start][1], abs=1e-12)
    assert float(found["tail_index"]) == pytest.approx(fits[start][0], rel=1e-12)
    assert int(found["tail_count"]) == np.sum(values >= start)


def test_tail__starts_where_the_power_law_does() -> None:
    rng = np.random.default_rng(0)
    body, tail = rng.uniform(0, 1, (5, 600)), 1 + rng.pareto(2.0, (5, 600))
    found = tail_index(spectrum(np.concatenate([body, tail], axis=1)))
    np.testing.assert_allclose(found["tail_minimum"], 1.0, rtol=0.35)
    np.testing.assert_allclose(found["tail_index"], 2.0, rtol=0.25)


def test_tail_distance__tells_a_power_law_from_another_law() -> None:
    rng = np.random.default_rng(0)
    pareto, uniform = 1 + rng.pareto(2.0, 2000), rng.uniform(1, 2, 2000)
    found = tail_index(spectrum([pareto, uniform]), minimum=1.0)["tail_distance"]
    assert float(found[0]) < 0.03
    assert float(found[1]) > 0.1


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-150, 0.3, 1e150]))
@pytest.mark.parametrize("options", [{"k": 4}, {}])
def test_tail_index__does_not_know_scale_and_order(seed: int, scale: float, options: dict[str, int]) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.exponential(1, 15))
    changed = np.concatenate([scale * rng.permutation(values), [NAN]])
    found, expected = (tail_index(spectrum(v), **options) for v in (changed, values))
    for name in ("tail_index", "tail_distance"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-9)
    assert int(found["tail_count"]) == int(expected["tail_count"])


def test_tail_index__takes_positive_values_only() -> None:
    values = [5.0, 3.0, 2.0, 1.0]
    for options in ({"k": 2}, {"minimum": 1.5}, {}):
        alone, among = (tail_index(spectrum(v), **options) for v in (values, [*values, 0.0, -7.0, -1.0]))
        assert float(alone["tail_index"]) == pytest.approx(float(among["tail_index"]), rel=1e-14)


@pytest.mark.parametrize(
    ("values", "options", "count", "index"),
    [
        ([NAN, NAN, NAN], {}, -1, NAN),
        ([NAN, 2.0, 1.0], {}, -1, NAN),
        ([0.5, 0.2, NAN], {"minimum": 1.0}, 0, NAN),
        ([-1.0, -2.0, -3.0], {}, 0, NAN),
        ([2.0, 2.0, 2.0], {"minimum": 2.0}, 3, NAN),
        ([2.0, 2.0, 2.0], {}, 0, NAN),
        ([2.0, 1.0, NAN], {"k": 2}, 0, NAN),
        ([math.e, 1.0, NAN], {"k": 1}, 1, 1.0),
    ],
)
def test_tail_index__without_a_tail_is_unknown(
    values: list[float], options: dict[str, float], count: int, index: float
) -> None:
    found = tail_index(spectrum(values), **options)
    assert int(found["tail_count"]) == count
    assert float(found["tail_index"]) == pytest.approx(index, nan_ok=True)
    assert np.isnan(found["tail_distance"]) == np.isnan(index)


def test_tail_index__takes_a_start_for_each_record() -> None:
    values = np.exp(np.random.default_rng(0).exponential(1, (3, 20)))
    minimum = xr.DataArray([1.0, 2.0, NAN], dims="step")
    found = tail_index(spectrum(values), minimum=minimum)
    for i in range(2):
        alone = tail_index(spectrum(values[i]), minimum=float(minimum[i]))
        assert float(found["tail_index"][i]) == pytest.approx(float(alone["tail_index"]), rel=1e-14)
    assert found["tail_count"].values[2] == -1


def test_kernel__takes_stacks_of_any_shape() -> None:
    values = np.exp(np.random.default_rng(0).exponential(1, (2, 1, 3, 9)))
    assert all(found.shape == (2, 1, 3) for found in tail_index_kernel(values))
    assert all(found.shape == (2, 1, 3) for found in tail_index_kernel(values, np.full((1, 3), 1.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 1.0, "k": 2}, "minimum or k"),
        ({"minimum": 0.0}, "minimum > 0"),
        ({"k": 3}, "1 <= k < 3"),
        ({"k": 0}, "1 <= k < 3"),
        ({"dim": "node"}, "missing"),
        ({"minimum": spectrum([1.0, 2.0, 3.0])}, "one minimum for a spectrum"),
    ],
)
def test_tail_index__refuses_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tail_index(spectrum([3.0, 2.0, 1.0]), **options)


def test_tail_index__refuses_complex_values() -> None:
    with pytest.raises(TypeError, match="complex"):
        tail_index(spectrum([1.0, 2.0]) * 1j)
