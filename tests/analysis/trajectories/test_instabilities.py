from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import instabilities, instability_rotation
from hild_xr.analysis.trajectories.instabilities import instabilities_kernel

NAN, INF = np.nan, np.inf
LIMIT = 20.0


def of(
    loss: list[float], sharp: list[float] | float = 30.0, rise: float = 0.1
) -> tuple[list[list[float]], int]:
    """(before, start, end) of the instabilities of one run with the labels 0, 10, ..., and their number."""
    n = len(loss)
    coords = {"step": 10 * np.arange(n)}
    a = xr.DataArray(loss, dims="step", coords=coords)
    b = xr.DataArray(np.broadcast_to(sharp, n).astype(float), dims="step", coords=coords)
    found = instabilities(a, b, LIMIT, rise=rise)
    times = [found[f"instability_{name}"].values for name in ("before", "start", "end")]
    count = int(found.instability_count)
    assert all(np.isnan(t[max(count, 0) :]).all() for t in times)
    return [[float(t[i]) for t in times] for i in range(max(count, 0))], count


@pytest.mark.parametrize(
    ("loss", "sharp", "expected"),
    [
        ([3.0, 2.0, 1.0], 30.0, []),
        ([1.0, 4.0, 0.5], 30.0, [[0, 10, 20]]),
        ([1.0, 4.0, 0.5], 10.0, []),  # a spike below the threshold is none
        ([1.0, 4.0, 0.5], [30.0, 10.0, 10.0], [[0, 10, 20]]),  # above it just before
        ([1.0, 4.0, 5.0, 0.5], [10.0, 10.0, 30.0, 10.0], [[0, 10, 30]]),
        ([1.0, 4.0, 0.5, 0.4], [10.0, 10.0, 30.0, 30.0], []),  # above it only afterwards
        ([1.0, 4.0, 1.05, 3.0, 0.9], 30.0, [[0, 10, 20], [20, 30, 40]]),  # back to within the rise
        ([1.0, 4.0, 1.2, 3.0, 0.9], 30.0, [[0, 10, 40]]),  # not back: one instability
        ([1.0, 4.0, 5.0], 30.0, [[0, 10, NAN]]),  # never back
        ([1.0, INF, 0.5], 30.0, [[0, 10, 20]]),
        ([1.0, 1.05, 1.09, 0.5], 30.0, []),  # within the rise of the lowest
        ([NAN, 1.0, NAN, 4.0, NAN, 4.0, 0.5], 30.0, [[10, 30, 60]]),  # missing records do not part it
        ([2.0, 3.0, 1.0, 3.0, 0.5], [10.0, 10.0, 30.0, 30.0, 10.0], [[20, 30, 40]]),  # the first one is none
        ([-2.0, -1.0, -3.0], 30.0, [[0, 10, 20]]),  # losses may be negative
        ([5.0], 30.0, []),
    ],
)
def test_instabilities__are_spikes_above_the_threshold(
    loss: list[float], sharp: list[float] | float, expected: list[list[float]]
) -> None:
    found, count = of(loss, sharp)
    np.testing.assert_array_equal(np.array(found).reshape(-1, 3), np.array(expected).reshape(-1, 3))
    assert count == len(expected)


def test_instabilities__of_nothing_recorded() -> None:
    assert of([NAN, NAN])[1] == -1
    assert of([])[1] == -1


def brute_force(loss: np.ndarray, sharp: np.ndarray, rise: float) -> list[tuple[int, int, float]]:
    """Walk through the records one by one."""
    found: list[tuple[int, int, float]] = []
    spike: tuple[int, int] | None = None
    last, low, above = -1, INF, False  # there is no spike before a first record
    for t, (value, s) in enumerate(zip(loss, sharp, strict=True)):
        if np.isnan(value):
            above = above or (spike is not None and s > LIMIT)
            continue
        if np.isfinite(low) and value > low + rise * abs(low):
            if spike is None:
                spike, above = (last, t), sharp[last] > LIMIT
            above = above or s > LIMIT
        elif spike is not None:
            if above:
                found.append((*spike, float(t)))
            spike, above = None, False
        low, last = min(low, value), t
    if spike is not None and above:
        found.append((*spike, NAN))
    return found


values = st.one_of(st.just(NAN), st.floats(0.1, 3.0))


@settings(max_examples=150)
@given(data=st.lists(st.tuples(values, st.sampled_from([10.0, 30.0, NAN])), min_size=1, max_size=14))
def test_instabilities__agree_with_a_walk_through_the_records(data: list[tuple[float, float]]) -> None:
    loss, sharp = np.array(data).T
    labels = np.arange(float(len(loss)))
    index, *times, _, count = instabilities_kernel(loss, sharp, np.full(len(loss), LIMIT), labels=labels)
    expected = brute_force(loss, sharp, 0.1)
    assert count == (len(expected) if np.isfinite(loss).any() else -1)
    for i, place in enumerate(expected):
        np.testing.assert_array_equal([t[i] for t in times], place)
        inside = np.flatnonzero(index == i)
        assert inside[0] == place[1]
        assert inside[-1] + 1 == (place[2] if np.isfinite(place[2]) else len(loss))


