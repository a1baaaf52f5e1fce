from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import track, track_drift
from hild_xr.analysis.trajectories.tracking import track_kernel
from hild_xr.variables import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTRS = {"vector_dims": ["out", "in"], "number_dim": "eig"}
NAN = np.nan
P, SHAPE = 24, (4, 6)
Planted = tuple[np.ndarray, np.ndarray]


def rotating_frames(steps: int, k: int, speed: float = 0.08, seed: int = 0) -> np.ndarray:
    """Orthonormal frames (steps, k, P) that turn by a fixed rotation at every step."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((P, P))
    generator = speed * (A - A.T) / np.linalg.norm(A - A.T, 2)
    w, V = np.linalg.eigh(1j * generator)
    turn = ((V * np.exp(-1j * w)) @ V.conj().T).real
    frame = np.linalg.qr(rng.standard_normal((P, k)))[0]
    return np.stack([(np.linalg.matrix_power(turn, t) @ frame).T for t in range(steps)])


def recorded(
    values: np.ndarray, frames: np.ndarray, *, seed: int | None = 0, steps: Sequence[int] | None = None
) -> tuple[xr.DataArray, xr.DataArray]:
    """What a recorder stores of planted pairs: sorted by size, random signs; exactly equal ones mixed."""
    values, frames = values.copy(), frames.copy()
    if seed is not None:
        rng = np.random.default_rng(seed)
        frames *= rng.choice([-1.0, 1.0], values.shape)[..., None]
        for t, v in enumerate(values):
            for value in np.unique(v[np.isfinite(v)]):
                same = np.flatnonzero(v == value)
                mix = np.linalg.qr(rng.standard_normal((len(same), len(same))))[0]
                frames[t, same] = mix @ frames[t, same]
        order = np.argsort(-np.abs(values), axis=1)
        values, frames = np.take_along_axis(values, order, 1), np.take_along_axis(frames, order[..., None], 1)
    coords = {"step": 10 * np.arange(len(values)) if steps is None else list(steps)}
    lam = xr.DataArray(values, dims=("step", "eig"), coords=coords)
    u = xr.DataArray(
        frames.reshape(*values.shape, *SHAPE), dims=("step", "eig", "out", "in"), coords=coords, attrs=ATTRS
    )
    return lam, u


def shown(tracks: xr.Dataset) -> np.ndarray:
    """Eigenvalues of the tracks that there are."""
    values: np.ndarray = tracks.track_eigenvalue.values
    return values[: int(tracks.track_count)]


def assert_tracks(tracks: xr.Dataset, expected: np.ndarray) -> None:
    """The tracks are the planted ones: rows of eigenvalues, in any order."""
    assert int(tracks.track_count) == len(expected)
    np.testing.assert_allclose(sorted(shown(tracks).tolist(), key=str), sorted(expected.tolist(), key=str))


def crossing(steps: int = 21) -> np.ndarray:
    """Four eigenvalues (steps, 4); the first two cross exactly at the middle record, the others never."""
    t = np.linspace(-1, 1, steps)
    return np.stack([3 + t, 3 - t, np.full(steps, 1.3), 0.5 + 0.1 * t], axis=1)


def test_track__follows_vectors_through_an_exact_crossing() -> None:
    """At the crossing the recorded basis is mixed at random: the identities come out as they went in."""
    values = crossing()
    for seed in range(20):
        tracks = track(*recorded(values, rotating_frames(21, 4, seed=seed), seed=seed))
        assert_tracks(tracks, values.T)
        at = tracks.sel(step=100).track_group.values[:4]
        assert sorted((at >= 0).tolist()) == [False, False, True, True]  # the two that cross, and no more
        assert len(set(at[at >= 0].tolist())) == 1
        assert float(tracks.track_overlap.min()) > 0.95
        assert np.isnan(tracks.track_death).all()


def test_track__of_places_would_not_do() -> None:
    """The negative control: the recorded places are no tracks, and single vectors turn at the crossing."""
    lam, u = recorded(crossing(), rotating_frames(21, 4), seed=3)
    assert not np.allclose(lam.values.T[0], crossing().T[0])
    single = track(lam, u, degenerate=0.0, min_overlap=0.9)
    exact = track(lam, u, degenerate=0.02, min_overlap=0.9)
    assert int(exact.track_count) == 4
    assert int(single.track_count) == 4  # eigenvalues equal to rounding are a group all the same
    lam[10, :2] += np.array([1e-3, -1e-3])
    assert int(track(lam, u, min_overlap=0.9).track_count) == 4
    assert int(track(lam, u, degenerate=0.0, min_overlap=0.9).track_count) > 4


@pytest.mark.parametrize("multiplicity", [2, 3, 4])
def test_track__a_lasting_degeneracy_is_followed_as_a_span(multiplicity: int) -> None:
    """The basis of the span is drawn anew at every record: no deaths, and overlaps of one."""
    values = np.full((15, 5), 2.0)
    values[:, multiplicity:] = [0.9, 0.4, 0.2][: 5 - multiplicity]
    tracks = track(*recorded(values, rotating_frames(15, 5, speed=0.05), seed=1))
    assert_tracks(tracks, values.T)
    assert float(tracks.track_overlap.min()) > 0.98
    group = tracks.track_group.values[:5]
    of_span = tracks.track_eigenvalue.values[:5, 0] == 2.0
    assert (group[of_span] == group[of_span].min()).all()
    assert (group[~of_span] == -1).all()


def test_track__identities_are_kept_through_a_long_degeneracy() -> None:
    """Two pairs merge for ten records, in which the recorded basis is arbitrary, and part again."""
    t = np.arange(30)
    apart = np.where(t < 10, 0.1 * (10 - t), np.where(t < 20, 0.0, 0.1 * (t - 19)))
    values = np.stack([3 + apart, 3 - apart, np.full(30, 1.0)], axis=1)
    values[20:, :2] = values[20:, 1::-1]  # they part crosswise: the size would give the wrong answer
    for seed in range(10):
        frames = rotating_frames(30, 3, speed=0.03, seed=seed)
        assert_tracks(track(*recorded(values, frames, seed=seed)), values.T)


def test_track__a_group_born_as_one_parts_without_deaths() -> None:
    """Nothing says which vector of the first span is which, but the span goes on into both."""
    values = np.stack([2 + 0.05 * np.arange(10), 2 - 0.05 * np.arange(10), np.full(10, 1.0)], axis=1)
    for seed in range(20):
        tracks = track(*recorded(values, rotating_frames(10, 3, speed=0.02, seed=seed), seed=seed))
        assert int(tracks.track_count) == 3
        assert float(tracks.track_overlap.min()) > 0.98


def test_track__births_and_deaths_are_told() -> None:
    """A third pair grows into the two leading ones: a death and a birth, at the records where it shows."""
    t = np.arange(12.0)
    three = np.stack([np.full(12, 5.0), np.full(12, 3.0), 1 + 0.45 * t], axis=1)  # passes 3 after record 4
    order = np.argsort(-three, axis=1)[:, :2]
    frames = rotating_frames(12, 3, speed=0.02)
    values = np.take_along_axis(three, order, 1)
    lam, u = recorded(values, np.take_along_axis(frames, order[..., None], 1))
    tracks = track(lam, u)
    assert int(tracks.track_count) == 3
    one, late, early = (tracks.isel(track=i) for i in range(3))  # the longest goes first
    np.testing.assert_array_equal(one.track_eigenvalue, 5.0)
    np.testing.assert_array_equal(late.track_eigenvalue[5:], three[5:, 2])
    assert np.isnan(late.track_eigenvalue[:5]).all()
    assert (late.track_index[:5] == -1).all()
    np.testing.assert_array_equal(early.track_eigenvalue[:5], 3.0)
    assert (float(one.track_birth), float(late.track_birth), float(early.track_birth)) == (0.0, 50.0, 0.0)
    assert float(early.track_death) == 50.0
    assert np.isnan([one.track_death, late.track_death]).all()
    assert np.isnan(late.track_overlap[5])
    assert np.isnan(tracks.track_birth[3])  # there is no fourth


@pytest.mark.parametrize(
    "order", [slice(None), slice(None, None, -1)], ids=["into a group", "out of a group"]
)
def test_track__two_vectors_that_fall_onto_one_direction_are_one_track_and_one_death(order: slice) -> None:
    """The principal angles of the spans are 0 and 90 degrees, though each vector overlaps by 0.707."""
    x = 2**-0.5
    spans = np.array([[[x, 0, x], [x, 0, -x]], [[1, 0, 0], [0, 1, 0]]])
    values = np.array([[2.0, 1.0], [1.5, 1.5]])
    u = xr.DataArray(spans[order], dims=("step", "eig", "in"), coords={"step": [0, 10]})
    u.attrs = {"vector_dims": ["in"], "number_dim": "eig"}
    tracks = track(xr.DataArray(values[order], dims=("step", "eig"), coords={"step": [0, 10]}), u)
    assert int(tracks.track_count) == 3
    np.testing.assert_array_equal(tracks.track_birth[:3], [0.0, 0.0, 10.0])
    np.testing.assert_array_equal(tracks.track_death[:3], [NAN, 10.0, NAN])
    np.testing.assert_allclose(tracks.track_overlap[:3, 1], [x, NAN, NAN])
    np.testing.assert_allclose(track_drift(tracks).eigenvector_rotation[:3, 1], [1 - x, NAN, NAN])


def replaced_in_a_group(seed: int, size: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of (nearly) one eigenvalue, in an arbitrary basis, and a distinct one; record 6 replaces one."""
    frames = rotating_frames(12, size + 2, speed=0.03, seed=seed)
    frames[6:, 0] = frames[6:, size + 1]
    frames = frames[:, : size + 1]
    rng = np.random.default_rng(seed)
    for t in range(12):
        frames[t, :size] = np.linalg.qr(rng.standard_normal((size, size)))[0] @ frames[t, :size]
    return np.tile([*(2 + 1e-3 * np.arange(size)), 1.0], (12, 1)), frames


