from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import active_units, feature_rank, sparsity
from hild_xr.analysis.features.feature_rank import active_units_kernel, feature_rank_kernel

NAN = np.nan


def labelled(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("sample", "unit"))


def low_rank(rank: int, noise: float, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((120, rank)) @ rng.standard_normal((rank, 30))
    return (low + noise * rng.standard_normal((120, 30))).astype(dtype)


@pytest.mark.parametrize("center", ["features", "samples", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_feature_rank__of_three_directions_and_a_little_noise_is_three(center: str, dtype: str) -> None:
    assert int(feature_rank(labelled(low_rank(3, 1e-3, dtype)), center=center)) == 3


def test_feature_rank__with_all_of_the_squares_is_the_rank() -> None:
    assert int(feature_rank(labelled(low_rank(3, 0.0)), part=1.0, center="none")) == 3
    assert int(feature_rank(labelled(low_rank(3, 1e-3)), part=1.0, center="none")) == 30


@given(seed=st.integers(0, 999), part=st.sampled_from([0.5, 0.9, 0.99]))
def test_feature_rank__is_that_of_the_code_released_with_the_paper(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((15, 8)) * np.exp(rng.uniform(-3, 0, 8)) + rng.standard_normal(8)
    for center, centred in (
        ("none", phi),
        ("samples", phi - phi.mean(1, keepdims=True)),
        ("features", phi - phi.mean(0)),
    ):
        s2 = np.linalg.svd(centred)[1] ** 2
        expected = np.sum(np.cumsum(s2) <= part * np.sum(s2)) + 1
        assert int(feature_rank_kernel(phi, part=part, center=center)) == expected


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-200, 3.0, 1e200]))
def test_feature_rank__does_not_change_under_rotation_scale_and_shift(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((12, 5)) * 2.0 ** -np.arange(5)
    Q, R = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 12))
    part = 0.9
    assert feature_rank_kernel(scale * (phi @ Q), part=part) == feature_rank_kernel(phi, part=part)
    assert feature_rank_kernel(R @ phi, part=part, center="none") == feature_rank_kernel(
        phi, part=part, center="none"
    )
    shifted = phi + rng.standard_normal(5)
    assert feature_rank_kernel(shifted, part=part) == feature_rank_kernel(phi, part=part)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_feature_rank__of_features_that_do_not_depend_on_the_sample_is_zero(dtype: str) -> None:
    constant = np.tile(np.random.default_rng(0).standard_normal(7) * 1e4, (50, 1)).astype(dtype)
    assert int(feature_rank_kernel(constant)) == 0
    assert int(feature_rank_kernel(constant, center="none")) == 1
    assert int(feature_rank_kernel(0 * constant, center="none")) == 0


def test_active_units__are_counted_as_by_loops() -> None:
    rng = np.random.default_rng(0)
    phi = np.maximum(rng.standard_normal((3, 40, 25)) - np.linspace(0, 3.5, 25), 0.0)
    found = active_units(xr.DataArray(phi, dims=("step", "sample", "unit")))
    assert found.dims == ("step", "fraction")
    assert found["fraction"].values.tolist() == [0.0, 0.01, 0.05, 0.1]
    for record, counts in zip(phi, found.values, strict=True):
        threshold = record.max() / 20
        expected = [
            sum(sum(a > threshold for a in unit) > fraction * 40 for unit in record.T)
            for fraction in (0.0, 0.01, 0.05, 0.1)
        ]
        assert counts.tolist() == expected
    assert len(set(found.values.ravel().tolist())) > 3


def test_active_units__of_a_layer_that_is_never_positive_are_none() -> None:
    assert active_units(labelled(-np.ones((4, 3)))).values.tolist() == [0, 0, 0, 0]
    assert float(sparsity(labelled(-np.ones((4, 3))))) == 1.0


def test_sparsity__is_the_fraction_of_activations_that_are_not_above_the_threshold() -> None:
    phi = labelled(np.array([[0.0, 1.0, 2.0], [0.0, 0.05, -3.0]]))
    assert float(sparsity(phi)) == pytest.approx(3 / 6)
    assert float(sparsity(phi, threshold=0.1)) == pytest.approx(4 / 6)
    assert float(sparsity(phi, threshold=0.5)) == pytest.approx(5 / 6)


def test_missing_activations__are_marked_and_the_others_are_not() -> None:
    phi = np.abs(np.random.default_rng(0).standard_normal((2, 6, 4)))
    phi[0, 2, 1] = NAN
    array = xr.DataArray(phi, dims=("step", "sample", "unit"))
    assert feature_rank(array).values.tolist() == [-1, 4]
    assert active_units(array, fractions=[0.0]).values.tolist() == [[-1], [4]]
    np.testing.assert_array_equal(sparsity(array), [NAN, 0.0])


def test_active_units_kernel__takes_stacks_of_any_shape() -> None:
    phi = np.random.default_rng(0).standard_normal((2, 1, 3, 6, 4))
    assert active_units_kernel(phi).shape == (2, 1, 3, 4)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (feature_rank, {"part": 0.0}, "expected part in"),
        (feature_rank, {"part": 1.1}, "expected part in"),
        (feature_rank, {"center": "units"}, "expected center"),
        (feature_rank, {"unit_dim": "neuron"}, "missing"),
        (active_units, {"fractions": []}, "expected fractions"),
        (active_units, {"fractions": [1.0]}, "expected fractions"),
        (active_units, {"threshold": 1.0}, "expected threshold"),
        (sparsity, {"threshold": -0.1}, "expected threshold"),
    ],
)
def test_functions__refuse_bad_arguments(function: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(labelled(np.ones((3, 2))), **options)


@pytest.mark.parametrize("function", [feature_rank, active_units, sparsity])
def test_functions__refuse_complex_and_empty_activations(function: object) -> None:
    with pytest.raises(TypeError, match="complex128"):
        function(labelled(np.ones((3, 2)) * 1j))
    with pytest.raises(ValueError, match="at least one value"):
        function(labelled(np.ones((0, 2))))
