from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import collapse_exponent, neuron_statistics, neuron_vectors

COUNTS = ("vanishing_neurons", "identical_pairs", "independent_neurons")


def layer(W: np.ndarray, b: np.ndarray, V: np.ndarray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    weights = xr.DataArray(W, dims=("out", "in")), xr.DataArray(b, dims="out")
    return (*weights, xr.DataArray(V, dims=("out", "in")))


def random_layer(h: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((h, 20)), rng.standard_normal(h), rng.standard_normal((10, h))


def counts(found: xr.Dataset) -> list[int]:
    return [int(found[name]) for name in COUNTS]


def test_copied_and_vanishing_neurons__are_counted() -> None:
    W, b, V = random_layer()
    assert counts(neuron_statistics(*layer(W, b, V))) == [0, 0, 6]
    for a in (W, b, V.T):
        a[4] = a[1]
    assert counts(neuron_statistics(*layer(W, b, V))) == [0, 1, 5]
    for a in (W, b, V.T):
        a[5] = 1.01 * a[1]
    assert counts(neuron_statistics(*layer(W, b, V))) == [0, 3, 4]
    for a in (W, b, V.T):
        a[0] *= 0.01
        a[2] *= 0
    assert counts(neuron_statistics(*layer(W, b, V))) == [2, 3, 2]


def test_independent_neurons__are_grouped_from_the_largest_on_in_any_order_of_storage() -> None:
    # the middle one is identical with both others, which are not with each other
    chain = 1.1 ** np.array([0, 1, 0])[:, None] * [[1.0, -0.25], [1.0, 0.0], [1.0, 0.25]]
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        found = neuron_statistics(xr.DataArray(chain[order], dims=("out", "in")))
        assert counts(found) == [0, 2, 1]


def test_vectors__join_what_belongs_to_a_neuron() -> None:
    W, b, V = random_layer()
    vectors = neuron_vectors(*layer(W, b, V))
    np.testing.assert_array_equal(vectors, np.concatenate([W, b[:, None], V.T], axis=1))
    assert vectors.attrs["vector_dims"] == ["component"]
    assert neuron_vectors(layer(W, b, V)[0]).shape == W.shape


def test_vectors__of_convolutions_are_those_of_their_channels() -> None:
    rng = np.random.default_rng(0)
    one = xr.DataArray(rng.standard_normal((2, 4, 3, 5, 5)), dims=("step", "out", "in", "kh", "kw"))
    bias = xr.DataArray(rng.standard_normal((2, 4)), dims=("step", "out"))
    two = xr.DataArray(rng.standard_normal((2, 6, 4, 2, 2)), dims=("step", "out", "in", "kh", "kw"))
    found = neuron_vectors(one, bias, two).transpose("step", "neuron", "component")
    assert found.shape == (2, 4, 75 + 1 + 24)
    expected = np.concatenate([one.values[1, 2].ravel(), bias.values[1, [2]], two.values[1, :, 2].ravel()])
    np.testing.assert_array_equal(found[1, 2], expected)


@given(seed=st.integers(0, 9999), h=st.integers(1, 8))
def test_statistics__are_those_of_loops_over_neurons(seed: int, h: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((3, 4))
    w = centres[rng.integers(0, 3, h)] * rng.choice([0.05, 1.0, 2.0], (h, 1))
    w += 0.1 * rng.standard_normal((h, 4))
    norms = np.linalg.norm(w, axis=1)
    alive = [i for i in range(h) if not norms[i] < 0.1 * norms.max()]

    def same(i: int, j: int) -> bool:
        return bool(2 * np.sum((w[i] - w[j]) ** 2) / (norms[i] ** 2 + norms[j] ** 2) < 0.1)

    pairs = sum(same(i, j) for k, i in enumerate(alive) for j in alive[k + 1 :])
    left, groups = sorted(alive, key=lambda i: -norms[i]), 0
    while left:
        groups += 1
        left = [j for j in left[1:] if not same(left[0], j)]
    s = np.linalg.svd(w, compute_uv=False)
    for order in (np.arange(h), rng.permutation(h)):
        found = neuron_statistics(xr.DataArray(w[order], dims=("out", "in")))
        assert counts(found) == [h - len(alive), pairs, groups]
        assert float(found["neuron_entropy"]) == pytest.approx(scipy.stats.entropy(s), abs=1e-12)
        np.testing.assert_allclose(found["neuron_norm"], norms[order], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_statistics__but_the_norm_do_not_depend_on_the_scale(scale: float) -> None:
    W, b, V = random_layer()
    W[1], b[1], V[:, 1] = W[0], b[0], V[:, 0]
    one, other = (neuron_statistics(*layer(s * W, s * b, s * V)) for s in (1.0, scale))
    xr.testing.assert_allclose(one.drop_vars("neuron_norm"), other.drop_vars("neuron_norm"))
    np.testing.assert_allclose(other["neuron_norm"], scale * one["neuron_norm"])


def test_statistics__of_zero_and_missing_weights() -> None:
    w = xr.DataArray(np.zeros((2, 3, 4)), dims=("step", "out", "in"))
    w[1, 0, 0] = np.nan
    found = neuron_statistics(w)
    assert [found[name].values.tolist() for name in COUNTS] == [[3, -1], [0, -1], [0, -1]]
    assert found["neuron_entropy"].isnull().all()
    assert found["neuron_norm"].isnull().values.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize(("learning_rate", "expected"), [(0.1, 0.0050), (0.2, 0.0002), (0.5, -0.0798)])
def test_exponent__of_the_toy_model(learning_rate: float, expected: float) -> None:
    curvature = xr.DataArray([-1.1, 0.9], dims="sample")
    assert float(collapse_exponent(curvature, learning_rate)) == pytest.approx(expected, abs=5e-5)


def test_exponent__of_gaussian_curvature_changes_its_sign_where_noise_beats_drift() -> None:
    p = (np.arange(20_000) + 0.5) / 20_000
    curvature = xr.DataArray(scipy.stats.norm.ppf(p, loc=-0.02, scale=1.0), dims="sample")
    rates = xr.DataArray([0.02, 0.03, 0.05, 0.1], dims="learning_rate")
    found = collapse_exponent(curvature, rates)
    assert np.sign(found.values).tolist() == [1, 1, -1, -1]  # lr sigma^2 / 2 = |h| at lr = .04
    for rate, value in zip(rates.values, found.values, strict=True):
        expected = scipy.integrate.quad(
            lambda h, r: np.log(abs(1 - r * h)) * scipy.stats.norm.pdf(h, -0.02), -8, 8, args=(rate,)
        )[0]
        assert value == pytest.approx(expected, abs=1e-6)


def test_exponent__is_accurate_for_tiny_steps_and_infinite_where_the_set_is_reached() -> None:
    curvature = xr.DataArray([-1.0, -1.0], dims="sample")
    assert float(collapse_exponent(curvature, 1e-12)) == pytest.approx(1e-12, rel=1e-11, abs=0)
    assert float(collapse_exponent(-curvature, 1.0)) == -np.inf
    assert float(collapse_exponent(-curvature, 3.0)) == pytest.approx(np.log(2))
    assert np.isnan(float(collapse_exponent(curvature * np.nan, 1.0)))


def test_neurons__refuse_bad_arguments() -> None:
    weight, bias, reader = layer(*random_layer())
    with pytest.raises(
        ValueError, match=r"same number of neurons, .* 6 in weight_in, 6 in bias, 5 in weight_out"
    ):
        neuron_vectors(weight, bias, reader.isel({"in": slice(5)}))
    with pytest.raises(ValueError, match=r"missing \['in'\]"):
        neuron_vectors(bias)
    with pytest.raises(ValueError, match="came sketches"):
        neuron_vectors(weight.expand_dims(sketch=4))
    with pytest.raises(TypeError, match="complex"):
        neuron_statistics(weight * 1j)
    for name in ("vanishing", "identical"):
        with pytest.raises(ValueError, match=f"positive threshold {name}, came 0"):
            neuron_statistics(weight, **{name: 0})
    with pytest.raises(ValueError, match="at least one neuron"):
        neuron_statistics(weight.isel(out=slice(0)))
    curvature = xr.DataArray([1.0], dims="sample")
    with pytest.raises(ValueError, match="learning rate without 'sample'"):
        collapse_exponent(curvature, curvature)
    with pytest.raises(ValueError, match="at least one sample"):
        collapse_exponent(curvature[:0], 0.1)
