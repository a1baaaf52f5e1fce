from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from hild_xr.plots import spectrum
from hild_xr.plots.axes import LogDimension


def of_group(overlay: hv.Overlay, group: str) -> list[hv.Element]:
    return [element for element in overlay if element.group == group]


def test_spectrum__of_one_seed_draws_the_outliers_as_recorded(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray
) -> None:
    one = eigenvalues.isel(seed=0)
    lines = of_group(spectrum(one, outlier_count.isel(seed=0)), "Outlier")
    assert [line.label for line in lines] == ["λ₁", "λ₂", "λ₃", "λ₄"]
    for index, line in enumerate(lines):
        assert line.dimension_values("step").tolist() == one.step.values.tolist()
        assert line.dimension_values("eigenvalue").tolist() == one.isel(eig=index).values.tolist()


def test_spectrum__bulk_reaches_from_the_smallest_to_the_largest_eigenvalue_that_is_no_outlier(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray
) -> None:
    one, count = eigenvalues.isel(seed=1), outlier_count.isel(seed=1)
    (bulk,) = of_group(spectrum(one, count), "Bulk")
    upper, lower = bulk.dimension_values("eigenvalue"), bulk.dimension_values("eigenvalue_lower")
    for at, number in enumerate(count.values.tolist()):
        rest = one.isel(step=at).values[number:] if number >= 0 else [np.nan]
        assert [lower[at], upper[at]] == pytest.approx([min(rest), max(rest)], nan_ok=True)
    assert np.isnan(upper[3]), "the fixture has a record whose count is unknown"


def test_spectrum__over_seeds_shows_medians_ranges_and_one_bulk(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray
) -> None:
    overlay = spectrum(eigenvalues, outlier_count)
    first, top = of_group(overlay, "Outlier")[0], of_group(overlay, "Range")[0]
    leading = eigenvalues.isel(eig=0)
    assert first.dimension_values("eigenvalue") == pytest.approx(leading.median("seed").values)
    assert top.dimension_values("eigenvalue") == pytest.approx(leading.max("seed").values)
    (bulk,) = of_group(overlay, "Bulk")
    smallest = eigenvalues.where(outlier_count >= 0).min(["seed", "eig"])
    assert bulk.dimension_values("eigenvalue_lower") == pytest.approx(smallest.values)


def test_spectrum__does_not_depend_on_the_order_of_dims_or_on_chunks(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray
) -> None:
    expected = spectrum(eigenvalues, outlier_count)
    lazy = eigenvalues.transpose("eig", "step", "seed").chunk(step=2)
    found = spectrum(lazy, outlier_count.transpose("step", "seed"))
    for one, other in zip(expected, found, strict=True):
        for dimension in one.dimensions():
            assert np.array_equal(
                one.dimension_values(dimension), other.dimension_values(dimension), equal_nan=True
            )


def test_spectrum__without_counts_draws_every_eigenvalue(eigenvalues: xr.DataArray) -> None:
    overlay = spectrum(eigenvalues.isel(seed=0))
    assert len(of_group(overlay, "Outlier")) == eigenvalues.sizes["eig"]
    assert of_group(overlay, "Bulk") == []
    assert [line.label for line in overlay][-1] == "λ₁₀"


def test_spectrum__takes_one_count_for_all_steps(eigenvalues: xr.DataArray) -> None:
    overlay = spectrum(eigenvalues.isel(seed=0), 2)
    (bulk,) = of_group(overlay, "Bulk")
    assert len(of_group(overlay, "Outlier")) == 2
    assert bulk.dimension_values("eigenvalue").tolist() == eigenvalues.isel(seed=0, eig=2).values.tolist()
    assert [element.group for element in spectrum(eigenvalues, 0)] == ["Bulk"]


def test_spectrum__draws_the_edge_under_its_long_name(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray, bulk_edge: xr.DataArray
) -> None:
    (edge,) = of_group(spectrum(eigenvalues, outlier_count, bulk_edge), "Edge")
    assert edge.label == "bulk edge"
    assert edge.dimension_values("eigenvalue").tolist() == bulk_edge.values.tolist()


def test_spectrum__says_which_axes_are_logarithmic(eigenvalues: xr.DataArray) -> None:
    line = spectrum(eigenvalues, 1, log_x=True, log_y=True).get(1)
    assert [isinstance(dimension, LogDimension) for dimension in line.dimensions()[:2]] == [True, True]
    assert line.dimension_values(0)[0] == 1
    plain = spectrum(eigenvalues, 1).get(1)
    assert [isinstance(dimension, LogDimension) for dimension in plain.dimensions()[:2]] == [False, False]


def test_spectrum__refuses_negative_eigenvalues_on_a_logarithmic_axis(eigenvalues: xr.DataArray) -> None:
    with pytest.raises(ValueError, match="log_y=False"):
        spectrum(-eigenvalues, 1, log_y=True)
    assert spectrum(-eigenvalues, 1).get(0).dimension_values(1).max() < 0


def test_spectrum__keeps_records_that_are_missing_as_gaps(eigenvalues: xr.DataArray) -> None:
    holey = eigenvalues.isel(seed=0).where(eigenvalues.step != 20)
    for element in spectrum(holey, 1):
        gaps = np.isnan(element.dimension_values(1))
        assert element.dimension_values("step")[gaps].tolist() == [20]


def test_spectrum__refuses_several_blocks_other_steps_and_too_many_outliers(
    eigenvalues: xr.DataArray, outlier_count: xr.DataArray
) -> None:
    with pytest.raises(ValueError, match="one block"):
        spectrum(eigenvalues.expand_dims(layer=["a", "b"]))
    with pytest.raises(ValueError, match="cannot align"):
        spectrum(eigenvalues, outlier_count.isel(step=slice(1, None)))
    with pytest.raises(ValueError, match="99 outliers and 10 eigenvalues"):
        spectrum(eigenvalues, 99)


def test_spectrum__leaves_its_arguments_alone(eigenvalues: xr.DataArray, outlier_count: xr.DataArray) -> None:
    before = eigenvalues.copy(deep=True), outlier_count.copy(deep=True)
    spectrum(eigenvalues, outlier_count)
    xr.testing.assert_identical(eigenvalues, before[0])
    xr.testing.assert_identical(outlier_count, before[1])
