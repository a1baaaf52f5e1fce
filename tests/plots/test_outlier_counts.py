from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from hild_xr.plots import outlier_counts


def test_outlier_counts__draws_one_line_a_seed_with_gaps_where_unknown(outlier_count: xr.DataArray) -> None:
    lines = list(outlier_counts(outlier_count))
    assert {line.group for line in lines} == {"Count"}
    assert [line.label for line in lines] == ["seed 0", "seed 1", "seed 2"]
    for seed, line in enumerate(lines):
        expected = np.where(outlier_count[seed] < 0, np.nan, outlier_count[seed])
        assert np.array_equal(line.dimension_values("outlier_count"), expected, equal_nan=True)
    assert np.isnan(lines[1].dimension_values("outlier_count")).sum() == 1


def test_outlier_counts__panels_share_the_vertical_axis(outlier_count: xr.DataArray) -> None:
    panels = outlier_counts(
        {"optimal": outlier_count, "sub-optimal": outlier_count.isel(seed=0) - 2}, {"optimal": 7}
    )
    assert [panel.label for panel in panels] == ["optimal", "sub-optimal"]
    (axis,) = {element.vdims[0] for panel in panels for element in panel}
    assert axis.soft_range == (0, pytest.approx(7, rel=0.1))
    assert axis.soft_range[1] > 7
    assert axis.type is int
    assert axis.label == "number of outliers"


def test_outlier_counts__draws_the_number_of_the_theory_where_there_is_one(
    outlier_count: xr.DataArray,
) -> None:
    first, second = outlier_counts({"a": outlier_count, "b": outlier_count}, {"b": 3})
    assert "Expected" not in {element.group for element in first}
    (line,) = (element for element in second if element.group == "Expected")
    assert set(line.dimension_values("outlier_count")) == {3.0}
    assert line.dimension_values("step").tolist() == outlier_count.step.values.tolist()
    assert all("Expected" in {e.group for e in panel} for panel in outlier_counts({"a": outlier_count}, 4))


def test_outlier_counts__names_lines_by_all_their_dims(outlier_count: xr.DataArray) -> None:
    both = outlier_count.isel(seed=[2]).expand_dims(matrix=["H", "G"])
    assert [line.label for line in outlier_counts(both)] == ["matrix H, seed 2", "matrix G, seed 2"]
    assert isinstance(outlier_counts(outlier_count.isel(seed=0)), hv.Overlay)


def test_outlier_counts__of_nothing_but_unknown_records_is_empty_not_wrong(
    outlier_count: xr.DataArray,
) -> None:
    line = outlier_counts(xr.full_like(outlier_count.isel(seed=0), -1)).get(0)
    assert np.isnan(line.dimension_values("outlier_count")).all()


def test_outlier_counts__refuses_numbers_for_panels_that_are_not_there(outlier_count: xr.DataArray) -> None:
    with pytest.raises(ValueError, match=r"panels \['optimal'\], came \['optimum'\]"):
        outlier_counts({"optimal": outlier_count}, {"optimum": 4})
    with pytest.raises(ValueError, match="at least one panel"):
        outlier_counts({})
