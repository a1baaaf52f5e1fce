from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hild_xr.plots.axes import HorizontalAxis
from hild_xr.plots.series import curve, extremes, spread

NUMBERS = st.floats(-1e6, 1e6) | st.just(np.nan)


def axis(number: int) -> HorizontalAxis:
    return HorizontalAxis(hv.Dimension("step"), np.arange(float(number)))


def test_curve__keeps_gaps_and_shows_records_between_gaps_as_points() -> None:
    values = np.array([7.0, np.nan, 1.0, 2.0, np.nan, 5.0])
    line, points = curve(axis(6), values, hv.Dimension("y"), label="a", group="Line")
    assert np.array_equal(line.dimension_values("y"), values, equal_nan=True)
    assert points.dimension_values("step").tolist() == [0.0, 5.0]
    assert points.dimension_values("y").tolist() == [7.0, 5.0]
    assert (line.group, line.label, points.label) == ("Line", "a", "a")


def test_curve__of_a_single_record_is_seen() -> None:
    _, points = curve(axis(1), np.array([3.0]), hv.Dimension("y"), label="a", group="Line")
    assert points.dimension_values("y").tolist() == [3.0]


def test_curve__without_gaps_is_one_element() -> None:
    assert len(curve(axis(2), np.array([1.0, 2.0]), hv.Dimension("y"), label="a", group="Line")) == 1


@given(arrays(np.float64, (3, 2, 4), elements=NUMBERS))
def test_spread__is_median_and_extremes_of_what_is_there(values: np.ndarray) -> None:
    found = spread(axis(4), xr.DataArray(values, dims=("seed", "out", "step")), hv.Dimension("y"), label="a")
    band, line = found[:2]
    for at in range(4):
        there = [number for number in values[..., at].ravel().tolist() if number == number]
        expected = [min(there), np.median(there), max(there)] if there else [np.nan] * 3
        shown = [
            band.dimension_values("y_lower")[at],
            line.dimension_values("y")[at],
            band.dimension_values("y")[at],
        ]
        assert shown == pytest.approx(expected, nan_ok=True)


def test_spread__over_nothing_is_the_line_alone() -> None:
    (line,) = spread(axis(2), xr.DataArray([[1.0, 2.0]], dims=("seed", "step")), hv.Dimension("y"), label="a")
    assert line.dimension_values("y").tolist() == [1.0, 2.0]


def test_extremes__takes_infinities_for_missing() -> None:
    lower, upper = extremes(np.array([[np.inf, -np.inf], [1.0, np.nan]]))
    assert np.array_equal(lower, [1.0, np.nan], equal_nan=True)
    assert np.array_equal(upper, [1.0, np.nan], equal_nan=True)