@pytest.mark.parametrize("size", [2, 3, 6])
def test_track__a_death_and_a_birth_inside_a_group_are_told(size: int) -> None:
    """Each vector of the group may overlap with what is left of the span: one of the tracks ends, no more."""
    for seed in range(20):
        tracks = track(*recorded(*replaced_in_a_group(seed, size), seed=None))
        births, deaths = tracks.track_birth.values, tracks.track_death.values
        assert int(tracks.track_count) == size + 2
        assert sorted(births[: size + 2]) == [0.0] * (size + 1) + [60.0]
        assert deaths[np.isfinite(deaths)].tolist() == [60.0]
        assert births[deaths == 60.0].tolist() == [0.0]


@pytest.mark.parametrize("size", [3, 6])
def test_track__one_that_leaves_a_group_is_no_death(size: int) -> None:
    """The vectors carried in the group may have 1 / sqrt(size) of the one that leaves; the span has it."""
    values = np.full((6, size), 2.0)
    values[3:, 0] = 2.5
    for seed in range(20):
        tracks = track(*recorded(values, rotating_frames(6, size, speed=0.03, seed=seed), seed=seed))
        assert int(tracks.track_count) == size
        assert np.isnan(tracks.track_death).all()


def test_track__an_unrelated_basis_ends_all_tracks() -> None:
    frames = rotating_frames(6, 3)
    frames[3:] = np.linalg.qr(np.random.default_rng(5).standard_normal((P, 3)))[0].T
    tracks = track(*recorded(np.tile([3.0, 2.0, 1.0], (6, 1)), frames), min_overlap=0.9)
    assert int(tracks.track_count) == 6
    np.testing.assert_array_equal(tracks.track_death.values[:6], [30.0] * 3 + [np.nan] * 3)
    np.testing.assert_array_equal(tracks.track_birth.values[:6], [0.0] * 3 + [30.0] * 3)


