"""Heat-maps over records: a regular grid of pixels, each showing the nearest record.

An image is the only form that both backends and PDF files draw without seams,
and it is small. Records at irregular steps are put on a regular grid by picking;
nothing is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import holoviews as hv
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hild_xr.plots.axes import HorizontalAxis

MOST_PIXELS = 400
"""Pixels along an axis; finer steps than a pixel are not told apart."""


@dataclass(frozen=True)
class PixelAxis:
    """One axis of an image.

    Parameters
    ----------
    dimension
        Name, label and unit.
    centres
        Centre of each pixel, evenly spaced.
    records
        Index of the record that the pixel shows.
    """

    dimension: hv.Dimension
    centres: NDArray[np.float64]
    records: NDArray[np.intp]

    @property
    def ends(self) -> tuple[float, float]:
        """Outer edges of the first and the last pixel."""
        spacing = float(self.centres[1] - self.centres[0]) if len(self.centres) > 1 else 1.0
        return float(self.centres[0]) - spacing / 2, float(self.centres[-1]) + spacing / 2


def pixel_axis(axis: HorizontalAxis, most: int = MOST_PIXELS) -> PixelAxis:
    """Return the coarsest regular grid that shows every record, up to ``most`` pixels.

    Evenly spaced records are the pixels themselves.

    Parameters
    ----------
    axis
        Positions of the records.
    most
        Largest number of pixels.

    Examples
    --------
    >>> from hild_xr.plots.axes import HorizontalAxis
    >>> pixels = pixel_axis(HorizontalAxis(hv.Dimension("step"), np.array([0.0, 1.0, 4.0])))
    >>> pixels.centres, pixels.records
    (array([0., 1., 2., 3., 4.]), array([0, 1, 1, 2, 2]))
    """
    positions = axis.values
    if len(positions) == 1:
        return PixelAxis(axis.dimension, positions, np.zeros(1, dtype=np.intp))
    gaps = np.diff(positions)
    pixels = min(most, round((positions[-1] - positions[0]) / gaps.min()) + 1)
    centres = np.linspace(positions[0], positions[-1], pixels)
    records = np.searchsorted(positions[:-1] + gaps / 2, centres)
    return PixelAxis(axis.dimension, centres, records)


def heat_map(
    x: PixelAxis, y: PixelAxis, values: NDArray[np.float64], value: hv.Dimension, *, label: str
) -> hv.Image:
    """Return the image of ``values`` with shape (records along x, records along y).

    NaN stays NaN and is left blank.

    Examples
    --------
    >>> from hild_xr.plots.axes import HorizontalAxis
    >>> x, y = (pixel_axis(HorizontalAxis(hv.Dimension(d), np.arange(2.0))) for d in "xy")
    >>> image = heat_map(x, y, np.array([[1.0, 2.0], [3.0, 4.0]]), hv.Dimension("z"), label="")
    >>> float(image[1, 0])
    3.0
    """
    (left, right), (bottom, top) = x.ends, y.ends
    pixels = values[np.ix_(x.records, y.records)]
    return hv.Image(
        pixels.T[::-1].astype(np.float32),  # the first row is on top; 32 bits: half the file
        kdims=[x.dimension, y.dimension],
        vdims=[value],
        bounds=(left, bottom, right, top),
        label=label,
    )
