from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import trajectory_distance


def frechet(D: np.ndarray) -> float:
    """Eiter and Mannila's recursion."""

    @cache
    def c(i: int, j: int) -> float:
        if i == j == 0:
            return float(D[0, 0])
        before = [c(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return max(min(before), float(D[i, j]))

    return c(D.shape[0] - 1, D.shape[1] - 1)


def labelled(D: np.ndarray) -> xr.DataArray:
    return xr.DataArray(D, dims=("pair", "step", "step_")[-D.ndim :])


@given(s=st.integers(1, 7), t=st.integers(1, 7), seed=st.integers(0, 9999))
def test_frechet__is_that_of_the_recursion(s: int, t: int, seed: int) -> None:
    D = np.random.default_rng(seed).random((3, s, t))
    found = trajectory_distance(labelled(D))
    assert found.values.tolist() == [frechet(d) for d in D]
    turned = trajectory_distance(labelled(np.swapaxes(D, 1, 2)))
    assert turned.values.tolist() == found.values.tolist()
    assert (found.values >= np.maximum(D[:, 0, 0], D[:, -1, -1])).all()


def test_frechet__sees_the_direction_and_the_smoothed_distance_does_not() -> None:
    x = np.linspace(0, 1, 5)
    forth, back = (labelled(np.abs(x[:, None] - y)) for y in (x, x[::-1]))
    assert float(trajectory_distance(forth)) == 0
    assert float(trajectory_distance(back)) == 1
    smooth = [float(trajectory_distance(D, method="smoothed", bandwidth=0.1)) for D in (forth, back)]
    assert smooth[0] == pytest.approx(smooth[1])


def test_smoothed__is_the_definition_and_tends_to_nearest_and_to_mean() -> None:
    D = np.random.default_rng(0).random((4, 6))

    def soft(D: np.ndarray, h: float) -> float:
        w = np.exp(-D / h)
        return float(np.mean((w * D).sum(axis=1) / w.sum(axis=1)))

    for h, expected in (
        (0.2, (soft(D, 0.2) + soft(D.T, 0.2)) / 2),
        (1e-6, (D.min(axis=1).mean() + D.min(axis=0).mean()) / 2),
        (1e6, D.mean()),
    ):
        found = trajectory_distance(labelled(D), method="smoothed", bandwidth=h)
        assert float(found) == pytest.approx(expected, rel=1e-5)
        assert found.attrs["bandwidth"] == h


def test_infinite_and_missing_distances() -> None:
    D = np.zeros((3, 2, 2))
    D[0, 0, 1] = np.inf
    D[1, 0] = np.inf
    D[2, 1, 1] = np.nan
    frechet_, smoothed = (
        trajectory_distance(labelled(D), method=m, bandwidth=h)
        for m, h in (("frechet", None), ("smoothed", 0.1))
    )
    np.testing.assert_array_equal(frechet_, [0, np.inf, np.nan])
    np.testing.assert_array_equal(smoothed, [0, np.inf, np.nan])


def test_trajectory_distance__refuses_bad_arguments() -> None:
    D = labelled(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="method 'frechet' or 'smoothed', came 'dtw'"):
        trajectory_distance(D, method="dtw")
    with pytest.raises(ValueError, match=r"bandwidth=\.\.\. with method 'smoothed'"):
        trajectory_distance(D, method="smoothed")
    with pytest.raises(ValueError, match=r"bandwidth=\.\.\. with method 'smoothed' and only then"):
        trajectory_distance(D, bandwidth=1.0)
    with pytest.raises(ValueError, match="positive bandwidth, came 0"):
        trajectory_distance(D, method="smoothed", bandwidth=0)
    with pytest.raises(ValueError, match=r"missing \['model', 'model_'\]"):
        trajectory_distance(D, dim="model")
    with pytest.raises(ValueError, match="at least one point"):
        trajectory_distance(D.isel(step=slice(0)))
