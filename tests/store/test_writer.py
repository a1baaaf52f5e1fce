from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore, WrapperStore

from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import (
    DamagedRecordError,
    MissingRecordsWarning,
    RecordsExistError,
    RecordsWithdrawnWarning,
    RunWriter,
    StoreError,
    StoreWriteError,
    open_run,
)
from hild_xr.store.backends import Location
from hild_xr.testing import random_record, spectrum_plan


def _write(writer: RunWriter, plan: RunPlan, seed: int, steps: tuple[int, ...], attempt: int = 1) -> None:
    for step in steps:
        for probe in plan.probes:
            writer.write(probe, step, random_record(plan, probe, seed=seed, step=step, attempt=attempt))


def _assert_holds(store: Store | Path, plan: RunPlan, seed: int, attempts: dict[int, int]) -> None:
    """Every step holds the record of its attempt (0: none) in every array of every probe."""
    run, row = open_run(store), plan.seeds.index(seed)
    for probe, contents in plan.probes.items():
        places = {int(step): i for i, step in enumerate(run[probe]["step"].values)}
        assert places.keys() >= {step for step, attempt in attempts.items() if attempt}
        for node, name, array in contents.arrays():
            stored = run["/".join(part for part in (probe, node, name) if part)].isel(seed=row).values
            for step in places.keys() & attempts.keys():
                record = random_record(plan, probe, seed=seed, step=step, attempt=attempts[step])
                expected = record[node][name] if attempts[step] else array.missing()
                np.testing.assert_array_equal(stored[places[step]], expected)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=90, unique=True).map(sorted),
    st.sampled_from([4, 4000, 400_000]),
)
def test_write_then_read__is_identity(steps: list[int], columns: int) -> None:
    # 4, 4000 and 400,000 columns make blocks of 64, 16 and 1 steps
    kept = tuple(steps) if columns < 400_000 else tuple(steps[:3])
    plan, store = spectrum_plan(steps=kept, seeds=(5,), rows=1, columns=columns), MemoryStore()
    with RunWriter(store, plan, 5) as writer:
        _write(writer, plan, 5, kept)
    _assert_holds(store, plan, 5, dict.fromkeys(kept, 1))


def test_write__commits_only_at_full_blocks_and_flushes(tmp_path: Path) -> None:
    plan = spectrum_plan(steps=tuple(range(100)), seeds=(0,))
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        _write(writer, plan, 0, tuple(range(63)))
        assert open_run(tmp_path / "run.zarr")["metrics"].sizes["step"] == 0
        _write(writer, plan, 0, (63,))
        assert open_run(tmp_path / "run.zarr")["metrics"].sizes["step"] == 64
        _write(writer, plan, 0, (64,))
        writer.flush()
        assert open_run(tmp_path / "run.zarr")["metrics"].sizes["step"] == 65
    _assert_holds(tmp_path / "run.zarr", plan, 0, dict.fromkeys(range(65), 1))


def test_write__flushes_an_overdue_probe(tmp_path: Path) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(tmp_path / "run.zarr", plan, 0, flush_seconds=0.0) as writer:
        _write(writer, plan, 0, (0, 1))
        assert open_run(tmp_path / "run.zarr")["metrics"].sizes["step"] == 2


