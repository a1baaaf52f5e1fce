"""Colours and dashes by what an element is: shared by the styles of all backends.

Lines take the palette of Okabe and Ito (2008), which people with any colour
vision can tell apart; more lines than it has colours take viridis. What is no
measured line, such as the bulk or a baseline, is grey or black.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import holoviews as hv
from bokeh.palettes import viridis

from hild_xr.plots.alignment_curves import BASELINE
from hild_xr.plots.outlier_counts import COUNT, EXPECTED
from hild_xr.plots.series import MEDIAN
from hild_xr.plots.spectrum import BULK, EDGE

Dash = Literal["solid", "dashed", "dashdot", "dotted"]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Without the yellow, which is too pale for a line on white."""

COLOUR_MAP = "viridis"
NOT_RECORDED = "#dddddd"
"""Background of heat-maps, seen where there is no number."""

_CHARACTERS, _HANDLE = 42, 6
"""Width of half a page, and of a legend's line sample with its margins, in characters."""

_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True)
class Look:
    """Colour, dash and width of the lines of one element; an area takes the colour."""

    colour: str
    dash: Dash = "solid"
    width: float = 2.0


_FIXED = {
    BULK: Look("#8c8c8c"),
    EDGE: Look("#000000", "dashed", 1.5),
    BASELINE: Look("#555555", "dotted", 2.0),
    EXPECTED: Look("#000000", "dashed", 1.5),
}


def looks(elements: Iterable[hv.Element]) -> list[Look]:
    """Return the look of each element: one colour for each label, in order of appearance.

    Medians and counts may lie on top of each other, so they differ in their dashes too.

    Examples
    --------
    >>> band, line = hv.Area([1, 2], group="Range", label="H"), hv.Curve([1, 2], group="Median", label="H")
    >>> [look.colour for look in looks([band, line, hv.Curve([1, 2], group="Edge", label="edge")])]
    ['#0072B2', '#0072B2', '#000000']
    """
    elements = list(elements)
    labels = list(dict.fromkeys(element.label for element in elements if element.group not in _FIXED))
    colours = OKABE_ITO if len(labels) <= len(OKABE_ITO) else viridis(len(labels))
    dashed = {element.label for element in elements if element.group in (MEDIAN, COUNT)}
    by_label = {
        label: Look(colours[at], _DASHES[at % len(_DASHES)] if label in dashed else "solid")
        for at, label in enumerate(labels)
    }
    return [_FIXED.get(element.group) or by_label[element.label] for element in elements]


def title_of(overlay: hv.Overlay) -> str:
    """Return the title; an overlay without one would lend the label that all its elements share."""
    return "" if {element.label for element in overlay} == {overlay.label} else str(overlay.label)


def legend_columns(elements: Iterable[hv.Element]) -> int:
    """Return in how many columns the legend fits the width of half a page.

    Examples
    --------
    >>> legend_columns(hv.Curve([1, 2], label=label) for label in ("λ₁", "λ₂", "λ₃"))
    3
    >>> legend_columns(hv.Curve([1, 2], label=label) for label in ("training loss", "test loss"))
    2
    """
    labels = {element.label for element in elements}
    wide_enough = _CHARACTERS // (max(map(len, labels)) + _HANDLE)
    return max(1, min(len(labels), wide_enough))


def ticks_of_eigenpairs(number: int) -> list[int]:
    """Return at most ten whole numbers from 1 on for an axis of eigenpairs.

    Examples
    --------
    >>> ticks_of_eigenpairs(3), ticks_of_eigenpairs(25)
    ([1, 2, 3], [1, 4, 7, 10, 13, 16, 19, 22, 25])
    """
    return list(range(1, number + 1, -(-number // 10)))
