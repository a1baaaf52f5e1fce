"""Processes really killed with SIGKILL: while they create, record, flush and resume.

There are two kinds of moments. **At random**, from outside. And **one by one**: a process kills itself
before its n-th operation on a file of the run (Python's audit events tell of each), so that no window
between two operations is left to chance, whatever code makes them. A kill in the middle of a write is
such a moment too: the file that was opened last is first cut to half.

The numbers of a record follow from its place and from the state of training, another one in every
process, so a reader can tell who wrote each of them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from numpy.typing import NDArray

from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter, StoreLike, create, open_run, validate
from hild_xr.testing import random_record, spectrum_plan

STEPS = tuple(range(48))
NOTHING_TOLD = -2
WAIT_SECONDS = 60

KILLS_BESIDE, KILLS_IN_CREATION, KILLS_IN_REPOSITORY = 12, 15, 12
"""Beside the more than two hundred of the layouts."""

FORK = multiprocessing.get_context("fork")
FORKSERVER = multiprocessing.get_context("forkserver")
DOOMED = "doomed"
"""Name under which this file runs in a process of the fork server."""


# --- when to die


@dataclass(frozen=True)
class Moment:
    """Before an operation, counted from 1, or the first in a window; or seconds after the start or a word."""

    operation: int = 0
    window: str = ""
    torn: bool = False
    seconds: float = 0.0
    after_told: bool = False


NEVER = Moment(seconds=math.inf)


@dataclass(frozen=True)
class Witness:
    """Shared memory that outlives the process; without locks, for the dead do not give them back."""

    told: Any = field(default_factory=lambda: RawValue(ctypes.c_long, NOTHING_TOLD))
    """The last step that the process knows to be committed."""
    operations: Any = field(default_factory=lambda: RawValue(ctypes.c_long, 0))
    last_words: Any = field(default_factory=lambda: RawArray(ctypes.c_char, 100))
    """The window that it died in."""


class Death:
    """Audit hook that kills its process at a moment; it is called before each operation is made.

    What is no operation on a file below ``folder`` does not count.
    """

    def __init__(self, folder: Path, moment: Moment, witness: Witness) -> None:
        self._folder, self._moment, self._witness = f"{folder}/", moment, witness
        self._being_written: str | None = None
        self._before = "nothing"
        self.flushes = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = _changed_path(event, arguments)
        if path is None or not path.startswith(self._folder):
            return
        kind = self._kind(path)
        self._witness.operations.value += 1
        window = self._window(event.removeprefix("os."), kind)
        if self._witness.operations.value == self._moment.operation or window == self._moment.window:
            self._die(window)
        self._being_written = path if event == "open" else None
        self._before = kind if self.flushes else f"resumed {kind}"

    def _window(self, event: str, kind: str) -> str:
        if self._moment.torn and self._being_written is not None:
            event, kind = "tear", self._kind(self._being_written)
        return f"{'flush' if self.flushes else 'start'}: {self._before}, {event} {kind}"

    def _die(self, window: str) -> None:
        torn, self._being_written = self._being_written, None
        if self._moment.torn and torn is not None:
            os.truncate(torn, Path(torn).stat().st_size // 2)
        self._witness.last_words.value = window.encode()
        os.kill(os.getpid(), signal.SIGKILL)

    def _kind(self, path: str) -> str:
        path = path.removeprefix(self._folder)
        parts = {".creating": "scratch", ".writers": "lease", "/committed/c/": "marker", "/c/": "chunk"}
        return next((kind for part, kind in parts.items() if part in path), "store")


def _changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Path that an audit event is about to create, replace or remove."""
    if event == "open":
        path, _, flags = arguments
        # a file that is opened without this flag is read, locked or synced
        return os.fspath(path) if isinstance(path, str) and flags & os.O_CREAT else None
    if event in ("os.rename", "os.link"):
        return str(arguments[1])
    if event == "os.mkdir" and Path(arguments[0]).is_dir():
        return None
    return str(arguments[0]) if event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate") else None


# --- who dies


