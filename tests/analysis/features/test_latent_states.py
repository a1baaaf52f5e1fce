from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import (
    fit_latent_states,
    latent_states,
    transition_count,
    transition_features,
    weight_statistics,
    z_score,
)

TRANSITIONS = np.array([[0.95, 0.05], [0.03, 0.97]])


def synthetic(n_runs: int = 10, n: int = 80, d: int = 3, seed: int = 0) -> tuple[xr.DataArray, np.ndarray]:
    """Runs of a hidden Markov model with two states, means -3 and +3, that start in the first."""
    rng = np.random.default_rng(seed)
    states = np.zeros((n_runs, n), dtype=int)
    for t in range(1, n):
        states[:, t] = rng.random(n_runs) > TRANSITIONS[states[:, t - 1], 0]
    values = np.where(states, 3.0, -3.0)[..., None] + rng.standard_normal((n_runs, n, d))
    coords = {"seed": np.arange(n_runs) + 100, "step": np.arange(n) * 10, "statistic": list("abc")[:d]}
    return xr.DataArray(values, dims=("seed", "step", "statistic"), coords=coords), states


@pytest.fixture(scope="module")
def fitted() -> tuple[xr.DataArray, np.ndarray, xr.Dataset]:
    observations, states = synthetic()
    return observations, states, fit_latent_states(observations, n_restarts=2)


def test_two_states__are_picked_found_and_followed(
    fitted: tuple[xr.DataArray, np.ndarray, xr.Dataset],
) -> None:
    observations, states, model = fitted
    assert model.n_states.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert int(model["bic"].idxmin()) == 2
    path = latent_states(observations, model)
    assert path.dims == ("seed", "step")
    assert path.attrs["n_states"] == 2
    assert np.mean(path.values == states) > 0.99
    two = model.sel(n_states=2).isel(state=slice(2), state_=slice(2))
    np.testing.assert_allclose(two["state_means"], [[-3] * 3, [3] * 3], atol=0.2)
    np.testing.assert_allclose(two["state_variances"], 1, atol=0.25)
    np.testing.assert_allclose(two["transition_probability"], TRANSITIONS, atol=0.03)
    np.testing.assert_allclose(two["start_probability"], [1, 0], atol=1e-6)
    assert bool(two["em_converged"])
    assert two.statistic.values.tolist() == ["a", "b", "c"]


def log_likelihood(model: xr.Dataset, runs: np.ndarray) -> float:
    """Sum over all paths, by the forward recursion in logarithms."""
    n = int(model.n_states)
    one = model.isel(state=slice(n), state_=slice(n))
    means, variances = (one[name].values for name in ("state_means", "state_variances"))
    total = 0.0
    with np.errstate(divide="ignore"):
        start, change = (np.log(one[f"{name}_probability"].values) for name in ("start", "transition"))
    for run in runs:
        emission = scipy.stats.norm.logpdf(run[:, None, :], means, np.sqrt(variances)).sum(axis=-1)
        alpha = start + emission[0]
        for e in emission[1:]:
            alpha = scipy.special.logsumexp(alpha[:, None] + change, axis=0) + e
        total += scipy.special.logsumexp(alpha)
    return float(total)


def test_criteria__are_those_of_their_definitions(
    fitted: tuple[xr.DataArray, np.ndarray, xr.Dataset],
) -> None:
    observations, _, models = fitted
    held_out = models["bic"].attrs["held_out"]
    assert len(held_out) == 2
    tested = observations.sel(seed=held_out)
    rest = observations.drop_sel(seed=held_out)
    for n in (1, 2, 3):
        model = models.sel(n_states=n)
        k = n * (n - 1) + (n - 1) + 2 * n * 3
        L = log_likelihood(model, tested.values)
        records = tested.sizes["seed"] * tested.sizes["step"]
        assert float(model["held_out_log_likelihood"]) == pytest.approx(L / records, rel=1e-9)
        assert float(model["aic"]) == pytest.approx(2 * k - 2 * L, rel=1e-9)
        assert float(model["bic"]) == pytest.approx(k * np.log(records) - 2 * L, rel=1e-9)
        fit = log_likelihood(model, rest.values) / (rest.sizes["seed"] * rest.sizes["step"])
        assert float(model["log_likelihood"]) == pytest.approx(fit, rel=1e-9)


def test_one_state__is_a_gaussian(fitted: tuple[xr.DataArray, np.ndarray, xr.Dataset]) -> None:
    observations, _, models = fitted
    rest = observations.drop_sel(seed=models["bic"].attrs["held_out"]).values.reshape(-1, 3)
    one = models.sel(n_states=1).isel(state=0)
    np.testing.assert_allclose(one["state_means"], rest.mean(axis=0))
    np.testing.assert_allclose(one["state_variances"], rest.var(axis=0), rtol=1e-3)  # hmmlearn's prior
    assert models["state_means"].sel(n_states=1).isel(state=slice(1, None)).isnull().all()


