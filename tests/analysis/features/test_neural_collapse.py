from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis.features import neural_collapse
from hild_xr.analysis.features.neural_collapse import self_duality_kernel, simplex_etf_kernel

C = 4
LABELS = np.repeat(np.arange(C), 5)


def simplex(d: int, seed: int = 0) -> Any:
    """C vectors of length d that form a simplex equiangular tight frame around a point."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    etf = np.sqrt(C / (C - 1)) * (np.eye(C) - 1 / C)
    return etf @ Q[:C] + 0.3


def activations(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("sample", "unit"))


def labels(values: np.ndarray = LABELS) -> xr.DataArray:
    return xr.DataArray(values, dims="sample")


def noisy(seed: int = 0, d: int = 6) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((C, d))[LABELS] + 0.5 * rng.standard_normal((len(LABELS), d))


def test_a_collapsed_network__has_all_of_them_zero() -> None:
    means = simplex(6)
    weight = xr.DataArray(7 * (means - means.mean(axis=0)), dims=("out", "in"))
    found = neural_collapse(activations(means[LABELS]), labels(), weight=weight)
    for name in ("nc2_equinorm", "nc2_equiangular", "nc2_maximal_angle", "nc3", "nc4"):
        assert float(found[name]) == pytest.approx(0, abs=1e-12)
    assert float(found["nc1"]) == pytest.approx(0, abs=1e-25)
    assert float(found["nearest_mean_accuracy"]) == 1


@pytest.mark.parametrize("nc1", ["pinv", "trace_ratio"])
def test_nc1__is_that_of_the_dense_matrices(nc1: Any) -> None:
    h = noisy()
    means = np.stack([h[c == LABELS].mean(axis=0) for c in range(C)])
    within = (h - means[LABELS]).T @ (h - means[LABELS]) / len(h)
    between = (means - means.mean(axis=0)).T @ (means - means.mean(axis=0)) / C
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-9, hermitian=True)) / C
    if nc1 == "trace_ratio":
        expected = np.trace(within) / np.trace(between)
    assert float(neural_collapse(activations(h), labels(), nc1=nc1)["nc1"]) == pytest.approx(expected)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.25, 2.0, 3.0]))
def test_nc1__grows_with_the_square_of_the_noise(seed: int, scale: float) -> None:
    means = np.random.default_rng(seed).standard_normal((C, 6))
    noise = np.random.default_rng(seed + 1).standard_normal((len(LABELS), 6))
    for c in range(C):
        noise[c == LABELS] -= noise[c == LABELS].mean(axis=0)
    one, more = (
        neural_collapse(activations(means[LABELS] + s * noise), labels())["nc1"] for s in (1.0, scale)
    )
    assert float(more / one) == pytest.approx(scale**2, rel=1e-9)


def test_nc1__of_class_means_that_coincide_is_undefined_not_zero() -> None:
    h = np.tile(np.random.default_rng(0).standard_normal((5, 6)), (C, 1))
    for nc1 in ("pinv", "trace_ratio"):
        found = neural_collapse(activations(h), labels(), nc1=nc1)
        assert found.isnull().all().to_array().all()


def test_nc1__leaves_directions_below_rtol_out() -> None:
    means = np.diag([1.0, 1.0, 1e-3, 0.0])
    h = means[LABELS] + 1e-4 * np.random.default_rng(0).standard_normal((len(LABELS), 4))
    whole, cut = (float(neural_collapse(activations(h), labels(), rtol=r)["nc1"]) for r in (1e-6, 0.1))
    assert cut < whole / 100


def test_nc2__of_known_frames() -> None:
    orthogonal = np.eye(C)  # uncentred: all cosines are 0
    equinorm, equiangular, maximal = simplex_etf_kernel(orthogonal)
    assert [float(equinorm), float(equiangular)] == [0, 0]
    assert float(maximal) == pytest.approx(1 / (C - 1))
    lengths = np.array([1.0, 2.0, 3.0, 6.0])
    equinorm, equiangular, maximal = simplex_etf_kernel((simplex(5) - 0.3) * lengths[:, None])
    assert float(equinorm) == pytest.approx(lengths.std() / lengths.mean())
    assert [float(equiangular), float(maximal)] == pytest.approx([0, 0], abs=1e-12)


def test_nc2__of_a_class_at_the_centre_has_no_angles() -> None:
    means = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    equinorm, equiangular, maximal = simplex_etf_kernel(means)
    assert float(equinorm) == pytest.approx(np.std([1, 1, 0]) / (2 / 3))
    assert np.isnan([equiangular, maximal]).all()
    h = means[np.repeat([0, 1, 2], 3)] + 10
    found = neural_collapse(activations(h), labels(np.repeat([0, 1, 2], 3)))
    assert np.isnan(float(found["nc2_maximal_angle"]))


def test_nc3__of_orthogonal_and_opposite_matrices() -> None:
    A, B = np.eye(3), np.roll(np.eye(3), 1, axis=0)
    assert float(self_duality_kernel(5 * A, B)) == pytest.approx(np.sqrt(2))
    assert float(self_duality_kernel(A, -2 * A)) == pytest.approx(2)
    assert np.isnan(self_duality_kernel(A, 0 * A))


def test_nc4__counts_samples_that_logits_and_nearest_mean_judge_differently() -> None:
    h = noisy(3)
    means = np.stack([h[c == LABELS].mean(axis=0) for c in range(C)])
    nearest = np.linalg.norm(h[:, None] - means, axis=-1).argmin(axis=1)
    W, b = (np.random.default_rng(1).standard_normal(s) for s in ((C, 6), (C,)))
    decided = (h @ W.T + b).argmax(axis=1)
    assert 0 < np.mean(decided != nearest) < 1
    weight, bias = xr.DataArray(W, dims=("out", "in")), xr.DataArray(b, dims="out")
    logits = xr.DataArray(h @ W.T + b, dims=("sample", "class_"))
    for given_ in ({"weight": weight, "bias": bias}, {"logits": logits}):
        found = neural_collapse(activations(h), labels(), **given_)
        assert float(found["nc4"]) == pytest.approx(np.mean(decided != nearest))
        assert float(found["nearest_mean_accuracy"]) == pytest.approx(np.mean(nearest == LABELS))
    without = neural_collapse(activations(h), labels(), weight=weight)["nc4"]
    assert float(without) == pytest.approx(np.mean((h @ W.T).argmax(axis=1) != nearest))


def test_nearest_mean__is_the_nearest_not_the_one_with_the_largest_product() -> None:
    h = activations(np.repeat([0.0, 1.0, 10.0], 3)[:, None])
    found = neural_collapse(h, labels(np.repeat([0, 1, 2], 3)))
    assert float(found["nearest_mean_accuracy"]) == 1


def test_layers__are_those_of_single_calls_and_the_last_one_is_read() -> None:
    first, last = activations(noisy(0, d=3)), activations(noisy(1))
    weight = xr.DataArray(np.random.default_rng(2).standard_normal((C, 6)), dims=("out", "in"))
    found = neural_collapse({"fc1": first, "fc2": last}, labels(), weight=weight)
    alone = neural_collapse(last, labels(), weight=weight)
    for name in alone:
        assert float(found[name].sel(layer="fc2")) == pytest.approx(float(alone[name]))
    assert np.isnan(float(found["nc3"].sel(layer="fc1")))
    assert 0 < float(found["nc4"].sel(layer="fc1")) <= 1
    node = xr.DataTree.from_dict(
        {f"/{name}": xr.Dataset({"activations": a}) for name, a in (("fc1", first), ("fc2", last))}
    )
    xr.testing.assert_identical(neural_collapse(node, labels(), weight=weight), found)


def test_missing_weights__mark_only_what_needs_them() -> None:
    weight = xr.DataArray(np.full((C, 6), np.nan), dims=("out", "in"))
    found = neural_collapse(activations(noisy()), labels(), weight=weight)
    assert [name for name in found if np.isnan(float(found[name]))] == ["nc3", "nc4"]


def test_labels__must_number_the_rows_and_logits() -> None:
    h = activations(noisy())
    weight = xr.DataArray(np.ones((C, 6)), dims=("out", "in"))
    shifted = labels(LABELS + 1)
    assert np.isfinite(float(neural_collapse(h, shifted)["nc1"]))
    with pytest.raises(ValueError, match=r"labels 0 ... 3, .* 4 rows of weight"):
        neural_collapse(h, shifted, weight=weight)
    logits = xr.DataArray(np.ones((len(LABELS), C + 1)), dims=("sample", "class_"))
    with pytest.raises(ValueError, match=r"labels 0 ... 4, .* 5 logits"):
        neural_collapse(h, labels(), logits=logits)
    with pytest.raises(ValueError, match="6 columns, one for each unit"):
        neural_collapse(h, labels(), weight=weight.isel({"in": slice(5)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "all"}, "weighting 'class' or 'sample'"),
        ({"nc1": "ratio"}, "nc1 'pinv' or 'trace_ratio'"),
        ({"rtol": 2.0}, "rtol in"),
        ({"rtol": 0.1, "nc1": "trace_ratio"}, "with nc1='pinv' only"),
        ({"bias": xr.DataArray([0.0], dims="out")}, "weight that the bias belongs to"),
        ({"logits": xr.DataArray([0.0], dims="class_")}, r"missing \['sample'\]"),
        ({"weight": xr.DataArray([0.0], dims="in")}, r"missing \['out'\]"),
    ],
)
def test_neural_collapse__refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neural_collapse(activations(noisy()), labels(), **options)


def test_neural_collapse__refuses_other_steps_of_the_weight() -> None:
    h = activations(noisy()).expand_dims(step=[0, 10])
    weight = xr.DataArray(np.ones((2, C, 6)), dims=("step", "out", "in"), coords={"step": [0, 20]})
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        neural_collapse(h, labels(), weight=weight)
