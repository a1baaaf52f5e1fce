from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

import hild_xr as hx
from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import (
    DamagedRecordError,
    NotAStoreError,
    RunWriter,
    create,
    open_run,
    reader,
    recorded_seeds,
)
from hild_xr.store.contents import read_contents
from hild_xr.testing import random_record, spectrum_plan


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, RunPlan]:
    """A run of two seeds that got to different steps."""
    plan, path = spectrum_plan(steps=(0, 1, 2, 5, 10)), tmp_path / "run.zarr"
    for seed, steps in ((0, (0, 1, 2, 5)), (1, (0, 1))):
        with RunWriter(path, plan, seed) as writer:
            for step in steps:
                for probe in plan.probes:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    return path, plan


def test_open__trims_after_the_last_record_and_masks_what_a_seed_lacks(uneven: tuple[Path, RunPlan]) -> None:
    run = hx.open(uneven[0])
    np.testing.assert_array_equal(run["hessian/step"].values, [0, 1, 2, 5])
    lacking = run["hessian"].to_dataset().sel(seed=1, step=[2, 5])
    assert np.isnan(lacking["eigenvalues"].values).all()
    assert (lacking["n_matvec"].values == -1).all()
    assert not lacking["converged"].values.any()
    assert (lacking["committed"].values == 0).all()
    assert np.isnan(run["hessian/fc.weight/eigenvectors"].isel(seed=1, step=[2, 3]).values).all()
    assert np.isfinite(run["hessian/fc.weight/eigenvectors"].isel(seed=0).values).all()


def test_open__never_shows_values_above_the_marker(uneven: tuple[Path, RunPlan]) -> None:
    path, _ = uneven
    root = zarr.open_group(path, mode="r+")
    for name in ("hessian/eigenvalues", "hessian/fc.weight/eigenvectors"):
        array = root[name]
        assert isinstance(array, zarr.Array)
        array[1, 2:] = 666.0  # a block that was written when the process died before the marker
    run = hx.open(path)
    assert np.isnan(run["hessian/eigenvalues"].sel(seed=1, step=[2, 5]).values).all()
    assert not (run["hessian/fc.weight/eigenvectors"].values == 666.0).any()


def test_open__keeps_dtypes_dims_and_attributes_where_it_masks(uneven: tuple[Path, RunPlan]) -> None:
    path, plan = uneven
    run = hx.open(path)
    for probe, contents in plan.probes.items():
        for node, name, array in contents.arrays():
            found = run["/".join(part for part in (probe, node, name) if part)]
            assert found.dtype == array.dtype
            assert found.dims == ("seed", "step", *array.dims)
            assert found.attrs["long_name"]
            assert found.attrs.get("vector_dims") == array.attrs.get("vector_dims")


def test_open__is_lazy(uneven: tuple[Path, RunPlan]) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("opening computed something")

    with dask.config.set(scheduler=refuse):
        run = hx.open(uneven[0])
        assert run["hessian/fc.weight/eigenvectors"].chunks is not None


def test_open__selects_layers_by_name(uneven: tuple[Path, RunPlan]) -> None:
    eigenvalues = hx.open(uneven[0])["hessian/eigenvalues"]
    assert eigenvalues.sel(layer="fc.weight").dims == ("seed", "step", "eig")


def test_nodes_with_coordinates__keep_their_own_numbers(tmp_path: Path) -> None:
    """Two nodes whose metadata are equal differ in the values of their coordinates and arrays."""
    array = ArrayPlan(variable="eigenvalues", dims=("eig",), shape=(2,))
    nodes = {
        name: NodePlan(arrays={"eigenvalues": array}, coords={"eig": CoordPlan(dim="eig", values=labels)})
        for name, labels in (("a", (0, 1)), ("b", (5, 6)))
    }
    plan = RunPlan(seeds=(0,), probes={"spectra": ProbePlan(steps=(0,), nodes=nodes)})
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        writer.write("spectra", 0, {name: {"eigenvalues": [i, i + 1.0]} for i, name in enumerate(nodes)})
    run = hx.open(tmp_path / "run.zarr")
    for i, (name, labels) in enumerate((("a", [0, 1]), ("b", [5, 6]))):
        found = run[f"spectra/{name}/eigenvalues"].isel(seed=0, step=0)
        assert found["eig"].values.tolist() == labels
        assert found.values.tolist() == [i, i + 1]


