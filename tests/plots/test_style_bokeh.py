from __future__ import annotations

import importlib
from typing import Any

import holoviews as hv
import numpy as np
import pytest
import xarray as xr
from bokeh.models import LogScale, Plot
from bokeh.models.annotations import ColorBar, Legend
from bokeh.models.glyphs import Image, Line, Patch, Scatter

from hild_xr import plots
from hild_xr.plots.palette import OKABE_ITO
from hild_xr.plots.style_bokeh import render, style

PANELS = {"overlaps": 3, "counts": 2, "metrics": 3}


def draw(plot: Any) -> list[Any]:
    """Return the panels as bokeh figures."""
    model: Any = render(plot)
    return [model] if isinstance(model, Plot) else [panel for panel, _, _ in model.children]


def glyphs(figure: Any, kind: type) -> list[Any]:
    return [renderer for renderer in figure.renderers if isinstance(renderer.glyph, kind)]


def column(renderer: Any, field: str) -> np.ndarray:
    return np.asarray(renderer.data_source.data[getattr(renderer.glyph, field)])


def labels(figure: Any) -> list[str]:
    (legend,) = figure.select({"type": Legend})
    return [item.label.value for item in legend.items]


def test_style__every_builder_is_drawn_with_labelled_axes(drawings: dict[str, Any]) -> None:
    for name, plot in drawings.items():
        figures = draw(plot)
        assert len(figures) == PANELS.get(name, 1), name
        for figure in figures:
            assert figure.renderers, name
            assert figure.xaxis[0].axis_label, name
            assert figure.yaxis[0].axis_label, name


def test_style__draws_the_numbers_of_the_curve(eigenvalues: xr.DataArray) -> None:
    one = eigenvalues.isel(seed=0)
    (figure,) = draw(plots.spectrum(one, 2))
    first, second = glyphs(figure, Line)
    assert column(first, "x").tolist() == one.step.values.tolist()
    assert column(first, "y").tolist() == one.isel(eig=0).values.tolist()
    assert column(second, "y").tolist() == one.isel(eig=1).values.tolist()


def test_style__draws_gaps_in_lines_and_bands(eigenvalues: xr.DataArray) -> None:
    (figure,) = draw(plots.spectrum(eigenvalues.where(eigenvalues.step != 20), 1))
    (line,) = glyphs(figure, Line)
    assert column(line, "x")[np.isnan(column(line, "y"))].tolist() == [20]
    for band in glyphs(figure, Patch):
        assert np.isnan(column(band, "y")).sum() == 1, "one gap makes two polygons"
        assert 20 not in column(band, "x")


def test_style__a_bulk_of_one_recorded_eigenvalue_is_seen(eigenvalues: xr.DataArray) -> None:
    (figure,) = draw(plots.spectrum(eigenvalues.isel(seed=0, eig=slice(3)), 2))
    (bulk,) = glyphs(figure, Patch)
    assert bulk.glyph.line_alpha > 0.5


def test_style__draws_records_that_stand_alone(eigenvalues: xr.DataArray) -> None:
    alone = eigenvalues.isel(seed=0, eig=[0]).where(eigenvalues.step == 20)
    (figure,) = draw(plots.spectrum(alone))
    (points,) = glyphs(figure, Scatter)
    assert column(points, "x").tolist() == [20]


def test_style__draws_the_numbers_of_the_heat_map(overlap: xr.DataArray) -> None:
    evenly = overlap.sel(step=range(100, 1001, 100))
    (figure,) = draw(plots.overlap_map(evenly))
    (image,) = glyphs(figure, Image)
    (drawn,) = image.data_source.data["image"]
    # rows from the bottom of the picture to its top, where the axis is turned round
    assert np.asarray(drawn) == pytest.approx(np.abs(evenly.values.T), rel=1e-6)
    assert figure.y_range.start > figure.y_range.end
    assert (image.glyph.color_mapper.low, image.glyph.color_mapper.high) == (0, 1)
    (bar,) = figure.select({"type": ColorBar})
    assert bar.title == "|overlap|"


