"""The recorder: the one place where training, schedule, probes and store meet."""

from __future__ import annotations

import atexit
import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from pydantic import JsonValue
from torch import nn
from tqdm import tqdm

from hild_xr.plan import NodePlan, ProbePlan, RunPlan
from hild_xr.provenance import provenance
from hild_xr.recorders.async_writer import AsyncWriter
from hild_xr.recorders.curvature import NonFiniteCurvatureError
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.host_copy import HostCopier, HostCopy
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.schedule import Schedule
from hild_xr.recorders.wrappers import check_whole, unwrapped_optimizer
from hild_xr.store import RunWriter, StoreError, StoreLike, check_space, open_run

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from numpy.typing import NDArray

logger = logging.getLogger("hild_xr")

QUEUE_BYTES = 256_000_000
"""Default bound on the records that are copied and not yet written."""

FLUSH_SECONDS = 30.0
"""Records that wait this long for their block to fill are committed as they are."""


class NonFiniteRecordWarning(UserWarning):
    """Training reached NaN or infinity; the records that need finite numbers are marked missing."""


@dataclass(frozen=True)
class Estimate:
    """What recording a run will take.

    Parameters
    ----------
    records
        Records of this seed, all probes together.
    nbytes
        Bytes of all seeds, before metadata.
    seconds
        Time that measuring takes for this seed, from one measurement of each
        probe; early records can take longer than later ones. None if not every
        probe was measured.
    """

    records: int
    nbytes: int
    seconds: float | None

    def __str__(self) -> str:
        measuring = "" if self.seconds is None else f", about {_duration(self.seconds)} to measure them"
        return f"{self.records} records for this seed{measuring}, {self.nbytes / 1e6:.1f} MB for all seeds"


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
        Its optimizer; a post-step hook counts the updates. Of several, given in
        the order in which they step, the last one's updates count. Without one,
        call :meth:`step` after each update.
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
    queue_bytes
        Bound on the memory of records that are copied and wait for the disk. When
        it is reached training waits, and the log says so once. A record that is
        larger waits until it is alone. Beside it every array has the block that is
        being filled: about 1 MB, or one record where that is larger.
    check_space
        Refuse to start where the planned records do not fit the disk.
    durable
        Sync files and folders to the disk before records count as committed, so
        that they outlive a power failure and not only the process.

    Raises
    ------
    PlanMismatchError
        On entry, if the store exists with another plan; the differences are listed.
    RecordsExistError
        On entry, if the seed has records and ``resume`` is False.
    WriterBusyError
        On entry, if a live process records the same seed.
    NotEnoughSpaceError
        On entry, if the disk has less room than the records will need.
    StoreWriteError
        At the next step and when the block ends, if a record could not be written.
    ValueError, KeyError
        On entry, for settings that do not fit the model: unknown layer, k too
        large, an objective that is missing, of another length or on another device.
    TypeError
        On entry, if the objective is none.

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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
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
        queue_bytes: int = QUEUE_BYTES,
        check_space: bool = True,
        durable: bool = False,
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
        self._path, self._objective = path, objective
        self._optimizers = _as_tuple(optimizer)
        # The module inside torch.compile and data-parallel wrappers: names as the user wrote them.
        self._model = unwrapped(model)
        if queue_bytes < 1:
            raise ValueError(f"queue_bytes bounds the memory of waiting records; got {queue_bytes}")
        # copies: a probe remembers what it planned, and may be given to several recorders
        self._given_probes = tuple(probes)
        self._probes: list[Probe] = []
        self._schedule = schedule
        self._seed = int(seed)
        self._seeds = (self._seed,) if seeds is None else tuple(int(s) for s in seeds)
        self._config = dict(config or {})
        self._resume, self._start_step = resume, start_step or 0
        self._show_progress = sys.stderr.isatty() if progress is None else progress
        self._queue_bytes, self._check_space, self._durable = queue_bytes, check_space, durable
        self._warned = self._started = False
        self._copier = HostCopier()
        self._pid = os.getpid()
        self._writer: AsyncWriter | None = None
        self._hook: Any = None
        self._bar: tqdm[NoReturn] | None = None
        self.current_step = self._start_step

    def plan(self) -> RunPlan:
        """Plan the store: every probe looks at the model and the objective once."""
        check_whole(self._model)
        self._probes = [copy.copy(probe) for probe in self._given_probes]
        self._warned = False
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
        """Measure every probe once, write nothing, and estimate size and time of the run.

        Training is left as it is, as by every record.
        """
        plan = self.plan()
        measured = self._measured(self._probes)
        return _estimate(plan, {probe.group: seconds for probe, _, seconds in measured})

    def start(self) -> Recorder:
        """Create or join the store and record the present state if it is scheduled; ``with`` calls it."""
        if self._started:
            raise RuntimeError("a recorder records one stretch of training: make a new Recorder for the next")
        self._started, self._pid = True, os.getpid()
        plan = self.plan()
        if self._check_space:
            check_space(self._path, plan)
        device = next((str(p.device) for p in self._model.parameters()), "cpu")
        writer = RunWriter(
            self._path,
            plan,
            self._seed,
            resume_at=self._start_step if self._resume else None,
            flush_seconds=FLUSH_SECONDS,
            root_attrs={"provenance": provenance(device=device)},
            durable=self._durable,
        )
        try:
            self._writer = AsyncWriter(writer, self._queue_bytes, FLUSH_SECONDS)
            self._begin(plan)
        except BaseException:
            self.abandon()
            writer.abandon()
            raise
        return self

    def close(self) -> None:
        """Commit everything recorded and end; ``with`` calls it, a second call does nothing.

        Raises
        ------
        StoreWriteError
            If a record could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        self._detach()
        if not self._is_forked():
            try:
                writer.close()
            finally:
                self._copier.clear()  # only now: what was written last has given its memory back too

    def abandon(self) -> None:
        """End without committing what waits for its block; committed records stay."""
        writer, self._writer = self._writer, None
        self._detach()
        if writer is not None and not self._is_forked():
            writer.abandon()
            self._copier.clear()

    def __enter__(self) -> Recorder:
        return self if self._writer is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also when training failed: what is complete is kept.
        try:
            self.close()
        except StoreError as failed:
            if failed is not error:
                raise

    def step(self) -> None:
        """Count one optimizer step and record if it is scheduled.

        Called by the optimizer's hook; call it yourself where there is no optimizer.

        Raises
        ------
        StoreWriteError
            If an earlier record could not be written; what was committed is safe.
        """
        self._live_writer()
        self.current_step += 1
        self._record_scheduled()

    def flush(self) -> None:
        """Commit everything recorded so far; call it with each checkpoint that you may resume from."""
        writer = self._live_writer()
        if not self._is_forked():
            writer.flush()

    def _begin(self, plan: RunPlan) -> None:
        total = sum(len(probe.steps) for probe in plan.probes.values())
        done = sum(sum(step < self.current_step for step in probe.steps) for probe in plan.probes.values())
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=f"seed {self._seed}",
            unit="record",
            disable=not self._show_progress,
        )
        if self._resume:
            self._resume_probes()
        writer = self._live_writer()
        # a resume begins at a step that may be recorded already
        due = [probe for probe in self._due() if not writer.holds(probe.group, self.current_step)]
        first = list(self._measured(due))
        self._announce(plan, {probe.group: seconds for probe, _, seconds in first})
        for probe, copied, _ in first:
            self._put(probe, copied)
        self._attach()
        atexit.register(self.close)

    def _resume_probes(self) -> None:
        """Give the probes what the last records before the checkpoint hold."""
        writer, run = self._live_writer(), open_run(self._path)
        for probe in self._probes:
            steps = [s for s in self._steps(probe).steps if s <= self.current_step]
            steps = [s for s in steps if writer.holds(probe.group, s)]
            if steps:
                probe.resume(len(steps), partial(self._stored, run, probe.group, steps[-1]))

    def _stored(
        self, run: xr.DataTree, group: str, step: int, node: str, array: str
    ) -> NDArray[np.generic] | None:
        """Read one array of one record of this seed; None if it was not recorded."""
        try:
            records = run[f"{group}/{node}" if node else group].to_dataset()[array]
            record = records.sel(seed=self._seed, step=step)
        except KeyError:
            return None
        # in this thread: a forked child has none of dask's
        values: NDArray[np.generic] = record.compute(scheduler="synchronous").to_numpy()
        return values.copy()

    def _attach(self) -> None:
        if self._optimizers:
            self._hook = self._optimizers[-1].register_step_post_hook(lambda *_: self.step())

    def _is_forked(self) -> bool:
        """Whether this is a forked child: it has neither the thread nor the right to write."""
        return os.getpid() != self._pid

    def _detach(self) -> None:
        atexit.unregister(self.close)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._bar is not None and not self._is_forked():
            self._bar.close()

    def _live_writer(self) -> AsyncWriter:
        if self._writer is None:
            raise RuntimeError(
                "the recorder records inside its with block: with Recorder(...) as recorder: ..."
            )
        return self._writer

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        """The one whose learning rate is recorded."""
        return self._optimizers[0] if self._optimizers else None

    def _steps(self, probe: Probe) -> Schedule:
        return self._schedule if probe.schedule is None else probe.schedule

    def _record_scheduled(self) -> None:
        if self._is_forked():
            return
        self._live_writer().check()
        for probe, copied, _ in self._measured(self._due()):
            self._put(probe, copied)

    def is_scheduled(self, step: int) -> bool:
        """Whether any probe records after this number of optimizer steps."""
        return any(step in self._steps(probe) for probe in self._probes)

    def _due(self) -> list[Probe]:
        return [probe for probe in self._probes if self.current_step in self._steps(probe)]

    def _measured(self, probes: Sequence[Probe]) -> Iterator[tuple[Probe, HostCopy, float]]:
        """Measure the present state and copy what was found; with the seconds that took."""
        if not probes:
            return
        with Snapshot(self._model, self._optimizer, self._objective, self.current_step) as snapshot:
            for probe in probes:
                started = time.perf_counter()
                copied = self._copier.take(self._measure(probe, snapshot))
                yield probe, copied, time.perf_counter() - started

    def _put(self, probe: Probe, copied: HostCopy) -> None:
        self._live_writer().put(probe.group, self.current_step, copied)
        if self._bar is not None:
            self._bar.update()

    def _measure(self, probe: Probe, snapshot: Snapshot) -> NodeValues:
        try:
            return probe.record(snapshot)
        except NonFiniteCurvatureError as error:
            self._warn_once(snapshot.step, probe.group, error)
            return _missing(self._nodes[probe.group])

    def _announce(self, plan: RunPlan, seconds: Mapping[str, float]) -> None:
        """Say before the first record what is to come, as far as it is measured by now."""
        text = f"recording seed {self._seed} into {self._live_writer().location}: {_estimate(plan, seconds)}"
        logger.info(text)
        if self._show_progress:
            tqdm.write(text, file=sys.stderr)

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
        if not isinstance(self._objective, Objective):
            raise TypeError(
                "objective must be an Objective(loss, inputs, targets); got an object of type "
                f"{type(self._objective).__name__}"
            )
        self._objective.check(self._model)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 10 else f"{seconds:.2g} s"


def _estimate(plan: RunPlan, seconds: Mapping[str, float]) -> Estimate:
    records = {name: len(probe.steps) for name, probe in plan.probes.items()}
    known = seconds.keys() >= records.keys()
    spent = sum(seconds[name] * records[name] for name in records) if known else None
    return Estimate(sum(records.values()), plan.nbytes, spent)


def _as_tuple(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    return tuple(map(unwrapped_optimizer, given))


def _missing(nodes: Mapping[str, NodePlan]) -> NodeValues:
    """Make a record in which nothing is defined: NaN, -1 and False throughout."""
    return {
        node: {name: array.missing() for name, array in contents.arrays.items()}
        for node, contents in nodes.items()
    }