def test_open__of_a_run_without_records_is_empty_and_labelled() -> None:
    store, plan = MemoryStore(), spectrum_plan()
    RunWriter(store, plan, 0).close()
    run = open_run(store)
    assert run["hessian/fc.weight/eigenvectors"].shape == (2, 0, 2, 3, 4)
    assert run["hessian/eigenvalues"].compute().shape == (2, 0, 1, 2)


def test_open__computes_large_chunks_of_small_blocks() -> None:
    plan, store = spectrum_plan(steps=tuple(range(1000)), seeds=(0,)), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        for step in plan.probes["metrics"].steps:
            writer.write("metrics", step, random_record(plan, "metrics", seed=0, step=step))
    loss = open_run(store)["metrics/train_loss"]
    assert loss.data.numblocks == (1, 1)
    assert open_run(store)["metrics"].sizes["step"] == 1000


def test_open__says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        hx.open(tmp_path / "absent.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(NotAStoreError):
        hx.open(tmp_path / "foreign.zarr")


def test_open__gives_the_numbers_of_plain_xarray(uneven: tuple[Path, RunPlan]) -> None:
    run, plain = hx.open(uneven[0]), xr.open_datatree(uneven[0], engine="zarr")
    for path in ("metrics/train_loss", "hessian/eigenvalues", "weights/fc.weight/weight"):
        ours = run[path].isel(seed=0).values
        np.testing.assert_array_equal(ours, plain[path].isel(seed=0, step=slice(len(ours))).values)


def test_open__keeps_the_planned_order_of_probes_layers_and_arrays(uneven: tuple[Path, RunPlan]) -> None:
    path, plan = uneven
    run = hx.open(path)
    assert list(run.children) == list(plan.probes)
    assert list(run["hessian"].data_vars) == ["committed", *plan.probes["hessian"].nodes[""].arrays]


def test_open__says_where_the_run_lies(uneven: tuple[Path, RunPlan]) -> None:
    assert hx.open(uneven[0]).encoding["source"] == str(uneven[0])


def test_open__needs_no_consolidated_metadata(uneven: tuple[Path, RunPlan]) -> None:
    path, _ = uneven
    whole = hx.open(path).compute()
    root = json.loads((path / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (path / "zarr.json").write_text(json.dumps(root))
    xr.testing.assert_identical(hx.open(path).compute(), whole)


def test_open__of_a_store_that_is_being_created_says_so() -> None:
    store = MemoryStore()
    zarr.create_group(store, attributes={"plan": spectrum_plan().to_json()})
    with pytest.raises(NotAStoreError, match=r"lacks 9 of its 9 planned arrays.*being created"):
        open_run(store)


def test_open__of_an_empty_store_finds_no_run() -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        open_run(MemoryStore())
    assert recorded_seeds(MemoryStore()) == set()


def test_open__of_a_damaged_root_says_so(uneven: tuple[Path, RunPlan]) -> None:
    (uneven[0] / "zarr.json").write_text("{")
    with pytest.raises(NotAStoreError, match="not valid JSON"):
        hx.open(uneven[0])


LOST = object()
"""Stands for a key that is taken out of a document."""

ARRAY = ("consolidated_metadata", "metadata", "metrics/train_loss")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("attributes",), None),
        (("attributes",), [1]),
        (("attributes", "plan"), 5),
        (("attributes", "schema_version"), {}),
        (("consolidated_metadata",), 5),
        (("consolidated_metadata",), {"metadata": None}),
        (("consolidated_metadata", "metadata"), LOST),
        (("consolidated_metadata", "metadata", "metrics"), LOST),
        (("consolidated_metadata", "metadata", "metrics/step"), LOST),
        (("consolidated_metadata", "metadata", "metrics/committed"), {}),
        (ARRAY, 5),
        ((*ARRAY, "shape"), LOST),
        ((*ARRAY, "shape"), 5),
        ((*ARRAY, "shape"), [7, 7]),
        ((*ARRAY, "shape"), ["x", "y"]),
        ((*ARRAY, "dimension_names"), LOST),
        ((*ARRAY, "dimension_names"), ["seed"]),
        ((*ARRAY, "data_type"), "float33"),
        ((*ARRAY, "chunk_grid", "configuration"), {}),
        ((*ARRAY, "attributes"), 5),
    ],
)
def test_open__of_damaged_metadata_says_so(
    place: tuple[str, ...], value: object, uneven: tuple[Path, RunPlan]
) -> None:
    path, _ = uneven
    root = json.loads((path / "zarr.json").read_text())
    holder = root
    for name in place[:-1]:
        holder = holder[name]
    if value is LOST:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(NotAStoreError, match=r"damaged|which is none"):
        hx.open(path)


