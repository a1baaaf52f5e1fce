from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hild_xr.analysis import (
    angles_to_reference,
    consecutive_angles,
    pairwise_angles,
    principal_angles,
)
from hild_xr.analysis.subspaces import angles
from hild_xr.analysis.subspaces.angles import SMALL_ANGLE, pairwise_angles_kernel, principal_angles_kernel
from hild_xr.analysis.subspaces.bases import FloatArray, full_rank_basis
from hild_xr.analysis.subspaces.nearby import nearby_sines_kernel

LAYER = {"vector_dims": ["out", "in"], "number_dim": "eig"}


def orthonormal(rng: np.random.Generator, *shape: int) -> FloatArray:
    Q: FloatArray = np.linalg.qr(rng.standard_normal(shape))[0]
    return Q


def eigenvectors(
    seed: int = 0, steps: int = 5, k: int = 3, out: int = 2, in_: int = 4, drift: float = 0.3
) -> xr.DataArray:
    """Recorded eigenvectors that drift along training, dims (seed, step, eig, out, in)."""
    rng = np.random.default_rng(seed)
    U = orthonormal(rng, 2, 1, out * in_, k) + drift * rng.standard_normal((2, steps, out * in_, k))
    rows = np.swapaxes(np.linalg.qr(U)[0], -1, -2).reshape(2, steps, k, out, in_)
    coords = {"seed": [3, 7], "step": 10 * np.arange(steps), "eig": np.arange(k), "out": list("ab")[:out]}
    return xr.DataArray(rows, dims=("seed", "step", "eig", "out", "in"), coords=coords, attrs=LAYER)


def scipy_angles(U: FloatArray, V: FloatArray) -> FloatArray:
    angles: FloatArray = scipy.linalg.subspace_angles(U, V)[::-1]
    return angles


def mpmath_angles(U: FloatArray, V: FloatArray) -> FloatArray:
    """Arc cosines at 60 digits, where the cosine formula loses nothing."""
    with mpmath.workdps(60):
        Q, R = (mpmath.qr(mpmath.matrix(A.tolist()), mode="skinny")[0] for A in (U, V))
        cosines = mpmath.svd_r(Q.T * R, compute_uv=False)
        return np.array([float(mpmath.acos(min(c, mpmath.mpf(1)))) for c in cosines])


# ---------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("exponent", range(-14, 1))
def test_principal_angles_kernel__is_right_to_1e12_where_the_cosine_is_not(exponent: int) -> None:
    rng = np.random.default_rng(exponent + 100)
    U = orthonormal(rng, 8, 3)
    V = np.linalg.qr(U + 10.0**exponent * rng.standard_normal((8, 3)))[0]
    true = mpmath_angles(U, V)
    np.testing.assert_allclose(principal_angles_kernel(U, V), true, rtol=0, atol=2e-13)
    if exponent in (-9, -8):
        by_cosine = np.arccos(np.clip(np.linalg.svd(U.T @ V, compute_uv=False), -1, 1))
        assert np.abs(by_cosine - true).max() > 1e-9


def test_principal_angles_kernel__tiny_and_large_angles_in_one_pair() -> None:
    true = np.array([1e-13, 1e-9, 1e-5, 1e-2, 0.7, 1.5])
    frame = orthonormal(np.random.default_rng(0), 40, 12)
    U, W = frame[:, :6], frame[:, 6:]
    V = (U * np.cos(true) + W * np.sin(true)) @ orthonormal(np.random.default_rng(1), 6, 6)
    np.testing.assert_allclose(principal_angles_kernel(U, V), true, rtol=0, atol=5e-15)
    np.testing.assert_allclose(principal_angles_kernel(U, V), mpmath_angles(U, V), rtol=0, atol=5e-15)


