"""What a record costs to write, beside the same bytes written raw to the same disk in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter

RECORD = np.random.default_rng(0).standard_normal((2500, 4000), dtype=np.float32)  # 40 MB
LAYERS, K, STEPS = 100, 10, 6400


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / f"{i}" for i in count())


@pytest.mark.benchmark(group="40 MB record")
def test_raw_file(benchmark: BenchmarkFixture, paths: Iterator[Path]) -> None:
    benchmark.pedantic(lambda: RECORD.tofile(next(paths)), rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="40 MB record")
def test_committed_record(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    weight = ArrayPlan(variable="weight", dims=("out", "in"), shape=RECORD.shape, dtype="float32")
    nodes = {"fc.weight": NodePlan(arrays={"weight": weight})}
    plan = RunPlan(seeds=(0,), probes={"weights": ProbePlan(steps=tuple(range(30)), nodes=nodes)})
    steps = count()
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        benchmark.pedantic(
            lambda: writer.write("weights", next(steps), {"fc.weight": {"weight": RECORD}}),
            rounds=20,
            warmup_rounds=2,
        )


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