@dataclass(frozen=True)
class Task:
    """What a process records: from after one step to another, in a state of training."""

    path: Path
    plan: RunPlan
    seed: int = 0
    resume_at: int | None = None
    until: int = STEPS[-1]
    state: int = 1
    durable: bool = False
    in_repository: bool = False
    pause: float = 0.0

    def target(self) -> StoreLike:
        """Return what to record into; an Icechunk repository is opened anew by each who asks."""
        if not self.in_repository:
            return self.path
        import icechunk

        return icechunk.Repository.open_or_create(icechunk.local_filesystem_storage(str(self.path)))


def _record(task: Task, moment: Moment, witness: Witness) -> None:
    """Record with flushes at random and tell what is committed; then end, or wait for the death to come."""
    draw, death = random.Random(task.state), _await_death(task, moment, witness)
    with RunWriter(
        task.target(), task.plan, task.seed, resume_at=task.resume_at, durable=task.durable
    ) as writer:
        death.flushes = True
        begin = -1 if task.resume_at is None else task.resume_at
        for step in task.plan.probes["metrics"].steps:
            if not begin < step <= task.until:
                continue
            for probe in task.plan.probes:
                record = random_record(task.plan, probe, seed=task.seed, step=step, attempt=task.state)
                writer.write(probe, step, record)
            if draw.random() < 0.4 or step == task.until:
                writer.flush()
                witness.told.value = step
            time.sleep(task.pause)
        if moment != NEVER:
            time.sleep(WAIT_SECONDS)


def _create(task: Task, moment: Moment, witness: Witness) -> None:
    _await_death(task, moment, witness)
    create(task.target(), task.plan)
    witness.told.value = -1
    if moment != NEVER:
        time.sleep(WAIT_SECONDS)


def _await_death(task: Task, moment: Moment, witness: Witness) -> Death:
    death = Death(task.path.parent, moment, witness)
    sys.addaudithook(death)
    return death


Work = Callable[[Task, Moment, Witness], None]


def _start(task: Task, moment: Moment, witness: Witness, work: Work = _record) -> BaseProcess:
    process: BaseProcess
    if task.in_repository:
        # The threads of Icechunk do not outlive a fork, so the process is forked from one that never used it.
        # What it gets are plain values, for it cannot import this file by a name.
        arguments = {"arguments": (vars(task), vars(moment), vars(witness))}
        process = FORKSERVER.Process(target=runpy.run_path, args=(__file__, arguments, DOOMED))
    else:
        process = FORK.Process(target=work, args=(task, moment, witness))
    process.start()
    return process


def _run(task: Task, work: Work = _record) -> Witness:
    """Let a process work to its end."""
    witness = Witness()
    process = _start(task, NEVER, witness, work)
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    return witness


def _run_until_killed(task: Task, moment: Moment, work: Work = _record) -> Witness:
    witness = Witness()
    process = _start(task, moment, witness, work)
    if moment.operation or moment.window:
        process.join(WAIT_SECONDS / 2)
        assert process.exitcode is not None, f"lives after {witness.operations.value} operations: {moment}"
    else:
        while moment.after_told and witness.told.value == NOTHING_TOLD and process.is_alive():
            time.sleep(0.001)
        time.sleep(moment.seconds)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    return witness


# --- who looks afterwards