class _OrderStore(WrapperStore[MemoryStore]):
    """Remembers the order in which keys are written."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.keys: list[str] = []

    async def set(self, key: str, value: Buffer) -> None:
        self.keys.append(key)
        await self._store.set(key, value)


def test_flush__writes_the_marker_last() -> None:
    plan, store = spectrum_plan(seeds=(0,)), _OrderStore(MemoryStore())
    writer = RunWriter(store, plan, 0)
    store.keys.clear()
    writer.write("hessian", 0, random_record(plan, "hessian", seed=0, step=0))
    assert store.keys == []
    writer.flush()
    assert len(store.keys) == 5
    assert store.keys[-1] == "hessian/committed/c/0/0"


def test_seeds__do_not_touch_each_other(tmp_path: Path) -> None:
    plan = spectrum_plan(seeds=(0, 1))
    with (
        RunWriter(tmp_path / "run.zarr", plan, 0) as first,
        RunWriter(tmp_path / "run.zarr", plan, 1) as second,
    ):
        _write(first, plan, 0, (0, 1, 2))
        _write(second, plan, 1, (0, 1, 2, 5))
    _assert_holds(tmp_path / "run.zarr", plan, 0, {0: 1, 1: 1, 2: 1, 5: 0})
    _assert_holds(tmp_path / "run.zarr", plan, 1, {0: 1, 1: 1, 2: 1, 5: 1})


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_resume__keeps_what_is_before_and_replaces_what_is_after(data: st.DataObject) -> None:
    steps = tuple(range(0, 300, 3))
    plan, store = spectrum_plan(steps=steps, seeds=(0,)), MemoryStore()
    attempts = dict.fromkeys(steps, 0)
    with RunWriter(store, plan, 0) as writer:
        written = data.draw(st.integers(1, 100))
        _write(writer, plan, 0, steps[:written])
        attempts.update(dict.fromkeys(steps[:written], 1))
    for attempt in (2, 3):
        last = max(step for step, number in attempts.items() if number)
        resume_at = data.draw(st.integers(0, last))
        stop = data.draw(st.integers(resume_at, 300))
        with RunWriter(store, plan, 0, resume_at=resume_at) as writer:
            again = tuple(step for step in steps if resume_at < step <= stop)
            _write(writer, plan, 0, again, attempt)
        attempts.update({step: 0 for step in steps if step > resume_at})
        attempts.update(dict.fromkeys(again, attempt))
        _assert_holds(store, plan, 0, attempts)
        if not again:
            break


def test_resume__makes_the_record_of_its_own_step_if_that_was_lost() -> None:
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        _write(writer, plan, 0, (0, 1))
    with pytest.warns(MissingRecordsWarning, match="1 of the 3 records"):
        writer = RunWriter(store, plan, 0, resume_at=5)
    with writer:
        assert writer.holds("metrics", 2)
        assert not writer.holds("metrics", 5)
        _write(writer, plan, 0, (5, 10))
    _assert_holds(store, plan, 0, {0: 1, 1: 1, 2: 0, 5: 1, 10: 1})


def test_second_start__of_a_seed_with_records_is_refused(tmp_path: Path) -> None:
    plan = spectrum_plan()
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        _write(writer, plan, 0, (0, 1))
    with pytest.raises(RecordsExistError, match=r"up to step 1 .* resume=True"):
        RunWriter(tmp_path / "run.zarr", plan, 0)
    _assert_holds(tmp_path / "run.zarr", plan, 0, {0: 1, 1: 1})
    with RunWriter(tmp_path / "run.zarr", plan, 1):
        pass


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_attempt_that_committed_nothing__lends_its_number_to_no_other(tmp_path: Path, kind: str) -> None:
    """Else a reader that still shows withdrawn records could take those of a later attempt for them."""
    plan = spectrum_plan(seeds=(0,))
    store = tmp_path / "run.zarr" if kind == "folder" else MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        _write(writer, plan, 0, (0, 1, 2))
    with RunWriter(store, plan, 0, resume_at=0) as writer:
        _write(writer, plan, 0, (1, 2), attempt=2)
    RunWriter(store, plan, 0, resume_at=0).abandon()  # withdraws attempt 2 and ends
    with RunWriter(store, plan, 0, resume_at=0) as writer:
        _write(writer, plan, 0, (1, 2), attempt=4)
    _assert_holds(store, plan, 0, {0: 1, 1: 4, 2: 4})
    assert open_run(store)["metrics/committed"].values[0].tolist() == [1, 4, 4]


def test_attempts__go_on_in_a_store_made_anew(tmp_path: Path) -> None:
    """Else a tree of the deleted run would show the records of the new one."""
    plan, path = spectrum_plan(seeds=(0,)), tmp_path / "run.zarr"
    for attempt in (1, 2):
        with RunWriter(path, plan, 0) as writer:
            _write(writer, plan, 0, (0,), attempt)
        tree = open_run(path)
        assert tree["metrics/committed"].values[0].tolist() == [attempt]
        if attempt == 1:
            old = tree
            shutil.rmtree(path)
    with pytest.warns(RecordsWithdrawnWarning):
        assert np.isnan(old["metrics/train_loss"].values).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record[""].pop("eigenvalues"), r"missing arrays \['eigenvalues'\]"),
        (lambda record: record[""].update(extra=1.0), r"unplanned arrays \['extra'\]"),
        (
            lambda record: record["fc.weight"].update(eigenvectors=np.zeros((2, 4, 3))),
            r"fc.weight/eigenvectors: expected shape \(2, 3, 4\), got \(2, 4, 3\)",
        ),
    ],
)
def test_write__refuses_a_record_that_is_not_as_planned_and_keeps_nothing_of_it(
    change: object, message: str
) -> None:
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        broken = {n: dict(a) for n, a in random_record(plan, "hessian", seed=0, step=0).items()}
        change(broken)
        with pytest.raises(ValueError, match=message):
            writer.write("hessian", 0, broken)
    assert open_run(store)["hessian"].sizes["step"] == 0


def test_write__refuses_unplanned_and_earlier_steps() -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(MemoryStore(), plan, 0) as writer:
        _write(writer, plan, 0, (0, 5))
        with pytest.raises(ValueError, match="no record planned at step 3"):
            writer.write("metrics", 3, random_record(plan, "metrics", seed=0, step=3))
        with pytest.raises(ValueError, match="step 1 comes after step 5"):
            writer.write("metrics", 1, random_record(plan, "metrics", seed=0, step=1))


def test_writer__names_the_planned_probes_and_steps_to_one_who_asks_for_others() -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(MemoryStore(), plan, 0) as writer:
        known = r"no probe 'hesian' is planned; the plan has \['hessian', 'metrics', 'weights'\]"
        with pytest.raises(ValueError, match=known):
            writer.write("hesian", 0, random_record(plan, "hessian", seed=0, step=0))
        with pytest.raises(ValueError, match=known):
            writer.holds("hesian", 0)
        with pytest.raises(ValueError, match="probe 'hessian' has no record planned at step 3"):
            writer.holds("hessian", 3)


def test_writer__refuses_a_seed_that_was_not_planned() -> None:
    with pytest.raises(ValueError, match=r"seed 9 is not one of the planned seeds \(0, 1\)"):
        RunWriter(MemoryStore(), spectrum_plan(), 9)


def test_write__copies_values_that_change_later() -> None:
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    live = np.ones((3, 4), dtype=np.float32)
    with RunWriter(store, plan, 0) as writer:
        writer.write("weights", 0, {"fc.weight": {"weight": live}})
        live[:] = 7
    assert float(open_run(store)["weights/fc.weight/weight"].values.max()) == 1.0


class _FullStore(WrapperStore[MemoryStore]):
    """Fails when a key of an array named ``refused`` is written, like a full disk."""

    refused: str = ""

    async def set(self, key: str, value: Buffer) -> None:
        if self.refused and self.refused in key:
            raise OSError(28, "No space left on device")
        await self._store.set(key, value)


@pytest.mark.parametrize("refused", ["eigenvalues/c", "eigenvectors/c", "committed/c"])
def test_failing_store__loses_nothing_that_was_committed(refused: str) -> None:
    plan, store = spectrum_plan(seeds=(0,)), _FullStore(MemoryStore())
    writer = RunWriter(store, plan, 0)
    _write(writer, plan, 0, (0, 1))
    writer.flush()
    _write(writer, plan, 0, (2,))
    store.refused = refused
    with pytest.raises(StoreWriteError, match=r"at steps 2 to 2 .*No space left.*up to step 1.*resume=True"):
        writer.flush()
    run = open_run(store)
    # a probe that can be written is written, whatever happens to another
    assert run["metrics"].sizes["step"] == (2 if refused == "committed/c" else 3)
    np.testing.assert_array_equal(run["hessian/step"].values, [0, 1])
    store.refused = ""
    writer.close()  # the disk has room again: what was buffered is still there
    _assert_holds(store, plan, 0, {0: 1, 1: 1, 2: 1})


class _FlakyStore(WrapperStore[MemoryStore]):
    """Fails the next ``failures`` writes of keys with ``only``; with ``arrives`` the bytes arrive even so."""

    failures = 0
    arrives = False
    only = ""

    async def set(self, key: str, value: Buffer) -> None:
        fails = self.failures > 0 and self.only in key
        if self.arrives or not fails:
            await self._store.set(key, value)
        if fails:
            self.failures -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@settings(max_examples=12)
@given(st.data())
def test_failed_flush__keeps_what_is_buffered_until_there_is_room(data: st.DataObject) -> None:
    steps = tuple(range(140))  # two full blocks and a part of one
    plan, store = spectrum_plan(steps=steps, seeds=(0,)), _FlakyStore(MemoryStore())
    flushes = data.draw(st.sets(st.sampled_from(steps), max_size=5))
    with RunWriter(store, plan, 0) as writer:
        for step in steps:
            store.failures = (
                data.draw(st.sampled_from([0, 0, 0, 1, 2, 7])) if step % 7 == 0 else store.failures
            )
            for probe in plan.probes:
                record = random_record(plan, probe, seed=0, step=step)
                while not writer.holds(probe, step):
                    with suppress(StoreWriteError):
                        writer.write(probe, step, record)
            if step in flushes:
                with suppress(StoreWriteError):
                    writer.flush()
        store.failures = 0
    _assert_holds(store, plan, 0, dict.fromkeys(steps, 1))


@pytest.mark.parametrize("damage", ["lost", "flipped"])
@pytest.mark.parametrize("key", ["weights/fc.weight/weight/c/0/0/0/0", "hessian/n_matvec/c/0/0/0"])
def test_resume__beside_a_damaged_record_is_refused_and_changes_nothing(
    tmp_path: Path, damage: str, key: str
) -> None:
    """Written over, the block would have a valid checksum and the lost records look like missing ones."""
    plan, path = spectrum_plan(steps=tuple(range(100)), seeds=(0,)), tmp_path / "run.zarr"
    with RunWriter(path, plan, 0) as writer:
        _write(writer, plan, 0, tuple(range(80)))
    if damage == "lost":
        (path / key).unlink()
    else:
        content = bytearray((path / key).read_bytes())
        content[3] ^= 1
        (path / key).write_bytes(content)
    markers = {file: file.read_bytes() for file in path.glob("*/committed/c/0/0")}
    with pytest.raises(DamagedRecordError, match=rf"nothing was changed: {key.rpartition('/c/')[0]}.*backup"):
        RunWriter(path, plan, 0, resume_at=10)
    assert {file: file.read_bytes() for file in markers} == markers
    with RunWriter(path, plan, 0, resume_at=63) as writer:  # the whole block stays as it is
        _write(writer, plan, 0, (64, 65), attempt=2)
    with RunWriter(path, plan, 0, resume_at=-1) as writer:  # or goes
        _write(writer, plan, 0, tuple(range(80)), attempt=3)
    _assert_holds(path, plan, 0, dict.fromkeys(range(80), 3))


@pytest.mark.parametrize(
    ("damage", "says"), [("lost", "is missing, though records"), ("flipped", "checksum")]
)
def test_resume__beside_a_damaged_marker_is_refused(tmp_path: Path, damage: str, says: str) -> None:
    plan, path = spectrum_plan(seeds=(0,)), tmp_path / "run.zarr"
    with RunWriter(path, plan, 0) as writer:
        _write(writer, plan, 0, (0, 1))
    marker = path / "metrics/committed/c/0/0"
    if damage == "lost":
        marker.unlink()
    else:
        marker.write_bytes(b"\1" + marker.read_bytes()[1:-1] + b"\0")
    with pytest.raises(DamagedRecordError, match=rf"metrics/committed/c/0/0 in .*{says}"):
        RunWriter(path, plan, 0, resume_at=1)


@pytest.mark.parametrize(
    ("node", "name", "value", "says"),
    [
        ("", "n_matvec", np.array([2**40]), "exceed int32"),
        ("", "n_matvec", np.array([1.7]), "expected values of dtype int32, got float64"),
        ("", "eigenvalues", np.ones((1, 2)) * 1j, "expected values of dtype float64, got complex128"),
        ("", "converged", np.array([[1, 0]]), "expected values of dtype bool, got int64"),
    ],
)
def test_write__refuses_values_that_the_planned_dtype_cannot_hold(
    node: str, name: str, value: np.ndarray, says: str
) -> None:
    plan = spectrum_plan(seeds=(0,))
    good = random_record(plan, "hessian", seed=0, step=0)
    with RunWriter(MemoryStore(), plan, 0) as writer:
        with pytest.raises(ValueError, match=says):
            writer.write("hessian", 0, {**good, node: {**good[node], name: value}})
        assert not writer.holds("hessian", 0)
        writer.write("hessian", 0, good)


def test_writer__ends_before_its_marker_overflows() -> None:
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        _write(writer, plan, 0, (0,))
    zarr.open_group(store)["metrics/committed"][0, 0] = 65535
    with pytest.raises(StoreError, match="begun 65535 times"):
        RunWriter(store, plan, 0, resume_at=0)


def test_failed_flush__keeps_its_own_copy_of_records_that_are_blocks_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hild_xr.plan.BLOCK_BYTES", 10)
    plan, store = spectrum_plan(seeds=(0,)), _FlakyStore(MemoryStore())
    record = random_record(plan, "weights", seed=0, step=0)
    weight = np.asarray(record["fc.weight"]["weight"]).copy()
    with RunWriter(store, plan, 0) as writer:
        store.failures = 1
        with pytest.raises(StoreWriteError, match="No space left"):
            writer.write("weights", 0, {"fc.weight": {"weight": weight}})
        weight += 1
    np.testing.assert_array_equal(
        open_run(store)["weights/fc.weight/weight"].values[0, 0], record["fc.weight"]["weight"]
    )


def test_marker_that_arrived_though_its_write_failed__is_known_as_ones_own() -> None:
    plan, store = spectrum_plan(seeds=(0,)), _FlakyStore(MemoryStore())
    with RunWriter(store, plan, 0) as writer:
        _write(writer, plan, 0, (0,))
        store.failures, store.arrives, store.only = 1, True, "metrics/committed/c"
        with pytest.raises(StoreWriteError, match=r"metrics.*No space left"):
            writer.flush()
        assert store.failures == 0
        _write(writer, plan, 0, (1,))
    _assert_holds(store, plan, 0, {0: 1, 1: 1})


def test_failed_writer__is_closed_all_the_same_and_gives_its_lease_back() -> None:
    plan, store = spectrum_plan(seeds=(0,)), _FullStore(MemoryStore())
    writer = RunWriter(store, plan, 0)
    _write(writer, plan, 0, (0,))
    writer.flush()
    _write(writer, plan, 0, (1,))
    store.refused = "committed/c"
    with pytest.raises(StoreWriteError):
        writer.flush()
    with pytest.raises(StoreWriteError):
        writer.close()
    store.refused = ""
    writer.close()
    with pytest.raises(ValueError, match=r"seed 0 of .* was closed before everything was written"):
        writer.flush()
    with RunWriter(store, plan, 0, resume_at=0) as second:
        _write(second, plan, 0, (1,), attempt=2)
    _assert_holds(store, plan, 0, {0: 1, 1: 2})


def test_closed_writer__takes_no_records(tmp_path: Path) -> None:
    plan = spectrum_plan(seeds=(0,))
    writer = RunWriter(tmp_path / "run.zarr", plan, 0)
    _write(writer, plan, 0, (0,))
    writer.close()
    with pytest.raises(ValueError, match=r"the writer of seed 0 of .*run.zarr is closed"):
        _write(writer, plan, 0, (1,))
    writer.flush()
    _assert_holds(tmp_path / "run.zarr", plan, 0, {0: 1, 1: 0})


def test_writer__stops_when_another_wrote_its_seed_though_no_lease_held_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RunWriter.__init__.__globals__, "lease_for", lambda *_: None)
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    first = RunWriter(store, plan, 0)
    _write(first, plan, 0, (0,))
    first.flush()
    _write(first, plan, 0, (1,))
    with RunWriter(store, plan, 0, resume_at=0) as second:
        _write(second, plan, 0, (1, 2), attempt=2)
    with pytest.raises(StoreWriteError, match=r"steps 1 to 1 were not written .* its marker has changed"):
        first.close()
    run = open_run(store)
    np.testing.assert_array_equal(run["metrics/committed"].values, [[1, 2, 2]])


def test_flush__commits_once_a_probe_after_its_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, store = spectrum_plan(seeds=(7,)), _OrderStore(MemoryStore())
    monkeypatch.setattr(Location, "commit", lambda _, message: store.keys.append(message))
    with RunWriter(store, plan, 7) as writer:
        assert store.keys[-1] == "seed 7: attempt 1 begins"
        writer.write("hessian", 0, random_record(plan, "hessian", seed=7, step=0))
        writer.write("hessian", 1, random_record(plan, "hessian", seed=7, step=1))
        writer.flush()
        assert store.keys[-2:] == ["hessian/committed/c/0/0", "seed 7: hessian, steps 0 to 1"]
        writer.flush()
    assert sum(key.startswith("seed 7") for key in store.keys) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of two megabytes."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk__loses_nothing_that_was_committed(small_disk: Path) -> None:
    plan = spectrum_plan(
        steps=tuple(range(20)), seeds=(0,), rows=100, columns=600
    )  # 240 kB a tensor, 4 a block
    writer = RunWriter(small_disk / "run.zarr", plan, 0)
    with pytest.raises(StoreWriteError, match="No space left on device"):
        _write(writer, plan, 0, tuple(range(20)))
    writer.abandon()
    run = open_run(small_disk / "run.zarr")
    committed = {probe: run[probe].sizes["step"] for probe in plan.probes}
    assert max(committed.values()) > 0
    for probe, count in committed.items():
        for step in range(count):
            for node, name, _ in plan.probes[probe].arrays():
                path = "/".join(part for part in (probe, node, name) if part)
                expected = random_record(plan, probe, seed=0, step=step)[node][name]
                np.testing.assert_array_equal(run[path].isel(seed=0, step=step).values, expected)


def test_part_filled_chunk__is_written_whole(tmp_path: Path) -> None:
    plan = spectrum_plan(steps=tuple(range(100)), seeds=(0,))
    with RunWriter(tmp_path / "run.zarr", plan, 0) as writer:
        _write(writer, plan, 0, (0, 1, 2))
    raw = zarr.open_group(tmp_path / "run.zarr", mode="r")["metrics/train_loss"]
    assert isinstance(raw, zarr.Array)
    assert np.isnan(np.asarray(raw[0, 3:])).all()
    assert raw.nchunks_initialized == 1


def test_record_of_nothing_but_fill_values__is_written_all_the_same() -> None:
    plan, store = spectrum_plan(steps=(0,), seeds=(0,)), MemoryStore()
    nothing: dict[str, dict[str, np.ndarray]] = {"": {}, "fc.weight": {}}
    for node, name, array in plan.probes["hessian"].arrays():
        nothing[node][name] = array.missing()
    with RunWriter(store, plan, 0) as writer:
        writer.write("hessian", 0, nothing)
    root = zarr.open_group(store, mode="r")
    for name in ("eigenvalues", "converged", "n_matvec", "fc.weight/eigenvectors", "committed"):
        stored = root[f"hessian/{name}"]
        assert isinstance(stored, zarr.Array)
        assert stored.nchunks_initialized == 1, name


def test_marker__is_there_before_the_first_record() -> None:
    plan, store = spectrum_plan(seeds=(0, 1)), MemoryStore()
    writer = RunWriter(store, plan, 0)
    marker = zarr.open_group(store, mode="r")["hessian/committed"]
    assert isinstance(marker, zarr.Array)
    assert marker.nchunks_initialized == 1
    assert not np.asarray(marker[:]).any()
    writer.close()


def test_resume__deletes_what_a_killed_writer_left_half_written_of_its_own_seed(tmp_path: Path) -> None:
    plan = spectrum_plan()
    for seed in plan.seeds:
        with RunWriter(tmp_path / "run.zarr", plan, seed) as writer:
            _write(writer, plan, seed, (0, 1))
    weight = "weights/fc.weight/weight/c"
    keys = ("metrics/committed/c/0/0.ab", f"{weight}/0/0/0/0.cd", f"{weight}/1/0/0/0.ef")
    left = [tmp_path / "run.zarr" / f"{key}.partial" for key in keys]
    for path in left:
        path.write_bytes(b"half")
    RunWriter(tmp_path / "run.zarr", plan, 0, resume_at=1).close()
    assert [path.exists() for path in left] == [False, False, True]  # the last may be of a living writer
    _assert_holds(tmp_path / "run.zarr", plan, 0, {0: 1, 1: 1})


def test_write__of_a_chunk_in_several_pieces_reads_back(tmp_path: Path) -> None:
    from hild_xr.store.block import PIECE_BYTES

    size = PIECE_BYTES // 2  # float32: two pieces
    arrays = {"weight": ArrayPlan(variable="weight", dims=("out", "in"), shape=(3, size), dtype="float32")}
    plan = RunPlan(seeds=(0,), probes={"w": ProbePlan(steps=(0,), nodes={"a": NodePlan(arrays=arrays)})})
    values = np.random.default_rng(0).standard_normal((3, size)).astype("float32")
    with RunWriter(tmp_path / "run.zarr", plan, seed=0) as writer:
        writer.write("w", 0, {"a": {"weight": values}})
    stored = zarr.open_group(tmp_path / "run.zarr", mode="r")["w/a/weight"]
    np.testing.assert_array_equal(stored[0, 0], values)