@pytest.mark.parametrize("angle", [SMALL_ANGLE * f for f in (0.5, 0.999, 1.0, 1.001, 2.0)])
def test_principal_angles_kernel__is_as_good_on_both_sides_of_the_change_of_formula(angle: float) -> None:
    frame = orthonormal(np.random.default_rng(0), 30, 4)
    U, V = frame[:, :2], frame[:, :2] * np.cos([angle, 1.0]) + frame[:, 2:] * np.sin([angle, 1.0])
    np.testing.assert_allclose(principal_angles_kernel(U, V), [angle, 1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("p", "k1", "k2"), [(30, 3, 3), (30, 2, 5), (30, 5, 2), (5, 3, 4), (4, 4, 2), (1, 1, 1)]
)
def test_principal_angles_kernel__agrees_with_scipy(p: int, k1: int, k2: int) -> None:
    rng = np.random.default_rng(p + k1)
    U, V = rng.standard_normal((3, 2, p, k1)), rng.standard_normal((2, p, k2))
    found = principal_angles_kernel(U, V)
    assert found.shape == (3, 2, min(k1, k2))
    for i, j in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(found[i, j], scipy_angles(U[i, j], V[j]), rtol=0, atol=1e-12)


def test_principal_angles_kernel__of_identical_and_orthogonal_spaces() -> None:
    frame = orthonormal(np.random.default_rng(0), 500, 8)
    mixed = frame[:, :4] @ np.random.default_rng(1).standard_normal((4, 4))
    np.testing.assert_allclose(principal_angles_kernel(frame[:, :4], mixed), 0, atol=1e-13)
    np.testing.assert_allclose(principal_angles_kernel(frame[:, :4], frame[:, 4:]), np.pi / 2, atol=1e-13)
    np.testing.assert_allclose(principal_angles_kernel(frame[:, :2], frame), 0, atol=1e-13)


def test_principal_angles_kernel__works_in_float64_on_float32_bases() -> None:
    U, V = orthonormal(np.random.default_rng(0), 2, 300, 5).astype(np.float32)
    found = principal_angles_kernel(U, V)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, scipy_angles(U.astype(float), V.astype(float)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(principal_angles_kernel(U, U.astype(float)), 0, atol=1e-13)


def test_principal_angles_kernel__is_nan_only_where_a_basis_is_bad() -> None:
    rng = np.random.default_rng(0)
    U, V = rng.standard_normal((4, 6, 2)), rng.standard_normal((4, 6, 2))
    U[0, 0, 0], V[1, 5, 1], U[2, :, 1] = np.nan, np.inf, 3 * U[2, :, 0]
    found = principal_angles_kernel(U, V)
    np.testing.assert_array_equal(np.isnan(found), np.array([[True, True]] * 3 + [[False, False]]))
    np.testing.assert_allclose(found[3], scipy_angles(U[3], V[3]), rtol=0, atol=1e-13)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), tiny=st.sampled_from([0.0, 1e-9, 1e-3, 1.0]))
def test_principal_angles_kernel__depends_on_the_spans_only(seed: int, tiny: float) -> None:
    rng = np.random.default_rng(seed)
    U = orthonormal(rng, 3, 9, 3)
    V = U[..., :2] + tiny * rng.standard_normal((3, 9, 2))
    expected = principal_angles_kernel(U, V)
    rotation, basis = orthonormal(rng, 9, 9), orthonormal(rng, 3, 3) * rng.uniform(0.1, 10, 3)
    signs = rng.permutation(np.eye(2)) * rng.choice([-1, 1], 2)
    order = rng.permutation(9)
    for changed in (
        principal_angles_kernel(U @ basis, V @ signs),
        principal_angles_kernel(rotation @ U, rotation @ V),
        principal_angles_kernel(U[:, order], V[:, order]),
        principal_angles_kernel(V, U),
    ):
        np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-13)
    assert (np.diff(expected) >= 0).all()


