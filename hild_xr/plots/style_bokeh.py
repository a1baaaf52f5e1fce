"""The look of the plots on web pages: bokeh.

Importing this module loads HoloViews' bokeh backend.
"""

from __future__ import annotations

from typing import Any

import holoviews as hv
import holoviews.plotting.bokeh  # options can be set only for a backend that is loaded
from bokeh.models import BasicTicker, LayoutDOM, NumeralTickFormatter

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
from hild_xr.plots.spectrum import BULK
from hild_xr.variables import DIM_EIG, DIM_STEP

BACKEND = "bokeh"
_COPY = {"backend": BACKEND, "clone": True}  # without clone, opts() changes the plot it is given

HEIGHT = 380
"""Height of a panel in pixels; the width is that of the page."""

SQUARE = (590, 500)
"""Width and height in pixels of a map of pairs of steps: a square frame and room for its labels."""

_FONT_SIZES = {"title": "12pt", "labels": "11pt", "ticks": "10pt", "legend": "10pt", "clabel": "11pt"}

_UPRIGHT = {f"{axis}axis.axis_label_text_font_style": "normal" for axis in "xy"}


def style(plot: Any) -> Any:
    """Return the plot with the options that bokeh draws it by.

    Parameters
    ----------
    plot
        What a builder of :mod:`hild_xr.plots` returned: an element, an overlay
        or a layout of them. It is left as it is.

    Returns
    -------
    holoviews object
        A copy with options, for a notebook after ``hv.extension("bokeh")``.

    Raises
    ------
    TypeError
        If it is nothing of the kind.

    Examples
    --------
    >>> styled = style(hv.Curve([1, 2], label="loss"))
    >>> hv.Store.lookup_options("bokeh", styled, "style").kwargs["line_width"]
    2.0
    """
    with current_backend(BACKEND):
        if isinstance(plot, hv.Layout):
            panels = plot.clone([_panel(panel, beside=True) for panel in plot])
            return panels.opts(shared_axes=True, toolbar="above", **_COPY)
        return _panel(plot, beside=False)


def render(plot: Any) -> LayoutDOM:
    """Return the styled plot as a bokeh model, to be embedded or served.

    Parameters
    ----------
    plot
        As for :func:`style`.

    Returns
    -------
    bokeh.models.LayoutDOM
        A figure, or a grid of figures for a layout.

    Raises
    ------
    TypeError
        As :func:`style`.

    Examples
    --------
    >>> render(hv.Curve([1, 2], label="loss")).title.text
    'loss'
    """
    styled = style(plot)
    with current_backend(BACKEND):
        model: LayoutDOM = hv.render(styled, backend=BACKEND)
    return model


def _panel(plot: Any, *, beside: bool) -> Any:
    """Give one panel its options; ``beside`` others there is less room."""
    # on a screen that is narrower the page scrolls the figure
    panel = {"min_width": 300 if beside else 480, **_COPY}
    if isinstance(plot, hv.Overlay):
        drawn = [_series(element, look) for element, look in zip(plot, looks(plot), strict=True)]
        return hv.Overlay(drawn, label=plot.label).opts(
            **_frame(drawn[0], title_of(plot)),
            **_legend(plot, "top" if beside else "right"),
            **panel,
        )
    if isinstance(plot, hv.Image):
        return _image(plot).opts(**panel)
    if isinstance(plot, hv.Element):
        (look,) = looks([plot])
        return _series(plot, look).opts(**_frame(plot, plot.label), **panel)
    raise TypeError(
        "expected an element, an overlay or a layout from a builder of hild_xr.plots, "
        f"came {type(plot).__name__}"
    )


def _legend(plot: hv.Overlay, position: str) -> dict[str, Any]:
    look = {
        "click_policy": "mute",
        "border_line_alpha": 0,
        "background_fill_alpha": 0,
        "glyph_width": 30,
        "padding": 2,
        "margin": 4,
    }
    if position == "right":
        return {"legend_position": position, "legend_opts": look | {"spacing": 3, "location": "top_left"}}
    columns = legend_columns(plot)
    return {"legend_position": position, "legend_cols": columns, "legend_opts": look | {"spacing": 10}}


def _series(element: hv.Element, look: Look) -> hv.Element:
    """Give one curve, area or set of points its look."""
    if isinstance(element, hv.Area):
        # a bulk of which little is recorded is a thin band, or none: its outline keeps it in sight
        outline = {"line_color": look.colour, "line_alpha": 0.8 if element.group == BULK else 0}
        fill = {"fill_color": look.colour, "fill_alpha": 0.25, "muted_alpha": 0.05}
        return element.opts(**fill, **outline, **_COPY)
    hover = [("", "$label"), *(dimension.label for dimension in element.dimensions())]
    shared = {"color": look.colour, "muted_alpha": 0.1, "tools": ["hover"], "hover_tooltips": hover}
    if isinstance(element, hv.Scatter):
        return element.opts(**shared, size=6, **_COPY)
    return element.opts(**shared, line_width=look.width, line_dash=look.dash, **_COPY)


def _frame(element: hv.Element, title: str) -> dict[str, Any]:
    """Options of axes, grid, fonts and size, by the dimensions of an element."""
    x, y = element.dimensions()[:2]
    options: dict[str, Any] = {
        "title": title,
        "fontsize": _FONT_SIZES,
        "backend_opts": _UPRIGHT,
        "height": HEIGHT,
        "responsive": True,
        "border": 12,
        "show_grid": True,
        "gridstyle": {"grid_line_color": "#e5e5e5"},
        "logx": isinstance(x, LogDimension),
        "logy": isinstance(y, LogDimension),
        "default_tools": ["save", "pan", "box_zoom", "wheel_zoom", "reset"],
        "active_tools": [],
        "toolbar": "above",
        "framewise": True,
    }
    if _counts_steps(x):
        options["xformatter"] = NumeralTickFormatter(format="0,0")  # not 6.000e+4
    if y.type is int:
        options["yticks"] = BasicTicker(min_interval=1)
    if y.range == (0, 1):
        options["ylim"] = (0, 1.02)  # a line at 1 in its full width
    return options


def _image(image: hv.Image) -> hv.Image:
    """Give a heat-map its colours, the leading eigenpair on top."""
    _, y = image.kdims
    (value,) = image.vdims
    vertical: dict[str, Any]
    if y.name == DIM_EIG:
        pairs = len(image.dimension_values(y, expanded=False))
        vertical = {"invert_yaxis": True, "yticks": ticks_of_eigenpairs(pairs)}
    else:
        # both axes count steps: a square, and the diagonal at half a right angle
        vertical = {"responsive": False, "width": SQUARE[0], "height": SQUARE[1]}
        if _counts_steps(y):
            vertical["yformatter"] = NumeralTickFormatter(format="0,0")
    return image.opts(
        **(_frame(image, image.label) | vertical | {"show_grid": False}),
        cmap=COLOUR_MAP,
        clim=value.range,
        colorbar=True,
        clabel=value.pprint_label,
        colorbar_opts={"title_text_font_style": "normal", "title_standoff": 8},
        bgcolor=NOT_RECORDED,
        tools=["hover"],
        **_COPY,
    )


def _counts_steps(dimension: hv.Dimension) -> bool:
    return str(dimension.name).rstrip("_") == DIM_STEP
