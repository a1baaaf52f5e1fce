from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.plots import angle_map


def test_angle_map__shows_each_pair_of_steps_in_degrees(angles: xr.DataArray) -> None:
    evenly = angles.sel(step=range(100, 1001, 100), step_=range(100, 1001, 100))
    image = angle_map(evenly)
    assert image.vdims[0].pprint_label == "principal angle (°)"
    assert image.vdims[0].range == (0, 90)
    for step in (100, 500, 1000):
        for other in (100, 300):
            expected = np.degrees(float(evenly.sel(step=step, step_=other)))
            assert image[step, other] == pytest.approx(expected, rel=1e-6)


def test_angle_map__tells_the_two_steps_apart(angles: xr.DataArray) -> None:
    evenly = angles.sel(step=[100, 200, 300], step_=[100, 200, 300])
    lopsided = evenly.where((evenly.step == 100) & (evenly.step_ == 300), 0.0)
    image = angle_map(lopsided.transpose("step_", "step"))
    assert image[100, 300] > 0
    assert image[300, 100] == 0


def test_angle_map__of_irregular_steps_shows_the_nearest_record(angles: xr.DataArray) -> None:
    image = angle_map(angles)
    steps = image.dimension_values("step", expanded=False)
    nearest = angles.sel(step=steps, step_=steps, method="nearest")
    shown = image.dimension_values("angle", flat=False).T
    between = np.abs(steps[:, None] - angles.step.values).min(axis=1)
    clear = between < 0.49 * (steps[1] - steps[0])  # elsewhere a tie may be broken either way
    assert clear.sum() > len(angles.step) / 2
    assert shown[np.ix_(clear, clear)] == pytest.approx(
        np.degrees(nearest.values[np.ix_(clear, clear)]), abs=1e-4
    )


def test_angle_map__on_logarithmic_axes_names_the_logarithm(angles: xr.DataArray) -> None:
    image = angle_map(angles, log_x=True)
    assert [dimension.label for dimension in image.kdims] == [
        "log₁₀(1 + training step)",
        "other log₁₀(1 + training step)",
    ]
    for dimension in image.kdims:
        ends = image.dimension_values(dimension, expanded=False)[[0, -1]]
        assert ends == pytest.approx([0, np.log10(1001)])


def test_angle_map__takes_degrees_as_they_are(angles: xr.DataArray) -> None:
    degrees = (angles * (180 / np.pi)).assign_attrs(units="degree", long_name="principal angle")
    assert np.array_equal(
        angle_map(degrees).dimension_values("angle"), angle_map(angles).dimension_values("angle")
    )


def test_angle_map__refuses_angles_without_units(angles: xr.DataArray) -> None:
    with pytest.raises(ValueError, match="came None; set it"):
        angle_map(angles.drop_attrs())


def test_angle_map__refuses_degrees_that_call_themselves_radians(angles: xr.DataArray) -> None:
    with pytest.raises(ValueError, match="angles in degrees between 0 and 90"):
        angle_map((angles * (180 / np.pi)).assign_attrs(units="rad"))


def test_angle_map__asks_for_one_angle(angles: xr.DataArray) -> None:
    with pytest.raises(ValueError, match=r"isel\(angle=0\)"):
        angle_map(angles.expand_dims(angle=[0, 1]))


def test_angle_map__leaves_missing_records_blank(angles: xr.DataArray) -> None:
    evenly = angles.sel(step=[100, 200, 300], step_=[100, 200, 300])
    image = angle_map(evenly.where((evenly.step != 200) & (evenly.step_ != 200)))
    assert np.isnan(image[200, 300])
    assert image[100, 300] > 0
