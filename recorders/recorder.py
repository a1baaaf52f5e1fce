"""The recorder: the one place where training, schedule, probes and store meet."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch
from pydantic import JsonValue
from torch import nn
from tqdm import tqdm

from hild_xr.plan import NodePlan, ProbePlan, RunPlan
from hild_xr.provenance import provenance
from hild_xr.recorders.curvature import NonFiniteCurvatureError
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.schedule import Schedule
from hild_xr.store import Record, RunWriter, StoreLike

logger = logging.getLogger("hild_xr")


class NonFiniteRecordWarning(UserWarning):
    """Training reached NaN or infinity; the records that need finite numbers are marked missing."""


@dataclass(frozen=True)
class Estimate:
    """Size of a run before it starts.

    Parameters
    ----------
    records
        Records of this seed, all probes together.
    nbytes
        Bytes of all seeds, before metadata.
    """

    records: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.records} records for this seed, {self.nbytes / 1e6:.1f} MB for all seeds"


class Recorder:
    """Record a training run into a labelled store; the user's loop stays as it is.

    As a context manager it creates the store from its plan, records step 0, and
    then records after those optimizer steps that the schedules name. Training is
    bit-identical with and without it.

    Parameters
    ----------
    path
        Folder of the store (created, or joined if its plan is equal), or a zarr store.
    model
        The model in training.
    optimizer
        Its optimizer; a post-step hook counts the updates. Without one, call
        :meth:`step` after each update.
    objective
        Fixed data and loss of which metrics, Hessian and G-matrix are taken.
    probes
        What to record.
    schedule
        When to record; a probe may have a schedule of its own.
    seed
        Seed of this run.
    seeds
        All seeds of the store, for which room is planned; by default this one.
    config
        Hyperparameters as JSON values; part of the plan, so runs with another
        config do not mix in one store.
    resume
        Go on with a seed that has records, from a checkpoint.
    start_step
        Number of optimizer steps that the model has behind it, 0 by default. With
        ``resume=True`` it must be given: the records after it are withdrawn.
    progress
        Show a progress bar over the records; by default if stderr is a terminal.

    Raises
    ------
    PlanMismatchError
        On entry, if the store exists with another plan; the differences are listed.
    RecordsExistError
        On entry, if the seed has records and ``resume`` is False.
    WriterBusyError
        On entry, if a live process records the same seed.
    ValueError, KeyError
        On entry, for settings that do not fit the model: unknown layer, k too
        large, an objective that is missing, of another length or on another device.

    Warns
    -----
    NonFiniteRecordWarning
        Once, when the curvature is not finite. Its records are NaN from there
        on, training goes on.

    Examples
    --------
    >>> import tempfile, torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
    >>> with rec.Recorder(
    ...     tempfile.mkdtemp() + "/run.zarr", model, sgd,
    ...     objective=rec.Objective(torch.nn.functional.mse_loss, x, y),
    ...     probes=[rec.Metrics(), rec.Weights(), rec.Hessian(k=1)],
    ...     schedule=rec.every(5, total_steps=10),
    ... ) as recorder:
    ...     for _ in range(10):
    ...         sgd.zero_grad()
    ...         torch.nn.functional.mse_loss(model(x), y).backward()
    ...         loss = sgd.step()
    >>> recorder.current_step
    10
    """

    def __init__(
        self,
        path: StoreLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        objective: Objective | None = None,
        probes: Sequence[Probe],
        schedule: Schedule,
        seed: int = 0,
        seeds: Iterable[int] | None = None,
        config: Mapping[str, JsonValue] | None = None,
        resume: bool = False,
        start_step: int | None = None,
        progress: bool | None = None,
    ) -> None:
        if resume and start_step is None:
            raise ValueError(
                "resume=True needs start_step=<steps behind the checkpoint>; the records after it are "
                "withdrawn"
            )
        if start_step is not None and start_step < 0:
            raise ValueError(f"start_step counts optimizer steps from 0; got {start_step}")
        if int(seed) != seed:
            raise ValueError(f"seed must be a whole number; got {seed!r}")
        self._path, self._optimizer, self._objective = path, optimizer, objective
        # The module inside torch.compile and data-parallel wrappers: names as the user wrote them.
        self._model = unwrapped(model)
        self._probes = list(probes)
        self._schedule = schedule
        self._seed = int(seed)
        self._seeds = (self._seed,) if seeds is None else tuple(int(s) for s in seeds)
        self._config = dict(config or {})
        self._resume, self._start_step = resume, start_step or 0
        self._show_progress = sys.stderr.isatty() if progress is None else progress
        self._warned = self._entered = False
        self._writer: RunWriter | None = None
        self._hook: Any = None
        self._bar: tqdm[NoReturn] | None = None
        self.current_step = self._start_step

    def plan(self) -> RunPlan:
        """Plan the store: every probe looks at the model and the objective once."""
        groups = [probe.group for probe in self._probes]
        if len(set(groups)) != len(groups):
            raise ValueError(f"two probes write the same group; give one of them group=...: {groups}")
        self._check_objective()
        self._nodes = {p.group: p.plan(self._model, self._optimizer, self._objective) for p in self._probes}
        probes = {
            probe.group: ProbePlan(
                steps=self._steps(probe).steps,
                nodes=self._nodes[probe.group],
                attrs={"probe": type(probe).__name__, **probe.attrs(self._objective)},
            )
            for probe in self._probes
        }
        return RunPlan(seeds=self._seeds, probes=probes, config=self._config)

    def estimate(self) -> Estimate:
        """Estimate the size of the run without writing anything."""
        plan = self.plan()
        return Estimate(sum(len(probe.steps) for probe in plan.probes.values()), plan.nbytes)

    def __enter__(self) -> Recorder:
        if self._entered:
            raise RuntimeError("a recorder records one stretch of training: make a new Recorder for the next")
        self._entered = True
        plan = self.plan()
        device = next((str(p.device) for p in self._model.parameters()), "cpu")
        self._writer = RunWriter(
            self._path,
            plan,
            self._seed,
            resume_at=self._start_step if self._resume else None,
            root_attrs={"provenance": provenance(device=device)},
        )
        try:
            self._start(plan)
        except BaseException:
            self._detach()
            self._writer.abandon()
            self._writer = None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        writer, self._writer = self._live_writer(), None
        # Also when training failed: what is complete is kept.
        writer.close()

    def step(self) -> None:
        """Count one optimizer step and record if it is scheduled.

        Called by the optimizer's hook; call it yourself where there is no optimizer.
        """
        self.current_step += 1
        self._record_scheduled()

    def flush(self) -> None:
        """Commit everything recorded so far; call it with each checkpoint that you may resume from."""
        self._live_writer().flush()

    def _start(self, plan: RunPlan) -> None:
        writer = self._live_writer()
        total = sum(len(probe.steps) for probe in plan.probes.values())
        logger.info(
            "recording seed %d into %s: %d records, %.1f MB for all seeds",
            self._seed,
            writer.location,
            total,
            plan.nbytes / 1e6,
        )
        done = sum(sum(step < self.current_step for step in probe.steps) for probe in plan.probes.values())
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=f"seed {self._seed}",
            unit="record",
            disable=not self._show_progress,
        )
        self._record_scheduled()
        if self._optimizer is not None:
            self._hook = self._optimizer.register_step_post_hook(lambda *_: self.step())

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._bar is not None:
            self._bar.close()

    def _live_writer(self) -> RunWriter:
        if self._writer is None:
            raise RuntimeError(
                "the recorder records inside its with block: with Recorder(...) as recorder: ..."
            )
        return self._writer

    def _steps(self, probe: Probe) -> Schedule:
        return self._schedule if probe.schedule is None else probe.schedule

    def _record_scheduled(self) -> None:
        step, writer = self.current_step, self._live_writer()
        due = [p for p in self._probes if step in self._steps(p) and not writer.holds(p.group, step)]
        if not due:
            return
        with Snapshot(self._model, self._optimizer, self._objective, step) as snapshot:
            for probe in due:
                writer.write(probe.group, step, self._measure(probe, snapshot))
                if self._bar is not None:
                    self._bar.update()

    def _measure(self, probe: Probe, snapshot: Snapshot) -> Record:
        try:
            return probe.record(snapshot)
        except NonFiniteCurvatureError as error:
            self._warn_once(snapshot.step, probe.group, error)
            return _missing(self._nodes[probe.group])

    def _warn_once(self, step: int, group: str, error: NonFiniteCurvatureError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"step {step}: {error}. The record of {group!r} is marked NaN, and so are later ones like "
                "it; training goes on and earlier records are untouched.",
                NonFiniteRecordWarning,
                stacklevel=2,
            )

    def _check_objective(self) -> None:
        asking = [probe.group for probe in self._probes if probe.needs_objective]
        if self._objective is None:
            if asking:
                raise ValueError(
                    f"probes {asking} need an objective: "
                    "Recorder(..., objective=Objective(loss, inputs, targets))"
                )
            return
        self._objective.check(self._model)


def _missing(nodes: Mapping[str, NodePlan]) -> NodeValues:
    """Make a record in which nothing is defined: NaN, -1 and False throughout."""
    return {
        node: {name: array.missing() for name, array in contents.arrays.items()}
        for node, contents in nodes.items()
    }