def test_viterbi__is_the_best_of_all_paths() -> None:
    observations, _ = synthetic(n=6)
    observations = observations * 0.3  # states that are hard to tell apart
    model = fit_latent_states(observations, n_states=[3], n_restarts=3)
    path = latent_states(observations, model)
    one = model.isel(n_states=0)
    with np.errstate(divide="ignore"):
        start, change = (np.log(one[f"{name}_probability"].values) for name in ("start", "transition"))
    for run, found in zip(observations.values, path.values, strict=True):
        emission = scipy.stats.norm.logpdf(
            run[:, None, :], one["state_means"].values, np.sqrt(one["state_variances"].values)
        ).sum(axis=-1)

        def score(states: tuple[int, ...], emission: np.ndarray = emission) -> float:
            total = start[states[0]] + sum(emission[t, s] for t, s in enumerate(states))
            return float(total + sum(change[a, b] for a, b in itertools.pairwise(states)))

        best = max(itertools.product(range(3), repeat=6), key=score)
        assert score(tuple(found.tolist())) == pytest.approx(score(best), abs=1e-9)


def test_states__are_numbered_in_the_order_of_training_whatever_the_seed() -> None:
    rng = np.random.default_rng(0)
    stage = np.repeat([0, 1, 2], 15)
    centres = np.array([[0.0, 4.0], [6.0, -2.0], [-5.0, 0.0]])
    values = centres[stage] + 0.5 * rng.standard_normal((5, 45, 2))
    runs = xr.DataArray(values, dims=("seed", "step", "statistic"))
    for random_seed in range(3):
        model = fit_latent_states(runs, n_states=[3], random_seed=random_seed)
        path = latent_states(runs, model)
        np.testing.assert_array_equal(path, np.tile(stage, (5, 1)))
        # the last state is never left: its own successor
        np.testing.assert_allclose(model["transition_probability"].isel(n_states=0)[2], [0, 0, 1], atol=1e-9)
        counts = transition_count(path).sum("seed")
        np.testing.assert_array_equal(counts, [[70, 5, 0], [0, 70, 5], [0, 0, 70]])
        changed = transition_features(model, n_features=1)
        assert changed.sel(state=1, state_=2).statistic.values.tolist() == [0]
        assert float(changed[1, 2, 0]) == pytest.approx(-11, abs=0.5)


def test_a_state_that_only_ends_runs__is_its_own_successor() -> None:
    values = np.random.default_rng(0).standard_normal((6, 20, 2))
    values[:, -1] += 50
    runs = xr.DataArray(values, dims=("seed", "step", "statistic"))
    model = fit_latent_states(runs, n_states=[2])
    assert model["transition_probability"].isel(n_states=0, state=1).values.tolist() == [0, 1]
    expected = np.zeros((6, 20))
    expected[:, -1] = 1
    np.testing.assert_array_equal(latent_states(runs, model), expected)


def test_the_same_seed__gives_the_same_fit_and_order_of_dims_does_not_matter() -> None:
    observations, _ = synthetic(5, 30)
    one = fit_latent_states(observations, n_states=[2, 3], n_restarts=1)
    again = fit_latent_states(observations.transpose("statistic", "step", "seed"), [2, 3], n_restarts=1)
    xr.testing.assert_identical(one, again)
    lazy = fit_latent_states(observations.chunk(seed=1), [2, 3], n_restarts=1)
    xr.testing.assert_identical(one, lazy)
    path = latent_states(observations, one, n_states=3)
    xr.testing.assert_identical(latent_states(observations.transpose(), one, n_states=3), path)


def test_runs__may_end_early_and_be_held_out_by_label() -> None:
    observations, states = synthetic(5, 40)
    observations[1, 25:] = np.nan
    model = fit_latent_states(observations, n_states=[2], held_out=[102, 104], n_restarts=2)
    assert model["bic"].attrs["held_out"] == [102, 104]
    path = latent_states(observations, model)
    assert (path[1, 25:] == -1).all()
    assert (path[1, :25] == states[1, :25]).mean() > 0.95
    short = observations.isel(seed=[1], step=slice(25))
    np.testing.assert_array_equal(latent_states(short, model)[0], path[1, :25])