class Ledger:
    """What is known to be committed of one seed of a store, and by which state of training."""

    def __init__(self, task: Task) -> None:
        self._task, self._plan, self._seed = task, task.plan, task.seed
        self._attempts = {probe: np.zeros(0, dtype=np.uint16) for probe in task.plan.probes}
        self._states = {probe: np.zeros(0, dtype=int) for probe in task.plan.probes}
        self._last_attempt = 0
        self._records: dict[tuple[str, int, int], Any] = {}

    def reached(self) -> int:
        """Return the last step that all probes have, -1 if there is none."""
        probes = self._plan.probes.items()
        return min(max([-1, *contents.steps[: len(self._attempts[probe])]]) for probe, contents in probes)

    def audit(self, state: int, resumed_at: int, told: int) -> None:
        """Open the store after the end of the process that trained in this state; compare every number.

        A record is either one that was there before, with the same marker and the
        same numbers, or one of that process, whole.
        """
        with dask.config.set(scheduler="synchronous"):
            run = open_run(self._task.target()).compute()
        row, last_attempt = self._plan.seeds.index(self._seed), self._last_attempt
        for probe in self._plan.probes:
            marked = run[probe]["committed"].values[row]
            now = marked[: np.count_nonzero(marked)]
            assert (now > 0).all(), "a step between two committed ones is missing"
            steps = np.array(self._plan.probes[probe].steps[: len(now)])
            assert max([-1, *steps]) >= max(told, resumed_at), "a committed record is lost"
            new = self._new(probe, now)
            assert not new[steps <= resumed_at].any(), "a record from before the resume is another one"
            assert new[(steps > resumed_at) & (steps <= told)].all(), "a record is not the one committed last"
            assert len(set(new[steps > resumed_at])) <= 1, "records of two attempts after the resume"
            assert len(set(now[new])) <= 1, "two attempts of one process"
            if not self._task.in_repository:  # whose readers see one snapshot
                assert (now[new] > last_attempt).all(), "the number of an attempt came back"
            self._last_attempt = max([self._last_attempt, *now[new]])
            states = np.full(len(now), state)
            states[~new] = self._states[probe][: len(now)][~new[: len(self._states[probe])]]
            self._compare(run, probe, row, states)
            self._attempts[probe], self._states[probe] = now, states

    def _new(self, probe: str, now: NDArray[Any]) -> NDArray[np.bool_]:
        """Which records have another marker than before."""
        before = self._attempts[probe][: len(now)]
        new = np.ones(len(now), dtype=bool)
        new[: len(before)] = now[: len(before)] != before
        return new

    def _compare(self, run: Any, probe: str, row: int, states: NDArray[Any]) -> None:
        steps = self._plan.probes[probe].steps[: len(states)]
        records = [self._record(probe, step, int(state)) for step, state in zip(steps, states, strict=True)]
        for node, name, _ in self._plan.probes[probe].arrays() if records else ():
            stored = run["/".join(part for part in (probe, node, name) if part)].values[row, : len(records)]
            np.testing.assert_array_equal(stored, np.stack([record[node][name] for record in records]))

    def _record(self, probe: str, step: int, state: int) -> Any:
        key = (probe, step, state)
        if key not in self._records:
            record = random_record(self._plan, probe, seed=self._seed, step=step, attempt=state)
            self._records[key] = record
        return self._records[key]


