from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import holoviews as hv
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hild_xr import plots
from hild_xr.plots.palette import OKABE_ITO
from hild_xr.plots.style_matplotlib import RC, render, style

PANELS = {"overlaps": 3, "counts": 2, "metrics": 3}


Drawn = Callable[[str], Figure]


@pytest.fixture(scope="module")
def drawn(drawings: dict[str, Any]) -> Drawn:
    """Return a function that draws a plot of that name, once for all tests."""
    return cache(lambda name: draw(drawings[name]))


def draw(plot: Any) -> Figure:
    figure = render(plot)
    with mpl.rc_context(RC):
        figure.canvas.draw()
    return figure


def frames(figure: Figure) -> list[Axes]:
    """Return the axes without those of the colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.get_xlabel()]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def test_style__every_builder_is_drawn_with_labelled_axes_in_a_readable_frame(
    drawings: dict[str, Any],
    drawn: Drawn,
) -> None:
    for name in drawings:
        figure = drawn(name)
        panels = frames(figure)
        assert len(panels) == PANELS.get(name, 1), name
        for axes in panels:
            assert axes.get_ylabel(), name
            box = axes.get_window_extent()
            assert 0.8 < box.width / box.height < 2.6, (
                f"{name}: a frame of {box.width:.0f} x {box.height:.0f}"
            )
            assert min(box.width, box.height) > figure.dpi * 1.5, name


def test_style__draws_the_numbers_of_the_curve_with_its_gaps(eigenvalues: xr.DataArray) -> None:
    holey = eigenvalues.isel(seed=0).where(eigenvalues.step != 20)
    (axes,) = frames(draw(plots.spectrum(holey, 1)))
    (line,) = axes.lines
    assert np.asarray(line.get_xdata()).tolist() == holey.step.values.tolist()
    assert np.array_equal(np.asarray(line.get_ydata()), holey.isel(eig=0).values, equal_nan=True)
    (bulk,) = axes.collections
    assert len(bulk.get_paths()) == 2, "one gap makes two polygons"


def test_style__draws_records_that_stand_alone(eigenvalues: xr.DataArray) -> None:
    alone = eigenvalues.isel(seed=0, eig=[0]).where(eigenvalues.step == 20)
    (axes,) = frames(draw(plots.spectrum(alone)))
    (points,) = axes.collections
    assert np.asarray(points.get_offsets())[:, 0].tolist() == [20]


def test_style__draws_the_numbers_of_the_heat_map(overlap: xr.DataArray) -> None:
    evenly = overlap.sel(step=range(100, 1001, 100))
    (axes,) = frames(draw(plots.overlap_map(evenly)))
    (image,) = axes.images
    array, (_, _, bottom, top) = np.asarray(image.get_array()), image.get_extent()
    from_the_leading = array if (top < bottom) == (image.origin == "upper") else array[::-1]
    assert from_the_leading == pytest.approx(np.abs(evenly.values.T), rel=1e-6)
    assert axes.yaxis_inverted()
    assert image.get_clim() == (0, 1)


def test_style__units_stand_on_axes_and_colour_bars(angles: xr.DataArray, eigenvalues: xr.DataArray) -> None:
    figure = draw(plots.angle_map(angles))
    assert "principal angle (°)" in {axes.get_ylabel() for axes in figure.axes}
    metres = eigenvalues.assign_attrs(long_name="height", units="m")
    (axes,) = frames(draw(plots.spectrum(metres)))
    assert axes.get_ylabel() == "height (m)"
    assert axes.get_xlabel() == "training step"


def test_style__logarithmic_dimensions_give_logarithmic_axes(drawn: Drawn) -> None:
    (axes,) = frames(drawn("spectrum, logarithmic"))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "1 + training step"
    (linear,) = frames(drawn("spectrum"))
    assert (linear.get_xscale(), linear.get_yscale()) == ("linear", "linear")


def test_style__legend_names_each_line_once_and_covers_no_data(drawn: Drawn) -> None:
    (axes,) = frames(drawn("spectrum"))
    assert legend(axes) == ["bulk", "λ₁", "λ₂", "λ₃", "λ₄", "bulk edge"]
    for name in ("spectrum", "alignment", "counts", "metrics"):
        boxes = []
        for panel in frames(drawn(name)):
            found = panel.get_legend()
            assert found is not None, name
            boxes.append((panel.get_window_extent(), found.get_window_extent()))
        assert not any(frame.overlaps(box) for frame, _ in boxes for _, box in boxes), name


def test_style__band_and_line_have_the_same_colour(drawn: Drawn) -> None:
    (axes,) = frames(drawn("alignment"))
    bands = [to_hex(band.get_facecolor()[0]) for band in axes.collections]
    lines = [to_hex(line.get_color()) for line in axes.lines]
    assert bands == lines[: len(bands)]
    assert len(set(lines)) == len(lines)


def test_style__a_bulk_of_one_recorded_eigenvalue_is_seen(eigenvalues: xr.DataArray) -> None:
    (axes,) = frames(draw(plots.spectrum(eigenvalues.isel(seed=0, eig=slice(3)), 2)))
    (bulk,) = axes.collections
    assert np.asarray(bulk.get_edgecolor())[0, 3] > 0.5
    assert bulk.get_linewidth()[0] > 0


def test_style__grid_lies_behind_the_data(drawn: Drawn) -> None:
    for axes in frames(drawn("counts")):
        assert axes.xaxis.get_gridlines()[0].get_visible()
        data = [artist.get_zorder() for artist in (*axes.lines, *axes.collections)]
        assert max(axes.xaxis.get_zorder(), axes.yaxis.get_zorder()) < min(data)


def test_style__alignment_is_shown_from_zero_to_one(drawn: Drawn) -> None:
    (axes,) = frames(drawn("alignment"))
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert 1 < top < 1.05


def test_style__panels_have_the_same_vertical_axis(drawn: Drawn) -> None:
    optimal, sub_optimal = frames(drawn("counts"))
    assert optimal.get_ylim() == sub_optimal.get_ylim()
    assert all(float(tick).is_integer() for tick in optimal.get_yticks())
    assert [axes.get_title() for axes in (optimal, sub_optimal)] == ["optimal", "sub-optimal"]


def test_style__colour_bars_leave_room_for_the_next_panel(drawn: Drawn) -> None:
    figure = drawn("overlaps")
    bars = [axes.get_tightbbox() for axes in figure.axes if not axes.get_xlabel()]
    panels = [axes.get_tightbbox() for axes in frames(figure)]
    assert len(bars) == len(panels) == 3
    right_of_the_first = [panel for panel in panels if panel and panel.x0 > bars[0].x0]
    assert len(right_of_the_first) == 1
    for panel in right_of_the_first:
        assert not any(panel.overlaps(bar) for bar in bars if bar.x0 < panel.x0)


def test_style__leaves_settings_and_the_plot_as_they_were(drawings: dict[str, Any]) -> None:
    before = dict(mpl.rcParams)
    for plot in drawings.values():
        style(plot)
        for element in plot.traverse(lambda found: found):
            assert element.opts.get(backend="matplotlib", defaults=False).kwargs == {}
    assert dict(mpl.rcParams) == before


def test_style__refuses_what_no_builder_makes() -> None:
    with pytest.raises(TypeError, match="came HoloMap"):
        style(hv.HoloMap({0: hv.Curve([1, 2])}))


@pytest.mark.parametrize("current", ["bokeh", "matplotlib"])
def test_style__does_not_depend_on_the_current_backend(
    drawings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, current: str
) -> None:
    importlib.import_module("hild_xr.plots.style_bokeh")
    monkeypatch.setattr(hv.Store, "current_backend", current)
    (axes,) = frames(draw(drawings["alignment"]))
    assert to_hex(axes.collections[0].get_facecolor()[0]) == OKABE_ITO[0].lower()
    assert hv.Store.current_backend == current


def test_render__leaves_no_figure_with_pyplot(drawings: dict[str, Any]) -> None:
    draw(drawings["counts"])
    assert plt.get_fignums() == []