def test_style__units_stand_on_axes_and_colour_bars(angles: xr.DataArray, eigenvalues: xr.DataArray) -> None:
    (figure,) = draw(plots.angle_map(angles))
    (bar,) = figure.select({"type": ColorBar})
    assert bar.title == "principal angle (°)"
    metres = eigenvalues.assign_attrs(long_name="height", units="m")
    (figure,) = draw(plots.spectrum(metres))
    assert figure.yaxis[0].axis_label == "height (m)"


def test_style__logarithmic_dimensions_give_logarithmic_axes(drawings: dict[str, Any]) -> None:
    (figure,) = draw(drawings["spectrum, logarithmic"])
    assert isinstance(figure.x_scale, LogScale)
    assert isinstance(figure.y_scale, LogScale)
    assert figure.xaxis[0].axis_label == "1 + training step"
    (linear,) = draw(drawings["spectrum"])
    assert not isinstance(linear.x_scale, LogScale)
    assert not isinstance(linear.y_scale, LogScale)


def test_style__legend_names_each_line_once_beside_the_frame(drawings: dict[str, Any]) -> None:
    (figure,) = draw(drawings["spectrum"])
    assert labels(figure) == ["bulk", "λ₁", "λ₂", "λ₃", "λ₄", "bulk edge"]
    assert len(figure.right) == 1
    for panel, last in zip(draw(drawings["counts"]), ("seed 2", "seed 2"), strict=True):
        assert labels(panel)[0] == "theory"
        assert labels(panel)[-1] == last
        assert len(panel.above) == 1
    for panel in draw(drawings["overlaps"]):
        assert not panel.select({"type": Legend}) or labels(panel) == []


def test_style__band_and_line_have_the_same_colour(drawings: dict[str, Any]) -> None:
    (figure,) = draw(drawings["alignment"])
    lines = [renderer.glyph.line_color for renderer in glyphs(figure, Line)]
    bands = [renderer.glyph.fill_color for renderer in glyphs(figure, Patch)]
    assert bands == lines[: len(bands)]
    assert len(set(lines)) == len(lines)


def test_style__alignment_is_shown_from_zero_to_one(drawings: dict[str, Any]) -> None:
    (figure,) = draw(drawings["alignment"])
    assert figure.y_range.start == 0
    assert 1 < figure.y_range.end < 1.05


def test_style__panels_share_their_axes(drawings: dict[str, Any]) -> None:
    optimal, sub_optimal = draw(drawings["counts"])
    assert optimal.y_range is sub_optimal.y_range
    assert optimal.title.text == "optimal"
    assert optimal.yaxis[0].ticker.min_interval == 1, "counts are whole numbers"
    loss, accuracy, *_ = draw(drawings["metrics"])
    assert loss.y_range is not accuracy.y_range


def test_style__title_is_the_label_and_nothing_else(drawings: dict[str, Any]) -> None:
    (titled,), (untitled,) = draw(drawings["spectrum"]), draw(drawings["alignment"])
    assert titled.title.text == "class 0"
    assert untitled.title.text == ""
    (single,) = draw(drawings["one seed's counts"])
    assert single.title.text == ""


def test_style__leaves_the_plot_without_options(drawings: dict[str, Any]) -> None:
    for plot in drawings.values():
        style(plot)
        for element in plot.traverse(lambda found: found):
            assert element.opts.get(backend="bokeh", defaults=False).kwargs == {}


def test_style__refuses_what_no_builder_makes() -> None:
    with pytest.raises(TypeError, match="came HoloMap"):
        style(hv.HoloMap({0: hv.Curve([1, 2])}))
    with pytest.raises(TypeError, match="came str"):
        style("curve")


@pytest.mark.parametrize("current", ["bokeh", "matplotlib"])
def test_style__does_not_depend_on_the_current_backend(
    drawings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, current: str
) -> None:
    importlib.import_module("hild_xr.plots.style_matplotlib")
    monkeypatch.setattr(hv.Store, "current_backend", current)
    (figure,) = draw(drawings["alignment"])
    assert glyphs(figure, Patch)[0].glyph.fill_color == OKABE_ITO[0]
    assert glyphs(figure, Line)[0].glyph.line_color == OKABE_ITO[0]
    assert hv.Store.current_backend == current
