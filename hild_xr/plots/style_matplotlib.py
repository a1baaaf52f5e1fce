"""The look of the plots in papers: matplotlib.

Importing this module loads HoloViews' matplotlib backend.
"""

from __future__ import annotations

from typing import Any

import holoviews as hv
import holoviews.plotting.mpl  # options can be set only for a backend that is loaded
import matplotlib as mpl
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hild_xr.plots.axes import LogDimension
from hild_xr.plots.backends import current_backend
from hild_xr.plots.palette import (
    COLOUR_MAP,
    NOT_RECORDED,
    Look,
    legend_columns,
    looks,
    ticks_of_eigenpairs,
    title_of,
)
from hild_xr.plots.series import RANGE
from hild_xr.plots.spectrum import BULK
from hild_xr.variables import DIM_EIG

BACKEND = "matplotlib"
_COPY = {"backend": BACKEND, "clone": True}  # without clone, opts() changes the plot it is given

INCHES = (5.0, 3.2)
"""Width and height of one panel; a column of text is about 3.3 inches wide, a page 6.5."""

RC: dict[Any, Any] = {
    "pdf.fonttype": 42,  # text stays text: TrueType in PDF, which journals ask for
    "svg.fonttype": "none",
    "svg.hashsalt": "hild-xr",  # the same figure gives the same file
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}
"""Settings under which a styled plot is rendered and written."""

_FONT_SIZES = {"title": 11, "labels": 10, "ticks": 9, "legend": 9, "clabel": 10, "cticks": 9}
_LEGENDS = {
    "right": {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0},
    "below": {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.2),
        "borderaxespad": 0.0,
        "columnspacing": 1.2,
    },
}


def style(plot: Any) -> Any:
    """Return the plot with the options that matplotlib draws it by.

    Parameters
    ----------
    plot
        What a builder of :mod:`hild_xr.plots` returned: an element, an overlay
        or a layout of them. It is left as it is.

    Returns
    -------
    holoviews object
        A copy with options, for a notebook after ``hv.extension("matplotlib")``.

    Raises
    ------
    TypeError
        If it is nothing of the kind.

    Examples
    --------
    >>> styled = style(hv.Curve([1, 2], label="loss"))
    >>> hv.Store.lookup_options("matplotlib", styled, "style").kwargs["linewidth"]
    1.6
    """
    with current_backend(BACKEND):
        return _layout(plot) if isinstance(plot, hv.Layout) else _panel(plot, legend="right")


def render(plot: Any) -> Figure:
    """Return the styled plot as a matplotlib figure.

    Write it under the settings :data:`RC`, as
    :func:`hild_xr.report.save_figures` does.

    Parameters
    ----------
    plot
        As for :func:`style`.

    Returns
    -------
    matplotlib.figure.Figure
        The figure; pyplot does not know it.

    Raises
    ------
    TypeError
        As :func:`style`.

    Examples
    --------
    >>> render(hv.Curve([1, 2], label="loss")).axes[0].get_title()
    'loss'
    """
    styled = style(plot)
    with current_backend(BACKEND), mpl.rc_context(RC):
        figure: Figure = hv.render(styled, backend=BACKEND)
    return figure


def _layout(plot: hv.Layout) -> hv.Layout:
    panels = plot.clone([_panel(panel, legend="below") for panel in plot])
    rows, columns = panels.shape
    return panels.opts(
        fig_inches=(columns * INCHES[0] * 0.9, rows * INCHES[1] * 0.9),
        # matplotlib makes no room for the colour bars by itself
        hspace=0.75 if any(isinstance(panel, hv.Image) for panel in panels) else 0.3,
        vspace=0.6,
        sublabel_format="",
        shared_axes=True,
        fig_rcparams=RC,
        **_COPY,
    )


def _panel(plot: Any, *, legend: str) -> Any:
    if isinstance(plot, hv.Overlay):
        drawn = [_series(element, look) for element, look in zip(plot, looks(plot), strict=True)]
        opts = dict(_LEGENDS[legend])
        if legend == "below":
            opts["ncols"] = legend_columns(plot)
        return hv.Overlay(drawn, label=plot.label).opts(
            **_frame(drawn[0], title_of(plot)), legend_position="inner", legend_opts=opts, **_COPY
        )
    if isinstance(plot, hv.Image):
        return _image(plot)
    if isinstance(plot, hv.Element):
        (look,) = looks([plot])
        return _series(plot, look).opts(**_frame(plot, plot.label), **_COPY)
    raise TypeError(
        "expected an element, an overlay or a layout from a builder of hild_xr.plots, "
        f"came {type(plot).__name__}"
    )


def _series(element: hv.Element, look: Look) -> hv.Element:
    """Give one curve, area or set of points its look."""
    # an overlay takes its grid from its elements, and only from them
    options: dict[str, Any] = {"show_grid": True}
    if isinstance(element, hv.Area):
        # a bulk of which little is recorded is a thin band, or none: its outline keeps it in sight
        edge = to_rgba(look.colour, 0.8) if element.group == BULK else "none"
        options |= {"facecolor": to_rgba(look.colour, 0.25), "edgecolor": edge, "linewidth": 0.8}
        options["show_legend"] = element.group != RANGE  # a band around a line is named by the line
    elif isinstance(element, hv.Scatter):
        options |= {"color": look.colour, "s": 14}
    else:
        options |= {"color": look.colour, "linewidth": 0.8 * look.width, "linestyle": look.dash}
    return element.opts(**options, **_COPY)


def _frame(element: hv.Element, title: str) -> dict[str, Any]:
    """Options of axes, grid, fonts and size, by the dimensions of an element."""
    x, y = element.dimensions()[:2]
    options: dict[str, Any] = {
        "title": title,
        "fontsize": _FONT_SIZES,
        "fig_inches": INCHES,
        "fig_rcparams": RC,
        "aspect": "auto",  # on a logarithmic axis HoloViews' own choice collapses the frame
        "show_grid": True,
        "logx": isinstance(x, LogDimension),
        "logy": isinstance(y, LogDimension),
        "framewise": True,
        "hooks": [_grid_behind],
    }
    if y.type is int:
        options["hooks"] = [_grid_behind, _count_by_ones]
    if y.range == (0, 1):
        options["ylim"] = (0, 1.02)  # a line at 1 in its full width
    return options


# HoloViews calls hooks with the plot and the element, and has options for neither of these.


def _grid_behind(plot: Any, _: hv.Element) -> None:
    """HoloViews counts its elements from zorder 0, where they lie below matplotlib's grid."""
    for axis in (plot.handles["axis"].xaxis, plot.handles["axis"].yaxis):
        axis.set_zorder(-1)


def _count_by_ones(plot: Any, _: hv.Element) -> None:
    plot.handles["axis"].yaxis.set_major_locator(MaxNLocator(integer=True))


def _image(image: hv.Image) -> hv.Image:
    """Give a heat-map its colours, the leading eigenpair on top."""
    _, y = image.kdims
    (value,) = image.vdims
    vertical: dict[str, Any]
    if y.name == DIM_EIG:
        pairs = len(image.dimension_values(y, expanded=False))
        vertical = {"invert_yaxis": True, "yticks": ticks_of_eigenpairs(pairs)}
    else:
        vertical = {"aspect": "equal", "fig_inches": (INCHES[0], INCHES[0] * 0.85)}
    return image.opts(
        **(_frame(image, image.label) | vertical | {"show_grid": False}),
        cmap=COLOUR_MAP,
        clim=value.range,
        colorbar=True,
        clabel=value.pprint_label,
        bgcolor=NOT_RECORDED,
        **_COPY,
    )
