"""The same results on a cluster of processes as on the threads of this one."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import dask
import numpy as np
import pytest
import xarray as xr

import hild_xr as hx
from hild_xr.analyze import analyze
from hild_xr.store import RunWriter
from hild_xr.testing import random_record, spectrum_plan

distributed = pytest.importorskip("distributed")

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

ALL = ["angles", "angles_to_reference", "consecutive_angles", "alignment", "outliers", "rank"]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes of two threads each, on ports of their own."""
    with (
        dask.config.set({"distributed.worker.memory.terminate": False}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, of which the second lacks a record, in stored chunks of a few steps."""
    plan = spectrum_plan(steps=tuple(range(12)), rows=40, columns=300)
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    for seed, n in ((0, 12), (1, 11)):
        with RunWriter(path, plan, seed) as writer:
            for step in range(n):
                for probe in plan.probes:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    return path


def chunked(path: Path) -> xr.DataTree:
    return hx.open(path).chunk(seed=1, step=3)


def test_results__are_the_same_to_the_bit_on_threads_and_on_processes(client: Client, run_path: Path) -> None:
    results = analyze(chunked(run_path), ALL)
    with dask.config.set(scheduler="threads", num_workers=2):
        on_threads = results.compute()
    with dask.config.set(scheduler="synchronous"):
        one_by_one = results.compute()
    on_processes = results.compute()  # the client is active: dask takes it
    for node in on_threads.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            for other in (one_by_one, on_processes):
                np.testing.assert_array_equal(other[node.path][name].values, array.values, strict=True)


def test_results__in_one_chunk_are_the_same_to_rounding(client: Client, run_path: Path) -> None:
    xr.testing.assert_allclose(
        analyze(chunked(run_path), ALL).compute(), analyze(run_path, ALL).compute(), rtol=1e-12, atol=1e-13
    )


def test_store__is_written_by_the_workers(
    client: Client, run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tasks_done(client)
    found = analyze(run_path, ALL, tmp_path / "results.zarr", progress=True)
    assert tasks_done(client) - before > 20
    with dask.config.set(scheduler="synchronous"):
        expected = analyze(run_path, ALL).compute()
        xr.testing.assert_identical(
            found["outliers/hessian"].to_dataset().compute(), expected["outliers/hessian"].to_dataset()
        )
    shown = capsys.readouterr()
    assert "100% Completed" in shown.err
    assert shown.out == ""


def tasks_done(client: Client) -> int:
    """Count what the scheduler has done: it grows with every task."""
    count: int = client.cluster.scheduler.transition_counter
    return count


def test_tasks__run_on_one_blas_thread_in_every_worker(client: Client) -> None:
    from hild_xr.analysis.base.arguments import apply_kernel

    def threads_seen(values: np.ndarray) -> np.ndarray:
        from threadpoolctl import threadpool_info

        found = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
        return np.full(values.shape[:-1], max(found), dtype=np.float64)

    def set_two_threads() -> None:
        from threadpoolctl import ThreadpoolController

        for library in ThreadpoolController().select(user_api="blas").lib_controllers:
            library.set_num_threads(2)
            library.clear_controlling_thread(force=True)

    client.run(set_two_threads)
    steps = xr.DataArray(np.ones((12, 3)), dims=("step", "in")).chunk(step=1)
    assert (apply_kernel(threads_seen, [steps], [["in"]]).compute() == 1).all()


@pytest.mark.parametrize("how", ["address", "scheduler file"])
def test_cli__takes_a_scheduler(client: Client, run_path: Path, tmp_path: Path, how: str) -> None:
    from typer.testing import CliRunner

    from hild_xr import cli

    file, out = tmp_path / "scheduler.json", tmp_path / "results.zarr"
    address = str(client.scheduler.address)
    file.write_text(json.dumps({"type": "Scheduler", "address": address}))
    scheduler = str(file) if how == "scheduler file" else address
    before = tasks_done(client)
    arguments = ["analyze", str(run_path), "--what", "rank", "--out", str(out), "--scheduler", scheduler]
    shown = CliRunner().invoke(cli.app, [*arguments, "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert tasks_done(client) > before
    assert "rank" in xr.open_datatree(out, engine="zarr").children


def test_workers__are_on_this_machine(client: Client) -> None:
    assert set(client.run(socket.gethostname).values()) == {socket.gethostname()}
    assert len(set(client.run(os.getpid).values()) - {os.getpid()}) == 2
