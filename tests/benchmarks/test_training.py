"""What recording costs the training of a 1.5 M-parameter network, against the same training without it.

Recorded and bare stretches of one training follow each other, and each recorded one is held against its two
neighbours: drift of the machine cancels. The allocator keeps its memory: glibc gives the tensors of a bare
training back and takes them again by chance, up to 200 page faults a step. What raw files would cost stands
beside it: a thread that writes the same bytes with ``ndarray.tofile`` and nothing else.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


def _training(device: str, batch: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], float]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 640), nn.Tanh(), nn.Linear(640, 10)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(batch, 784, device=device), torch.randint(10, (batch,), device=device)

    def train(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return model, optimizer, train


class RawWriter:
    """The least that writing the weights can cost: copy, and a thread that writes them to files."""

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: set[int]
    ) -> None:
        self._model, self._steps, self._folder, self._step = model, steps, folder, 0
        self._pool, self._jobs = ThreadPoolExecutor(1), deque[Future[None]]()
        optimizer.register_step_post_hook(self._record)
        folder.mkdir()

    def _record(self, *_: object) -> None:
        self._step += 1
        if self._step in self._steps:
            for i, parameter in enumerate(self._model.parameters()):
                copied = parameter.detach().cpu().numpy().copy()
                self._jobs.append(self._pool.submit(copied.tofile, self._folder / f"{self._step}-{i}"))

    def flush(self) -> None:
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        self._pool.shutdown()


def _timed(call: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    def timed() -> None:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)

    return timed


@pytest.fixture
def steady_allocator() -> None:
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt(trim_threshold, 2**31 - 1)
        assert libc.mallopt(mmap_threshold, 2**25)


@pytest.mark.usefixtures("steady_allocator")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("what", ["weights", "weights-raw", "spectra"])
def test_slowdown(benchmark: BenchmarkFixture, tmp_path: Path, device: str, batch: int, what: str) -> None:
    # Small records wake the writer by the 64: a recorded stretch holds whole turns of it.
    stretch, pairs = (20, 1) if benchmark.disabled else (128, 30)
    every = 1 if what == "spectra" else 10
    model, optimizer, train = _training(device, batch)
    total = 2 * stretch * pairs
    recorded_steps = [s for s in range(1, total + 1) if ((s - 1) // stretch) % 2 and s % every == 0]
    recorder: rec.Recorder | RawWriter
    if what == "weights-raw":
        recorder = RawWriter(tmp_path / "raw", model, optimizer, set(recorded_steps))
    else:
        probe = rec.Weights() if what == "weights" else FixedSpectra()
        path, schedule = tmp_path / "run.zarr", rec.at(recorded_steps)
        recorder = rec.Recorder(
            path, model, optimizer, probes=[probe], schedule=schedule, progress=False
        ).start()
    inside: list[float] = []
    if isinstance(recorder, rec.Recorder):
        recorder.step = _timed(recorder.step, inside)  # type: ignore[method-assign]
    bare: list[float] = []
    recorded: list[float] = []

    def pair() -> None:
        bare.append(train(stretch))
        recorded.append(train(stretch))
        recorder.flush()

    benchmark.pedantic(pair, rounds=pairs)
    recorder.close()
    neighbours = [(before + after) / 2 for before, after in itertools.pairwise([*bare, bare[-1]])]
    ratios = [mine / beside for mine, beside in zip(recorded, neighbours, strict=True)]
    benchmark.extra_info["slowdown %"] = round(100 * (statistics.median(ratios) - 1), 2)
    if inside:  # the drift of the machine is not in this one, nor is what the writer's thread costs training
        share = sum(inside) / (sum(recorded) / 100)
        benchmark.extra_info["inside the hook %"] = round(share, 2)
    # of a median: 1.25 times that of a mean
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    benchmark.extra_info["standard error %"] = round(100 * error, 2)
    benchmark.extra_info["bare ms a step"] = round(statistics.median(bare) / stretch * 1e3, 3)
