from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis import cka, landscape_phase

THRESHOLDS = {"sharp_above": 10.0, "barrier_below": -0.1, "similar_above": 0.9}


def line(*values: float) -> xr.DataArray:
    return xr.DataArray(np.array(values), dims="temperature", coords={"temperature": np.arange(len(values))})


def test_phases__are_those_of_the_table() -> None:
    sharpness = line(50, 50, 50, 1, 1, 1, 1)
    mc = line(-1, 0, 3, -1, 0, 0, 3)
    similarity = line(0.99, 0.99, 0.1, 0.99, 0.5, 0.95, 0.95)
    phase = landscape_phase(sharpness, mc, similarity, **THRESHOLDS)
    assert phase.values.tolist() == [1, 2, 2, 3, 4, 5, 5]
    names = dict(zip(phase.attrs["flag_values"], phase.attrs["flag_meanings"].split(), strict=True))
    assert [names[value] for value in (1, 2, 3, 4, 5)] == ["I", "II", "III", "IV-A", "IV-B"]
    assert {name: phase.attrs[name] for name in THRESHOLDS} == THRESHOLDS


def test_identical_runs__are_connected_and_alike() -> None:
    outputs = xr.DataArray(np.random.default_rng(0).normal(size=(20, 3)), dims=("sample", "unit"))
    phase = landscape_phase(line(1.0), line(0.0), cka(outputs, outputs).expand_dims("run"), **THRESHOLDS)
    assert phase.values.ravel().tolist() == [5]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_numbers__have_no_phase(missing: int) -> None:
    arrays = [line(50, 1), line(-1, 0), line(0.5, 0.95)]
    arrays[missing] = arrays[missing].where(arrays[missing]["temperature"] > 0)
    assert landscape_phase(arrays[0], arrays[1], arrays[2], **THRESHOLDS).values.tolist() == [-1, 5]


def test_numbers_at_a_threshold__are_flat_connected_and_different() -> None:
    assert landscape_phase(line(10.0), line(-0.1), line(0.9), **THRESHOLDS).values.tolist() == [4]


def test_bad_input__is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharp_above is a threshold: expected a finite number, got nan"):
        landscape_phase(line(1), line(0), line(1), **{**THRESHOLDS, "sharp_above": np.nan})
    with pytest.raises(ValueError, match="temperature"):
        landscape_phase(line(1, 2), line(0), line(1, 1), **THRESHOLDS)
    with pytest.raises(TypeError, match="similarity"):
        landscape_phase(line(1), line(0), 0.5, **THRESHOLDS)
