"""What a record costs to write, beside the same bytes written raw to the same disk in the same run."""

from __future__ import annotations

import statistics
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter

RECORD = np.random.default_rng(0).standard_normal((2500, 4000), dtype=np.float32)  # 40 MB
LAYERS, K, STEPS = 100, 10, 6400


@pytest.mark.parametrize("split", [True, False], ids=["one array in chunks", "thirteen arrays"])
def test_committed_record(benchmark: BenchmarkFixture, tmp_path: Path, split: bool) -> None:
    """Raw and committed in turn, so that both meet the same disk."""
    parts = [RECORD] if split else np.array_split(RECORD, 13)
    nodes = {
        f"fc{i}.weight": NodePlan(
            arrays={
                "weight": ArrayPlan(variable="weight", dims=("out", "in"), shape=part.shape, dtype="float32")
            }
        )
        for i, part in enumerate(parts)
    }
    record = {f"fc{i}.weight": {"weight": part} for i, part in enumerate(parts)}
    plan = RunPlan(seeds=(0,), probes={"weights": ProbePlan(steps=tuple(range(40)), nodes=nodes)})
    steps, raw, committed = count(), list[float](), list[float]()
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:

        def pair() -> None:
            step = next(steps)
            started = time.perf_counter()
            RECORD.tofile(tmp_path / f"raw{step}")
            between = time.perf_counter()
            writer.write("weights", step, record)
            raw.append(between - started)
            committed.append(time.perf_counter() - between)

        benchmark.pedantic(pair, rounds=1 if benchmark.disabled else 40)
    ratios = [least / ours for least, ours in zip(raw, committed, strict=True)]
    benchmark.extra_info["raw ms"] = round(statistics.median(raw) * 1e3, 1)
    benchmark.extra_info["committed ms"] = round(statistics.median(committed) * 1e3, 1)
    benchmark.extra_info["of the rate of a raw file"] = round(statistics.median(ratios), 2)


@pytest.mark.benchmark(group="100-layer spectrum record")
def test_committed_spectrum(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Mean over whole blocks of 64 records, so the flush is in it."""
    eigenvalues = ArrayPlan(variable="eigenvalues", dims=("layer", "eig"), shape=(LAYERS, K), dtype="float64")
    coords = {"layer": CoordPlan(dim="layer", values=tuple(f"l{i}.weight" for i in range(LAYERS)))}
    nodes = {"": NodePlan(arrays={"eigenvalues": eigenvalues}, coords=coords)}
    plan = RunPlan(seeds=(0,), probes={"hessian": ProbePlan(steps=tuple(range(STEPS)), nodes=nodes)})
    record, steps = {"": {"eigenvalues": np.ones((LAYERS, K))}}, count()
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:

        def write_block() -> None:
            for _ in range(64):
                writer.write("hessian", next(steps), record)

        benchmark.pedantic(write_block, rounds=50, warmup_rounds=2)
    if benchmark.stats is not None:  # None where benchmarks run once as tests
        benchmark.extra_info["microseconds a record"] = benchmark.stats.stats.median / 64 * 1e6
