"""What recording costs the training of a 1.5 M-parameter network, against the same training without it.

Each round trains bare and recorded, one right after the other, and the ratio is taken within the round. The
recorder is started and closed outside the timed part: both cost the same for a run of any length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan

LAYERS, K = 100, 10
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


class FixedSpectra(rec.Probe):
    """Spectra of 100 layers that cost nothing to find: what is left is the writing."""

    def __init__(self) -> None:
        super().__init__("hessian", None)
        self.eigenvalues = torch.rand(LAYERS, K, dtype=torch.float64)

    def plan(self, *_: object) -> dict[str, NodePlan]:
        names = tuple(f"layer{i}.weight" for i in range(LAYERS))
        eigenvalues = ArrayPlan(
            variable="eigenvalues", dims=("layer", "eig"), shape=(LAYERS, K), dtype="float64"
        )
        coords = {"layer": CoordPlan(dim="layer", values=names)}
        return {"": NodePlan(arrays={"eigenvalues": eigenvalues}, coords=coords)}

    def record(self, snapshot: rec.Snapshot) -> dict[str, dict[str, torch.Tensor]]:
        del snapshot
        return {"": {"eigenvalues": self.eigenvalues}}


def _trainer(
    device: str, batch: int, steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], float]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 640), nn.Tanh(), nn.Linear(640, 10)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(batch, 784, device=device), torch.randint(10, (batch,), device=device)

    def train() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return model, optimizer, train


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / f"run{i}.zarr" for i in count())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize(
    ("probe", "every"), [(rec.Weights, 10), (FixedSpectra, 1)], ids=["weights", "spectra"]
)
def test_slowdown(
    benchmark: BenchmarkFixture,
    paths: Iterator[Path],
    device: str,
    batch: int,
    probe: Callable[[], rec.Probe],
    every: int,
) -> None:
    rounds, steps = (1, 20) if benchmark.disabled else (25, 200)
    model, optimizer, train = _trainer(device, batch, steps)
    ratios: list[float] = []
    bare_seconds: list[float] = []

    def pair() -> None:
        bare = train()
        recorder = rec.Recorder(
            next(paths),
            model,
            optimizer,
            probes=[probe()],
            schedule=rec.every(every, total_steps=steps),
            progress=False,
        ).start()
        recorded = train()
        recorder.close()
        ratios.append(recorded / bare)
        bare_seconds.append(bare)

    benchmark.pedantic(pair, rounds=rounds, warmup_rounds=0 if benchmark.disabled else 1)
    benchmark.extra_info["slowdown %"] = round(100 * (statistics.median(ratios) - 1), 2)
    benchmark.extra_info["bare ms a step"] = round(statistics.median(bare_seconds) / steps * 1e3, 3)
