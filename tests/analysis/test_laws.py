"""Laws that hold for every labelled function of the package, each checked over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr import analysis
from hild_xr.analysis import (
    active_units,
    alignment,
    angles_to_reference,
    bulk_distance,
    bulk_weights,
    cka,
    conjugate_kernel,
    consecutive_angles,
    effective_parameters,
    effective_rank,
    feature_matrix_alignment,
    feature_rank,
    flatten_like,
    gauss_newton_split,
    grassmann_distances,
    kernel_alignment,
    landscape_phase,
    noise_scale,
    numerical_rank,
    outliers,
    pairwise_angles,
    pairwise_subspace_overlap,
    participation_ratio,
    positive_fraction,
    principal_angles,
    projection,
    r_med,
    rank,
    rank_deficiency,
    relative_drift,
    sparsity,
    spectral_density,
    spectral_distribution,
    spectral_moments,
    spike_alignment,
    stable_rank,
    subspace_alignment,
    subspace_overlap,
    tail_index,
    trace_to_frobenius,
    updates,
    weight_spectrum,
)
from hild_xr.variables import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Mapping

Run = dict[str, xr.DataArray]
Result = xr.DataArray | xr.Dataset

STEPS = [0, 1, 10, 100, 50]  # neither regular nor sorted


def recorded_run(seed: int = 0, *, missing: bool = True) -> Run:
    """What the probes record of one layer, drifting along training; by default one record is missing."""
    rng = np.random.default_rng(seed)
    n, out, in_, k = len(STEPS), 3, 4, 2
    lead, coords = ("seed", "step"), {"seed": [1, 5], "step": STEPS}
    attempt = ("step", np.arange(n))
    layer = {"vector_dims": ["out", "in"], "number_dim": "eig"}
    rows = {"vector_dims": ["in"], "number_dim": "eig"}
    start = rng.standard_normal((2, 1, k, out, in_))

    def array(values: np.ndarray, dims: tuple[str, ...], attrs: Mapping[str, object]) -> xr.DataArray:
        a = xr.DataArray(values, dims=(*lead, *dims), coords={**coords, "attempt": attempt}, attrs=attrs)
        return a.assign_coords({dim: np.arange(a.sizes[dim]) for dim in dims if dim == "eig"})

    run = {
        "u": array(start + 0.2 * rng.standard_normal((2, n, k, out, in_)), ("eig", "out", "in"), layer),
        "v": array(start + 0.2 * rng.standard_normal((2, n, k, out, in_)), ("eig", "out", "in"), layer),
        "rows": array(rng.standard_normal((2, n, out, k, in_)), ("out", "eig", "in"), rows),
        "weight": array(rng.standard_normal((2, n, out, in_)), ("out", "in"), {"vector_dims": ["out", "in"]}),
        "eigenvalues": array(np.exp(rng.uniform(-6, 2, (2, n, out, 6))), ("out", "eig"), {}),
    }
    symmetric = rng.standard_normal((2, 2, n, 5, 5))
    symmetric += symmetric.swapaxes(-1, -2)
    run |= {
        "activations": array(rng.standard_normal((2, n, 6, 4)), ("sample", "unit"), {}),
        "nodes": array(np.exp(rng.uniform(-2, 2, (2, n, 2, 5))), ("probe", "node"), {}),
        "hessian": array(symmetric[0], ("param", "param_"), {}),
        "gauss_newton": array(symmetric[0] + 0.2 * symmetric[1], ("param", "param_"), {}),
    }
    for a in run.values() if missing else ():
        a[{"seed": 1, "step": 2}] = np.nan
    run["means"] = xr.DataArray(rng.standard_normal((2, in_)), dims=("class", "in"))
    return run


FLAT = xr.DataArray(0.0, attrs={"layers": ["a", "b"], "layer_shapes": [[3, 4], [3, 4]]})

RULE = ("probe", "node")
MATRIX = ("param", "param_")


def density(run: Run) -> tuple[xr.DataArray, xr.DataArray]:
    """Nodes of the size 1 and weights that sum to 1 for each probe."""
    nodes = run["nodes"] / run["nodes"].max(RULE)
    return nodes, nodes**2 / (nodes**2).sum("node")


def agop(run: Run) -> xr.DataArray:
    rows = run["rows"]
    products: xr.DataArray = xr.dot(rows, rows.drop_attrs().rename({"in": "in_"}), dim=["out", "eig"])
    return products


CASES: dict[str, Callable[[Run], Result]] = {
    "principal_angles": lambda r: principal_angles(r["u"], r["v"]),
    "principal_angles, unequal": lambda r: principal_angles(r["u"], r["v"].isel(eig=[0])),
    "principal_angles, rows": lambda r: principal_angles(r["rows"], r["rows"].isel(step=0)),
    "pairwise_angles": lambda r: pairwise_angles(r["u"]),
    "pairwise_angles, rows": lambda r: pairwise_angles(r["rows"]),
    "angles_to_reference": lambda r: angles_to_reference(r["u"], 10),
    "consecutive_angles": lambda r: consecutive_angles(r["u"].sortby("step")),
    "grassmann_distances": lambda r: grassmann_distances(principal_angles(r["u"], r["v"])),
    "grassmann_distances, unequal": lambda r: grassmann_distances(
        pairwise_angles(r["u"]), dimension_difference=2
    ),
    "projection": lambda r: projection(r["weight"], r["u"]),
    "projection, means": lambda r: projection(r["weight"], r["means"], vector_dims="in", number_dim="class"),
    "updates": lambda r: updates(r["weight"].sortby("step")),
    "subspace_overlap": lambda r: subspace_overlap(r["u"], r["v"]),
    "subspace_alignment": lambda r: subspace_alignment(r["u"], r["v"]),
    "alignment": lambda r: alignment(r["weight"], r["u"]),
    "alignment, rows": lambda r: alignment(r["weight"], r["rows"], vector_dims=["in"], min_norm=0.5),
    "alignment, means": lambda r: alignment(
        r["weight"], r["means"], vector_dims="in", number_dim="class", min_norm=0.8
    ),
    # flat vectors only rearrange: the laws are those of what is made of them
    "flatten_like": lambda r: alignment(
        flatten_like({"a": r["weight"], "b": r["weight"]}, FLAT),
        flatten_like({"a": r["u"], "b": r["u"]}, FLAT),
    ),
    "outliers": lambda r: outliers(r["eigenvalues"]),
    "outliers, relative": lambda r: outliers(
        r["eigenvalues"], method="relative", k=2, regularizer=0.1 * r["eigenvalues"].min("eig")
    ),
    "outliers, edge": lambda r: outliers(
        r["eigenvalues"], method="edge", edge=r["eigenvalues"].isel(eig=2, drop=True)
    ),
    "rank": lambda r: rank(r["eigenvalues"]),
    "rank of matrices": lambda r: rank(r["weight"], ("out", "in")),
    "numerical_rank": lambda r: numerical_rank(r["eigenvalues"], rtol=0.1),
    "stable_rank": lambda r: stable_rank(r["eigenvalues"]),
    "effective_rank": lambda r: effective_rank(r["eigenvalues"]),
    "effective_parameters": lambda r: effective_parameters(r["eigenvalues"], r["eigenvalues"].mean("eig")),
    "pairwise_subspace_overlap": lambda r: pairwise_subspace_overlap(r["u"]),
    "pairwise_subspace_overlap, rows": lambda r: pairwise_subspace_overlap(r["rows"]),
    "participation_ratio": lambda r: participation_ratio(r["eigenvalues"]),
    "rank_deficiency": lambda r: rank_deficiency(r["eigenvalues"], 2, method="relative"),
    "feature_rank": lambda r: feature_rank(r["activations"]),
    "feature_rank, samples": lambda r: feature_rank(r["activations"], center="samples", part=0.8),
    "active_units": lambda r: active_units(r["activations"], fractions=[0.0, 0.4]),
    "sparsity": lambda r: sparsity(r["activations"], threshold=0.3),
    "conjugate_kernel": lambda r: conjugate_kernel(r["activations"]),
    "kernel_alignment": lambda r: kernel_alignment(
        r["hessian"], r["activations"].isel(unit=0, sample=slice(5)).rename(sample="param"), dims=MATRIX
    ),
    "cka": lambda r: cka(r["activations"], r["activations"].sel(step=0, drop=True).isel(unit=slice(3))),
    "spike_alignment": lambda r: spike_alignment(
        r["weight"], r["weight"].sel(step=0, drop=True).mean("in"), dims=("out", "in"), k=2
    ),
    "feature_matrix_alignment": lambda r: feature_matrix_alignment(r["weight"], agop(r)),
    "feature_matrix_alignment, change": lambda r: feature_matrix_alignment(
        r["weight"], agop(r), initial=r["weight"].sel(step=0, drop=True)
    ),
    "spectral_density": lambda r: spectral_density(*density(r), [-0.1, 0.4, 2.0], width=0.3),
    "spectral_density, widths": lambda r: spectral_density(
        *density(r), [0.2], width=density(r)[0].mean(RULE)
    ),
    "spectral_distribution": lambda r: spectral_distribution(*density(r), [-0.1, 0.41, 2.0]),
    "spectral_moments": lambda r: spectral_moments(*density(r), [0, 1, 3]),
    "bulk_weights": lambda r: bulk_weights(*density(r), upper=0.99),
    "bulk_distance": lambda r: bulk_distance(
        r["eigenvalues"],
        r["eigenvalues"].sel(step=0, drop=True).isel(eig=slice(4)),
        upper=(r["eigenvalues"].max("eig"), None),
    ),
    "bulk_distance, densities": lambda r: bulk_distance(
        r["nodes"], r["nodes"].sel(step=0, drop=True), weights=(density(r)[1], None), dim=RULE
    ),
    "tail_index": lambda r: tail_index(r["eigenvalues"]),
    "tail_index, k": lambda r: tail_index(r["eigenvalues"], k=3),
    "tail_index, minimum": lambda r: tail_index(
        r["eigenvalues"], minimum=r["eigenvalues"].isel(eig=0, drop=True)
    ),
    "weight_spectrum": lambda r: weight_spectrum(r["weight"]),
    "weight_spectrum, variance": lambda r: weight_spectrum(
        r["weight"], variance=(r["weight"] ** 2).mean(["out", "in"])
    ),
    "relative_drift": lambda r: relative_drift(r["weight"], 0),
    "relative_drift, kernels": lambda r: relative_drift(r["hessian"], 10, vector_dims=MATRIX),
    "r_med": lambda r: r_med(r["weight"]),
    "trace_to_frobenius": lambda r: trace_to_frobenius(
        r["eigenvalues"].sum("eig", skipna=False), (r["eigenvalues"] ** 2).sum("eig", skipna=False) ** 0.5
    ),
    "positive_fraction": lambda r: positive_fraction(r["nodes"] - r["nodes"].mean(RULE), dim=RULE),
    "positive_fraction, densities": lambda r: positive_fraction(
        r["nodes"] - r["nodes"].mean(RULE), density(r)[1], dim=RULE
    ),
    "noise_scale": lambda r: noise_scale(
        (r["weight"] ** 2).sum(["out", "in"]) + (r["rows"] ** 2).sum(["out", "eig", "in"]), r["weight"]
    ),
    "gauss_newton_split": lambda r: gauss_newton_split(r["hessian"], r["gauss_newton"], 2),
    "landscape_phase": lambda r: landscape_phase(
        *(getattr(r["weight"], name)(["out", "in"], skipna=False) for name in ("sum", "mean", "median")),
        sharp_above=0.0,
        barrier_below=0.0,
        similar_above=0.0,
    ),
}
NO_ARRAYS = {"random_alignment_baseline", "theory", "features"}
# Records depend on those before, eigenpairs are told apart, or the unit is that of the eigenvalues: the laws
# that hold for these stand in the tests of their modules.
OWN_LAWS = {
    "consecutive_overlap",
    "edge_of_stability",
    "eigenvector_overlap",
    "instabilities",
    "instability_rotation",
    "marchenko_pastur_fit",
    "pairwise_overlap",
    "preconditioned_sharpness",
    "sharpness",
    "stability_threshold",
    "track",
    "track_drift",
}

SUCCESSIVE = {"consecutive_angles", "updates"}
"""Cases that compare each record with the one before it, in the order of the labels."""

every_case = pytest.mark.parametrize("case", CASES)


def arrays(result: Result) -> list[xr.DataArray]:
    return [result] if isinstance(result, xr.DataArray) else list(result.data_vars.values())


def assert_same(found: Result, expected: Result, atol: float = 1e-13) -> None:
    """Equal numbers, dims, labels and attributes."""
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        assert a.name == b.name
        assert a.attrs == b.attrs
        xr.testing.assert_allclose(a.transpose(*b.dims).compute(), b.compute(), rtol=1e-12, atol=atol)
        assert set(a.coords) == set(b.coords)


def test_cases__cover_every_public_function() -> None:
    public = set(analysis.__all__) - NO_ARRAYS - OWN_LAWS
    assert {case.partition(",")[0].split()[0] for case in CASES} == public


@every_case
@pytest.mark.usefixtures("nothing_computes")
def test_law__nothing_is_computed(case: str) -> None:
    result = CASES[case]({name: a.chunk(dict.fromkeys(a.dims, 2)) for name, a in recorded_run().items()})
    for array in arrays(result):
        assert array.chunks is not None
        with pytest.raises(AssertionError, match="something was computed"):
            array.compute()


@every_case
@settings(max_examples=6)
@given(data=st.data())
def test_law__chunks_change_nothing(case: str, data: st.DataObject) -> None:
    run = recorded_run()
    chunked = {}
    for name, a in run.items():
        sizes = {dim: data.draw(st.integers(1, n), label=f"{name} {dim}") for dim, n in a.sizes.items()}
        in_memory = data.draw(st.booleans(), label=f"{name} in memory")
        chunked[name] = a if in_memory else a.chunk(sizes)
    assert_same(CASES[case](chunked), CASES[case](run))


@every_case
@settings(max_examples=6)
@given(data=st.data())
def test_law__the_order_of_dims_changes_nothing(case: str, data: st.DataObject) -> None:
    run = recorded_run()
    transposed = {name: a.transpose(*data.draw(st.permutations(a.dims))) for name, a in run.items()}
    assert_same(CASES[case](transposed), CASES[case](run))


@every_case
def test_law__records_are_independent_of_each_other(case: str) -> None:
    run = recorded_run()
    # holds the reference step; of successive records, all from the second on
    order = [1, 2, 3, 4] if case in SUCCESSIVE else [3, 0, 2]
    part = {name: a.isel(step=order) if "step" in a.dims else a for name, a in run.items()}
    if "rows" in case and "pairwise" not in case and "alignment" not in case:
        part["rows"] = run["rows"].isel(step=[0, *order])  # its first step is what it is compared with
        order = [0, *order]
    whole = CASES[case](run)
    if case in SUCCESSIVE:  # its first record is the one before it for the second
        order = [1, 2, 3]
    expected = whole.isel({dim: order for dim in ("step", "step_") if dim in whole.dims})
    assert_same(CASES[case](part), expected)


@every_case
def test_law__a_missing_record_is_marked_and_changes_no_other(case: str) -> None:
    found, complete = CASES[case](recorded_run()), CASES[case](recorded_run(missing=False))
    assert_same(found.sel(seed=1), complete.sel(seed=1))
    marks = {"f": np.nan, "i": -1, "b": False}
    for array in arrays(found):
        here = array.sel(seed=5, step=10)
        np.testing.assert_array_equal(here, np.full(here.shape, marks[array.dtype.kind]))


@every_case
def test_law__float32_records_give_float64_results_close_to_those_of_float64(case: str) -> None:
    run = recorded_run()
    single = CASES[case]({name: a.astype(np.float32) for name, a in run.items()})
    for a, b in zip(arrays(single), arrays(CASES[case](run)), strict=True):
        assert a.dtype == b.dtype
        xr.testing.assert_allclose(a.drop_attrs(), b.drop_attrs(), rtol=1e-4, atol=1e-5)


SCALES_WITH = {
    "bulk_edge": 1,
    "wasserstein_distance": 1,
    "tail_minimum": 1,
    "singular_values": 1,
    "entry_variance": 2,
    "singular_bulk_lower": 1,
    "singular_bulk_upper": 1,
    "spike_threshold": 1,
    "conjugate_kernel": 2,
    "dominant": 1,
    "bulk": 1,
    "update": 1,
}
"""Power of the scale of the records; what is not named here does not depend on it."""


@every_case
def test_law__scale_changes_what_has_a_unit_and_nothing_else(case: str) -> None:
    run = recorded_run()
    scaled = {name: (8 * a).assign_attrs(a.attrs) for name, a in run.items()}
    found = arrays(CASES[case](scaled))
    for a, b in zip(found, arrays(CASES[case](run)), strict=True):
        assert_same(a, (b * 8.0 ** SCALES_WITH[b.name]).assign_attrs(b.attrs) if b.name in SCALES_WITH else b)


@every_case
def test_law__results_carry_the_registry_and_their_coords(case: str) -> None:
    for array in arrays(CASES[case](recorded_run())):
        assert array.name in VARIABLES
        assert array.attrs.items() >= VARIABLES[str(array.name)].attrs().items()
        assert array.dtype.kind == VARIABLES[str(array.name)].kind
        assert array["seed"].values.tolist() == [1, 5]
        assert array["step"].values.tolist() == (sorted(STEPS)[1:] if case in SUCCESSIVE else STEPS)
        if "step_" in array.dims:
            assert array["step_"].values.tolist() == STEPS
        else:
            assert array["attempt"].dims == ("step",)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_law__permuting_parameters_changes_nothing(seed: int) -> None:
    run = recorded_run(seed)
    order = np.random.default_rng(seed).permutation(4)
    permuted = {name: a.isel({"in": order}) if "in" in a.dims else a for name, a in run.items()}
    for case in CASES:
        found = CASES[case](permuted)
        if "in" in found.dims:
            found = found.isel({"in": np.argsort(order)})
        assert_same(found, CASES[case](run), atol=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_law__sign_and_order_of_eigenvectors_change_nothing(seed: int) -> None:
    run = recorded_run(seed)
    rng = np.random.default_rng(seed)
    changed = dict(run)
    for name in ("u", "v", "rows"):
        signs = xr.DataArray(rng.choice([-1.0, 1.0], (2, 5, 2)), dims=("seed", "step", "eig"))
        flipped = (run[name] * signs).transpose(*run[name].dims).assign_attrs(run[name].attrs)
        changed[name] = flipped.isel(eig=rng.permutation(2))
    for case in CASES:
        if case != "principal_angles, unequal":  # takes one vector, so the order decides which
            assert_same(CASES[case](changed), CASES[case](run), atol=1e-12)
