"""Laws that hold for the labelled functions of the sub-package, each checked over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import features
from hild_xr.analysis.features import (
    bhattacharyya_distance,
    collapse_exponent,
    inpca,
    matched_correlation,
    neural_collapse,
    neuron_correlation,
    neuron_statistics,
    neuron_vectors,
    pairwise_bhattacharyya,
    progress,
    random_rotation,
    separation,
    separation_slope,
    trajectory_distance,
    transition_count,
    truth,
    weight_statistics,
    z_score,
)
from hild_xr.variables import VARIABLES, attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

Run = dict[str, xr.DataArray]
Result = xr.DataArray | xr.Dataset

STEPS = [0, 1, 10, 100, 50]  # neither regular nor sorted
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])


def recorded_run(seed: int = 0, *, missing: bool = True) -> Run:
    """What the probes record, for two runs; by default one record is missing."""
    rng = np.random.default_rng(seed)
    n, coords = len(STEPS), {"seed": [1, 5], "step": STEPS}
    samples = len(LABELS)

    def array(dims: str, *shape: int, name: str | None = None) -> xr.DataArray:
        values = rng.standard_normal((2, n, *shape))
        a = xr.DataArray(values, dims=("seed", "step", *dims.split()), coords=coords, name=name)
        return a.assign_coords(attempt=("step", np.arange(n)))

    run = {
        "fc1": array("sample unit", samples, 6, name="activations"),
        "fc2": array("sample unit", samples, 4, name="activations"),
        "other": array("sample unit", samples, 5),
        "logits": array("sample class_", samples, 3),
        "points": array("model sample class_", 3, samples, 3),
        "weight": array("out in", 3, 4),
        "bias": array("out", 3),
        "reader": array("out in", 2, 3),
        "curvature": array("sample", samples),
        "distances": array("model model_", 4, 4),
    }
    means = rng.standard_normal((3, 6))
    run["fc1"] += means[LABELS]
    run["fc2"] += 2 * means[LABELS, :4]
    run["distances"] = run["distances"] ** 2
    symmetric = run["distances"] + run["distances"].rename(model="model_", model_="model")
    run["distances"] = symmetric * (1 - np.eye(4))
    for name, vector in (("weight", ["out", "in"]), ("bias", ["out"]), ("reader", ["out", "in"])):
        run[name].attrs["vector_dims"] = vector
    for name in ("fc1", "fc2"):
        run[name].attrs = attrs("activations")
    for a in run.values() if missing else ():
        a[{"seed": 1, "step": 2}] = np.nan
    states = rng.integers(0, 3, (2, n, 9))
    if missing:
        states[1, 2] = -1
    run["states"] = xr.DataArray(states, dims=("seed", "step", "time"), coords=run["bias"].coords)
    run["labels"] = xr.DataArray(LABELS, dims="sample")
    return run


def probabilities(run: Run, name: str) -> Any:
    p = np.exp(run[name])
    return p / p.sum("class_")


def layers(run: Run) -> dict[str, xr.DataArray]:
    return {"fc1": run["fc1"], "fc2": run["fc2"]}


CASES: dict[str, Callable[[Run], Result]] = {
    "neural_collapse": lambda r: neural_collapse(r["fc2"], r["labels"], logits=r["logits"]),
    "neural_collapse, layers": lambda r: neural_collapse(
        layers(r), r["labels"], weight=r["weight"], weighting="sample", nc1="trace_ratio"
    ),
    "separation": lambda r: separation(layers(r), r["labels"]),
    "separation, pinv": lambda r: separation(r["fc1"], r["labels"], measure="pinv"),
    "separation_slope": lambda r: separation_slope(separation(layers(r), r["labels"])),
    "bhattacharyya_distance": lambda r: bhattacharyya_distance(
        probabilities(r, "logits"), probabilities(r, "points")
    ),
    "bhattacharyya_distance, logits": lambda r: bhattacharyya_distance(
        r["logits"], r["points"].isel(model=0, drop=True), of="logits"
    ),
    "pairwise_bhattacharyya": lambda r: pairwise_bhattacharyya(r["points"], dim="model", of="logits"),
    "progress": lambda r: progress(r["logits"], truth(r["labels"], 3), of="logits"),
    "progress, between": lambda r: progress(
        r["points"], probabilities(r, "logits"), ignorance=truth(r["labels"], 3) / 2 + 1 / 6, of="logits"
    ),
    "inpca": lambda r: inpca(r["distances"]),
    "trajectory_distance": lambda r: trajectory_distance(r["distances"], dim="model"),
    "trajectory_distance, smoothed": lambda r: trajectory_distance(
        r["distances"], dim="model", method="smoothed", bandwidth=0.3
    ),
    "neuron_vectors": lambda r: neuron_vectors(r["weight"], r["bias"], r["reader"]),
    "neuron_statistics": lambda r: neuron_statistics(
        r["weight"], r["bias"], r["reader"], vanishing=0.7, identical=1.5
    ),
    "collapse_exponent": lambda r: collapse_exponent(r["curvature"], 0.3),
    "neuron_correlation": lambda r: neuron_correlation(r["fc2"], r["other"]),
    "matched_correlation": lambda r: matched_correlation(r["other"], r["fc2"]),
    "matched_correlation, absolute": lambda r: matched_correlation(r["fc2"], r["other"], absolute=True),
    "random_rotation": lambda r: random_rotation(r["fc2"], random_seed=3),
    "transition_count": lambda r: transition_count(r["states"], n_states=3, dim="time"),
    "weight_statistics": lambda r: weight_statistics(
        {"fc1.weight": r["weight"], "fc1.bias": r["bias"], "fc2.weight": r["reader"]}
    ),
    "z_score": lambda r: z_score(r["fc1"], dim="sample"),
}
NO_RECORDS = {"matched_correlation_baseline", "truth"}
AT_ONCE = {"fit_latent_states", "latent_states", "transition_features"}

every_case = pytest.mark.parametrize("case", CASES)


def arrays(result: Result) -> list[xr.DataArray]:
    return [result] if isinstance(result, xr.DataArray) else list(result.data_vars.values())


def assert_same(found: Result, expected: Result, atol: float = 1e-12) -> None:
    """Equal numbers, dims, labels and attributes."""
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        assert a.name == b.name
        assert a.attrs == b.attrs
        xr.testing.assert_allclose(a.transpose(*b.dims).compute(), b.compute(), rtol=1e-10, atol=atol)
        assert set(a.coords) == set(b.coords)


def test_cases__cover_every_public_function() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(features.__all__) - NO_RECORDS - AT_ONCE


@every_case
@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed(case: str) -> None:
    run = recorded_run()
    chunked = {name: a.chunk(dict.fromkeys(a.dims, 2)) for name, a in run.items() if name != "labels"}
    result = CASES[case](chunked | {"labels": run["labels"]})
    for array in arrays(result):
        assert array.chunks is not None
        with pytest.raises(AssertionError, match="something was computed"):
            array.compute()


@every_case
@settings(max_examples=3)
@given(seed=st.integers(0, 999))
def test_law__chunks_change_nothing(case: str, seed: int) -> None:
    run = recorded_run()
    rng = np.random.default_rng(seed)
    chunked = {}
    for name, a in run.items():
        sizes = {dim: int(rng.integers(1, n + 1)) for dim, n in a.sizes.items()}
        chunked[name] = a if rng.random() < 0.3 else a.chunk(sizes)
    assert_same(CASES[case](chunked), CASES[case](run))


@every_case
@settings(max_examples=5)
@given(seed=st.integers(0, 999))
def test_law__the_order_of_dims_changes_nothing(case: str, seed: int) -> None:
    run = recorded_run()
    rng = np.random.default_rng(seed)
    transposed = {name: a.transpose(*map(str, rng.permutation(a.dims))) for name, a in run.items()}
    assert_same(CASES[case](transposed), CASES[case](run))


@every_case
def test_law__records_are_independent_of_each_other(case: str) -> None:
    run = recorded_run()
    order = [3, 0, 2]
    part = {name: a.isel(step=order) if "step" in a.dims else a for name, a in run.items()}
    assert_same(CASES[case](part), CASES[case](run).isel(step=order))


@every_case
def test_law__one_record_needs_no_other_dims(case: str) -> None:
    run = recorded_run()
    part = {name: a.isel(step=0, seed=0) if "step" in a.dims else a for name, a in run.items()}
    assert_same(CASES[case](part), CASES[case](run).isel(step=0, seed=0))


@every_case
def test_law__a_missing_record_is_marked_and_changes_no_other(case: str) -> None:
    found, complete = CASES[case](recorded_run()), CASES[case](recorded_run(missing=False))
    assert_same(found.sel(seed=1), complete.sel(seed=1))
    marks = {"f": np.nan, "i": 0 if case == "transition_count" else -1}
    for array in arrays(found):
        here = array.sel(seed=5, step=10)
        np.testing.assert_array_equal(here, np.full(here.shape, marks[array.dtype.kind]))
        assert not np.array_equal(array.sel(seed=5, step=0), here) or "layer" in array.dims


@every_case
def test_law__float32_records_give_results_close_to_those_of_float64(case: str) -> None:
    run = recorded_run()
    single = CASES[case]({n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in run.items()})
    for a, b in zip(arrays(single), arrays(CASES[case](run)), strict=True):
        assert a.dtype == b.dtype or case == "neuron_vectors"
        xr.testing.assert_allclose(a.drop_attrs(), b.drop_attrs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        "neural_collapse",
        "neural_collapse, layers",
        "separation",
        "separation, pinv",
        "neuron_correlation",
        "matched_correlation",
        "z_score",
    ],
)
@pytest.mark.parametrize("scale", [1e-100, 8.0, 1e100])
def test_law__scale_changes_nothing(case: str, scale: float) -> None:
    run = recorded_run()
    scaled = {
        name: (scale * a).assign_attrs(a.attrs) if a.dtype.kind == "f" else a for name, a in run.items()
    }
    assert_same(CASES[case](scaled), CASES[case](run))


@every_case
def test_law__results_carry_the_registry_and_their_coords(case: str) -> None:
    for array in arrays(CASES[case](recorded_run())):
        assert array.name in VARIABLES
        assert array.attrs.items() >= VARIABLES[str(array.name)].attrs().items()
        assert array.dtype.kind == VARIABLES[str(array.name)].kind
        assert array["seed"].values.tolist() == [1, 5]
        assert array["step"].values.tolist() == STEPS
        assert array["attempt"].dims == ("step",)


PER_SAMPLE = ("random_rotation", "z_score")
PER_UNIT = ("neuron_correlation", "matched_correlation", "random_rotation", "neuron_vectors", "z_score")


def reordered(run: Run, dim: str, order: Sequence[int], size: int) -> Run:
    fits = {name: a for name, a in run.items() if a.sizes.get(dim) == size}
    return run | {name: a.isel({dim: order}) for name, a in fits.items()}


@settings(max_examples=6)
@given(seed=st.integers(0, 999))
def test_law__permuting_samples_changes_nothing(seed: int) -> None:
    run = recorded_run(seed)
    permuted = reordered(run, "sample", np.random.default_rng(seed).permutation(12), 12)
    for case, function in CASES.items():
        if case.partition(",")[0] not in PER_SAMPLE:
            assert_same(function(permuted), function(run), atol=1e-9)


@settings(max_examples=6)
@given(seed=st.integers(0, 999))
def test_law__permuting_units_and_parameters_changes_nothing(seed: int) -> None:
    run = recorded_run(seed)
    order = np.random.default_rng(seed).permutation(4)
    permuted = reordered(reordered(run, "unit", order, 4), "in", order, 4)
    for case, function in CASES.items():
        if case.partition(",")[0] not in (*PER_UNIT, "weight_statistics"):  # the trace needs the order
            assert_same(function(permuted), function(run), atol=1e-9)


@settings(max_examples=6)
@given(seed=st.integers(0, 999))
def test_law__a_rotation_of_the_features_changes_nothing(seed: int) -> None:
    run = recorded_run(seed)
    rng = np.random.default_rng(seed)
    rotated: Run = dict(run)
    for name, dim in (("fc1", "unit"), ("fc2", "unit"), ("weight", "in")):
        basis = rng if name == "fc1" else np.random.default_rng(seed)  # one for fc2 and what reads it
        n = run[name].sizes[dim]
        Q = np.linalg.qr(basis.standard_normal((n, n)))[0]
        turned: Any = xr.dot(run[name], xr.DataArray(Q, dims=(dim, "turned")), dim=dim)
        rotated[name] = turned.rename(turned=dim).assign_attrs(run[name].attrs)
    for case in (
        "neural_collapse",
        "neural_collapse, layers",
        "separation",
        "separation, pinv",
        "neuron_statistics",
    ):
        assert_same(CASES[case](rotated), CASES[case](run), atol=1e-9)
