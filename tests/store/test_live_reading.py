"""Readers beside writers: processes that write, are killed and resume, and every interleaving of one."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, WrapperStore

import hild_xr as hx
from hild_xr.plan import RunPlan
from hild_xr.store import RecordsWithdrawnWarning, RunWriter, lazy_array, open_run, reader
from hild_xr.testing import random_record, spectrum_plan

POLLS = 1_000  # of each of the two tests beside a living writer
COMPUTE: Any = dask.compute  # type: ignore[attr-defined]  # dask declares no types
MISSING = {"i": -1, "b": False}


@cache
def expected(
    plan: Callable[[], RunPlan], probe: str, seed: int, steps: tuple[int, ...], attempts: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Return the numbers of all steps of a seed by path of the array; no attempt is as the first."""
    records = [
        random_record(plan(), probe, seed=seed, step=step, attempt=attempt or 1)
        for step, attempt in zip(steps, attempts, strict=True)
    ]
    return {
        "/".join(part for part in (probe, node, name) if part): np.stack(
            [record[node][name] for record in records]
        )
        for node, name, _ in plan().probes[probe].arrays()
    }


def torn(run: xr.DataTree, plan: Callable[[], RunPlan], **options: str) -> tuple[int, int, int]:
    """Read a run and compare every number with the attempt it names: records that are whole, withdrawn, torn.

    A record counts once for each array. Withdrawn ones are missing throughout, torn ones are neither.
    """
    counts = np.zeros(3, dtype=int)
    for probe, group in run.children.items():
        attempts, steps = group["committed"].values, tuple(group["step"].values.tolist())
        for row, seed in enumerate(group["seed"].values.tolist() if steps else ()):
            there = attempts[row] > 0
            wanted = expected(plan, probe, seed, steps, tuple(attempts[row].tolist()))
            read = COMPUTE(*(run[path].variable.data[row] for path in wanted), **options)
            for found, written in zip(read, wanted.values(), strict=True):
                each = (len(steps), -1)
                missing = np.isnan(found) if found.dtype.kind == "f" else found == MISSING[found.dtype.kind]
                lacks = missing.reshape(each).all(axis=1)
                whole = there & (found == written).reshape(each).all(axis=1)
                counts += [whole.sum(), (there & lacks & ~whole).sum(), (~whole & ~lacks).sum()]
    whole, withdrawn, broken = counts.tolist()
    return whole, withdrawn, broken


def live_plan() -> RunPlan:
    return spectrum_plan(steps=tuple(range(12)), seeds=(0,))


def train(path: Path, seed: int, resume_at: int | None, attempt: int, committed: object) -> None:
    """Record to the end, a flush every few steps, then wait to be killed; records differ by attempt."""
    plan, draw = live_plan(), random.Random(attempt)
    with RunWriter(path, plan, seed, resume_at=resume_at) as writer:
        for step in plan.probes["metrics"].steps:
            if resume_at is not None and step <= resume_at:
                continue
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=seed, step=step, attempt=attempt))
            if draw.random() < 0.4:
                writer.flush()
                committed.value = step  # type: ignore[attr-defined]
            time.sleep(0.002)
        writer.flush()
        committed.value = step  # type: ignore[attr-defined]
        time.sleep(60)


class Trainer:
    """A process that trains one seed, killed again and again, each time going on at an earlier step."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed, self._draw = path, seed, random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._process: BaseProcess | None = None
        self.attempts = 0
        self._start(None)

    def _start(self, resume_at: int | None) -> None:
        self.attempts += 1
        self._committed = self._context.Value("l", -1, lock=False)
        self._until = time.monotonic() + self._draw.uniform(0.1, 0.5)
        arguments = (self._path, self._seed, resume_at, self.attempts, self._committed)
        self._process = self._context.Process(target=train, args=arguments)
        self._process.start()

    def interrupt(self) -> None:
        """Kill the process if its time has come, and resume with another state of training."""
        reached, last = self._committed.value, live_plan().probes["metrics"].steps[-1]
        if time.monotonic() > self._until and reached >= 0:
            self.stop()
            self._start(self._draw.randint(0, min(reached, last - 1)))  # so that every attempt records

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    monkeypatch.setattr("hild_xr.plan.MAX_BLOCK_STEPS", 8)  # two chunks an array
    started = Trainer(tmp_path / "run.zarr", seed=0)
    while not (tmp_path / "run.zarr").exists():
        time.sleep(0.001)
    yield started
    started.stop()


@pytest.mark.parametrize("polling", ["open", "refresh"])
def test_polls__beside_a_writer_that_is_killed_and_resumes_show_no_torn_record(
    trainer: Trainer, tmp_path: Path, polling: str
) -> None:
    path, counts, refreshed = tmp_path / "run.zarr", np.zeros(3, dtype=int), 0
    kept = hx.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordsWithdrawnWarning)
        for poll in range(POLLS):
            trainer.interrupt()
            if polling == "open":
                run = hx.open(path)
            elif poll % 4 == 0:  # so that trees also stay open across resumes
                run = kept.hild.refresh()
                refreshed += run is not kept
                kept = run
            scheduler = "threads" if poll % 20 < 4 else "synchronous"
            counts += torn(run, live_plan, scheduler=scheduler)
    whole, withdrawn, broken = counts.tolist()
    assert broken == 0
    # the test saw what it is about: many records, and resumes while a tree was open
    assert whole > 10 * POLLS
    assert withdrawn > 0
    assert trainer.attempts > POLLS / 100
    assert refreshed > POLLS / 20 or polling == "open"


class Interrupted(WrapperStore[MemoryStore]):
    """A store where something happens just before the n-th request."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.requests: list[str] = []
        self._at, self._happens = -1, lambda: None

    def before(self, request: int, happens: Callable[[], None]) -> None:
        self._at, self._happens = len(self.requests) + request, happens

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.requests.append(key)
        if len(self.requests) - 1 == self._at:
            # in a thread, since the writer talks to zarr's event loop, which is here
            await asyncio.to_thread(self._happens)
        return await super().get(key, prototype, byte_range)


