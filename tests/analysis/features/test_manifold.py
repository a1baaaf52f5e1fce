from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis.features import (
    bhattacharyya_distance,
    manifold,
    pairwise_bhattacharyya,
    progress,
    truth,
)

NAMES = ("sample", "class_")


def predictions(*shape: int, seed: int = 0, sharp: float = 1.0) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(shape[-1], 1 / sharp), shape[:-1])
    return xr.DataArray(p, dims=("seed", "step", *NAMES)[-len(shape) :])


def brute(p: np.ndarray, q: np.ndarray) -> float:
    return -float(np.mean([np.log(np.sum(np.sqrt(a * b))) for a, b in zip(p, q, strict=True)]))


def geodesic(t: float, end: xr.DataArray) -> xr.DataArray:
    """Point of the geodesic from ignorance, as its formula says."""
    C = end.sizes["class_"]
    p, q = np.full(end.shape, 1 / C), end.values
    T = np.arccos(np.sqrt(p * q).sum(axis=-1, keepdims=True))
    amplitude = np.sin((1 - t) * T) / np.sin(T) * np.sqrt(p) + np.sin(t * T) / np.sin(T) * np.sqrt(q)
    return xr.DataArray(amplitude**2, dims=NAMES)


def test_distance__of_certainty_and_ignorance() -> None:
    p, q = (xr.DataArray([v], dims=NAMES) for v in ([1.0, 0.0], [0.5, 0.5]))
    assert float(bhattacharyya_distance(p, q)) == pytest.approx(0.34657, abs=5e-6)
    assert float(bhattacharyya_distance(p, q)) == pytest.approx(np.log(2) / 2, rel=1e-15)


@given(seed=st.integers(0, 999), n=st.integers(1, 6), C=st.integers(2, 5))
def test_distance__is_that_of_the_definition(seed: int, n: int, C: int) -> None:
    p, q = predictions(n, C, seed=seed), predictions(n, C, seed=seed + 1)
    expected = brute(p.values, q.values)
    assert float(bhattacharyya_distance(p, q)) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert float(bhattacharyya_distance(q, p)) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert float(bhattacharyya_distance(p, p)) == pytest.approx(0, abs=1e-15)
    logits = xr.apply_ufunc(np.log, p) + xr.DataArray(np.arange(n) - 3.0, dims="sample")
    found = bhattacharyya_distance(logits, xr.apply_ufunc(np.log, q), of="logits")
    assert float(found) == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_logits__lose_nothing_where_probabilities_are_rounded_to_zero() -> None:
    logits = xr.DataArray([[200.0, 0.0]], dims=NAMES)
    single = xr.DataArray(np.exp(logits.values.astype(np.float32) - 200), dims=NAMES)
    other = logits.isel(class_=[1, 0])
    assert float(bhattacharyya_distance(single, single.isel(class_=[1, 0]))) == np.inf
    found = bhattacharyya_distance(logits, other, of="logits")
    assert float(found) == pytest.approx(100 - np.log(2), rel=1e-12)


@pytest.mark.parametrize("bad", [[2.0, -1.0], [0.7, 0.7], [np.nan, 1.0], [np.inf, 0.0], [0.0, 0.0]])
def test_predictions__that_are_no_probabilities_are_marked(bad: list[float]) -> None:
    p = xr.DataArray([[[0.5, 0.5], bad], [[0.5, 0.5], [1.0, 0.0]]], dims=("step", *NAMES))
    found = bhattacharyya_distance(p, p.isel(step=1, drop=True))
    assert np.isnan(found.values).tolist() == [True, False]


def test_predictions__rounded_to_float16_are_probabilities_and_are_normalised() -> None:
    p = predictions(50, 100).astype(np.float16)
    assert float(abs(p.astype(float).sum("class_") - 1).max()) > 1e-5
    assert float(bhattacharyya_distance(p, p)) == pytest.approx(0, abs=1e-15)


