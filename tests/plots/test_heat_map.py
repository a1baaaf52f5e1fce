from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.plots.axes import HorizontalAxis
from hild_xr.plots.heat_map import MOST_PIXELS, heat_map, pixel_axis

STEPS = st.lists(st.integers(0, 100_000), min_size=1, max_size=30, unique=True).map(sorted)


def axis(positions: list[int], name: str = "step") -> HorizontalAxis:
    return HorizontalAxis(hv.Dimension(name), np.array(positions, dtype=float))


def test_pixel_axis__of_evenly_spaced_records_is_the_records() -> None:
    pixels = pixel_axis(axis([0, 10, 20, 30]))
    assert pixels.centres.tolist() == [0, 10, 20, 30]
    assert pixels.records.tolist() == [0, 1, 2, 3]
    assert pixels.ends == (-5, 35)


def test_pixel_axis__of_one_record_has_a_width() -> None:
    pixels = pixel_axis(axis([7]))
    assert pixels.records.tolist() == [0]
    assert pixels.ends == (6.5, 7.5)


@given(STEPS)
def test_pixel_axis__shows_the_nearest_record_in_every_pixel(steps: list[int]) -> None:
    pixels = pixel_axis(axis(steps))
    assert len(pixels.centres) <= MOST_PIXELS
    assert (pixels.centres[0], pixels.centres[-1]) == (steps[0], steps[-1])
    distances = np.abs(pixels.centres[:, None] - np.array(steps))
    assert distances[np.arange(len(pixels.records)), pixels.records] == pytest.approx(distances.min(axis=1))


@given(STEPS)
def test_pixel_axis__shows_every_record_that_is_a_pixel_apart(steps: list[int]) -> None:
    pixels = pixel_axis(axis(steps))
    width = (steps[-1] - steps[0]) / max(1, len(pixels.centres) - 1)
    lonely = [
        at for at, step in enumerate(steps) if all(abs(step - s) >= 2 * width for s in steps if s != step)
    ]
    assert set(lonely) <= set(pixels.records.tolist())


def test_heat_map__places_each_number_and_keeps_nan() -> None:
    x, y = pixel_axis(axis([0, 1, 4])), pixel_axis(axis([10, 20], "other"))
    values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]])
    image = heat_map(x, y, values, hv.Dimension("z"), label="title")
    assert image.label == "title"
    for i, step in enumerate([0, 1, 4]):
        for j, other in enumerate([10, 20]):
            assert image[step, other] == pytest.approx(values[i, j], nan_ok=True)
    assert image.bounds.lbrt() == (-0.5, 5, 4.5, 25)


def test_heat_map__of_one_record_can_be_made() -> None:
    one = pixel_axis(axis([3]))
    image = heat_map(
        one, pixel_axis(axis([1, 2], "other")), np.array([[0.5, 0.25]]), hv.Dimension("z"), label=""
    )
    assert image.dimension_values(2).tolist() == [0.5, 0.25]
