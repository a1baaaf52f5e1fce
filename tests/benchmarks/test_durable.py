"""What durable=True costs: records flushed with and without it, in turn, to the same disk in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter

RECORD = np.random.default_rng(0).standard_normal((2500, 4000), dtype=np.float32)  # 40 MB
LAYERS, K, BLOCK = 100, 10, 64


def _large(path: Path, open_until: ExitStack, *, durable: bool) -> Callable[[], None]:
    """Write one record of 40 MB, which is one flush."""
    weight = ArrayPlan(variable="weight", dims=("out", "in"), shape=RECORD.shape, dtype="float32")
    nodes = {"fc.weight": NodePlan(arrays={"weight": weight})}
    plan = RunPlan(seeds=(0,), probes={"weights": ProbePlan(steps=tuple(range(1000)), nodes=nodes)})
    writer, steps = open_until.enter_context(RunWriter(path, plan, 0, durable=durable)), count()
    return lambda: writer.write("weights", next(steps), {"fc.weight": {"weight": RECORD}})


def _small(path: Path, open_until: ExitStack, *, durable: bool) -> Callable[[], None]:
    """Write a block of 64 spectra of 100 layers, which is one flush."""
    eigenvalues = ArrayPlan(variable="eigenvalues", dims=("layer", "eig"), shape=(LAYERS, K), dtype="float64")
    coords = {"layer": CoordPlan(dim="layer", values=tuple(f"l{i}.weight" for i in range(LAYERS)))}
    nodes = {"": NodePlan(arrays={"eigenvalues": eigenvalues}, coords=coords)}
    plan = RunPlan(seeds=(0,), probes={"hessian": ProbePlan(steps=tuple(range(100 * BLOCK)), nodes=nodes)})
    writer, steps = open_until.enter_context(RunWriter(path, plan, 0, durable=durable)), count()
    record = {"": {"eigenvalues": np.ones((LAYERS, K))}}

    def write_block() -> None:
        for _ in range(BLOCK):
            writer.write("hessian", next(steps), record)

    return write_block


@pytest.mark.parametrize("flush", [_large, _small], ids=["40 MB record", "block of 64 spectra"])
def test_durable_flush(
    benchmark: BenchmarkFixture, tmp_path: Path, flush: Callable[..., Callable[[], None]]
) -> None:
    taken: list[float] = []
    with ExitStack() as stack:
        durable = flush(tmp_path / "durable.zarr", stack, durable=True)
        plain = flush(tmp_path / "plain.zarr", stack, durable=False)

        def time_plain() -> None:
            began = time.perf_counter()
            plain()
            taken.append(time.perf_counter() - began)

        benchmark.pedantic(durable, setup=time_plain, rounds=20, warmup_rounds=2)
    assert len(taken) > 0
    if benchmark.stats is not None:  # None where benchmarks run once as tests
        usual = statistics.median(taken[2:])
        benchmark.extra_info["milliseconds without"] = usual * 1e3
        benchmark.extra_info["times as long as without"] = benchmark.stats.stats.median / usual
