"""Weights in the layout of flat blocks: values by hand, laws, laziness, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

import hild_xr.accessor  # noqa: F401  # registers .hild
from hild_xr.analysis import alignment, flatten_like
from hild_xr.analysis.subspaces.flattening import flatten_kernel
from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter, open_run
from hild_xr.variables import attrs

DIMS = {0: [], 1: ["out"], 2: ["out", "in"], 4: ["out", "in", "kh", "kw"]}
SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "scale": (), "fc.weight": (3, 5)}


def layer(name: str, *, seeds: int = 2, steps: int = 3, dtype: str = "float64") -> xr.DataArray:
    shape = SHAPES[name]
    rng = np.random.default_rng(len(name))
    values = rng.standard_normal((seeds, steps, *shape)).astype(dtype)
    dims = DIMS[len(shape)]
    coords = {"seed": range(seeds), "step": 10 * np.arange(steps), "attempt": ("step", np.ones(steps, int))}
    return xr.DataArray(
        values,
        dims=("seed", "step", *dims),
        coords=coords,
        name="weight",
        attrs=attrs("weight", vector_dims=dims),
    )


def like(*names: str) -> xr.DataArray:
    p = sum(int(np.prod(SHAPES[name])) for name in names)
    layout = {"layers": list(names), "layer_shapes": [list(SHAPES[name]) for name in names]}
    return xr.DataArray(
        np.eye(p)[:2],
        dims=("eig", "param"),
        name="eigenvectors",
        attrs={**layout, "vector_dims": ["param"], "number_dim": "eig"},
    )


WEIGHTS = {name: layer(name) for name in SHAPES}
TREE = xr.DataTree.from_dict({f"/{name}": a.to_dataset() for name, a in WEIGHTS.items()})


def by_hand(arrays: dict[str, xr.DataArray], *names: str) -> np.ndarray:
    parts = [arrays[name].values.reshape(2, 3, -1) for name in names]
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize(
    "names", [tuple(SHAPES), ("fc.weight", "conv.bias"), ("scale",), ("scale", "conv.weight")]
)
@pytest.mark.parametrize("source", [WEIGHTS, TREE], ids=["mapping", "tree"])
def test_flat_vectors__are_the_layers_end_to_end_in_the_blocks_order(
    source: Any, names: tuple[str, ...]
) -> None:
    flat = flatten_like(source, like(*names))
    assert flat.dims == ("seed", "step", "param")
    np.testing.assert_array_equal(flat, by_hand(WEIGHTS, *names))
    assert flat.name == "weight"
    assert flat.attrs == {
        **attrs("weight"),
        "vector_dims": ["param"],
        "layers": list(names),
        "layer_shapes": [list(SHAPES[name]) for name in names],
    }
    assert flat["step"].values.tolist() == [0, 10, 20]
    assert flat["attempt"].dims == ("step",)
    # and they go straight into analysis: the basis holds the first two axes
    rho = alignment(flat, like(*names)) if flat.sizes["param"] > 1 else None
    if rho is not None:
        expected = np.linalg.norm(flat.values[..., :2], axis=-1) / np.linalg.norm(flat.values, axis=-1)
        np.testing.assert_allclose(rho, expected)


@settings(max_examples=25)
@given(data=st.data())
def test_law__the_order_of_dims_and_chunks_change_nothing(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True))
    changed = {}
    for name in names:
        a = WEIGHTS[name].transpose(*data.draw(st.permutations(WEIGHTS[name].dims)))
        sizes = {dim: data.draw(st.integers(1, n)) for dim, n in a.sizes.items()}
        changed[name] = a.chunk(sizes) if data.draw(st.booleans()) else a
    found, expected = flatten_like(changed, like(*names)), flatten_like(WEIGHTS, like(*names))
    lazy = any(a.chunks is not None for a in changed.values())
    assert (found.chunks is not None) == lazy
    xr.testing.assert_identical(found.transpose(*expected.dims).compute(), expected)


@pytest.mark.usefixtures("nothing_computes")
def test_dask__is_not_computed() -> None:
    lazy = {name: a.chunk(step=1) for name, a in WEIGHTS.items()}
    lazy = {name: a.assign_coords(attempt=a["attempt"].chunk(step=1)) for name, a in lazy.items()}
    flat = flatten_like(lazy, like(*SHAPES).chunk())
    assert flat.chunks == ((2,), (1, 1, 1), (92,))
    with pytest.raises(AssertionError, match="something was computed"):
        flat.compute()


def test_one_step_of_the_result__reads_one_step_of_each_layer() -> None:
    read: list[tuple[int, ...]] = []

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        read.append(block_id)
        return np.zeros((1, 1, 4))

    values = da.map_blocks(  # type: ignore[no-untyped-call]
        block, chunks=((1, 1), (1, 1, 1), (4,)), dtype=float, meta=np.zeros((0, 0, 0))
    )
    lazy = {"conv.bias": WEIGHTS["conv.bias"].copy(data=values), "scale": WEIGHTS["scale"]}
    flatten_like(lazy, like("conv.bias", "scale")).isel(seed=0, step=1).compute()
    assert read == [(0, 1, 0)]


def test_dtype__is_kept() -> None:
    for dtypes, expected in ((("float32", "float32"), "float32"), (("float32", "float64"), "float64")):
        mixed = {n: layer(n, dtype=d) for n, d in zip(("conv.bias", "fc.weight"), dtypes, strict=True)}
        assert flatten_like(mixed, like(*mixed)).dtype == expected
        lazy = {name: a.chunk(step=1) for name, a in mixed.items()}
        assert flatten_like(lazy, like(*mixed)).dtype == expected


def test_fixed_arrays__are_repeated_for_every_record() -> None:
    start = {"conv.bias": WEIGHTS["conv.bias"].isel(step=0, drop=True), "fc.weight": WEIGHTS["fc.weight"]}
    flat = flatten_like(start, like("conv.bias", "fc.weight")).transpose("seed", "step", "param")
    first = WEIGHTS["conv.bias"].values[:, :1].repeat(3, axis=1)
    np.testing.assert_array_equal(flat.values[..., :4], first)


def test_bases__keep_what_numbers_their_vectors() -> None:
    u = {n: a.expand_dims(eig=2).assign_attrs(a.attrs | {"number_dim": "eig"}) for n, a in WEIGHTS.items()}
    flat = flatten_like(u, like("conv.bias", "fc.weight"))
    assert flat.attrs["number_dim"] == "eig"
    assert set(flat.dims) == {"eig", "seed", "step", "param"}


def test_differing_attrs__are_dropped() -> None:
    arrays = {
        "conv.bias": WEIGHTS["conv.bias"].assign_attrs(lossy=[1, 2], note="a"),
        "scale": WEIGHTS["scale"],
    }
    assert not {"lossy", "note"} & set(flatten_like(arrays, like(*arrays)).attrs)
    arrays["scale"] = WEIGHTS["scale"].rename("other").assign_attrs(lossy=[1, 3], note="a")
    flat = flatten_like(arrays, like(*arrays))
    assert flat.name is None
    assert ("lossy" in flat.attrs, flat.attrs["note"]) == (False, "a")


def test_missing_records__are_missing_in_the_flat_vector() -> None:
    holed = {name: a.copy() for name, a in WEIGHTS.items()}
    holed["conv.bias"][0, 1] = np.nan
    flat = flatten_like(holed, like("conv.bias", "fc.weight"))
    assert np.isnan(flat.values[0, 1, :4]).all()
    assert np.isfinite(np.delete(flat.values.reshape(6, -1), 1, axis=0)).all()
    assert np.isnan(alignment(flat, like("conv.bias", "fc.weight")).values).sum() == 1


def test_opened_run__is_flattened_from_its_node() -> None:
    nodes = {
        name: NodePlan(
            arrays={
                "weight": ArrayPlan(
                    variable="weight",
                    dims=tuple(DIMS[len(shape)]),
                    shape=shape,
                    dtype="float64",
                    attrs={"vector_dims": [*DIMS[len(shape)]]},
                )
            }
        )
        for name, shape in SHAPES.items()
    }
    plan = RunPlan(seeds=(0, 1), probes={"weights": ProbePlan(steps=(0, 10, 20), nodes=nodes)})
    store = MemoryStore()
    for seed in (0, 1):
        with RunWriter(store, plan, seed=seed) as writer:
            for i, step in enumerate((0, 10, 20)):
                values = {name: {"weight": a.values[seed, i]} for name, a in WEIGHTS.items()}
                writer.write("weights", step, values)
    run = open_run(store)
    flat = run["weights"].hild.flatten_like(like(*SHAPES))
    assert flat.chunks is not None
    np.testing.assert_array_equal(flat, by_hand(WEIGHTS, *SHAPES))


@pytest.mark.parametrize(
    ("weights", "block", "error", "message"),
    [
        (WEIGHTS, like("scale").drop_attrs(), ValueError, "only blocks over several tensors"),
        (WEIGHTS, like("scale").assign_attrs(sketch={}), ValueError, r"sketch_model\(weights, like\)"),
        ({"scale": WEIGHTS["scale"]}, like("scale", "conv.bias"), KeyError, r"also holds \['conv.bias'\]"),
        ({"scale": WEIGHTS["scale"].drop_attrs()}, like("scale"), ValueError, "'vector_dims' on 'scale'"),
        ({"scale": WEIGHTS["scale"].values}, like("scale"), TypeError, "DataArray as scale"),
        ({"scale": WEIGHTS["scale"] * 1j}, like("scale"), TypeError, "complex128"),
        (
            {"conv.bias": WEIGHTS["conv.bias"].isel(out=[0])},
            like("conv.bias"),
            ValueError,
            r"shape \(4,\) .*\(1,\)",
        ),
        (
            {"conv.bias": WEIGHTS["conv.bias"].rename(out="row")},
            like("conv.bias"),
            ValueError,
            r"'vector_dims' of 'conv.bias' names \['out'\]",
        ),
        (
            {"conv.bias": WEIGHTS["conv.bias"].rename(out="sketch").assign_attrs(vector_dims=["sketch"])},
            like("conv.bias"),
            ValueError,
            "'conv.bias' is a sketch",
        ),
        (
            {**WEIGHTS, "scale": WEIGHTS["scale"].isel(step=[0, 1])},
            like("conv.bias", "scale"),
            ValueError,
            "conv.bias and scale differ along dim 'step'",
        ),
        (
            xr.DataTree.from_dict({"/scale": xr.Dataset({"a": 1.0, "b": 2.0})}),
            like("scale"),
            ValueError,
            r"one variable in each node .*\['a', 'b'\] in 'scale'",
        ),
    ],
)
def test_arguments_that_do_not_fit__are_refused(
    weights: Any, block: xr.DataArray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flatten_like(weights, block)


def test_accessor_of_one_layer__says_which_node_to_take() -> None:
    with pytest.raises(TypeError, match="take the node above the layers"):
        WEIGHTS["scale"].hild.flatten_like(like("scale"))


def test_kernel__broadcasts_leading_axes() -> None:
    a, b = np.arange(12.0).reshape(2, 1, 2, 3), np.arange(3.0)[:, None]
    flat = flatten_kernel(a, b, n_axes=[2, 1])
    assert flat.shape == (2, 3, 7)
    np.testing.assert_array_equal(flat[1, 2], [6, 7, 8, 9, 10, 11, 2])