def runs() -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    coords = {"seed": [1, 5], "step": [0, 10, 20, 30, 40]}
    loss = [[1.0, 0.5, 4.0, 0.4, 0.3], [1.0, 5.0, 0.9, 3.0, 0.8]]
    sharp = [[18.0, 25.0, 14.0, 12.0, 11.0], [30.0, 28.0, 25.0, 23.0, 15.0]]
    frames = np.zeros((2, 5, 1, 4))
    angle = np.array([[0.0, 0.0, 0.8, 0.5, 0.5], [0.0, 0.1, 0.3, 0.9, 1.2]])
    frames[..., 0, 0], frames[..., 0, 1] = np.cos(angle), np.sin(angle)
    u = xr.DataArray(
        frames,
        dims=("seed", "step", "eig", "in"),
        coords=coords,
        attrs={"vector_dims": ["in"], "number_dim": "eig"},
    )
    first, second = (xr.DataArray(a, dims=("seed", "step"), coords=coords) for a in (loss, sharp))
    return first, second, u


def test_flattening_and_rotation__are_those_over_the_instability() -> None:
    """Planted: the sharpness falls from 25 to 12 and the vector turns by 0.5 rad; in the other run two."""
    loss, sharp, u = runs()
    found = instabilities(loss, sharp, LIMIT)
    np.testing.assert_array_equal(found.instability_count, [1, 2])
    np.testing.assert_array_equal(found.flattening, [[13.0, NAN, NAN], [5.0, 10.0, NAN]])
    np.testing.assert_array_equal(found.instability_index, [[-1, -1, 0, -1, -1], [-1, 0, -1, 1, -1]])
    rotation = instability_rotation(u, found)
    expected = 1 - np.cos([[0.5, NAN, NAN], [0.3, 0.9, NAN]])
    np.testing.assert_allclose(rotation, expected, atol=1e-12)
    assert rotation.dims == ("seed", "instability")


def test_rotation__of_a_span_is_what_its_attrs_say() -> None:
    """Planted: of two vectors one turns by 0.3 rad, so that the subspace overlap is (1 + cos^2) / 2."""
    loss, sharp, u = (a.sel(seed=5) for a in runs())
    still = xr.zeros_like(u)
    still[..., -1] = 1.0  # across the plane in which u turns
    rotation = instability_rotation(xr.concat([u, still], "eig"), instabilities(loss, sharp, LIMIT))
    expected = 1 - ((1 + np.cos(0.3) ** 2) / 2) ** 0.5
    np.testing.assert_allclose(rotation[0], expected, atol=1e-12)
    assert rotation.name == "instability_rotation"
    assert "One minus the root of the subspace overlap" in rotation.attrs["description"]


def test_rotation__of_another_cadence_takes_the_records_around() -> None:
    loss, sharp, u = runs()
    found = instabilities(loss, sharp, LIMIT)
    sparse = instability_rotation(u.isel(step=[0, 4]), found)
    np.testing.assert_allclose(sparse, 1 - np.cos([[0.5, NAN, NAN], [1.2, 1.2, NAN]]), atol=1e-12)
    early = instability_rotation(u.isel(step=[0, 1]), found)  # nothing recorded afterwards
    assert np.isnan(early).all()
    gone = u.copy()
    gone[0, 1] = NAN
    assert np.isnan(instability_rotation(gone, found).values)[:, 0].tolist() == [True, False]


def test_law__chunks_and_the_order_of_dims_change_nothing() -> None:
    loss, sharp, u = runs()
    expected = instabilities(loss, sharp, LIMIT)
    found = instabilities(loss.chunk(step=2).T, sharp.chunk(seed=1), xr.DataArray(LIMIT).chunk())
    xr.testing.assert_equal(found.compute(scheduler="synchronous").transpose(*expected.dims), expected)
    rotation = instability_rotation(u.chunk(step=1).transpose("in", "eig", "step", "seed"), expected)
    assert rotation.chunks is not None
    xr.testing.assert_allclose(
        rotation.compute(scheduler="synchronous"), instability_rotation(u, expected), atol=1e-13
    )
    one = instabilities(loss.sel(seed=5), sharp.sel(seed=5), LIMIT)
    xr.testing.assert_equal(one, expected.sel(seed=5))


@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed() -> None:
    loss, sharp, u = runs()
    found = instabilities(loss.chunk(step=2), sharp, LIMIT)
    assert all(a.chunks is not None for a in found.data_vars.values())
    with pytest.raises(ValueError, match=r"call .load\(\) on them first"):
        instability_rotation(u, found)
    instability_rotation(u.chunk(step=1), instabilities(loss, sharp, LIMIT))


def test_law__scale_of_the_loss_changes_nothing_and_float32_is_enough() -> None:
    loss, sharp, _ = runs()
    expected = instabilities(loss, sharp, LIMIT)
    xr.testing.assert_equal(instabilities(1e-6 * loss, sharp, LIMIT), expected)
    xr.testing.assert_equal(instabilities(loss.astype("f4"), sharp.astype("f4"), LIMIT), expected)


def test_instabilities__refuse_what_does_not_fit() -> None:
    loss, sharp, u = runs()
    with pytest.raises(ValueError, match="rise >= 0"):
        instabilities(loss, sharp, LIMIT, rise=-1)
    with pytest.raises(ValueError, match="loss and sharpness differ along dim 'step'"):
        instabilities(loss, sharp.isel(step=slice(2)), LIMIT)
    with pytest.raises(ValueError, match="expected increasing labels"):
        instabilities(loss.isel(step=[1, 0]), sharp.isel(step=[1, 0]), LIMIT)
    with pytest.raises(TypeError, match="complex"):
        instabilities(loss * 1j, sharp, LIMIT)
    with pytest.raises(ValueError, match="dataset that instabilities returns"):
        instability_rotation(u, xr.Dataset())