def small_plan() -> RunPlan:
    """Blocks of 4 steps, so that one dask chunk reads several."""
    return spectrum_plan(steps=tuple(range(12)), seeds=(0,), columns=8000)


def write(store: MemoryStore, attempt: int, resume_at: int | None = None) -> None:
    plan = small_plan()
    with RunWriter(store, plan, 0, resume_at=resume_at) as writer:
        for step in range(0 if resume_at is None else resume_at + 1, 12):
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step, attempt=attempt))


def read_across_a_resume(request: int, resume_at: int) -> tuple[tuple[int, int, int], int]:
    """Open a run, and let training resume before a request of the reading; count the requests."""
    store = MemoryStore()
    write(store, attempt=1)
    watched = Interrupted(store)
    run = open_run(watched)
    watched.before(request, lambda: write(store, attempt=2, resume_at=resume_at))
    opening = len(watched.requests)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordsWithdrawnWarning)
        counts = torn(run, small_plan, scheduler="synchronous")
    return counts, len(watched.requests) - opening


@pytest.mark.parametrize("resume_at", [0, 5])
def test_reading__shows_one_attempt_whenever_training_resumes(resume_at: int) -> None:
    _, requests = read_across_a_resume(10_000, resume_at)
    assert requests == 6 + 9  # a marker for each array, and 9 chunks
    changed = set()
    for request in range(requests):
        whole, withdrawn, broken = read_across_a_resume(request, resume_at)[0]
        assert broken == 0, f"resumed before request {request} of {requests}"
        assert whole + withdrawn == 12 * 6
        changed.add(withdrawn)
    # resumed after the last marker was read nothing is withdrawn, before the first all arrays lack records
    assert {(11 - resume_at) * 6, (11 - resume_at)} <= changed


def test_reading__would_be_torn_without_the_marker_after_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    async def trusting(marker: lazy_array.Marker, rows: slice, columns: slice) -> np.ndarray:
        return marker.seen[rows, columns] > 0

    monkeypatch.setattr(lazy_array.Marker, "unchanged", trusting)
    assert any(read_across_a_resume(request, 5)[0][2] for request in range(15))


@pytest.mark.parametrize("resume_at", [0, 5])
def test_opening__is_whole_whenever_training_resumes(resume_at: int) -> None:
    def open_across_a_resume(request: int) -> tuple[xr.DataTree, int]:
        store = MemoryStore()
        write(store, attempt=1)
        watched = Interrupted(store)
        watched.before(request, lambda: write(store, attempt=2, resume_at=resume_at))
        run = open_run(watched)
        return run, len(watched.requests)

    requests = open_across_a_resume(10_000)[1]
    for request in range(requests):
        run, _ = open_across_a_resume(request)
        with warnings.catch_warnings():
            # a probe whose marker was read before the resume lists what is withdrawn now
            warnings.simplefilter("ignore", RecordsWithdrawnWarning)
            whole, _, broken = torn(run, small_plan)
        assert broken == 0, f"resumed before request {request} of {requests}"
        assert whole >= (resume_at + 1) * 6
        assert torn(run.hild.refresh(), small_plan) == (12 * 6, 0, 0)