def test_open__of_damaged_metadata_chains_what_was_found(uneven: tuple[Path, RunPlan]) -> None:
    path, _ = uneven
    root = json.loads((path / "zarr.json").read_text())
    del root["consolidated_metadata"]["metadata"]["metrics/train_loss"]["shape"]
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(
        NotAStoreError, match=r"run\.zarr: its metadata are damaged: KeyError: 'shape'; hild-xr validate "
    ) as caught:
        hx.open(path)
    assert isinstance(caught.value.__cause__, KeyError)


def test_coordinates__are_those_stored(uneven: tuple[Path, RunPlan]) -> None:
    path, plan = uneven
    with RunWriter(path, plan, 1, resume_at=1) as writer:
        for step in (2, 5, 10):
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=1, step=step))
    run, plain = hx.open(path), xr.open_datatree(path, engine="zarr")
    for node in run.subtree:
        for name, coord in node.to_dataset(inherit=False).coords.items():
            np.testing.assert_array_equal(coord.values, plain[node.path][name].values)
            assert coord.attrs == plain[node.path][name].attrs


def test_tree__survives_a_pickle(uneven: tuple[Path, RunPlan]) -> None:
    run = hx.open(uneven[0])
    run["metrics/train_loss"].compute()  # what was opened in reading is not pickled
    xr.testing.assert_identical(pickle.loads(pickle.dumps(run)).compute(), run.compute())


def test_tree__can_be_written_elsewhere(uneven: tuple[Path, RunPlan], tmp_path: Path) -> None:
    run = hx.open(uneven[0])
    run.to_zarr(tmp_path / "copy.zarr", consolidated=False)
    copy = xr.open_datatree(tmp_path / "copy.zarr", engine="zarr", consolidated=False)
    for path in ("metrics/train_loss", "hessian/fc.weight/eigenvectors"):
        np.testing.assert_array_equal(copy[path].values, run[path].values)


@pytest.fixture(scope="module")
def long_run() -> tuple[MemoryStore, xr.DataTree]:
    """A run of 21 steps in blocks of 4, with weights split in two chunks along a row, and what it holds."""
    store = MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hild_xr.plan.MAX_BLOCK_STEPS", 4)
        patch.setattr("hild_xr.store.layout.MAX_CHUNK_BYTES", 40)
        plan = spectrum_plan(steps=tuple(range(0, 63, 3)), seeds=(0, 5))
        for seed, until in ((0, 60), (5, 33)):
            with RunWriter(store, plan, seed) as writer:
                for step in range(0, until + 1, 3):
                    for probe in plan.probes:
                        writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    return store, open_run(store).compute()


@settings(max_examples=30)
@given(st.integers(1, 4000))
def test_values__do_not_depend_on_the_dask_chunks(
    long_run: tuple[MemoryStore, xr.DataTree], read_bytes: int
) -> None:
    store, whole = long_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "READ_BYTES", read_bytes)
        reader._read_chunks.cache_clear()
        run = open_run(store)
    reader._read_chunks.cache_clear()
    xr.testing.assert_identical(run.compute(scheduler="synchronous"), whole)


_STEP = st.integers(-21, 20) | st.slices(21)


@settings(max_examples=60)
@given(seed=st.integers(-2, 1) | st.slices(2), step=_STEP, row=st.integers(0, 2) | st.slices(3))
def test_indexing__gives_what_indexing_of_the_values_gives(
    long_run: tuple[MemoryStore, xr.DataTree], seed: int | slice, step: int | slice, row: int | slice
) -> None:
    store, whole = long_run
    path, index = "weights/fc.weight/weight", {"seed": seed, "step": step, "out": row}
    xr.testing.assert_identical(
        open_run(store)[path].isel(index).compute(scheduler="synchronous"), whole[path].isel(index)
    )


