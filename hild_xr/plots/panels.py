"""Several plots beside each other, each under its title."""

from __future__ import annotations

from typing import TYPE_CHECKING

import holoviews as hv

if TYPE_CHECKING:
    from collections.abc import Mapping


def side_by_side(panels: Mapping[str, hv.Element | hv.Overlay], *, columns: int = 2) -> hv.Layout:
    """Put plots beside each other, such as an optimal run and a sub-optimal one.

    Panels with the same dimensions share their axes.

    Parameters
    ----------
    panels
        Plots by title.
    columns
        Panels in a row.

    Returns
    -------
    holoviews.Layout
        The panels, row by row.

    Raises
    ------
    ValueError
        If there is no panel.

    Examples
    --------
    >>> layout = side_by_side({"optimal": hv.Curve([4, 4]), "sub-optimal": hv.Curve([4, 3])})
    >>> [panel.label for panel in layout]
    ['optimal', 'sub-optimal']
    """
    if not panels:
        raise ValueError("expected at least one panel, came none")
    return hv.Layout([panel.relabel(title) for title, panel in panels.items()]).cols(columns)
