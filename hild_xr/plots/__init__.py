"""Plots: labelled results of the analysis in, HoloViews objects out.

Each builder is a pure function in a file of its own. It computes a lazy array
once, picks, masks and orders, and returns an object without options; the
numbers come from :mod:`hild_xr.analysis`. The look is given later, by one
function for each backend::

    from hild_xr import plots
    from hild_xr.plots import style_bokeh

    style_bokeh.style(plots.spectrum(eigenvalues, outlier_count=found.outlier_count))

:func:`hild_xr.report.save_figures` makes PDF, SVG and PNG files of the same
objects, :func:`hild_xr.report.write_report` one offline HTML file.

Rules that all builders keep
----------------------------
* The horizontal axis is the optimizer step on a linear axis, where step 0 is
  shown at 0. ``log_x=True`` shows ``1 + step`` on a logarithmic axis instead, and
  says so in the label: the start stays in the picture, and no number is moved
  without a word. ``x="time"`` takes another coordinate along ``step``.
* Axis labels and units come from the attrs ``long_name`` and ``units``.
* NaN is a gap. What cannot be drawn honestly (a negative number on a logarithmic
  axis, a cosine above 1) is refused.
* Dims that are not axes, such as seeds, classes or neurons, are a spread: the
  line is the median, the band reaches from the smallest to the largest value.

Importing this package loads no plotting backend.
"""

from __future__ import annotations

try:
    import holoviews as hv  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError('hild_xr.plots needs holoviews: pip install "hild-xr[plot]"') from error

from hild_xr.plots.alignment_curves import alignment_curves
from hild_xr.plots.angle_map import angle_map
from hild_xr.plots.metric_curves import metric_curves
from hild_xr.plots.outlier_counts import outlier_counts
from hild_xr.plots.overlap_map import overlap_map
from hild_xr.plots.panels import side_by_side
from hild_xr.plots.spectrum import spectrum

__all__ = [
    "alignment_curves",
    "angle_map",
    "metric_curves",
    "outlier_counts",
    "overlap_map",
    "side_by_side",
    "spectrum",
]
