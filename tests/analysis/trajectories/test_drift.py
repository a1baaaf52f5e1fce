from __future__ import annotations

import warnings
from collections.abc import Callable

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import (
    consecutive_overlap,
    eigenvector_overlap,
    pairwise_angles,
    pairwise_overlap,
    pairwise_subspace_overlap,
    subspace_overlap,
)
from hild_xr.analysis.trajectories import drift as drift_module
from hild_xr.analysis.trajectories.drift import consecutive_overlap_kernel
from hild_xr.variables import VARIABLES

NAN = np.nan
ATTRS = {"vector_dims": ["out", "in"], "number_dim": "eig"}
STEPS, K, OUT, IN = 7, 3, 3, 4


def frames(seed: int = 0, missing: tuple[int, ...] = ()) -> xr.DataArray:
    """Orthonormal bases that drift, two runs of them; some records missing in the second."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((2, 1, OUT * IN, K)) + 0.3 * rng.standard_normal((2, STEPS, OUT * IN, K))
    Q = np.swapaxes(np.linalg.qr(A)[0], -1, -2).reshape(2, STEPS, K, OUT, IN)
    Q[1, list(missing)] = NAN
    return xr.DataArray(
        Q,
        dims=("seed", "step", "eig", "out", "in"),
        coords={"seed": [1, 5], "step": 10 * np.arange(STEPS), "eig": np.arange(K)},
        attrs=ATTRS,
    )


def flat(u: xr.DataArray) -> np.ndarray:
    return u.transpose("seed", "step", "eig", "out", "in").values.reshape(2, STEPS, K, OUT * IN)


def brute_force_consecutive(rows: np.ndarray) -> np.ndarray:
    """One run (s, k, p), record by record."""
    result = np.full((len(rows), K, K), NAN)
    last = None
    for t, record in enumerate(rows):
        if last is not None:
            result[t] = np.abs(last @ record.T)
        if np.isfinite(record).all(axis=-1).any():
            last = record
    return result


@pytest.mark.parametrize("missing", [(), (0,), (2, 3), (0, 1, 4), (6,), (1, 3, 5), tuple(range(7))])
def test_consecutive_overlap__is_with_the_last_recorded_one(missing: tuple[int, ...]) -> None:
    u = frames(missing=missing)
    found = consecutive_overlap(u)
    assert found.dims == ("seed", "step", "eig_", "eig")
    expected = [brute_force_consecutive(rows) for rows in flat(u)]
    np.testing.assert_allclose(found, expected, atol=1e-14)
    for chunk in (1, 2, 3, 5):
        lazy = consecutive_overlap(u.chunk(step=chunk, seed=1, out=2))
        np.testing.assert_allclose(lazy.compute(scheduler="synchronous"), expected, atol=1e-14)


def test_consecutive_overlap__works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    u = frames(missing=(2, 3, 4))
    expected = consecutive_overlap(u)
    for size in (1, 2000):
        monkeypatch.setattr(drift_module, "BLOCK_BYTES", size)
        xr.testing.assert_allclose(consecutive_overlap(u), expected, atol=1e-14)


def test_consecutive_overlap__single_absent_vectors_are_nan_and_carried_by_none() -> None:
    u = frames()
    u[0, 2, 1] = NAN
    u[0, 3, 0] = 0.0  # a zero vector has no direction
    found = consecutive_overlap(u).isel(seed=0)
    assert np.isnan(found.isel(step=2).values).any(axis=0).tolist() == [False, True, False]
    after = np.isnan(found.isel(step=3).values)
    assert after[1].all()
    assert after[:, 0].all()
    assert after.sum() == 5
    np.testing.assert_allclose(found.isel(step=5), np.abs(flat(u)[0, 4] @ flat(u)[0, 5].T), atol=1e-14)


def test_consecutive_overlap__a_record_of_zeros_is_none_in_any_chunks() -> None:
    u = frames()
    u[1, 3] = 0.0
    gone = u.where(u.step != 30).assign_attrs(ATTRS)
    expected = consecutive_overlap(gone).sel(seed=5)
    xr.testing.assert_allclose(consecutive_overlap(u).sel(seed=5), expected)
    for chunk in (1, 2, 4):
        lazy = consecutive_overlap(u.chunk(step=chunk)).compute(scheduler="synchronous")
        xr.testing.assert_allclose(lazy.sel(seed=5), expected)


def test_overlap__of_a_quadratic_loss_is_the_identity() -> None:
    """Known answer of item 3: the Hessian does not move, whatever signs the solver gives."""
    one = frames().isel(step=0, drop=True)
    signs = xr.DataArray(np.random.default_rng(0).choice([-1.0, 1.0], (STEPS, K)), dims=("step", "eig"))
    u = (one * signs).assign_attrs(ATTRS)
    expected = np.broadcast_to(np.eye(K), (2, STEPS, STEPS, K, K))
    np.testing.assert_allclose(
        pairwise_overlap(u).transpose("seed", "step", "step_", "eig", "eig_"), expected, atol=1e-12
    )
    np.testing.assert_allclose(pairwise_subspace_overlap(u), 1.0, atol=1e-12)


def test_subspace_overlap__of_random_directions_is_k_by_p() -> None:
    """Known answer of item 3: the random baseline."""
    rng = np.random.default_rng(0)
    k, p = 5, 200
    u = xr.DataArray(
        rng.standard_normal((40, k, p)),
        dims=("step", "eig", "in"),
        attrs={"vector_dims": ["in"], "number_dim": "eig"},
    )
    found = pairwise_subspace_overlap(u).values[np.triu_indices(40, 1)]
    assert found.mean() == pytest.approx(k / p, rel=0.02)


def test_pairwise__agree_with_pairs_one_by_one() -> None:
    u = frames(missing=(4,))
    overlap, spans = pairwise_overlap(u), pairwise_subspace_overlap(u)
    cosines = np.square(np.cos(pairwise_angles(u))).mean("angle", skipna=False)
    xr.testing.assert_allclose(spans.drop_attrs(), cosines.drop_attrs(), atol=1e-12)
    for s in (0, 3, 4):
        for t in (1, 4, 6):
            a, b = u.isel(step=s, drop=True), u.isel(step=t, drop=True)
            pair = {"step": s, "step_": t}
            np.testing.assert_allclose(
                overlap.isel(pair), eigenvector_overlap(a, b).transpose("seed", "eig", "eig_"), atol=1e-13
            )
            np.testing.assert_allclose(spans.isel(pair), subspace_overlap(a, b), atol=1e-13)
    assert overlap.step_.values.tolist() == overlap.step.values.tolist()
    assert overlap.eig_.values.tolist() == [0, 1, 2]


def test_pairwise__works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    u = frames()
    expected = pairwise_subspace_overlap(u)
    monkeypatch.setattr(drift_module, "BLOCK_BYTES", 1)
    xr.testing.assert_allclose(pairwise_subspace_overlap(u), expected, atol=1e-14)


def test_eigenvector_overlap__names_its_dims_after_both() -> None:
    u = frames()
    means = xr.DataArray(np.eye(12)[:2].reshape(2, OUT, IN), dims=("class", "out", "in"))
    found = eigenvector_overlap(u, means, vector_dims=["out", "in"], number_dim=("eig", "class"))
    assert found.dims == ("seed", "step", "eig", "class")
    np.testing.assert_allclose(found, np.abs(flat(u)[..., :2]), atol=1e-14)
    assert found.attrs.items() >= VARIABLES["eigenvector_overlap"].attrs().items()


@settings(max_examples=10)
@given(data=st.data())
def test_law__chunks_order_of_dims_and_signs_change_nothing(data: st.DataObject) -> None:
    u = frames(missing=(1, 2))
    sizes = {dim: data.draw(st.integers(1, n), label=str(dim)) for dim, n in u.sizes.items()}
    signs = np.random.default_rng(data.draw(st.integers(0, 99))).choice([-1.0, 1.0], (2, STEPS, K, 1, 1))
    other = (u * signs).assign_attrs(ATTRS).chunk(sizes).transpose(*data.draw(st.permutations(u.dims)))
    for function in (consecutive_overlap, pairwise_overlap, pairwise_subspace_overlap):
        expected = function(u)
        found = function(other).compute(scheduler="synchronous").transpose(*expected.dims)
        xr.testing.assert_allclose(found, expected, atol=1e-13)


@settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_law__rotation_scale_and_float32_change_nothing(seed: int) -> None:
    u = frames(seed, missing=(3,))
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((OUT * IN, OUT * IN)))[0]
    turned = u.copy(data=(flat(u) @ turn).reshape(u.shape))
    scaled = (u * 10.0 ** rng.uniform(-200, 150, (2, STEPS, K, 1, 1))).assign_attrs(ATTRS)
    for function in (consecutive_overlap, pairwise_overlap, pairwise_subspace_overlap):
        expected = function(u)
        xr.testing.assert_allclose(function(turned), expected, atol=1e-12)
        xr.testing.assert_allclose(function(scaled), expected, atol=1e-12)
        xr.testing.assert_allclose(function(u.astype("f4")), expected, atol=1e-6)


@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed() -> None:
    u = frames().chunk(step=2)
    for function in (consecutive_overlap, pairwise_overlap, pairwise_subspace_overlap):
        result = function(u)
        with pytest.raises(AssertionError, match="something was computed"):
            result.compute()
    assert eigenvector_overlap(u, u).chunks is not None


def test_graph__of_consecutive_overlaps_is_linear_in_the_number_of_chunks() -> None:
    def tasks(n: int) -> int:
        array = dask.array.ones((n, K, OUT, IN), chunks=(1, K, OUT, IN))
        u = xr.DataArray(array, dims=("step", "eig", "out", "in"), attrs=ATTRS)
        return len(dict(consecutive_overlap(u).__dask_graph__()))  # type: ignore[no-untyped-call]

    assert tasks(64) - tasks(32) <= 1.05 * 2 * (tasks(32) - tasks(16))


@pytest.mark.parametrize("function", [pairwise_overlap, pairwise_subspace_overlap])
def test_graph__of_all_pairs_grows_with_the_number_of_small_chunks_not_its_square(
    function: Callable[[xr.DataArray], xr.DataArray],
) -> None:
    def tasks(n: int) -> int:
        array = dask.array.ones((n, K, OUT, IN), chunks=(1, K, OUT, IN))
        return len(
            dict(function(xr.DataArray(array, dims=("step", "eig", "out", "in"), attrs=ATTRS)).data.dask)
        )

    assert tasks(64) - tasks(32) <= 1.05 * 2 * (tasks(32) - tasks(16))


@pytest.mark.parametrize("function", [pairwise_overlap, pairwise_subspace_overlap])
def test_pairwise__of_some_united_chunks_is_that_in_memory(
    function: Callable[[xr.DataArray], xr.DataArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hild_xr.analysis.base.chunks.CHUNK_BYTES", 2 * 8 * 2 * K * OUT * IN)
    u = frames(missing=(4,))
    found = function(u.chunk(step=1))
    assert found.chunksizes["step"] == found.chunksizes["step_"] == (2, 2, 2, 1)
    xr.testing.assert_allclose(found.compute(scheduler="synchronous"), function(u), atol=1e-13)


def test_drift__of_no_records_is_empty() -> None:
    none = frames().isel(step=slice(0))
    for u in (none, none.chunk()):
        assert consecutive_overlap(u).shape == (2, 0, K, K)
        assert pairwise_overlap(u).shape == (2, 0, 0, K, K)
        assert pairwise_subspace_overlap(u).shape == (2, 0, 0)


def test_kernel__bridges_blocks_through_the_record_before() -> None:
    rows = flat(frames(missing=(3,)))[1]
    whole = consecutive_overlap_kernel(rows, np.full((1, K, OUT * IN), NAN))
    tail = consecutive_overlap_kernel(rows[3:], rows[2:3])
    np.testing.assert_allclose(tail, whole[3:], atol=1e-14)


def test_drift__refuses_what_does_not_fit() -> None:
    u = frames()
    with pytest.raises(ValueError, match="expected increasing labels"):
        consecutive_overlap(u.isel(step=[1, 0]))
    with pytest.raises(ValueError, match="expected one record for each label"):
        consecutive_overlap(u.isel(step=[1, 1]))
    with pytest.raises(ValueError, match="no dim 'step_'"):
        pairwise_overlap(u.expand_dims(step_=2))
    with pytest.raises(TypeError, match="complex"):
        pairwise_overlap(u * 1j)
    with pytest.raises(ValueError, match="differ along dim 'step'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eigenvector_overlap(u, u.isel(step=slice(3)))
