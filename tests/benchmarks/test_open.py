"""What opening a run costs, beside plain ``xarray.open_datatree`` of the same run."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from pytest_benchmark.fixture import BenchmarkFixture

import hild_xr as hx
from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import create

STEPS, K = 200, 10


def layered_plan(layers: int, *, curvature: bool) -> RunPlan:
    """Weights of so many layers; with curvature also spectra of H and G, with eigenvectors of each layer."""
    names = tuple(f"blocks.{i}.weight" for i in range(layers))
    weight = ArrayPlan(
        variable="weight", dims=("out", "in"), shape=(8, 8), attrs={"vector_dims": ["out", "in"]}
    )
    vectors = ArrayPlan(variable="eigenvectors", dims=("eig", "out", "in"), shape=(K, 8, 8))
    values = ArrayPlan(variable="eigenvalues", dims=("layer", "eig"), shape=(layers, K), dtype="float64")
    coords = {
        "layer": CoordPlan(dim="layer", values=names),
        "eig": CoordPlan(dim="eig", values=tuple(range(K))),
    }
    spectrum = {"": NodePlan(arrays={"eigenvalues": values}, coords=coords)}
    spectrum |= {name: NodePlan(arrays={"eigenvectors": vectors}) for name in names}
    probes = {"weights": {name: NodePlan(arrays={"weight": weight}) for name in names}}
    if curvature:
        probes |= {"hessian": spectrum, "gmatrix": spectrum}
    steps = tuple(range(STEPS))
    return RunPlan(
        seeds=(0, 1), probes={name: ProbePlan(steps=steps, nodes=nodes) for name, nodes in probes.items()}
    )


def run_of(folder: Path, layers: int, *, curvature: bool) -> Path:
    """Create a run and mark half of its records, which is all that opening looks at."""
    plan, path = layered_plan(layers, curvature=curvature), folder / "run.zarr"
    create(path, plan)
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name in plan.probes:
        marker = root[f"{name}/committed"]
        assert isinstance(marker, zarr.Array)
        marker[:, : STEPS // 2] = np.uint16(1)
    return path


@pytest.mark.parametrize(("layers", "curvature"), [(100, True), (1000, False), (1000, True)])
def test_open(benchmark: BenchmarkFixture, tmp_path: Path, layers: int, curvature: bool) -> None:
    if benchmark.disabled and layers > 100:
        pytest.skip("creating thousands of nodes is for `make bench`")
    path = run_of(tmp_path, layers, curvature=curvature)
    run = benchmark.pedantic(hx.open, args=(path,), rounds=7, warmup_rounds=1)
    nodes = len(list(run.subtree))
    assert nodes > layers * (3 if curvature else 1)
    assert run["weights"].sizes["step"] == STEPS // 2
    began = time.perf_counter()
    assert len(list(xr.open_datatree(path, engine="zarr").subtree)) == nodes
    plain = time.perf_counter() - began
    if benchmark.stats is not None:  # None where benchmarks run once as tests
        benchmark.extra_info["nodes"] = nodes
        benchmark.extra_info["seconds of xr.open_datatree"] = plain
        benchmark.extra_info["times faster"] = plain / benchmark.stats.stats.median


@pytest.mark.parametrize("changed", [False, True], ids=["nothing new", "new records"])
@pytest.mark.parametrize(("layers", "curvature"), [(100, True), (1000, False), (1000, True)])
def test_refresh(
    benchmark: BenchmarkFixture, tmp_path: Path, layers: int, curvature: bool, changed: bool
) -> None:
    if benchmark.disabled and layers > 100:
        pytest.skip("creating thousands of nodes is for `make bench`")
    path = run_of(tmp_path, layers, curvature=curvature)
    run, length = hx.open(path), iter(range(STEPS // 2 + 1, STEPS))
    marker = zarr.open_array(path, path="weights/committed", mode="r+")

    def go_on() -> None:
        if changed:
            marker[0, : next(length)] = np.uint16(1)

    def refresh() -> xr.DataTree:
        refreshed: xr.DataTree = run.hild.refresh()
        return refreshed

    refreshed = benchmark.pedantic(refresh, setup=go_on, rounds=7, warmup_rounds=1)
    assert (refreshed is run) != changed


LARGE = np.random.default_rng(0).standard_normal((2500, 4000), dtype=np.float32)  # 40 MB


@pytest.mark.parametrize("reader", ["hild_xr", "xarray"])
@pytest.mark.benchmark(group="read 10 records of 40 MB")
def test_read(benchmark: BenchmarkFixture, tmp_path: Path, reader: str) -> None:
    """What checking each chunk against the marker costs: the same chunks read by plain xarray and dask."""
    from hild_xr.store import RunWriter

    weight = ArrayPlan(variable="weight", dims=("out", "in"), shape=LARGE.shape, dtype="float32")
    nodes, steps = {"fc.weight": NodePlan(arrays={"weight": weight})}, 2 if benchmark.disabled else 10
    plan = RunPlan(seeds=(0,), probes={"weights": ProbePlan(steps=tuple(range(steps)), nodes=nodes)})
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        for step in range(steps):
            writer.write("weights", step, {"fc.weight": {"weight": LARGE}})
    run = hx.open(tmp_path / "run.zarr")["weights/fc.weight/weight"]
    if reader == "xarray":
        chunks = dict(zip(run.dims, run.data.chunksize, strict=True))
        run = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")["weights/fc.weight/weight"].chunk(chunks)

    def read() -> np.ndarray:
        return np.asarray(run.data.compute(scheduler="synchronous"))

    np.testing.assert_array_equal(benchmark.pedantic(read, rounds=5, warmup_rounds=1)[0, -1], LARGE)
