from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.plots import overlap_map


def test_overlap_map__shows_the_size_of_each_overlap(overlap: xr.DataArray) -> None:
    evenly = overlap.sel(step=range(100, 1001, 100))
    assert (overlap < 0).any()
    image = overlap_map(evenly, label="class 0")
    assert image.label == "class 0"
    assert image.dimension_values("step", expanded=False).tolist() == evenly.step.values.tolist()
    for at, step in enumerate(evenly.step.values):
        shown = [image[step, 1 + eig] for eig in range(evenly.sizes["eig"])]
        assert shown == pytest.approx(np.abs(evenly.values[at]), rel=1e-6)


def test_overlap_map__has_the_colours_of_a_cosine_and_says_what_it_shows(overlap: xr.DataArray) -> None:
    image = overlap_map(overlap)
    assert image.vdims[0].range == (0, 1)
    assert image.vdims[0].pprint_label == "|overlap|"
    assert image.kdims[0].label == "training step"
    assert image.kdims[1].label == "eigenvector (1: leading)"


def test_overlap_map__every_record_is_seen_on_the_logarithmic_axis(overlap: xr.DataArray) -> None:
    labels = 0.01 * np.arange(overlap.sizes["step"])
    marked = overlap.copy(data=np.broadcast_to(labels[:, None], overlap.shape))
    shown = np.unique(overlap_map(marked, log_x=True).dimension_values("overlap"))
    assert shown == pytest.approx(labels, abs=1e-6)


def test_overlap_map__leaves_missing_records_blank(overlap: xr.DataArray) -> None:
    evenly = overlap.sel(step=[100, 200, 300])
    image = overlap_map(evenly.where(evenly.step != 200))
    assert np.isnan(image[200, 1])
    assert np.isfinite(image[300, 1])


def test_overlap_map__can_be_made_of_one_record(overlap: xr.DataArray) -> None:
    image = overlap_map(overlap.isel(step=[-1]))
    assert image[1000, 1] == pytest.approx(abs(float(overlap[-1, 0])), rel=1e-6)


def test_overlap_map__refuses_what_is_no_cosine(overlap: xr.DataArray) -> None:
    with pytest.raises(ValueError, match="overlap between -1 and 1"):
        overlap_map(overlap * 3)
    with pytest.raises(ValueError, match=r"isel\(seed=0\)"):
        overlap_map(overlap.expand_dims(seed=[0, 1]))
