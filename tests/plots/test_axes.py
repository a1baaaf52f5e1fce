from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from hild_xr.plots.axes import (
    HorizontalAxis,
    LogDimension,
    decades_axis,
    horizontal_axis,
    value_dimension,
)


def test_horizontal_axis__shows_steps_where_they_are(bulk_edge: xr.DataArray) -> None:
    axis = horizontal_axis(bulk_edge)
    assert axis.values.tolist() == bulk_edge.step.values.tolist()
    assert (axis.dimension.name, axis.dimension.pprint_label) == ("step", "training step")
    assert not isinstance(axis.dimension, LogDimension)


def test_horizontal_axis__counts_from_one_on_a_logarithmic_axis_and_says_so(bulk_edge: xr.DataArray) -> None:
    axis = horizontal_axis(bulk_edge, log=True)
    assert isinstance(axis.dimension, LogDimension)
    assert axis.dimension.label == "1 + training step"
    assert axis.values.tolist() == (bulk_edge.step.values + 1).tolist()


def test_horizontal_axis__takes_another_coordinate_with_its_label_and_unit(bulk_edge: xr.DataArray) -> None:
    seconds = bulk_edge.assign_coords(clock=("step", 2.0 * bulk_edge.time.values))
    seconds["clock"].attrs |= {"long_name": "wall time", "units": "s"}
    axis = horizontal_axis(seconds, "clock")
    assert axis.dimension.pprint_label == "wall time (s)"
    assert axis.values.tolist() == seconds.clock.values.tolist()


def test_horizontal_axis__refuses_a_logarithm_of_time_zero(bulk_edge: xr.DataArray) -> None:
    with pytest.raises(ValueError, match="positive values of 'time'"):
        horizontal_axis(bulk_edge, "time", log=True)
    later = horizontal_axis(bulk_edge.isel(step=slice(1, None)), "time", log=True)
    assert isinstance(later.dimension, LogDimension)
    assert later.values[0] == bulk_edge.time.values[1]


def test_horizontal_axis__refuses_an_array_without_the_coordinate() -> None:
    with pytest.raises(ValueError, match="coordinate 'step' along 'step', came none; use assign_coords"):
        horizontal_axis(xr.DataArray([1.0, 2.0], dims="step"))


@pytest.mark.parametrize("steps", [[5, 1], [1, 1], []])
def test_horizontal_axis__refuses_steps_that_do_not_increase(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing values of 'step'"):
        horizontal_axis(xr.DataArray(np.zeros(len(steps)), dims="step", coords={"step": steps}))


def test_decades_axis__leaves_a_linear_axis_alone() -> None:
    axis = HorizontalAxis(hv.Dimension("step"), np.array([0.0, 5.0]))
    assert decades_axis(axis) is axis


def test_decades_axis__names_logarithm_and_unit() -> None:
    axis = HorizontalAxis(LogDimension("clock", label="wall time", unit="s"), np.array([0.1, 10.0]))
    decades = decades_axis(axis)
    assert decades.values == pytest.approx([-1, 1])
    assert decades.dimension.pprint_label == "log₁₀(wall time (s))"


def test_value_dimension__takes_label_and_unit_from_the_registry(eigenvalues: xr.DataArray) -> None:
    assert value_dimension(eigenvalues, "eigenvalue").pprint_label == "eigenvalue"
    metres = eigenvalues.assign_attrs(long_name="height", units="m")
    assert value_dimension(metres, "eigenvalue").pprint_label == "height (m)"


def test_value_dimension__falls_back_to_the_name_in_words() -> None:
    assert value_dimension(xr.DataArray(1.0, name="train_loss"), "y").label == "train loss"
    assert value_dimension(xr.DataArray(1.0), "y").label == "value"


@pytest.mark.parametrize("smallest", [0.0, -0.5])
def test_value_dimension__refuses_to_hide_numbers_on_a_logarithmic_axis(smallest: float) -> None:
    array = xr.DataArray([smallest, 1.0, np.nan], dims="eig", attrs={"long_name": "eigenvalue"})
    with pytest.raises(ValueError, match="positive values for a logarithmic axis"):
        value_dimension(array, "eigenvalue", log=True)
    assert isinstance(value_dimension(array.where(array > 0), "eigenvalue", log=True), LogDimension)


def test_log_dimension__survives_what_holoviews_does_to_dimensions() -> None:
    x, y = LogDimension("x"), LogDimension("y")
    curve = hv.Curve(([1.0, 2.0], [3.0, 4.0]), x, y, label="a")
    overlay = hv.Overlay([curve.clone()]).relabel("title")
    for element in (curve.relabel("b"), overlay.get(0), overlay.clone().get(0)):
        assert [type(dimension) for dimension in element.dimensions()] == [LogDimension, LogDimension]