def test_track__goes_on_over_missing_records() -> None:
    values, frames = crossing(), rotating_frames(21, 4, speed=0.05)
    lam, u = recorded(values, frames)
    gone = [0, 4, 5, 6, 10, 20]  # the first, some in between, the crossing itself and the last
    lam[gone], u[gone] = np.nan, np.nan
    tracks = track(lam, u)
    expected = values.T.copy()
    expected[:, gone] = np.nan
    assert_tracks(tracks, expected)
    np.testing.assert_array_equal(tracks.track_birth[:4], 10.0)
    assert np.isnan(tracks.track_death).all()
    assert (tracks.track_index.values[:, gone] == -1).all()


def test_track__death_is_at_the_next_recorded_step() -> None:
    values = np.tile([3.0, 2.0, 1.0], (5, 1))
    lam, u = recorded(values, rotating_frames(5, 3, speed=0.01), seed=None)
    lam[2], u[2] = np.nan, np.nan
    lam[3:, 1], u[3:, 1] = np.nan, np.nan
    tracks = track(lam, u)
    death = dict(zip(tracks.track_eigenvalue.values[:3, 0].tolist(), tracks.track_death.values, strict=False))
    assert death[2.0] == 30.0  # not at 20, where nothing was recorded
    assert np.isnan([death[3.0], death[1.0]]).all()