def test_stored_weights__go_all_the_way() -> None:
    rng = np.random.default_rng(0)
    grown = np.where(np.arange(30) < 12, 1.0, 3.0)[:, None, None]
    weight = xr.DataArray(
        grown * rng.standard_normal((4, 30, 6, 8)),
        dims=("seed", "step", "out", "in"),
        attrs={"vector_dims": ["out", "in"]},
    )
    scores = z_score(weight_statistics({"fc.weight": weight}))
    with pytest.raises(ValueError, match=r"NaN or inf in \['bias_mean', 'bias_median', 'bias_variance'\]"):
        fit_latent_states(scores, n_states=[2])
    scores = scores.sel(statistic=["l1", "l2", "spectral_norm", "weight_variance"])
    path = latent_states(scores, fit_latent_states(scores, n_states=[2]))
    np.testing.assert_array_equal(path, np.tile(np.arange(30) >= 12, (4, 1)))


@given(seed=st.integers(0, 9999), n=st.integers(1, 5))
def test_transition_count__is_that_of_a_loop(seed: int, n: int) -> None:
    states = np.random.default_rng(seed).integers(-1, n, (2, 12))
    found = transition_count(xr.DataArray(states, dims=("seed", "step")), n_states=n)
    expected = np.zeros((2, n, n), dtype=int)
    for k, run in enumerate(states):
        for a, b in itertools.pairwise(run):
            if a >= 0 and b >= 0:
                expected[k, a, b] += 1
    np.testing.assert_array_equal(found, expected)


def test_transition_features__are_ranked_by_size() -> None:
    means = np.random.default_rng(0).standard_normal((1, 4, 5))
    array = xr.DataArray(
        means, dims=("n_states", "state", "statistic"), coords={"n_states": [3], "statistic": list("abcde")}
    )
    found = transition_features(xr.Dataset({"state_means": array}), n_states=3, n_features=5)
    assert found.sizes == {"state": 3, "state_": 3, "rank": 5}
    for i, j in itertools.product(range(3), repeat=2):
        change = means[0, j] - means[0, i]
        values = found[i, j].values
        assert (np.diff(np.abs(values)) <= 0).all()
        for name, value in zip(found.statistic[i, j].values, values, strict=True):
            assert change["abcde".index(name)] == value


def test_hmmlearn__that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hmmlearn", None)
    with pytest.raises(ImportError, match=r'pip install "hild-xr\[hmm\]"'):
        fit_latent_states(synthetic(2, 5)[0])


def test_fit__refuses_bad_observations() -> None:
    observations, _ = synthetic(4, 10)
    with pytest.raises(ValueError, match=r"missing \['statistic'\]"):
        fit_latent_states(observations.isel(statistic=0))
    with pytest.raises(ValueError, match=r"dims .* only"):
        fit_latent_states(observations.expand_dims(layer=2))
    with pytest.raises(TypeError, match="complex"):
        fit_latent_states(observations * 1j)
    partly = observations.copy()
    partly[2, 3, 1] = np.nan
    with pytest.raises(ValueError, match=r"every statistic at every record, came NaN or inf in \['b'\]"):
        fit_latent_states(partly)
    gap = observations.copy()
    gap[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"missing record before another, came some in the runs \[102\]"):
        fit_latent_states(gap)


def test_fit__refuses_bad_options() -> None:
    observations, _ = synthetic(4, 10)
    for options, message in (
        ({"n_states": [0, 1]}, "different numbers of states"),
        ({"n_states": [2, 2]}, "different numbers of states"),
        ({"n_states": [50]}, "at least 50 records"),
        ({"held_out": 1.5}, r"held_out in \(0, 1\)"),
        ({"held_out": [7]}, r"labels of 'seed' as held_out, came \[7\]"),
        ({"held_out": [100, 101, 102, 103]}, "one run with records to fit"),
        ({"n_restarts": 0}, "n_restarts >= 1"),
        ({"tolerance": 0}, "tolerance > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_latent_states(observations, **options)
    with pytest.raises(ValueError, match="one run with records to fit"):
        fit_latent_states(observations.isel(seed=[0]), n_states=[1])


def test_states__refuse_what_does_not_fit_the_model(
    fitted: tuple[xr.DataArray, np.ndarray, xr.Dataset],
) -> None:
    observations, _, model = fitted
    with pytest.raises(
        ValueError, match=r"statistics of the model, \['a', 'b', 'c'\], came \['b', 'a', 'c'\]"
    ):
        latent_states(observations.isel(statistic=[1, 0, 2]), model)
    with pytest.raises(KeyError, match="came n_states=9"):
        latent_states(observations, model, n_states=9)
    with pytest.raises(ValueError, match="criterion 'aic' or 'bic', came 'icl'"):
        latent_states(observations, model, criterion="icl")
    with pytest.raises(ValueError, match="n_features <= 3"):
        transition_features(model, n_features=4)
    states = xr.DataArray([0, 1], dims="step")
    with pytest.raises(ValueError, match=r"pass n_states=\.\.\."):
        transition_count(states)
    with pytest.raises(TypeError, match="whole numbers, came dtype float64"):
        transition_count(states.astype(float), n_states=2)
