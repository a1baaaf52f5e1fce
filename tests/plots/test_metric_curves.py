from __future__ import annotations

import pytest
import xarray as xr

from hild_xr.plots import metric_curves
from hild_xr.plots.axes import LogDimension


def test_metric_curves__has_a_panel_for_each_quantity(metrics: xr.Dataset) -> None:
    panels = metric_curves(metrics)
    assert [panel.label for panel in panels] == ["loss", "accuracy", "learning rate"]
    losses = [element.label for element in next(iter(panels)) if element.group == "Median"]
    assert losses == ["training loss", "test loss"]


def test_metric_curves__shows_the_spread_over_seeds(metrics: xr.Dataset) -> None:
    ((band, line),) = metric_curves(metrics[["accuracy"]])
    assert line.dimension_values("accuracy") == pytest.approx(metrics.accuracy.median("seed").values)
    assert band.dimension_values("accuracy_lower") == pytest.approx(metrics.accuracy.min("seed").values)


def test_metric_curves__only_losses_take_the_logarithmic_axis(metrics: xr.Dataset) -> None:
    panels = metric_curves(metrics, log_y=True)
    kinds = {panel.label: type(panel.get(0).vdims[0]) for panel in panels}
    assert kinds["loss"] is LogDimension
    assert kinds["accuracy"] is not LogDimension
    with pytest.raises(ValueError, match="log_y=False"):
        metric_curves(metrics - 10, log_y=True)


def test_metric_curves__refuses_metrics_without_steps(metrics: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="the dim 'step', came \\['train_loss'\\]"):
        metric_curves(metrics[["train_loss"]].isel(step=0))
