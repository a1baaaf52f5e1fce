from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features.classes import (
    ClassIndex,
    Weighting,
    class_index,
    label_values,
    require_weighting,
    scatter_kernel,
    scatter_traces_kernel,
    whitened_trace_kernel,
)


def dense(features: np.ndarray, labels: np.ndarray, weighting: Weighting) -> tuple[np.ndarray, np.ndarray]:
    """The two scatter matrices as their definition says, class by class."""
    classes = np.unique(labels)
    weights = [1 / len(classes) if weighting == "class" else np.mean(labels == c) for c in classes]
    means = [features[labels == c].mean(axis=0) for c in classes]
    centre = sum(w * m for w, m in zip(weights, means, strict=True))
    within = np.zeros((features.shape[1],) * 2)
    between = within.copy()
    for c, w, m in zip(classes, weights, means, strict=True):
        own = features[labels == c] - m
        within += w * own.T @ own / len(own)
        between += w * np.outer(m - centre, m - centre)
    return within, between


@pytest.mark.parametrize("weighting", ["class", "sample"])
@given(seed=st.integers(0, 10_000), d=st.integers(1, 9))
def test_scatter__is_that_of_the_dense_matrices(weighting: Weighting, seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1, 2, 3], rng.integers(0, 4, 20)])
    h = rng.standard_normal((2, 24, d)) * rng.uniform(0.1, 3, d) + 5 * rng.standard_normal(d)
    index = ClassIndex(labels, np.arange(4))
    scatter = scatter_kernel(h, index, weighting)
    traces = scatter_traces_kernel(scatter, index, weighting)
    whitened = whitened_trace_kernel(scatter, index, weighting, 1e-9)
    for k in range(2):
        within, between = dense(h[k], labels, weighting)
        assert traces[0][k] == pytest.approx(np.trace(within), rel=1e-9)
        assert traces[1][k] == pytest.approx(np.trace(between), rel=1e-9)
        expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-12, hermitian=True))
        assert whitened[k] == pytest.approx(expected, rel=1e-5)


def test_weightings__agree_for_classes_of_one_size_and_differ_else() -> None:
    h = np.random.default_rng(0).standard_normal((1, 12, 3))
    for labels, same in ((np.repeat([0, 1, 2], 4), True), (np.repeat([0, 1, 2], [2, 3, 7]), False)):
        index = ClassIndex(labels, np.arange(3))
        traces = [scatter_traces_kernel(scatter_kernel(h, index, w), index, w) for w in ("class", "sample")]
        assert np.allclose(traces[0], traces[1], rtol=1e-12) == same


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whitened_trace__of_class_means_that_differ_by_rounding_only_is_undefined(dtype: type) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, 3))
    h = np.concatenate([base, base[rng.permutation(5)]]).astype(dtype) + dtype(100)
    index = ClassIndex(np.repeat([0, 1], 5), np.arange(2))
    scatter = scatter_kernel(h, index, "class")
    assert np.isnan(whitened_trace_kernel(scatter, index, "class", 1e-9))
    moved = scatter_kernel(h + np.repeat([0, 1], 5)[:, None].astype(dtype), index, "class")
    assert np.isfinite(whitened_trace_kernel(moved, index, "class", 1e-9))


def test_whitened_trace__leaves_out_a_direction_in_which_means_differ_by_rounding_only() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, 3))
    orders = [np.arange(5), rng.permutation(5), rng.permutation(5)]
    h = np.concatenate([base[order] for order in orders]) + 1e8
    h[10:, 0] += 4
    index = ClassIndex(np.repeat([0, 1, 2], 5), np.arange(3))
    found = whitened_trace_kernel(scatter_kernel(h, index, "class"), index, "class", 1e-15)
    # along the one direction left the means are at 0, 0 and 4: their variance is 32/9
    assert float(found) == pytest.approx(base[:, 0].var() / (32 / 9), rel=1e-4)


def test_class_index__numbers_the_labels_that_occur() -> None:
    a = xr.DataArray(np.zeros((4, 2)), dims=("sample", "unit"))
    index = class_index(a, xr.DataArray(["b", "a", "b", "c"], dims="sample"))
    assert index.classes.tolist() == ["a", "b", "c"]
    assert index.positions.tolist() == [1, 0, 1, 2]
    np.testing.assert_allclose(index.averaging.sum(axis=1), 1)
    assert index.weights("sample").tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (xr.DataArray([0, 1, 0], dims="step"), ValueError, r"the dim \('sample',\)"),
        (xr.DataArray([0, 1], dims="sample"), ValueError, "differ along dim 'sample'"),
        (xr.DataArray([1, 1, 1], dims="sample"), ValueError, "at least two classes"),
        (xr.DataArray([0.0, np.nan, 1.0], dims="sample"), TypeError, "dtype float64"),
        (np.array([0, 1, 0]), TypeError, "DataArray as labels, came ndarray"),
    ],
)
def test_class_index__refuses_bad_labels(labels: xr.DataArray, error: type[Exception], message: str) -> None:
    a = xr.DataArray(np.zeros((3, 2)), dims=("sample", "unit"))
    with pytest.raises(error, match=message):
        class_index(a, labels)


def test_class_index__refuses_bad_activations() -> None:
    labels = xr.DataArray([0, 1], dims="sample")
    with pytest.raises(TypeError, match="complex"):
        class_index(xr.DataArray([[1j], [2j]], dims=("sample", "unit")), labels)
    with pytest.raises(ValueError, match=r"missing \['unit'\]"):
        class_index(xr.DataArray([[1.0], [2.0]], dims=("sample", "in")), labels)
    with pytest.raises(ValueError, match="at least one unit"):
        class_index(xr.DataArray(np.zeros((2, 0)), dims=("sample", "unit")), labels)


def test_label_values__and_weighting_are_checked() -> None:
    assert label_values(xr.DataArray([True, False], dims="sample")).tolist() == [True, False]
    with pytest.raises(ValueError, match="'class' or 'sample', came 'both'"):
        require_weighting("both")
