from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.theory import (
    bbp_outlier,
    bbp_overlap,
    bbp_spike,
    bbp_threshold,
    marchenko_pastur_edges,
)

NAN = np.nan


def test_bbp__check_of_the_effective_spectral_theory() -> None:
    """Section B4: h = 1, |mu|^2 = 3, phi = 4, lambda = 1."""
    assert float(bbp_outlier(3.0, 1 / 4)) == pytest.approx(4.3333, abs=5e-5)
    assert float(bbp_overlap(3.0, 1 / 4)) == pytest.approx(0.8974, abs=5e-5)


@pytest.mark.parametrize(("ratio", "scale"), [(0.25, 1.0), (0.5, 0.1), (2.0, 3.0)])
def test_bbp__is_met_by_a_sample_covariance(ratio: float, scale: float) -> None:
    """Three spikes in one draw: the sampling error of an outlier is about sqrt(2 / N) of it."""
    n, rng = 600, np.random.default_rng(0)
    spikes = scale * np.array([12.0, 5.0, 0.4 * np.sqrt(ratio)])
    N = int(n / ratio)
    variance = scale + np.r_[spikes, np.zeros(n - 3)]
    Y = rng.standard_normal((N, n)) * np.sqrt(variance)
    values, vectors = np.linalg.eigh(Y.T @ Y / N)
    np.testing.assert_allclose(values[::-1][:2], bbp_outlier(spikes[:2], ratio, scale), rtol=0.15)
    np.testing.assert_allclose(
        vectors[[0, 1], [-1, -2]] ** 2, bbp_overlap(spikes[:2], ratio, scale), atol=0.09
    )
    np.testing.assert_allclose(bbp_spike(values[::-1][:2], ratio, scale), spikes[:2], rtol=0.2)
    # the third one is below the threshold: it stays in the bulk, and its eigenvector is no direction
    assert float(bbp_outlier(spikes[2], ratio, scale)) == marchenko_pastur_edges(ratio, scale)[1]
    assert values[-3] == pytest.approx(marchenko_pastur_edges(ratio, scale)[1], rel=0.05)
    assert float(bbp_overlap(spikes[2], ratio, scale)) == 0
    assert vectors[2, -3] ** 2 < 0.2


@given(excess=st.floats(1e-6, 1e3), ratio=st.floats(1e-3, 50), scale=st.sampled_from([1e-8, 1.0, 1e6]))
def test_bbp__spike_undoes_outlier(excess: float, ratio: float, scale: float) -> None:
    spike = bbp_threshold(ratio, scale) * (1 + excess)
    outlier = float(bbp_outlier(spike, ratio, scale))
    assert outlier > spike
    if excess > 1e-3:  # at the threshold the map is flat: the spike has half the digits of the outlier
        assert float(bbp_spike(outlier, ratio, scale)) == pytest.approx(spike, rel=1e-9)
        assert outlier > marchenko_pastur_edges(ratio, scale)[1]
    assert 0 <= float(bbp_overlap(spike, ratio, scale)) <= 1


def test_bbp__at_the_threshold_the_outlier_is_the_edge() -> None:
    spikes = bbp_threshold(0.5, 2.0) * np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(bbp_outlier(spikes, 0.5, 2.0), marchenko_pastur_edges(0.5, 2.0)[1])
    np.testing.assert_allclose(bbp_overlap(spikes, 0.5, 2.0), 0.0, atol=1e-15)
    edge = marchenko_pastur_edges(0.5, 2.0)[1]
    np.testing.assert_array_equal(np.isnan(bbp_spike([edge, 0.9 * edge, -1.0, NAN], 0.5, 2.0)), True)
    np.testing.assert_array_equal(np.isnan(bbp_outlier([NAN, 3.0], 0.5)), [True, False])
    np.testing.assert_array_equal(np.isnan(bbp_overlap([NAN, 3.0], 0.5)), [True, False])


def test_bbp__overlap_grows_to_one_with_the_spike() -> None:
    overlap = bbp_overlap(np.geomspace(0.71, 1e6, 50), 0.5)
    assert (np.diff(overlap) > 0).all()
    assert overlap[-1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.usefixtures("nothing_computes")
def test_bbp__keeps_labels_and_stays_lazy() -> None:
    spike = xr.DataArray([3.0, 5.0], dims="spike").chunk(spike=1)
    ratio = xr.DataArray([0.25, 0.5], dims="layer", coords={"layer": ["a", "b"]})
    for function in (bbp_outlier, bbp_overlap, bbp_spike):
        result = function(spike, ratio)
        assert result.chunks is not None
        assert set(result.dims) == {"spike", "layer"}
    found = bbp_outlier(spike, ratio).compute(scheduler="synchronous")
    assert float(found.sel(layer="a")[0]) == pytest.approx(13 / 3)


def test_bbp__refuses_what_is_not_positive() -> None:
    with pytest.raises(ValueError, match="expected ratio > 0"):
        bbp_threshold(0.0)
    with pytest.raises(ValueError, match="expected scale > 0"):
        bbp_spike(3.0, 0.5, -1.0)
    with pytest.raises(ValueError, match="expected spike >= 0"):
        bbp_outlier(-1.0, 0.5)
