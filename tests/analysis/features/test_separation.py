from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import neural_collapse, separation, separation_slope

LABELS = xr.DataArray(np.repeat([0, 1, 2], 8), dims="sample")


def geometric(rate: float, n_layers: int, seed: int = 0) -> dict[str, xr.DataArray]:
    """Layers whose noise within the classes shrinks by a constant factor, in other dimensions each."""
    rng = np.random.default_rng(seed)
    means, noise = rng.standard_normal((3, 5)), rng.standard_normal((24, 5))
    for c in range(3):
        noise[c == LABELS] -= noise[c == LABELS].mean(axis=0)
    layers = {}
    for i in range(n_layers):
        Q = np.linalg.qr(rng.standard_normal((5 + i, 5)))[0].T
        h = (means[LABELS] + np.exp(rate * i / 2) * noise) @ Q * rng.uniform(0.1, 10)
        layers[f"layer{i}"] = xr.DataArray(h, dims=("sample", "unit"))
    return layers


@given(rate=st.floats(-3, 1), n_layers=st.integers(2, 6), seed=st.integers(0, 999))
def test_geometric_layers__give_their_rate_as_slope(rate: float, n_layers: int, seed: int) -> None:
    D = separation(geometric(rate, n_layers, seed), LABELS)
    assert D.dims == ("layer",)
    found = separation_slope(D)
    assert float(found["separation_slope"]) == pytest.approx(rate, abs=1e-10)
    if abs(rate) > 1e-3:
        assert float(found["separation_correlation"]) == pytest.approx(np.sign(rate), abs=1e-6)


def test_separation__is_the_logarithm_of_the_ratio() -> None:
    h = geometric(0, 1)["layer0"]
    ratio = neural_collapse(h, LABELS, nc1="trace_ratio")["nc1"]
    whitened = neural_collapse(h, LABELS)["nc1"]
    assert float(separation(h, LABELS)) == pytest.approx(np.log(float(ratio)))
    assert float(separation(h, LABELS, measure="pinv")) == pytest.approx(np.log(3 * float(whitened)))


def test_separation__of_collapsed_and_of_equal_classes() -> None:
    means = xr.DataArray([[0.0], [1.0], [3.0]], dims=("class", "unit")).values
    collapsed = xr.DataArray(means[LABELS], dims=("sample", "unit"))
    equal = xr.DataArray(np.tile(np.arange(8.0), 3)[:, None], dims=("sample", "unit"))
    for measure in ("trace_ratio", "pinv"):
        assert float(separation(collapsed, LABELS, measure=measure)) == -np.inf
        assert np.isnan(float(separation(equal, LABELS, measure=measure)))


def test_slope__is_that_of_scipy() -> None:
    values = np.random.default_rng(0).standard_normal((3, 7))
    found = separation_slope(xr.DataArray(values, dims=("step", "layer")))
    for k, row in enumerate(values):
        expected = scipy.stats.linregress(np.arange(7), row)
        assert float(found["separation_slope"][k]) == pytest.approx(expected.slope)
        assert float(found["separation_correlation"][k]) == pytest.approx(expected.rvalue)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_slope__of_a_layer_without_value_is_undefined(bad: float) -> None:
    D = xr.DataArray([[1.0, bad, 2.0], [1.0, 2.0, 3.0]], dims=("step", "layer"))
    found = separation_slope(D)
    for name in found:
        assert np.isnan(found[name].values).tolist() == [True, False]


def test_slope__of_equal_layers_is_zero_without_correlation() -> None:
    found = separation_slope(xr.DataArray([0.1, 0.1, 0.1], dims="layer"))
    assert float(found["separation_slope"]) == pytest.approx(0, abs=1e-15)
    assert np.isnan(float(found["separation_correlation"]))


def test_separation__refuses_bad_options() -> None:
    h = geometric(0, 1)["layer0"]
    with pytest.raises(ValueError, match="measure 'trace_ratio' or 'pinv', came 'trace'"):
        separation(h, LABELS, measure="trace")
    with pytest.raises(ValueError, match="weighting"):
        separation(h, LABELS, weighting="none")
    with pytest.raises(ValueError, match="at least two layers"):
        separation_slope(xr.DataArray([1.0], dims="layer"))
    with pytest.raises(ValueError, match=r"missing \['layer'\]"):
        separation_slope(xr.DataArray([1.0], dims="depth"))