@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-6, 0.0])
def test_pairwise_angles_kernel__is_the_kernel_pair_by_pair(
    drift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    U = orthonormal(rng, 1, 1, 12, 3) + drift * rng.standard_normal((2, 5, 12, 3))
    V = orthonormal(rng, 1, 1, 12, 3) + drift * rng.standard_normal((2, 4, 12, 3))
    V[:, :2, :, :2] = U[:, :2, :, :2]
    V = V[..., :2]
    U[1, 3, 0, 0] = np.nan
    expected = principal_angles_kernel(U[:, :, None], V[:, None])
    found = pairwise_angles_kernel(U, V)
    assert found.shape == (2, 5, 4, 2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    assert np.isnan(found[1, 3]).all()
    monkeypatch.setattr(angles, "BLOCK_BYTES", 1)
    np.testing.assert_allclose(pairwise_angles_kernel(U, V), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("p", "k1", "k2"), [(9, 2, 4), (9, 4, 2), (5, 3, 4), (4, 4, 3), (6, 1, 3)])
@pytest.mark.parametrize("tiny", [1e-13, 1e-9, 1e-5])
def test_principal_angles_kernel__is_right_to_1e12_for_other_shapes(
    p: int, k1: int, k2: int, tiny: float
) -> None:
    rng = np.random.default_rng(p + 10 * k1)
    U = rng.standard_normal((p, max(k1, k2)))
    V = U[:, :k2] @ rng.standard_normal((k2, k2)) + tiny * rng.standard_normal((p, k2))
    U = U[:, :k1]
    np.testing.assert_allclose(principal_angles_kernel(U, V), mpmath_angles(U, V), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dependence", [1e-2, 1e-5, 1e-8])
def test_principal_angles_kernel__of_nearly_dependent_columns_is_as_sure_as_their_span(
    dependence: float,
) -> None:
    rng = np.random.default_rng(0)
    U = rng.standard_normal((12, 3))
    U[:, 2] = U[:, 0] + dependence * U[:, 2]
    V = U @ rng.standard_normal((3, 3)) + 1e-3 * dependence * rng.standard_normal((12, 3))
    # one rounding of an entry turns the span by eps / dependence
    atol = 4 * np.finfo(float).eps * np.linalg.cond(V)
    assert atol < 1e-4
    np.testing.assert_allclose(principal_angles_kernel(U, V), mpmath_angles(U, V), rtol=0, atol=atol)


def test_principal_angles_kernel__is_right_to_1e12_for_long_vectors_on_both_sides_of_the_change() -> None:
    rng = np.random.default_rng(0)
    true = np.array([0.9, 1.1]) * SMALL_ANGLE
    frame = orthonormal(rng, 300_000, 4)
    mix = orthonormal(rng, 2, 2)
    V = (frame[:, :2] * np.cos(true) + frame[:, 2:] * np.sin(true)) @ mix
    np.testing.assert_allclose(principal_angles_kernel(frame[:, :2], V), true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("drift", [1.0, 1e-6])
@pytest.mark.parametrize("nearly", [True, False])
@pytest.mark.parametrize("cache_bytes", [1, 2**22])
@pytest.mark.parametrize("shapes", [((3, 1), (1, 4)), ((3, 4), (4,)), ((3, 4), ()), ((3, 4), (3, 4))])
def test_principal_angles_kernel__broadcasts_and_works_in_blocks(
    drift: float,
    nearly: bool,
    cache_bytes: int,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    start = orthonormal(rng, 12, 3) if nearly else rng.standard_normal((12, 3))
    U, V = (start + drift * rng.standard_normal((*lead, 12, 3)) for lead in shapes)
    U[1, 0, 0, 0] = np.nan
    every_U, every_V = (np.broadcast_to(A, (3, 4, 12, 3)) for A in (U, V))
    expected = [[principal_angles_kernel(every_U[i, j], every_V[i, j]) for j in range(4)] for i in range(3)]
    monkeypatch.setattr(angles, "CACHE_BYTES", cache_bytes)
    np.testing.assert_allclose(principal_angles_kernel(U, V), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(principal_angles_kernel(V, U), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("drift", [1e-2, 1e-4, 1e-7, 1e-11, 0.0])
@pytest.mark.parametrize("same", [True, False])
def test_pairwise_angles_kernel__of_long_vectors_takes_nearby_subspaces_together(
    drift: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    start = orthonormal(rng, 40, 3)
    U, V = (
        (start + drift * rng.standard_normal((2, n, 40, 3))) @ orthonormal(rng, n, 3, 3) for n in (13, 12)
    )
    U[1, :2] = orthonormal(rng, 2, 40, 3)  # far from all others
    U[0, 3, 0, 0] = np.nan
    V = U if same else V
    expected = principal_angles_kernel(U[:, :, None], V[:, None])
    taken: list[int] = []

    def counting(*arguments: Any) -> tuple[FloatArray, NDArray[np.bool_]]:
        sines, right = nearby_sines_kernel(*arguments)
        taken.append(int(right.sum()))
        return sines, right

    monkeypatch.setattr(angles, "CACHE_BYTES", 1)
    monkeypatch.setattr(angles, "nearby_sines_kernel", counting)
    found = pairwise_angles_kernel(U, None if same else V)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    if 0 < drift < 1e-2:
        assert min(taken) > 0


@pytest.mark.parametrize("block_bytes", [1, 400, 2**25])
@pytest.mark.parametrize("drift", [1.0, 1e-6])
def test_pairwise_angles_kernel__of_one_stack_is_symmetric_and_zero_to_itself(
    drift: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    U = orthonormal(rng, 1, 1, 12, 3) + drift * rng.standard_normal((2, 5, 12, 3))
    U[1, 3, 0, 0] = np.nan
    monkeypatch.setattr(angles, "BLOCK_BYTES", block_bytes)
    found = pairwise_angles_kernel(U)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))
    np.testing.assert_allclose(found, pairwise_angles_kernel(U, U.copy()), rtol=0, atol=1e-14)
    itself = found[:, np.arange(5), np.arange(5)]
    np.testing.assert_array_equal(itself[1, 3], np.nan)
    assert (itself[0] == 0).all()


# ---------------------------------------------------------------------------- labelled


def test_principal_angles__record_by_record_with_coords() -> None:
    u, v = eigenvectors(0), eigenvectors(1)
    found = principal_angles(u, v)
    assert found.dims == ("seed", "step", "angle")
    assert found.attrs["units"] == "rad"
    xr.testing.assert_equal(found["step"], u["step"])
    assert "eig" not in found.coords
    for seed, step in itertools.product(u["seed"].values, u["step"].values):
        U, V = (a.sel(seed=seed, step=step).values.reshape(3, 8).T for a in (u, v))
        np.testing.assert_allclose(found.sel(seed=seed, step=step), scipy_angles(U, V), rtol=0, atol=1e-12)


def test_principal_angles__broadcasts_dims_that_one_array_lacks() -> None:
    u = eigenvectors(0)
    found = principal_angles(u, u.sel(step=20))  # keeps the scalar coord step=20
    xr.testing.assert_equal(found, principal_angles(u, u.sel(step=20, drop=True)))
    assert found["step"].dims == ("step",)
    np.testing.assert_allclose(found.sel(step=20), 0, atol=1e-14)
    assert (found.sel(step=0) > 1e-3).any()


def test_principal_angles__row_blocks_have_one_subspace_a_row() -> None:
    u = eigenvectors(0, k=2).transpose("seed", "step", "out", "eig", "in")
    u.attrs["vector_dims"] = ["in"]
    found = principal_angles(u, u.roll(step=1))
    assert found.dims == ("seed", "step", "out", "angle")
    U, V = u.isel(seed=1, step=2, out=0).values.T, u.isel(seed=1, step=1, out=0).values.T
    np.testing.assert_allclose(found.isel(seed=1, step=2, out=0), scipy_angles(U, V), rtol=0, atol=1e-13)


def test_principal_angles__takes_bases_of_different_size_and_numbering() -> None:
    u = eigenvectors(0)
    v = eigenvectors(1).isel(eig=[0]).rename(eig="centre").drop_vars("centre")
    v.attrs["number_dim"] = "centre"
    expected = principal_angles(u, eigenvectors(1).isel(eig=[0]))
    assert expected.sizes["angle"] == 1
    xr.testing.assert_identical(principal_angles(u, v), expected)
    for a in (u, v):
        a.attrs.clear()
    found = principal_angles(u, v, vector_dims=["out", "in"], number_dim=("eig", "centre"))
    xr.testing.assert_identical(found, expected)


def test_principal_angles__number_dim_of_one_may_be_a_record_dim_of_the_other() -> None:
    u = eigenvectors(0)
    v = eigenvectors(1).drop_vars("eig").rename(eig="centre").isel(seed=0, step=0, drop=True)
    v.attrs["number_dim"] = "centre"
    many = xr.concat([u, u.roll(step=1)], dim="centre")
    found = principal_angles(many, v)
    assert set(found.dims) == {"centre", "seed", "step", "angle"}
    xr.testing.assert_allclose(found.isel(centre=0), principal_angles(u, v))


def test_pairwise_angles__equals_principal_angles_of_each_pair() -> None:
    u = eigenvectors(0)
    found = pairwise_angles(u)
    assert found.dims == ("seed", "step", "step_", "angle")
    xr.testing.assert_equal(found["step_"], u["step"].rename(step="step_"))
    for s, t in itertools.product(u["step"].values, repeat=2):
        expected = principal_angles(u.sel(step=s, drop=True), u.sel(step=t, drop=True))
        np.testing.assert_allclose(found.sel(step=s, step_=t), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seeds", [None, [3], [3, 7]])
@pytest.mark.parametrize(
    "chunks", [None, {"step": 2}, {"step": 2, "in": 3, "eig": 1}, {"step": 1, "seed": 1}]
)
def test_pairwise_angles__whatever_the_chunks_and_record_dims(
    seeds: list[int] | None, chunks: dict[str, int] | None
) -> None:
    u = eigenvectors(0)
    expected = pairwise_angles(u)
    u = u.isel(seed=0) if seeds is None else u.sel(seed=seeds)
    expected = expected.isel(seed=0) if seeds is None else expected.sel(seed=seeds)
    if chunks is not None:
        u = u.chunk({dim: n for dim, n in chunks.items() if dim in u.dims})
    xr.testing.assert_allclose(pairwise_angles(u).compute(), expected, rtol=0, atol=1e-14)


def test_pairwise_angles__along_another_dim() -> None:
    u = eigenvectors(0)
    found = pairwise_angles(u, dim="seed")
    assert found.dims == ("step", "seed", "seed_", "angle")
    expected = principal_angles(u.sel(seed=3, drop=True), u.sel(seed=7, drop=True))
    np.testing.assert_allclose(found.sel(seed=7, seed_=3), expected, rtol=0, atol=1e-14)


def count_of_orthonormalised(monkeypatch: pytest.MonkeyPatch, u: xr.DataArray) -> int:
    """How many bases pairwise_angles orthonormalises."""
    shapes: list[tuple[int, ...]] = []

    def counting(U: FloatArray) -> FloatArray:
        shapes.append(U.shape[:-2])
        return full_rank_basis(U)

    monkeypatch.setattr(angles, "full_rank_basis", counting)
    pairwise_angles(u).compute(scheduler="synchronous")
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize("chunk_bytes", [1, 2**27])
def test_pairwise_angles__takes_each_basis_once_where_all_can_be_held(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("hild_xr.analysis.base.chunks.CHUNK_BYTES", chunk_bytes)
    u = eigenvectors(0, steps=6)
    assert count_of_orthonormalised(monkeypatch, u.chunk(step=2, seed=1)) == u.sizes["seed"] * 6


class Live:
    """How many blocks of records are alive at a time, at most."""

    def __init__(self) -> None:
        self.now = self.most = self.read = 0

    def block(self, values: FloatArray) -> FloatArray:
        self.now += 1
        self.read += 1
        self.most = max(self.most, self.now)
        fresh = values.copy()
        weakref.finalize(fresh, self.leave)
        return fresh

    def leave(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("held_bytes", [0, 2**29])
def test_pairwise_angles__holds_a_few_blocks_where_all_are_too_many(
    monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    n, record = 12, 8 * 3 * 2 * 4
    monkeypatch.setattr("hild_xr.analysis.base.chunks.CHUNK_BYTES", 2 * record)
    monkeypatch.setattr(angles, "HELD_BYTES", held_bytes)
    u = eigenvectors(0, steps=2 * n).isel(seed=0)
    expected, live = pairwise_angles(u), Live()
    kernel = angles._full_rank_rows
    monkeypatch.setattr(angles, "_full_rank_rows", lambda U: live.block(kernel(U)))
    # the chunks are not the blocks: each block unites two
    found = pairwise_angles(u.chunk(step=1)).compute(scheduler="synchronous")
    xr.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    assert live.most == n if held_bytes else live.most <= 2
    assert live.read == (n if held_bytes else n**2)


def test_angles_to_reference__is_the_row_of_the_pairwise_angles() -> None:
    u = eigenvectors(0)
    found = angles_to_reference(u, 30)
    xr.testing.assert_allclose(found, pairwise_angles(u).sel(step_=30, drop=True), rtol=0, atol=1e-14)
    assert found.attrs["reference"] == 30
    np.testing.assert_allclose(found.sel(step=30), 0, atol=1e-14)


def test_angles__of_a_missing_record_are_nan_and_no_others() -> None:
    u = eigenvectors(0)
    u = u.where((u["step"] != 20) | (u["seed"] != 7))
    u.attrs = LAYER
    gone = (u["step"] == 20) & (u["seed"] == 7)
    xr.testing.assert_equal(principal_angles(u, u).isnull().all("angle"), gone.transpose("seed", "step"))
    pairs = pairwise_angles(u).isnull()
    assert bool(pairs.sel(seed=7, step=20).all())
    assert bool(pairs.sel(seed=7, step_=20).all())
    assert not bool(pairs.sel(seed=3).any())
    assert not bool(pairs.sel(seed=7).drop_sel(step=20, step_=20).any())


def test_angles__of_a_run_without_records_are_empty() -> None:
    u = eigenvectors(0).isel(step=slice(0))
    for array in (u, u.chunk()):
        assert principal_angles(array, array).compute().shape == (2, 0, 3)
        assert pairwise_angles(array).compute().shape == (2, 0, 0, 3)


def test_consecutive_angles__are_those_beside_the_diagonal_of_all_pairs() -> None:
    u = eigenvectors(0).assign_coords(attempt=("step", np.arange(5)))
    found, pairs = consecutive_angles(u), pairwise_angles(u)
    assert found.dims == ("seed", "step", "angle")
    assert found["step"].values.tolist() == [10, 20, 30, 40]
    assert found["attempt"].values.tolist() == [1, 2, 3, 4]
    for before, step in itertools.pairwise(u["step"].values):
        expected = pairs.sel(step=before, step_=step)
        np.testing.assert_allclose(found.sel(step=step), expected, rtol=0, atol=1e-14)


def test_consecutive_angles__do_not_reach_across_a_missing_record() -> None:
    u = eigenvectors(0)
    u = u.where((u["step"] != 20) | (u["seed"] != 7)).assign_attrs(LAYER)
    missing = consecutive_angles(u).isnull().all("angle")
    assert missing.sel(seed=7).values.tolist() == [False, True, True, False]
    assert not bool(consecutive_angles(u).isnull().sel(seed=3).any())


def test_consecutive_angles__take_dims_by_argument_and_arrays_without_labels() -> None:
    u = eigenvectors(0)
    plain = u.drop_vars(["step", "eig"]).drop_attrs()
    found = consecutive_angles(plain, vector_dims=["out", "in"], number_dim="eig")
    np.testing.assert_array_equal(found, consecutive_angles(u))
    assert consecutive_angles(u.isel(step=slice(1))).sizes["step"] == 0


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1, 1]])
def test_consecutive_angles__refuses_steps_out_of_order(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"increasing labels|several for \[10\]"):
        consecutive_angles(eigenvectors(0).isel(step=order))


def test_pairwise_angles__refuses_steps_that_occur_twice_but_takes_any_order() -> None:
    u = eigenvectors(0)
    with pytest.raises(ValueError, match=r"one record for each label of dim 'step' of u.*for \[0\]"):
        pairwise_angles(u.isel(step=[0, 0, 1]))
    order = [2, 0, 1]
    expected = pairwise_angles(u).isel(step=order, step_=order)
    xr.testing.assert_allclose(pairwise_angles(u.isel(step=order)), expected, rtol=0, atol=1e-14)


def test_principal_angles__missing_layers_are_an_error() -> None:
    u, v = (
        xr.concat([eigenvectors(0), eigenvectors(1)], dim=xr.Variable("layer", layers))
        for layers in (["a", "b"], ["a", "c"])
    )
    with pytest.raises(ValueError, match="u and v differ along dim 'layer'"):
        principal_angles(u, v)


@pytest.mark.parametrize(
    "function",
    [
        lambda u: principal_angles(u, u),
        lambda u: angles_to_reference(u, 0),
        consecutive_angles,
        pairwise_angles,  # as long as blocks of records are small
    ],
    ids=["principal", "reference", "consecutive", "pairwise"],
)
def test_angles__graphs_grow_in_proportion_to_the_number_of_chunks(
    function: Callable[[xr.DataArray], xr.DataArray],
) -> None:
    n_tasks = [
        len(dict(function(eigenvectors(0, steps=2 * n).chunk(step=2)).data.dask)) for n in (20, 40, 80)
    ]
    assert n_tasks[2] - n_tasks[1] == 2 * (n_tasks[1] - n_tasks[0])


def test_pairwise_angles__large_blocks_of_records_have_a_task_for_each_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hild_xr.analysis.base.chunks.CHUNK_BYTES", 1)  # nothing is united
    u = eigenvectors(0, steps=16).chunk(step=2)
    tasks = dict(pairwise_angles(u).data.dask)
    assert sum("pairwise-angles" in str(key[0]) for key in tasks) == 8**2


# ---------------------------------------------------------------------------- bad input


def test_principal_angles__different_steps_are_an_error_that_says_how_to_align() -> None:
    u, v = eigenvectors(0), eigenvectors(1).isel(step=[0, 2])
    with pytest.raises(
        ValueError, match=r"u and v differ along dim 'step': 5 labels \(0 ... 40\).*xr\.align"
    ):
        principal_angles(u, v)
    aligned = xr.align(u, v, join="inner")
    assert principal_angles(*aligned)["step"].values.tolist() == [0, 20]


def test_principal_angles__same_number_of_steps_but_other_labels_is_an_error() -> None:
    u = eigenvectors(0)
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        principal_angles(u, u.assign_coords(step=u["step"] + 1))


def test_principal_angles__vectors_of_different_size_are_an_error() -> None:
    u = eigenvectors(0)
    with pytest.raises(
        ValueError, match="differ along dim 'in': 4 labels without coordinate against 3 labels"
    ):
        principal_angles(u, u.isel({"in": slice(3)}))


def changed(**attrs: Any) -> xr.DataArray:
    """Eigenvectors with attrs replaced, or without those that are None."""
    u = eigenvectors(0)
    u.attrs = {name: value for name, value in {**LAYER, **attrs}.items() if value is not None}
    return u


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (changed(vector_dims=["in"]), r"came \['out', 'in'\] on u, \['in'\] on v; pass vector_dims"),
        (changed(vector_dims=["out", "kw"]), r"expected dims \['out', 'in'\] on u|missing \['kw'\]|came"),
        (changed(number_dim=None), "no number dim: expected an attr 'number_dim' on v"),
        (changed(number_dim="rank"), r"expected dims \['rank'\] on v.*pass number_dim"),
        (changed(number_dim="in"), "expected a number dim of v beside its vector dims"),
        (eigenvectors(0).isel(eig=slice(0)), "at least one vector"),
        (eigenvectors(0).isel(out=[0]), "differ along dim 'out'"),
    ],
)
def test_principal_angles__says_what_is_wrong_with_the_dims(v: xr.DataArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        principal_angles(eigenvectors(0), v)


def test_principal_angles__without_any_vector_dims() -> None:
    with pytest.raises(ValueError, match=r"no vector dims.*pass vector_dims=\[\.\.\.\]"):
        principal_angles(changed(vector_dims=None), changed(vector_dims=None))
    one = principal_angles(changed(vector_dims=None), changed())
    xr.testing.assert_identical(one, principal_angles(changed(), changed()))


def test_principal_angles__argument_goes_before_attrs() -> None:
    u = eigenvectors(0)
    rows = principal_angles(u, u, vector_dims=["in"])
    assert rows.dims == ("seed", "step", "out", "angle")


def test_principal_angles__more_vectors_than_entries_is_an_error() -> None:
    u = eigenvectors(0)
    with pytest.raises(ValueError, match=r"expected at most 2 vectors in u, the size of \['out'\], came 3"):
        principal_angles(u, u, vector_dims="out")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (eigenvectors(0) * 1j, "expected real numbers in v, came dtype complex128"),
        (eigenvectors(0) > 0, "expected real numbers in v, came dtype bool"),
        (eigenvectors(0).values, r"expected an xarray.DataArray as v, came ndarray; .*_kernel"),
        (eigenvectors(0).to_dataset(name="eigenvectors"), "came Dataset.*by their variable"),
    ],
)
def test_principal_angles__refuses_other_types(bad: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        principal_angles(eigenvectors(0), bad)


def test_pairwise_angles__refuses_a_vector_dim_and_a_missing_one() -> None:
    with pytest.raises(ValueError, match="expected dim='in' beside the vector dims"):
        pairwise_angles(eigenvectors(0), dim="in")
    with pytest.raises(ValueError, match=r"missing \['time'\]"):
        pairwise_angles(eigenvectors(0), dim="time")


def test_angles_to_reference__refuses_unknown_and_duplicate_labels() -> None:
    u = eigenvectors(0)
    with pytest.raises(KeyError, match=r"came 35; the labels are \[0, 10, 20, 30, 40\]"):
        angles_to_reference(u, 35)
    with pytest.raises(ValueError, match=r"expected one record at step=0, came 2; drop duplicates"):
        angles_to_reference(u.assign_coords(step=[0, 0, 1, 2, 3]), 0)