def test_withdrawn_records__are_missing_with_one_warning_until_the_tree_is_refreshed() -> None:
    store = MemoryStore()
    write(store, attempt=1)
    run = open_run(store)
    write(store, attempt=2, resume_at=5)
    with pytest.warns(RecordsWithdrawnWarning) as caught:
        loaded = run.compute()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "seed 0" in message
    assert "from step 6 on" in message
    assert "run.hild.refresh()" in message
    assert np.isfinite(loaded["hessian/eigenvalues"].isel(step=slice(0, 6))).all()
    assert np.isnan(loaded["hessian/eigenvalues"].isel(step=slice(6, None))).all()
    assert (loaded["hessian/n_matvec"].isel(step=slice(6, None)) == -1).all()
    assert not loaded["hessian/converged"].isel(step=slice(6, None)).any()
    refreshed = run.hild.refresh()
    assert torn(refreshed, small_plan) == (12 * 6, 0, 0)
    assert (refreshed["metrics/committed"] == [[1] * 6 + [2] * 6]).all()


def test_withdrawn_records__raise_at_every_reading_where_warnings_are_errors() -> None:
    store = MemoryStore()
    write(store, attempt=1)
    run = open_run(store)
    write(store, attempt=2, resume_at=5)
    for _ in range(2):
        with pytest.raises(RecordsWithdrawnWarning):
            run["hessian/eigenvalues"].compute()


def test_records_committed_after_opening__appear_on_refresh_only() -> None:
    store, plan = MemoryStore(), small_plan()
    with RunWriter(store, plan, 0) as writer:
        for step in range(3):
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step))
        writer.flush()
        run = open_run(store)
        writer.write("metrics", 3, random_record(plan, "metrics", seed=0, step=3))
        writer.flush()
        assert run["metrics/train_loss"].compute().sizes["step"] == 3
        refreshed = run.hild.refresh()
    assert refreshed["metrics"].sizes["step"] == 4
    assert refreshed["hessian"].sizes["step"] == 3
    assert np.isfinite(refreshed["metrics/train_loss"]).all()


def test_refresh__reads_the_markers_only_and_nothing_new_is_the_same_tree() -> None:
    store = MemoryStore()
    write(store, attempt=1)
    watched = Interrupted(store)
    run = open_run(watched)
    opened = list(watched.requests)
    assert run.hild.refresh() is run
    assert opened[0] == "zarr.json"
    markers = [f"{probe}/committed/c/0/0" for probe in small_plan().probes]
    assert sorted(opened[1:]) == sorted(markers)
    assert sorted(watched.requests[len(opened) :]) == sorted(markers)


def test_refresh__of_a_node_is_the_node() -> None:
    store = MemoryStore()
    RunWriter(store, small_plan(), 0).close()
    layer = open_run(store)["hessian/fc.weight"]
    write(store, attempt=1, resume_at=-1)
    refreshed = layer.hild.refresh()
    assert refreshed.path == "/hessian/fc.weight"
    assert refreshed["eigenvectors"].sizes["step"] == 12


def test_refresh__works_on_copies_pickles_and_selections(tmp_path: Path) -> None:
    import pickle

    path, plan = tmp_path / "run.zarr", spectrum_plan()
    RunWriter(path, plan, 0).close()
    run = hx.open(path)
    kept = [run, run.copy(), run.copy(deep=True), pickle.loads(pickle.dumps(run)), run.isel(seed=[0])]
    with RunWriter(path, plan, 1) as writer:
        writer.write("metrics", 0, random_record(plan, "metrics", seed=1, step=0))
    expected = hx.open(path).compute()
    for tree in kept:
        xr.testing.assert_identical(tree.hild.refresh().compute(), expected)


def test_refresh__of_what_does_not_know_its_run_says_to_open_it_again() -> None:
    with pytest.raises(ValueError, match=r"does not know its run.*hx.open\(path\)"):
        xr.DataTree().hild.refresh()
    store = MemoryStore()
    RunWriter(store, small_plan(), 0).close()
    run = open_run(store)
    with pytest.raises(ValueError, match=r"hx.open\(path\)"):
        xr.DataTree.from_dict({"/hessian": run["hessian"].to_dataset()}).hild.refresh()
    with pytest.raises(TypeError, match=r"a Dataset does not know its run.*hx.open\(path\)"):
        run["hessian"].to_dataset().hild.refresh()


def test_refresh__of_a_run_that_was_deleted_raises(tmp_path: Path) -> None:
    import shutil

    RunWriter(tmp_path / "run.zarr", spectrum_plan(), 0).close()
    run = hx.open(tmp_path / "run.zarr")
    shutil.rmtree(tmp_path / "run.zarr")
    with pytest.raises(FileNotFoundError, match="moved or deleted"):
        run.hild.refresh()
    with contextlib.suppress(FileNotFoundError):
        reader.open_run(tmp_path / "run.zarr")
        raise AssertionError("opened a run that was deleted")
