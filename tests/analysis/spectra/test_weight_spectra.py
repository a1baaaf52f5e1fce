from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import xarray as xr

from hild_xr.analysis import weight_spectrum
from hild_xr.analysis.spectra.weight_spectra import weight_spectrum_kernel
from hild_xr.analysis.theory import marchenko_pastur_edges

NAN = np.nan


def labelled(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("step", "out", "in")[-np.ndim(values) :])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def planted(m: int, n: int, strengths: list[float], seed: int = 0) -> np.ndarray:
    """Noise of variance 1 plus directions of the strengths, those of the threshold of detection being 1."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, len(strengths))))[0] for size in (m, n))
    spikes = (U * np.array(strengths) * (m * n) ** 0.25) @ V.T
    return np.asarray(rng.standard_normal((m, n)) + spikes)


def test_edges__of_800_by_400_are_those_of_the_law_and_noise_keeps_to_them() -> None:
    W = noise(800, 400) / 800**0.5
    found = weight_spectrum(labelled(W), variance=1 / 800)
    lower, upper = (float(found[f"singular_bulk_{side}"]) ** 2 for side in ("lower", "upper"))
    assert (lower, upper) == pytest.approx((0.0858, 2.9142), abs=5e-5)
    assert (lower, upper) == pytest.approx(marchenko_pastur_edges(0.5), rel=1e-12)
    s2 = found["singular_values"].values ** 2
    assert (s2[-1], s2[0]) == pytest.approx((lower, upper), rel=0.05)
    assert int(found["spike_count"]) == 0
    assert float(found["spike_threshold"]) ** 2 == pytest.approx(upper, rel=0.05)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25), (1, 6), (6, 1)])
def test_singular_values__are_those_of_scipy(shape: tuple[int, int]) -> None:
    W = noise(*shape)
    found = weight_spectrum(labelled(W))["singular_values"]
    assert found.dims == ("singular",)
    np.testing.assert_allclose(found, scipy.linalg.svdvals(W), rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60), (50, 50), (100, 10)])
def test_spikes__of_noise_are_as_rare_as_the_quantile_says(m: int, n: int) -> None:
    W = labelled(noise(1000, m, n))
    for quantile, fraction in ((2.0234, 0.01), (0.4501, 0.10)):
        found = weight_spectrum(W, variance=1.0, quantile=quantile)["spike_count"]
        assert float((found > 0).mean()) == pytest.approx(fraction, abs=4 * (fraction / 1000) ** 0.5)


@pytest.mark.parametrize(("m", "n"), [(400, 200), (200, 400), (300, 300)])
@pytest.mark.parametrize("variance", [None, 1.0])
def test_spikes__above_the_threshold_of_detection_are_counted_and_those_below_are_not(
    m: int, n: int, variance: float | None
) -> None:
    W = planted(m, n, [5.0, 3.0, 2.0, 0.5, 0.4])
    found = weight_spectrum(labelled(W), variance=variance)
    assert int(found["spike_count"]) == 3
    strengths = np.array([5.0, 3.0, 2.0])
    # squared singular value of a spike of strength c (mn)^(1/4): Benaych-Georges and Nadakuditi 2012
    expected = (m * n) ** 0.5 * (strengths**2 + strengths**-2) + m + n
    np.testing.assert_allclose(found["singular_values"][:3] ** 2, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("m", "n", "spikes"), [(400, 200, 0), (400, 200, 20), (200, 400, 20), (300, 300, 30)]
)
def test_variance__is_found_from_the_bulk_whatever_the_spikes(m: int, n: int, spikes: int) -> None:
    W = 0.3 * planted(m, n, list(np.linspace(3, 9, spikes))) if spikes else 0.3 * noise(m, n)
    found = weight_spectrum(labelled(W))
    assert float(found["entry_variance"]) / 0.09 == pytest.approx(1, abs=0.02)
    assert int(found["spike_count"]) == spikes
    if spikes:
        assert np.var(W) > 2 * 0.09  # which the variance of all entries is not


def test_variance__beside_strong_spikes_is_that_of_noise_with_less_rows_and_columns() -> None:
    W = np.stack([planted(240, 80, list(np.linspace(30, 90, 25)), seed) for seed in range(40)])
    found = weight_spectrum(labelled(W))
    assert (found["spike_count"] == 25).all()
    assert float(found["entry_variance"].mean()) == pytest.approx(1.0, abs=0.01)


def test_variance__of_small_matrices_is_right_on_average() -> None:
    found = weight_spectrum(labelled(noise(2000, 20, 12)))["entry_variance"]
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)


def test_spectrum__of_a_convolution_is_that_of_its_unfolded_weight() -> None:
    W = noise(2, 8, 3, 2, 2)
    conv = xr.DataArray(W, dims=("step", "out", "in", "kh", "kw"))
    xr.testing.assert_identical(weight_spectrum(conv), weight_spectrum(labelled(W.reshape(2, 8, 12))))
    other = weight_spectrum(conv, row_dims=["out", "kh"], column_dims=["in", "kw"])
    unfolded = W.transpose(0, 1, 3, 2, 4).reshape(2, 16, 6)
    np.testing.assert_allclose(other["singular_values"], np.linalg.svd(unfolded)[1], rtol=1e-12)


def test_spectrum__does_not_change_under_rotation_and_transposition() -> None:
    W = planted(40, 30, [3.0])
    Q = np.linalg.qr(noise(40, 40, seed=1))[0]
    expected = weight_spectrum(labelled(W))
    for changed in (Q @ W, W.T, W[::-1, ::-1]):
        xr.testing.assert_allclose(weight_spectrum(labelled(changed)), expected, rtol=1e-10)


def test_spectrum__of_missing_weights_is_marked_and_the_others_are_not() -> None:
    W = noise(3, 20, 10)
    W[1, 3, 2] = NAN
    found = weight_spectrum(labelled(W))
    assert (found["spike_count"].values >= 0).tolist() == [True, False, True]
    for name in ("entry_variance", "singular_bulk_upper", "spike_threshold"):
        assert found[name].isnull().values.tolist() == [False, True, False]
    alone = weight_spectrum(labelled(W[2]))
    xr.testing.assert_allclose(found.isel(step=2), alone, rtol=1e-14)


def test_spectrum__takes_a_variance_for_each_record() -> None:
    W = np.stack([noise(40, 30)] * 3)
    found = weight_spectrum(labelled(W), variance=xr.DataArray([1.0, 0.25, NAN], dims="step"))
    assert found["spike_count"].values[0] == 0
    assert found["spike_count"].values[1] > 5
    assert found["spike_count"].values[2] == -1
    np.testing.assert_allclose(found["spike_threshold"][0], 2 * found["spike_threshold"][1], rtol=1e-14)


def test_spectrum__of_zero_weights_has_no_spikes() -> None:
    found = weight_spectrum(labelled(np.zeros((6, 4))))
    assert int(found["spike_count"]) == 0
    assert float(found["entry_variance"]) == 0.0


def test_kernel__takes_stacks_of_any_shape() -> None:
    values, *others = weight_spectrum_kernel(noise(2, 1, 3, 7, 5))
    assert values.shape == (2, 1, 3, 5)
    assert all(found.shape == (2, 1, 3) for found in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": -1.0}, "variance of at least 0"),
        ({"variance": labelled(np.ones((3, 2)))}, "one variance for a matrix"),
        ({"row_dims": "in"}, "rows and columns of different dims"),
        ({"row_dims": []}, "rows and columns of different dims"),
        ({"row_dims": "unit"}, "missing"),
        ({"column_dims": ["kh"]}, "missing"),
    ],
)
def test_spectrum__refuses_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_spectrum(labelled(np.ones((3, 2))), **options)


def test_spectrum__refuses_biases_complex_and_empty_weights() -> None:
    with pytest.raises(ValueError, match="rows and columns of different dims"):
        weight_spectrum(xr.DataArray(np.ones((2, 3)), dims=("step", "out")))
    with pytest.raises(TypeError, match="complex"):
        weight_spectrum(labelled(np.ones((3, 2)) * 1j))
    with pytest.raises(ValueError, match="at least one value"):
        weight_spectrum(labelled(np.ones((3, 0))))
