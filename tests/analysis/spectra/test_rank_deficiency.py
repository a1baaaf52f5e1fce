from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis import outliers, rank_deficiency
from hild_xr.analysis.spectra.rank_deficiency import rank_deficiency_kernel

NAN = np.nan


def second_layer(weights: list[tuple[float, float]]) -> np.ndarray:
    """Eigenvalues of the vv-block of an XOR network whose neurons sit on centres of given sign and size.

    In the limit of no noise the block is the mean over the four centres of g g^T / 4, g the ReLU features.
    """
    centres = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    g = np.maximum(centres @ np.array(weights).T, 0.0)
    return np.linalg.eigvalsh(np.einsum("ci,cj->ij", g, g) / 16)[::-1]


@pytest.mark.parametrize(
    ("neurons", "deficiency"),
    [
        ([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)], 0),
        ([(1.0, 0.0), (0.9, 0.0), (0.0, 1.0), (0.0, -1.0)], 1),
        ([(1.0, 0.0), (0.9, 0.0), (0.0, 1.0), (0.0, 0.8)], 2),
        ([(1.0, 0.0), (0.9, 0.0), (0.7, 0.0), (0.8, 0.0)], 3),
    ],
)
def test_deficiency__is_the_number_of_centres_that_no_neuron_responds_to(
    neurons: list[tuple[float, float]], deficiency: int
) -> None:
    eigenvalues = xr.DataArray(second_layer(neurons), dims="eig")
    found = rank_deficiency(eigenvalues, 4, method="relative")
    assert int(found["rank_deficiency"]) == deficiency
    assert int(found["outlier_count"]) == 4 - deficiency
    assert found["rank_deficiency"].attrs["full_rank"] == 4


def test_deficiency__comes_with_the_outliers_it_was_counted_from() -> None:
    eigenvalues = xr.DataArray([[5.0, 4.0, 0.4, 0.3], [NAN] * 4], dims=("step", "eig"))
    for options in ({}, {"method": "edge", "edge": 1.0}, {"regularizer": 0.1, "threshold": 3.0}):
        found = rank_deficiency(eigenvalues, 3, **options)
        xr.testing.assert_identical(found.drop_vars("rank_deficiency"), outliers(eigenvalues, **options))
        assert found["rank_deficiency"].values.tolist() == [1, -1]


def test_deficiency__is_unknown_where_the_count_is_a_lower_bound_below_the_full_rank() -> None:
    count, reached = np.array([3, 3, 4, 5, -1]), np.array([True, False, False, True, False])
    assert rank_deficiency_kernel(count, reached, full_rank=4).tolist() == [1, -1, 0, 0, -1]
    eigenvalues = xr.DataArray([5.0, 4.0, 3.0], dims="eig")
    found = rank_deficiency(eigenvalues, 4, method="relative")
    assert int(found["rank_deficiency"]) == -1


def test_deficiency__refuses_a_full_rank_of_zero_and_what_outliers_refuses() -> None:
    eigenvalues = xr.DataArray([5.0, 4.0, 3.0], dims="eig")
    with pytest.raises(ValueError, match="full_rank of at least 1"):
        rank_deficiency(eigenvalues, 0)
    for wrong in (2.5, True, "2"):
        with pytest.raises(TypeError, match="whole number as full_rank"):
            rank_deficiency(eigenvalues, wrong)
    with pytest.raises(ValueError, match="method"):
        rank_deficiency(eigenvalues, 2, method="elbow")
    with pytest.raises(TypeError, match="complex"):
        rank_deficiency(eigenvalues * 1j, 2)