def test_track__a_pair_that_is_absent_for_a_record_is_a_new_track() -> None:
    lam, u = recorded(np.tile([3.0, 2.0], (5, 1)), rotating_frames(5, 2, speed=0.01), seed=None)
    lam[2, 1], u[2, 1] = np.nan, np.nan
    tracks = track(lam, u)
    assert int(tracks.track_count) == 3
    np.testing.assert_array_equal(tracks.track_birth[:3], [0.0, 0.0, 30.0])


def test_track__nothing_recorded() -> None:
    lam, u = recorded(np.full((3, 2), np.nan), np.full((3, 2, P), np.nan), seed=None)
    tracks = track(lam, u)
    assert int(tracks.track_count) == -1
    assert np.isnan(tracks.track_eigenvalue).all()
    assert np.isnan(tracks.track_birth).all()
    assert (tracks.track_index == -1).all()
    empty = track(lam.isel(step=slice(0)), u.isel(step=slice(0)))
    assert empty.track_eigenvalue.shape == (4, 0)
    assert int(empty.track_count) == -1
    no_seed = track(lam.expand_dims(seed=0), u.expand_dims(seed=0))
    assert no_seed.track_eigenvalue.shape == (0, 4, 3)


def test_track__negative_eigenvalues_pass_through_zero() -> None:
    values = np.stack([np.linspace(1, -1, 9), np.full(9, 0.6)], axis=1)
    tracks = track(*recorded(values, rotating_frames(9, 2, speed=0.02)))
    assert_tracks(tracks, values.T)


def test_track__short_lived_tracks_are_left_out_and_counted() -> None:
    frames = rotating_frames(12, 3, speed=0.01)
    rng = np.random.default_rng(0)
    for t in range(12):  # the third vector is another one at every record
        rest = rng.standard_normal(P)
        rest -= frames[t, :2].T @ (frames[t, :2] @ rest)
        frames[t, 2] = rest / np.linalg.norm(rest)
    tracks = track(*recorded(np.tile([3.0, 2.0, 1.0], (12, 1)), frames), min_overlap=0.8, max_tracks=2)
    assert tracks.sizes["track"] == 2
    assert int(tracks.track_count) == 14
    assert sorted(tracks.track_eigenvalue.values.mean(axis=1).tolist()) == [2.0, 3.0]


# ---------------------------------------------------------------------------- laws


