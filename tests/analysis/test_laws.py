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
    alignment,
    angles_to_reference,
    effective_rank,
    flatten_like,
    numerical_rank,
    outliers,
    pairwise_angles,
    principal_angles,
    rank,
    stable_rank,
    subspace_alignment,
    subspace_overlap,
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
    for a in run.values() if missing else ():
        a[{"seed": 1, "step": 2}] = np.nan
    run["means"] = xr.DataArray(rng.standard_normal((2, in_)), dims=("class", "in"))
    return run


FLAT = xr.DataArray(0.0, attrs={"layers": ["a", "b"], "layer_shapes": [[3, 4], [3, 4]]})

CASES: dict[str, Callable[[Run], Result]] = {
    "principal_angles": lambda r: principal_angles(r["u"], r["v"]),
    "principal_angles, unequal": lambda r: principal_angles(r["u"], r["v"].isel(eig=[0])),
    "principal_angles, rows": lambda r: principal_angles(r["rows"], r["rows"].isel(step=0)),
    "pairwise_angles": lambda r: pairwise_angles(r["u"]),
    "pairwise_angles, rows": lambda r: pairwise_angles(r["rows"]),
    "angles_to_reference": lambda r: angles_to_reference(r["u"], 10),
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
}
NO_ARRAYS = {"random_alignment_baseline", "theory"}

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
    assert {case.partition(",")[0].split()[0] for case in CASES} == set(analysis.__all__) - NO_ARRAYS


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
    order = [3, 0, 2]  # holds the reference step
    part = {name: a.isel(step=order) if "step" in a.dims else a for name, a in run.items()}
    if "rows" in case and "pairwise" not in case and "alignment" not in case:
        part["rows"] = run["rows"].isel(step=[0, *order])  # its first step is what it is compared with
        order = [0, *order]
    whole = CASES[case](run)
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


@every_case
def test_law__scale_changes_the_edge_of_the_bulk_only(case: str) -> None:
    run = recorded_run()
    scaled = {name: (8 * a).assign_attrs(a.attrs) for name, a in run.items()}
    expected = CASES[case](run)
    if isinstance(expected, xr.Dataset) and "bulk_edge" in expected:
        edge = expected["bulk_edge"]
        expected = expected.assign(bulk_edge=(8 * edge).assign_attrs(edge.attrs))
    assert_same(CASES[case](scaled), expected)


@every_case
def test_law__results_carry_the_registry_and_their_coords(case: str) -> None:
    for array in arrays(CASES[case](recorded_run())):
        assert array.name in VARIABLES
        assert array.attrs.items() >= VARIABLES[str(array.name)].attrs().items()
        assert array.dtype.kind == VARIABLES[str(array.name)].kind
        assert array["seed"].values.tolist() == [1, 5]
        assert array["step"].values.tolist() == STEPS
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
        assert_same(CASES[case](permuted), CASES[case](run), atol=1e-12)


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
