"""What users feel: Hessian and G recorded all along a training, against curvlinops called at each record.

A peer has no recorder, no rows and no labels: it is called from a hook for the layers' blocks of both
matrices, at some of the records only, and scaled to all of them. Its calls fall between ours, so both meet
the same machine. The true residuals of both are checked afterwards at the weights of those records.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hild_xr as hx
from hild_xr import recorders as rec
from tests.benchmarks.curvature_states import TINY_SETTING, Setting, State, data, network, train
from tests.benchmarks.curvature_tasks import Facts
from tests.benchmarks.peers import Curvlinops
from tests.benchmarks.true_residuals import RESIDUAL, Exact, Matrix, Pairs

MATRICES: tuple[Matrix, ...] = ("hessian", "gmatrix")


@dataclass(frozen=True)
class Training:
    """A training and how often it is looked at.

    Parameters
    ----------
    setting
        Start and data.
    steps
        Steps of SGD, batch 128.
    records
        Number of records.
    peer_records
        Number of these at which the peer is called.
    k
        Number of pairs of each block.
    """

    setting: Setting
    steps: int = 2000
    records: int = 200
    peer_records: int = 5
    k: int = 5


TRAININGS = {
    "digits 64-32-10": Training(
        Setting("digits", 0, seed=21, activation=nn.ReLU, sizes=(64, 32, 10), samples=1437), peer_records=20
    ),
    "784-256-256-10": Training(Setting("mixture", 0, seed=22)),
}
TINY_TRAINING = Training(replace(TINY_SETTING, steps=0), steps=20, records=4, peer_records=1, k=2)


def compare(training: Training, folder: Path) -> Facts:
    """Train bare, recorded, and bare again; return what recording cost and what the peer would have."""
    bare = [_Run(training).seconds()]
    recorded = _Run(training)
    facts = recorded.record(folder / "run.zarr")
    bare.append(_Run(training).seconds())
    facts["bare training: seconds"] = statistics.mean(bare)
    for who in ("hild-xr", "hild-xr without rows", "curvlinops"):
        each = facts[f"{who}: seconds a record"]
        facts[f"{who}: times the bare training, on top of it"] = (
            float(each) * training.records / statistics.mean(bare)
        )
    return facts


class _Run:
    """One training from the start; every one of a setting takes the same steps."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = network(training.setting)
        self.generator = torch.Generator().manual_seed(training.setting.seed + 1)
        self.inputs, self.targets = data(training.setting, self.generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def seconds(self) -> float:
        began = time.perf_counter()
        train(self.model, self.optimizer, self.inputs, self.targets, self.training.steps, self.generator)
        return time.perf_counter() - began

    def record(self, path: Path) -> Facts:
        schedule = rec.log_then_linear(total_steps=self.training.steps, records=self.training.records)
        recorder, clocks = self._recorder(path, schedule)
        peer = _PeerHook(self.training, self.model, self.inputs, self.targets, schedule.steps)
        began = time.perf_counter()
        with recorder:
            # After the recorder's own hook, at the same weights.
            self.optimizer.register_step_post_hook(peer)
            self.seconds()
        whole = time.perf_counter() - began
        run = hx.open(path)
        return _facts(self.training, run, clocks, peer) | {"recorded training: seconds": whole - peer.total}

    def _recorder(self, path: Path, schedule: rec.Schedule) -> tuple[rec.Recorder, dict[str, list[float]]]:
        k, clocks = self.training.k, defaultdict[str, list[float]](list)
        probes = [
            _TimedHessian(k, clocks),
            _TimedGMatrix(k, clocks),
            _TimedHessian(k, clocks, blocks="rows"),
            _TimedGMatrix(k, clocks, blocks="rows"),
        ]
        loss = torch.nn.functional.cross_entropy
        recorder = rec.Recorder(
            path,
            self.model,
            self.optimizer,
            objective=rec.Objective(loss, self.inputs, self.targets),
            probes=probes,
            schedule=schedule,
            progress=False,
        )
        return recorder, clocks


class _Timed(rec.Probe):
    """A probe that notes how long its records took; the first of a record also pays for the graph."""

    clocks: dict[str, list[float]]

    def record(self, snapshot: rec.Snapshot) -> Any:
        began, cpu_began = time.perf_counter(), time.thread_time()
        values = super().record(snapshot)  # type: ignore[safe-super]
        self.clocks[self.group].append(time.perf_counter() - began)
        self.clocks[f"{self.group}, CPU"].append(time.thread_time() - cpu_began)
        return values


class _TimedHessian(_Timed, rec.Hessian):
    def __init__(self, k: int, clocks: dict[str, list[float]], **options: Any) -> None:
        super().__init__(k, tol=RESIDUAL, **options)
        self.clocks = clocks


class _TimedGMatrix(_Timed, rec.GMatrix):
    def __init__(self, k: int, clocks: dict[str, list[float]], **options: Any) -> None:
        super().__init__(k, tol=RESIDUAL, **options)
        self.clocks = clocks


class _PeerHook:
    """Calls curvlinops for the layers' blocks of both matrices after some steps."""

    def __init__(
        self,
        training: Training,
        model: nn.Module,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        steps: Sequence[int],
    ) -> None:
        later = [step for step in steps if step > 0]
        chosen = np.linspace(0, len(later) - 1, min(training.peer_records, len(later))).round().astype(int)
        self._steps, self._step, self._k = {later[i] for i in chosen}, 0, training.k
        self._state = State(model, inputs, targets)
        self.total = 0.0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.products: list[int] = []
        self.states: dict[int, State] = {}
        self.found: dict[int, dict[Matrix, tuple[Pairs, ...]]] = defaultdict(dict)

    def __call__(self, *_: object) -> None:
        self._step += 1
        if self._step not in self._steps:
            return
        entered, cpu_entered, products = time.perf_counter(), time.thread_time(), 0
        blocks = [(name,) for name in self._state.names]
        for matrix in MATRICES:
            found = Curvlinops(self._state, matrix, blocks, self._k)()
            products += found.products
            self.found[self._step][matrix] = found.blocks
        self.seconds.append(time.perf_counter() - entered)
        self.cpu_seconds.append(time.thread_time() - cpu_entered)
        self.products.append(products)
        self.states[self._step] = copy.deepcopy(self._state)
        self.total += time.perf_counter() - entered


def _facts(training: Training, run: Any, clocks: dict[str, list[float]], peer: _PeerHook) -> Facts:
    facts: Facts = {"records": training.records, "steps": training.steps}
    mean = {group: statistics.mean(seconds) for group, seconds in clocks.items()}
    for group, seconds in mean.items():
        facts[f"hild-xr: seconds a record, {group}"] = seconds
    rowless, cpu_rowless = (mean[f"hessian{cpu}"] + mean[f"gmatrix{cpu}"] for cpu in ("", ", CPU"))
    with_rows = rowless + mean["hessian_rows"] + mean["gmatrix_rows"]
    facts["hild-xr: seconds a record"] = with_rows
    facts["hild-xr without rows: seconds a record"] = rowless
    for matrix in MATRICES:
        products = run[f"{matrix}/n_matvec"].sum("layer").mean()
        facts[f"hild-xr: products a record, {matrix}"] = round(float(products), 1)
        facts[f"hild-xr: share converged, {matrix}"] = float(run[f"{matrix}/converged"].mean())
        rows = [node["n_matvec"].sum("out").mean() for node in run[f"{matrix}_rows"].children.values()]
        facts[f"hild-xr: products a record, {matrix}_rows"] = round(float(sum(rows)), 1)
    facts["curvlinops: records measured"] = len(peer.seconds)
    facts["curvlinops: seconds a record"] = statistics.mean(peer.seconds)
    facts["curvlinops: products a record"] = statistics.mean(peer.products)
    facts |= _residuals(training, run, peer)
    facts["times faster than curvlinops, layers"] = statistics.mean(peer.seconds) / rowless
    facts["times faster than curvlinops, layers, CPU time"] = statistics.mean(peer.cpu_seconds) / cpu_rowless
    facts["times faster than curvlinops, with rows on top"] = statistics.mean(peer.seconds) / sum(
        mean.values()
    )
    return facts


def _residuals(training: Training, run: Any, peer: _PeerHook) -> Facts:
    """Return the worst true residuals at the peer's records, of pairs that are not noise."""
    worst = {"hild-xr": 0.0, "curvlinops": 0.0}
    for step, state in peer.states.items():
        exact = Exact(state)
        for matrix in MATRICES:
            record = run[matrix].to_dataset().isel(seed=0).sel(step=step)
            for theirs in peer.found[step][matrix]:
                (name,) = theirs.names
                vectors = run[f"{matrix}/{name}/eigenvectors"].isel(seed=0).sel(step=step).to_numpy()
                values = torch.from_numpy(record["eigenvalues"].sel(layer=name).to_numpy())
                mine = Pairs((name,), values, torch.from_numpy(vectors.reshape(training.k, -1)))
                for who, pairs in (("hild-xr", mine), ("curvlinops", theirs)):
                    counted = pairs.eigenvalues.abs() >= 1e-3 * pairs.eigenvalues.abs().max()
                    residual = exact.residuals(matrix, pairs)[counted].max()
                    worst[who] = max(worst[who], float(residual))
    return {f"{who}: true residual": residual for who, residual in worst.items()}