def test_pairs__are_those_of_single_distances_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    p = predictions(2, 3, 7, 4).assign_coords(seed=[3, 8], step=[0, 5, 9])
    p = p.assign_coords(attempt=("step", [1, 1, 2]))
    found = pairwise_bhattacharyya(p)
    assert found.dims == ("seed", "step", "step_")
    expected = bhattacharyya_distance(p, p.drop_vars("attempt").rename(step="step_"))
    np.testing.assert_allclose(found, expected.transpose(*found.dims), rtol=1e-12, atol=1e-15)
    assert found.coords["attempt_"].dims == ("step_",)
    monkeypatch.setattr(manifold, "BLOCK_BYTES", 8 * 2 * 9 * 2)
    np.testing.assert_allclose(pairwise_bhattacharyya(p), found, rtol=1e-12, atol=1e-15)


def test_pairs__tasks_grow_with_the_number_of_small_chunks_not_its_square() -> None:
    def tasks(n: int) -> int:
        return len(dict(pairwise_bhattacharyya(predictions(n, 7, 4).chunk(step=1)).data.dask))

    assert tasks(64) - tasks(32) <= 1.05 * 2 * (tasks(32) - tasks(16))


def test_pairs__of_some_united_chunks_are_those_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hild_xr.analysis.base.chunks.CHUNK_BYTES", 2 * 8 * 7 * 4)
    p = predictions(5, 7, 4)
    found = pairwise_bhattacharyya(p.chunk(step=1))
    assert found.chunksizes["step"] == found.chunksizes["step_"] == (2, 2, 1)
    np.testing.assert_allclose(found, pairwise_bhattacharyya(p), rtol=1e-12, atol=1e-15)


def test_pairs__of_all_records_of_all_runs_carry_the_labels_of_both() -> None:
    p = predictions(2, 3, 7, 4).assign_coords(seed=[3, 8], step=[0, 5, 9])
    found = pairwise_bhattacharyya(p, dim=("seed", "step"))
    assert found.dims == ("model", "model_")
    assert found.sizes == {"model": 6, "model_": 6}
    one = found[(found.seed == 8) & (found.step == 5), (found.seed_ == 3) & (found.step_ == 9)]
    expected = brute(p.sel(seed=8, step=5).values, p.sel(seed=3, step=9).values)
    assert one.values == pytest.approx(np.array([[expected]]), rel=1e-12)


def test_pairs__between_two_arrays_and_all_seeds() -> None:
    p = predictions(2, 3, 7, 4)
    q = p.rename(seed="seed_").isel(step=slice(2))
    for chunked in (p, p.chunk(seed=1, step=1)):
        found = pairwise_bhattacharyya(chunked, q)
        assert {d: found.sizes[d] for d in ("seed", "seed_", "step", "step_")} == {
            "seed": 2,
            "seed_": 2,
            "step": 3,
            "step_": 2,
        }
        for s, s_, t, t_ in ((0, 1, 2, 0), (1, 0, 0, 1), (1, 1, 2, 1)):
            expected = brute(p.values[s, t], p.values[s_, t_])
            one = found.isel(seed=s, seed_=s_, step=t, step_=t_)
            assert float(one) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("C", [2, 3, 10])
def test_progress__of_points_on_the_geodesic_is_their_place(C: int) -> None:
    end = truth(xr.DataArray(np.arange(20) % C, dims="sample"), C)
    for t in (0.0, 0.01, 0.3, 0.77, 1.0):
        found = progress(geodesic(t, end), end)
        assert float(found["progress"]) == pytest.approx(t, abs=1e-7)
        assert float(found["distance_to_geodesic"]) == pytest.approx(0, abs=1e-13)


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), sharp=st.sampled_from([0.3, 1.0, 4.0]))
def test_progress__is_the_nearest_point_of_the_curve(seed: int, sharp: float) -> None:
    C, n = 3, 6
    end = truth(xr.DataArray(np.random.default_rng(seed).integers(0, C, n), dims="sample"), C)
    p = predictions(n, C, seed=seed, sharp=sharp)
    found = progress(p, end)

    def distance(t: float) -> float:
        return brute(p.values, geodesic(t, end).values)

    best = scipy.optimize.minimize_scalar(distance, bounds=(0, 1), options={"xatol": 1e-10})
    expected = min((distance(t), t) for t in (0.0, 1.0, float(best.x)))
    assert float(found["progress"]) == pytest.approx(expected[1], abs=1e-5)
    assert float(found["distance_to_geodesic"]) == pytest.approx(expected[0], rel=1e-9, abs=1e-12)