class Campaign:
    """One seed of a store, written by one process after the other, each in another state of training."""

    def __init__(self, task: Task) -> None:
        self._task, self._ledger = task, Ledger(task)
        self._draw, self._state = random.Random(0), 0

    def record(self, steps: int) -> Witness:
        """Record so many steps and end well."""
        reached = self._ledger.reached()
        task = self._next(reached if self._state else None, until=max(0, reached) + steps)
        witness = _run(task)
        self._ledger.audit(task.state, reached, witness.told.value)
        return witness

    def kill(self, moment: Moment) -> str:
        """Resume at an earlier step, die, and look; return the window."""
        # who aims at a window needs records to withdraw, and no rubbish that is cleared away first
        if self._ledger.reached() < 12 or moment.window:
            self.record(12)
        reached = self._ledger.reached()
        latest = reached - bool(moment.window)
        resume_at = self._draw.randint(reached // 2, min(latest, STEPS[-1] - 20))
        task = self._next(resume_at)
        witness = _run_until_killed(task, moment)
        self._ledger.audit(task.state, resume_at, witness.told.value)
        window: bytes = witness.last_words.value
        return window.decode()

    def _next(self, resume_at: int | None, until: int = STEPS[-1]) -> Task:
        self._state += 1
        return replace(self._task, resume_at=resume_at, until=until, state=self._state)


# --- killed while they record, flush and resume


def _layers_plan(layers: int, steps: tuple[int, ...] = STEPS) -> RunPlan:
    loss = NodePlan(arrays={"train_loss": ArrayPlan(variable="train_loss", dtype="float64")})
    weight = NodePlan(arrays={"weight": ArrayPlan(variable="weight", dims=("out", "in"), shape=(2, 3))})
    weights = {f"layers.{i}.weight": weight for i in range(layers)}
    probes = {
        "metrics": ProbePlan(steps=steps, nodes={"": loss}),
        "weights": ProbePlan(steps=steps, nodes=weights),
    }
    return RunPlan(seeds=(0,), probes=probes)


WINDOWS = (
    "start: resumed lease, open marker",  # nothing is withdrawn yet
    "start: resumed marker, tear marker",
    "start: resumed marker, open marker",  # one probe is withdrawn, the next is not
    "flush: resumed marker, open chunk",  # all are withdrawn, nothing is rewritten
    "flush: chunk, tear chunk",
    "flush: chunk, rename chunk",
    "flush: chunk, open chunk",
    "flush: chunk, open marker",  # all chunks, no marker
    "flush: marker, tear marker",
    "flush: marker, rename marker",
    "flush: marker, open chunk",  # one probe is committed, the next is not
)
"""What is about to happen, after what."""


@dataclass(frozen=True)
class Layout:
    """A plan, the limits that shape its chunks, and how often its writer is killed."""

    plan: Callable[[], RunPlan]
    swept: int
    at_random: int
    every_operation: bool = False
    durable: bool = False
    block_bytes: int = 1_000_000
    chunk_bytes: int = 8_000_000

    @property
    def kills(self) -> int:
        return 2 * self.swept + self.at_random + len(self.windows)

    @property
    def windows(self) -> tuple[str, ...]:
        return WINDOWS if self.every_operation else ()

    def moments(self, operations: int, draw: random.Random) -> Iterator[Moment]:
        """Sweep over the first operations, with and without a torn file; kills at random and in windows."""
        swept = [
            Moment(operation=1 + i * operations // self.swept, torn=torn)
            for i, torn in itertools.product(range(self.swept), (False, True))
        ]
        at_random = [
            Moment(seconds=draw.uniform(0.0, 0.08), after_told=i % 2 == 0) for i in range(self.at_random)
        ]
        in_windows = [Moment(window=window, torn="tear" in window) for window in self.windows]
        yield from draw.sample(swept + at_random + in_windows, self.kills)


LAYOUTS = {
    "small records in blocks": Layout(
        lambda: spectrum_plan(steps=STEPS, seeds=(0,)), swept=50, at_random=14, every_operation=True
    ),
    "records split over chunks": Layout(
        lambda: spectrum_plan(steps=STEPS, seeds=(0,), rows=2, columns=600),
        swept=18,
        at_random=10,
        block_bytes=20_000,
        chunk_bytes=2_000,
    ),
    "sixty layers": Layout(lambda: _layers_plan(60), swept=14, at_random=10),
    "durable": Layout(lambda: spectrum_plan(steps=STEPS, seeds=(0,)), swept=14, at_random=6, durable=True),
}


def test_layouts__are_killed_two_hundred_times_in_all() -> None:
    assert sum(layout.kills for layout in LAYOUTS.values()) >= 200


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    chosen = LAYOUTS[request.param]
    monkeypatch.setattr("hild_xr.plan.MAX_BLOCK_STEPS", 4)
    monkeypatch.setattr("hild_xr.plan.BLOCK_BYTES", chosen.block_bytes)
    monkeypatch.setattr("hild_xr.store.layout.MAX_CHUNK_BYTES", chosen.chunk_bytes)
    return chosen


def test_kill__loses_no_committed_record_and_shows_none_that_is_torn_or_of_two_attempts(
    layout: Layout, tmp_path: Path
) -> None:
    campaign = Campaign(Task(tmp_path / "run.zarr", layout.plan(), durable=layout.durable))
    campaign.record(12)
    operations = layout.swept if layout.every_operation else campaign.record(4).operations.value
    windows: Counter[str] = Counter()
    half_written = 0
    for i, moment in enumerate(layout.moments(operations, random.Random(1))):
        windows[campaign.kill(moment)] += 1
        half_written += any(True for _ in tmp_path.rglob("*.partial"))
        if i % 8 == 0:
            report = validate(tmp_path / "run.zarr", progress=False)
            assert report.ok, report
    assert windows.total() == layout.kills
    assert sum(windows[window] for window in windows if window.startswith("flush")) >= layout.swept
    if layout.every_operation:
        assert windows.keys() >= set(WINDOWS)
    assert half_written, "no kill was in the middle of a write"
    campaign.record(12)
    assert not list(tmp_path.rglob("*.partial")), "a resumed writer leaves no half-written files behind"
    assert validate(tmp_path / "run.zarr", progress=False).ok


@pytest.mark.parametrize("durable", [False, True])
def test_kill_of_one_seed__leaves_the_other_alone(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hild_xr.plan.MAX_BLOCK_STEPS", 4)
    killed = Task(tmp_path / "run.zarr", spectrum_plan(steps=STEPS, seeds=(0, 1)), seed=1, durable=durable)
    steady, witness = replace(killed, seed=0, pause=0.05), Witness()
    process = _start(steady, NEVER, witness)
    campaign, draw = Campaign(killed), random.Random(2)
    for _ in range(KILLS_BESIDE):
        campaign.kill(Moment(seconds=draw.uniform(0.0, 0.08)))
        Ledger(steady).audit(steady.state, -1, witness.told.value)
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    Ledger(steady).audit(steady.state, -1, STEPS[-1])
    assert validate(tmp_path / "run.zarr", progress=False).ok


# --- killed while they create


def test_kill_during_creation__leaves_nothing_or_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(tmp_path / "run.zarr", _layers_plan(200, steps=(0,)), until=0)
    operations, draw = _run(task, _create).operations.value, random.Random(3)
    assert operations > 400, "every node has a file"
    moments = [
        *(Moment(operation=i) for i in (1, 2, operations)),
        *(Moment(operation=i, torn=True) for i in (operations - 1, operations)),
        *(Moment(operation=draw.randint(3, operations), torn=True) for _ in range(4)),
        *(Moment(seconds=draw.uniform(0.0, 0.2)) for _ in range(4)),
        *(Moment(after_told=True) for _ in range(2)),
    ]
    assert len(moments) == KILLS_IN_CREATION
    whole = 0
    for moment in moments:
        shutil.rmtree(task.path)
        _run_until_killed(task, moment, _create)
        if task.path.exists():
            whole += 1
            assert open_run(task.path)["weights"].sizes["step"] == 0
        else:
            with pytest.raises(FileNotFoundError):
                open_run(task.path)
        told = _run(task).told.value
        Ledger(task).audit(task.state, -1, told)
    assert 2 <= whole <= KILLS_IN_CREATION - 9
    assert validate(task.path, progress=False).ok
    leftovers = list(tmp_path.glob(".*.creating"))
    assert leftovers
    for leftover in leftovers:
        os.utime(leftover, (0, 0))
    create(task.path, task.plan)
    assert not list(tmp_path.glob(".*.creating")), "a later creator sweeps up after the dead"


# --- killed while they commit


def test_kill__of_a_writer_into_an_icechunk_repository(tmp_path: Path) -> None:
    """One commit a flush takes the place of the marker that is written last."""
    pytest.importorskip("icechunk")
    FORKSERVER.set_forkserver_preload(["icechunk", "hild_xr.store", "hild_xr.testing", "pytest"])
    plan = spectrum_plan(steps=STEPS, seeds=(0,))
    campaign, draw = Campaign(Task(tmp_path / "repository", plan, in_repository=True)), random.Random(4)
    for i in range(KILLS_IN_REPOSITORY):
        campaign.kill(Moment(seconds=draw.uniform(0.0, 0.25), after_told=i % 2 == 0))
    campaign.record(12)


if __name__ == DOOMED:
    doomed_task, its_moment, its_witness = globals()["arguments"]
    _record(Task(**doomed_task), Moment(**its_moment), Witness(**its_witness))