def test_indexing__reads_no_more_chunks_than_it_needs(
    uneven: tuple[Path, RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = LocalStore.get

    async def watched(self: LocalStore, key: str, *args: object, **kwargs: object) -> object:
        asked.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", watched)
    plan = spectrum_plan(steps=tuple(range(200)), seeds=(0,))
    path = uneven[0].with_name("long.zarr")
    with RunWriter(path, plan, 0) as writer:
        for step in range(200):
            writer.write("metrics", step, random_record(plan, "metrics", seed=0, step=step))
    loss = hx.open(path)["metrics/train_loss"]
    asked.clear()
    assert np.isfinite(loss.isel(seed=0, step=70).compute())
    assert asked == ["metrics/train_loss/c/0/1", "metrics/committed/c/0/0"]


def test_damage__is_named_with_array_seed_steps_and_chunk(uneven: tuple[Path, RunPlan]) -> None:
    path, _ = uneven
    chunk = path / "hessian/eigenvalues/c/1/0/0/0"
    stored = bytearray(chunk.read_bytes())
    stored[3] ^= 16
    chunk.write_bytes(stored)
    run = hx.open(path)
    with pytest.raises(
        DamagedRecordError,
        match=rf"^hessian/eigenvalues, seed 1, steps 0 to 10: checksum of chunk c/1/0/0/0 differs: the "
        rf"file is damaged; hild-xr validate {path} lists all damage$",
    ):
        run["hessian/eigenvalues"].compute()
    assert np.isfinite(run["hessian/eigenvalues"].isel(seed=0).compute()).all()


@pytest.mark.parametrize("array", ["metrics/train_loss/c/0/0", "hessian/converged/c/0/0/0/0"])
def test_damage__of_a_lost_chunk_is_not_read_as_missing_records(
    uneven: tuple[Path, RunPlan], array: str
) -> None:
    path, _ = uneven
    (path / array).unlink()
    with pytest.raises(DamagedRecordError, match=r"seed 0, steps 0 to 10: chunk c/0/0.* is missing although"):
        hx.open(path)[array.partition("/c/")[0]].compute()


def test_damage__where_nothing_is_committed_does_not_matter(tmp_path: Path) -> None:
    plan, path = spectrum_plan(steps=tuple(range(100)), seeds=(0,)), tmp_path / "run.zarr"
    with RunWriter(path, plan, 0) as writer:
        writer.write("metrics", 0, random_record(plan, "metrics", seed=0, step=0))
        writer.write("metrics", 99, random_record(plan, "metrics", seed=0, step=99))
    with RunWriter(path, plan, 0, resume_at=0):  # withdraws the second, and its chunk stays
        pass
    (path / "metrics/train_loss/c/0/1").write_bytes(b"not even a checksum")
    assert hx.open(path)["metrics/train_loss"].compute().sizes["step"] == 1


def test_damage__in_one_of_several_chunks_names_that_one(
    long_run: tuple[MemoryStore, xr.DataTree],
) -> None:
    store = MemoryStore(dict(long_run[0]._store_dict))
    key = "weights/fc.weight/weight/c/0/2/1/0"
    del store._store_dict[key]
    array = open_run(store)["weights/fc.weight/weight"]
    with pytest.raises(DamagedRecordError, match=r"seed 0, steps 24 to 33: chunk c/0/2/1/0 is missing"):
        array.compute()
    assert np.isfinite(array.sel(step=slice(36, 60), seed=0).compute()).all()


def test_records_of_nothing_but_the_fill_value__are_no_damage(tmp_path: Path) -> None:
    plan, path = spectrum_plan(steps=(0, 1), seeds=(0,)), tmp_path / "run.zarr"
    record = {
        node: {name: array.missing() for name, array in contents.arrays.items()}
        for node, contents in plan.probes["hessian"].nodes.items()
    }
    with RunWriter(path, plan, 0) as writer:
        writer.write("hessian", 0, record)
    run = hx.open(path)["hessian"].to_dataset()
    assert np.isnan(run["eigenvalues"].compute()).all()
    assert (run["n_matvec"].compute() == -1).all()
    assert (run["committed"] == 1).all()


def test_damage__of_a_marker_is_named_at_opening(uneven: tuple[Path, RunPlan]) -> None:
    chunk = uneven[0] / "weights/committed/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(
        DamagedRecordError, match=r"weights/committed.*checksum of the marker.*hild-xr validate"
    ):
        hx.open(uneven[0])


def test_reading__of_a_run_that_was_deleted_raises(uneven: tuple[Path, RunPlan]) -> None:
    run = hx.open(uneven[0])
    shutil.rmtree(uneven[0])
    with pytest.raises(DamagedRecordError, match="moved or deleted"):
        run["hessian/eigenvalues"].compute()


def test_contents__are_read_once_and_shared_by_deep_copies() -> None:
    store = MemoryStore()
    create(store, spectrum_plan())
    run = open_run(store)
    copied = run.copy(deep=True)
    assert copied.encoding["hild_run"] is run.encoding["hild_run"]
    assert read_contents(store).plan == spectrum_plan()
