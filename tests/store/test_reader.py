from __future__ import annotations

from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import MemoryStore

import hild_xr as hx
from hild_xr.plan import RunPlan
from hild_xr.store import NotAStoreError, RunWriter, open_run
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