def test_progress__between_given_ends_that_agree_on_some_samples() -> None:
    end = predictions(4, 3, seed=1)
    start = end.copy()
    start[2:] = predictions(2, 3, seed=2).values
    for t, point in ((0.0, start), (1.0, end)):
        found = progress(point, end, ignorance=start)
        assert float(found["progress"]) == pytest.approx(t, abs=1e-7)
    assert np.isnan(float(progress(end, end, ignorance=end)["progress"]))


def test_progress__of_a_prediction_that_excludes_truth_somewhere_stops_before_it() -> None:
    end = truth(xr.DataArray([0, 0, 0], dims="sample"), 2)
    p = xr.DataArray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dims=NAMES)
    found = progress(p, end)
    assert 0 < float(found["progress"]) < 1
    assert np.isfinite(float(found["distance_to_geodesic"]))


def test_truth__is_one_hot_and_refuses_other_labels() -> None:
    labels = xr.DataArray([2, 0], dims="sample", coords={"sample": [7, 9]})
    one_hot = truth(labels, 3)
    assert one_hot.values.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot.sample.values.tolist() == [7, 9]
    with pytest.raises(ValueError, match=r"labels 0 \.\.\. 1, came 0 \.\.\. 2"):
        truth(labels, 2)
    with pytest.raises(TypeError, match="came dtype <U1"):
        truth(xr.DataArray(["a"], dims="sample"), 2)


def test_manifold__refuses_bad_arguments() -> None:
    p = predictions(3, 4)
    with pytest.raises(ValueError, match="of='probabilities' or 'logits', came 'probs'"):
        bhattacharyya_distance(p, p, of="probs")
    with pytest.raises(TypeError, match="complex"):
        bhattacharyya_distance(p, p * 1j)
    with pytest.raises(ValueError, match=r"missing \['class_'\]"):
        bhattacharyya_distance(p, p.rename(class_="unit"))
    with pytest.raises(ValueError, match="differ along dim 'sample'"):
        bhattacharyya_distance(p, p.isel(sample=slice(2)))
    with pytest.raises(ValueError, match="two classes in q"):
        bhattacharyya_distance(p, p.isel(class_=[0]))
    with pytest.raises(ValueError, match=r"missing \['step'\]"):
        pairwise_bhattacharyya(p)
    with pytest.raises(ValueError, match="beside sample and class_"):
        pairwise_bhattacharyya(p, dim=("sample", "class_"))
    steps = predictions(1, 2, 3, 4)
    with pytest.raises(ValueError, match="no dim 'step_'"):
        pairwise_bhattacharyya(steps.rename(seed="step_"))
    with pytest.raises(ValueError, match="differ along dim 'sample'"):
        progress(p, p.isel(sample=slice(2)))


def test_logits__said_to_be_probabilities_are_refused_and_named() -> None:
    logits = xr.DataArray(np.random.default_rng(0).normal(0, 5, (3, 8, 4)), dims=("step", *NAMES))
    for function in (pairwise_bhattacharyya, lambda a: bhattacharyya_distance(a, a)):
        with pytest.raises(ValueError, match="came none: pass of='logits'"):
            function(logits)
    with pytest.raises(ValueError, match=r"probabilities as predictions.*of='logits'"):
        progress(logits, predictions(8, 4))
    assert pairwise_bhattacharyya(logits, of="logits").notnull().all()


def test_lazy_outputs__as_the_model_gave_them_are_refused_as_probabilities_without_computing() -> None:
    p = predictions(3, 8, 4)
    raw = p.chunk(step=1).assign_attrs(transform=None)
    with pytest.raises(ValueError, match=r"transform=None.*of='logits'.*assign_attrs"):
        pairwise_bhattacharyya(raw)
    for stated in (raw.assign_attrs(transform="Softmax"), p.chunk(), p.assign_attrs(transform=None)):
        np.testing.assert_allclose(pairwise_bhattacharyya(stated), pairwise_bhattacharyya(p), atol=1e-15)
    missing = xr.full_like(p, np.nan)
    assert pairwise_bhattacharyya(missing).isnull().all()