def planted(seed: int, k: int = 4, steps: int = 12) -> Planted:
    """Smooth eigenvalues that cross here and there, on turning frames."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)[:, None]
    values = 2 + rng.uniform(-1, 1, k) + np.cumsum(rng.normal(0, 0.05, (steps, k)), axis=0) + 1.5 * t
    return values, rotating_frames(steps, k, speed=0.05, seed=seed)


PER_RECORD = ["track_eigenvalue", "track_overlap", "track_group"]


@settings(max_examples=25)
@given(seed=st.integers(0, 999), change=st.integers(0, 999))
def test_law__signs_and_order_do_not_change_the_tracks(seed: int, change: int) -> None:
    values, frames = planted(seed)
    expected = track(*recorded(values, frames, seed=None))
    rng = np.random.default_rng(change)
    order = np.stack([rng.permutation(4) for _ in values])
    frames = np.take_along_axis(frames, order[..., None], 1) * rng.choice([-1, 1], order.shape)[..., None]
    found = track(*recorded(np.take_along_axis(values, order, 1), frames, seed=None))
    for name in (*PER_RECORD, "track_birth", "track_death", "track_count"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12, err_msg=name)
    assert_tracks(found, values.T)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), change=st.integers(0, 999))
def test_law__signs_and_order_do_not_change_a_death_in_a_group(seed: int, change: int) -> None:
    values, frames = replaced_in_a_group(seed)
    rng = np.random.default_rng(change)
    order = np.stack([rng.permutation(3) for _ in values])
    changed = np.take_along_axis(frames, order[..., None], 1) * rng.choice([-1, 1], order.shape)[..., None]
    found = track(*recorded(np.take_along_axis(values, order, 1), changed, seed=None))
    expected = track(*recorded(values, frames, seed=None))
    for name in (*PER_RECORD, "track_birth", "track_death", "track_count"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12, err_msg=name)


@settings(max_examples=25)
@given(seed=st.integers(0, 999))
def test_law__rotation_and_permutation_of_parameters_change_nothing(seed: int) -> None:
    lam, u = recorded(*planted(seed))
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((P, P)))[0]
    turned = u.copy(data=(u.values.reshape(*lam.shape, P) @ turn).reshape(u.shape))
    permuted = u.isel({"in": rng.permutation(SHAPE[1]), "out": rng.permutation(SHAPE[0])})
    for other in (turned, permuted):
        xr.testing.assert_allclose(track(lam, other), track(lam, u), atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), factor=st.sampled_from([-1e-12, 0.25, 1e12]))
def test_law__scale_changes_eigenvalues_only(seed: int, factor: float) -> None:
    lam, u = recorded(*planted(seed))
    expected, found = track(lam, u), track(factor * lam, (factor * u).assign_attrs(u.attrs))
    xr.testing.assert_allclose(found.track_eigenvalue / factor, expected.track_eigenvalue)
    xr.testing.assert_allclose(
        found.drop_vars("track_eigenvalue"), expected.drop_vars("track_eigenvalue"), atol=1e-12
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 99))
def test_law__float32_records_give_the_same_tracks(seed: int) -> None:
    lam, u = recorded(*planted(seed))
    single, double = track(lam.astype("f4"), u.astype("f4")), track(lam, u)
    np.testing.assert_array_equal(single.track_index, double.track_index)
    for name in ("track_eigenvalue", "track_overlap"):
        assert single[name].dtype == np.float64
        np.testing.assert_allclose(single[name], double[name], atol=1e-5)


def runs(missing: bool = True) -> tuple[xr.DataArray, xr.DataArray]:
    """Three seeds with missing records, a different one each."""
    pairs = [recorded(*planted(seed), seed=seed) for seed in range(3)]
    lam, u = (xr.concat(arrays, "seed") for arrays in zip(*pairs, strict=True))
    u.attrs = ATTRS
    for seed, gone in enumerate([[], [3, 4, 5, 6], [0, 7, 11]] if missing else []):
        lam[seed, gone], u[seed, gone] = np.nan, np.nan
    attempt = ("step", np.arange(lam.sizes["step"]))
    return lam.assign_coords(seed=[1, 5, 9], attempt=attempt), u.assign_coords(seed=[1, 5, 9])


@settings(max_examples=10)
@given(data=st.data())
def test_law__chunks_and_the_order_of_dims_change_nothing(data: st.DataObject) -> None:
    lam, u = runs()
    changed = []
    for a in (lam, u):
        sizes = {dim: data.draw(st.integers(1, n), label=f"{a.ndim} {dim}") for dim, n in a.sizes.items()}
        in_memory = data.draw(st.booleans(), label=f"{a.ndim} in memory")
        order = data.draw(st.permutations(a.dims), label=f"{a.ndim} dims")
        changed.append((a if in_memory else a.chunk(sizes)).transpose(*order))
    found, expected = track(*changed).compute(scheduler="synchronous"), track(lam, u)
    for name, array in expected.items():
        xr.testing.assert_allclose(found[name].transpose(*array.dims), array, atol=1e-13)


def test_law__seeds_are_independent_of_each_other() -> None:
    lam, u = runs()
    whole = track(lam, u)
    for seed in (1, 5, 9):
        xr.testing.assert_allclose(track(lam.sel(seed=seed), u.sel(seed=seed)), whole.sel(seed=seed))


@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed() -> None:
    lam, u = runs()
    tracks = track(lam.chunk(step=5), u.chunk(step=4, out=2))
    for result in (tracks, track_drift(tracks)):
        for array in result.data_vars.values():
            assert array.chunks is not None
            with pytest.raises(AssertionError, match="something was computed"):
                array.compute()


def test_graph__is_linear_in_the_number_of_chunks() -> None:
    def tasks(n: int) -> int:
        lam = xr.DataArray(dask.array.ones((n, 2), chunks=(1, 2)), dims=("step", "eig"))
        u = xr.DataArray(
            dask.array.ones((n, 2, *SHAPE), chunks=(1, 2, *SHAPE)),
            dims=("step", "eig", "out", "in"),
            attrs=ATTRS,
        )
        return len(dict(track(lam, u).track_eigenvalue.__dask_graph__()))

    assert tasks(64) - tasks(32) <= 1.05 * 2 * (tasks(32) - tasks(16))


def test_track__results_carry_the_registry_and_their_coords() -> None:
    lam, u = runs()
    tracks = track(lam, u, max_tracks=5, min_overlap=0.6)
    assert tracks.sizes == {"seed": 3, "track": 5, "step": 12}
    for name, array in tracks.items():
        assert array.attrs.items() >= VARIABLES[str(name)].attrs().items()
        assert array.attrs["min_overlap"] == 0.6
        assert array.dtype.kind == VARIABLES[str(name)].kind
    assert tracks.step.values.tolist() == lam.step.values.tolist()
    assert tracks.seed.values.tolist() == [1, 5, 9]
    assert tracks.attempt.dims == ("step",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_overlap": 0.0}, r"expected min_overlap in \(0, 1\]"),
        ({"min_overlap": 1.1}, r"expected min_overlap in \(0, 1\]"),
        ({"degenerate": 1.0}, r"expected degenerate in \[0, 1\)"),
        ({"max_tracks": 0}, "expected max_tracks of at least 1"),
        ({"dim": "epoch"}, r"missing \['epoch'\]"),
        ({"number_dim": "layer"}, r"missing \['layer'\]"),
    ],
)
def test_track__refuses_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        track(*recorded(*planted(0)), **options)


def test_track__refuses_records_that_do_not_belong_together() -> None:
    lam, u = recorded(*planted(0))
    with pytest.raises(ValueError, match="eigenvalues and eigenvectors differ along dim 'step'"):
        track(lam.isel(step=slice(3, None)), u)
    with pytest.raises(ValueError, match="expected increasing labels along dim 'step'"):
        track(lam.isel(step=[1, 0]), u.isel(step=[1, 0]))
    with pytest.raises(ValueError, match="expected one record for each label"):
        track(lam.isel(step=[0, 0]), u.isel(step=[0, 0]))
    with pytest.raises(ValueError, match=r"came \['layer'\] besides; select first"):
        track(lam.expand_dims(layer=["a", "b"]), u)
    with pytest.raises(TypeError, match="complex128"):
        track(lam, u * 1j)
    with pytest.raises(ValueError, match="expected numbers as labels"):
        words = [f"{t:02d}" for t in range(12)]
        track(lam.assign_coords(step=words), u.assign_coords(step=words))


# ---------------------------------------------------------------------------- drift of tracks


def test_drift__is_that_of_the_eigenpair_not_of_the_place() -> None:
    values = crossing()
    drift = track_drift(track(*recorded(values, rotating_frames(21, 4, speed=0.0))))
    change = np.diff(values, axis=0).T
    np.testing.assert_allclose(np.sort(drift.eigenvalue_drift[:4, 1:], axis=0), np.sort(change, axis=0))
    assert np.isnan(drift.eigenvalue_drift[:4, 0]).all()
    np.testing.assert_allclose(drift.eigenvector_rotation[:4, 1:], 0.0, atol=1e-12)


def test_drift__of_a_turning_vector_is_its_rotation_and_bridges_gaps() -> None:
    angle = 0.1 * np.arange(6)
    frames = np.zeros((6, 1, P))
    frames[:, 0, 0], frames[:, 0, 1] = np.cos(angle), np.sin(angle)
    lam, u = recorded(np.arange(1.0, 7.0)[:, None], frames)
    lam[3], u[3] = np.nan, np.nan
    drift = track_drift(track(lam, u)).isel(track=0)
    np.testing.assert_allclose(drift.eigenvalue_drift, [np.nan, 1, 1, np.nan, 2, 1])
    rotation = 1 - np.cos([np.nan, 0.1, 0.1, np.nan, 0.2, 0.1])
    np.testing.assert_allclose(drift.eigenvector_rotation, rotation, atol=1e-12)


def test_kernel__of_a_quadratic_loss_has_one_track_a_pair() -> None:
    """Known answer: the Hessian of a quadratic loss does not move, so overlap matrices are the identity."""
    values = np.tile([4.0, 2.0, 1.0], (2, 7, 1))
    cosines = np.tile(np.eye(3), (2, 7, 1, 1))
    cosines[:, 0] = np.nan
    present = np.full(values.shape, True)
    tracks = track_kernel(values, present, cosines, labels=np.arange(7.0), max_tracks=4)
    np.testing.assert_array_equal(tracks[0][:, :3], np.swapaxes(values, 1, 2))
    np.testing.assert_array_equal(tracks[1][:, :3], np.broadcast_to(np.arange(3)[:, None], (2, 3, 7)))
    np.testing.assert_array_equal(tracks[-1], [3, 3])
