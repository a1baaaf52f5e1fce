from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from hild_xr.store import RunWriter
from hild_xr.store.backends import Location, locate
from hild_xr.store.durable import DurableStore, durable_location
from hild_xr.testing import random_record, spectrum_plan

PLAN = spectrum_plan(seeds=(0, 1))


class Disk:
    """The system calls that decide what a power failure leaves, in their order, each really made.

    A file or name counts as safe once its bytes, its name in its folder, and so the name of each folder up to
    ``top`` were synced.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
        self._top = top
        self.calls: list[tuple[str, Path]] = []
        fsync, replace, link, rename = os.fsync, os.replace, os.link, os.rename

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

        def noted(call: Callable[..., None]) -> Callable[..., None]:
            def moving(source: Any, target: Any) -> None:
                self.calls.append(("from", Path(source)))
                call(source, target)
                self.calls.append(("to", Path(target)))

            return moving

        monkeypatch.setattr(os, "fsync", noted_fsync)
        for name, call in (("replace", replace), ("link", link), ("rename", rename)):
            monkeypatch.setattr(os, name, noted(call))

    def assert_marker_follows_its_records(self) -> int:
        """Check every replacement of a marker; return how many there were."""
        markers = 0
        for i, (what, path) in enumerate(self.calls):
            if what == "to" and path.parts[-4:-2] == ("committed", "c"):
                markers += 1
                for chunk in self._chunks_before(i, path.parents[3]):
                    self._assert_safe(chunk, before=i - 1)  # the call before begins the replacement
                self._assert_safe(path, before=self._next_write(i))
        return markers

    def _chunks_before(self, i: int, group: Path) -> list[Path]:
        written = [path for what, path in self.calls[:i] if what == "to"]
        return [path for path in written if path.is_relative_to(group)]

    def _next_write(self, i: int) -> int:
        later = (j for j in range(i + 1, len(self.calls)) if self.calls[j][0] == "from")
        return next(later, len(self.calls))

    def _assert_safe(self, path: Path, *, before: int) -> None:
        named = max(i for i in range(before) if self.calls[i] == ("to", path)) if before else -1
        source = max(i for i in range(named) if self.calls[i][0] == "from")
        assert ("sync", self.calls[source][1]) in self.calls[:source], (
            f"{path} took its name with bytes unsynced"
        )
        assert ("sync", path.parent) in self.calls[named:before], f"the name of {path} was not synced"
        for folder in path.parents:
            if folder == self._top:
                break
            assert ("sync", folder.parent) in self.calls[:before], f"the name of {folder} was not synced"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("reads the paths of open files from /proc")
    return Disk(monkeypatch, tmp_path)


def _record(path: Path, *, durable: bool, seed: int = 0, steps: tuple[int, ...] = (0, 1)) -> None:
    with RunWriter(path, PLAN, seed, durable=durable) as writer:
        for step in steps:
            for probe in PLAN.probes:
                writer.write(probe, step, random_record(PLAN, probe, seed=seed, step=step))
            writer.flush()


def test_durable_writer__syncs_files_and_folders_before_the_marker_and_the_marker_before_anything_else(
    tmp_path: Path, disk: Disk
) -> None:
    _record(tmp_path / "new" / "folders" / "run.zarr", durable=True)
    # one for each of the three probes when the seed begins, and one for each of two flushes
    assert disk.assert_marker_follows_its_records() == 9


def test_writer__without_durable_would_not_pass_that_test(tmp_path: Path, disk: Disk) -> None:
    _record(tmp_path / "run.zarr", durable=False)
    with pytest.raises(AssertionError, match="unsynced"):
        disk.assert_marker_follows_its_records()
    assert not any(what == "sync" for what, _ in disk.calls)


def test_durable_writer__syncs_the_new_store_with_its_folders_before_the_first_write(
    tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "new" / "folders" / "run.zarr"
    RunWriter(path, PLAN, 0, durable=True).close()
    first = disk.calls.index(("to", path / "metrics" / "committed" / "c" / "0" / "0"))
    synced = {called for what, called in disk.calls[:first] if what == "sync"}
    made = {path, *path.rglob("*")} - {*path.rglob("c"), *path.rglob("c/**/*")}
    assert {place for place in made if place.name == "zarr.json" or place.is_dir()} <= synced
    assert {path.parent, path.parent.parent, tmp_path} <= synced


def test_durable_writer__syncs_what_an_earlier_writer_left_to_the_operating_system(
    tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "run.zarr"
    _record(path, durable=False)
    written = {called for what, called in disk.calls if what == "to" and called.is_relative_to(path)}
    disk.calls.clear()
    _record(path, durable=True, seed=1, steps=())
    assert written - {path} <= {called for what, called in disk.calls if what == "sync"}


def test_durable_writer__writes_the_same_files(tmp_path: Path) -> None:
    def files(root: Path) -> dict[Path, bytes]:
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    for durable in (True, False):
        _record(tmp_path / f"{durable}.zarr", durable=durable)
    assert files(tmp_path / "True.zarr") == files(tmp_path / "False.zarr")


def _put(store: DurableStore, key: str, content: bytes, *, new: bool = False) -> None:
    value = default_buffer_prototype().buffer.from_bytes(content)
    sync((store.set_if_not_exists if new else store.set)(key, value))


def test_durable_store__replaces_a_key_or_leaves_it(tmp_path: Path, disk: Disk) -> None:
    store = DurableStore(tmp_path / "store")
    _put(store, "a/b", b"1")
    _put(store, "a/b", b"22")
    assert (tmp_path / "store/a/b").read_bytes() == b"22"
    disk.calls.clear()
    _put(store, "a/b", b"333", new=True)
    assert (tmp_path / "store/a/b").read_bytes() == b"22"
    _put(store, "a/c", b"4", new=True)
    assert (tmp_path / "store/a/c").read_bytes() == b"4"
    assert disk.calls[-1] == ("sync", tmp_path / "store/a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "store"]


def test_durable_store__that_cannot_write_leaves_the_old_value_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DurableStore(tmp_path)
    _put(store, "a", b"old")

    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        _put(store, "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_durable_store__makes_and_syncs_a_folder_again_that_was_deleted(tmp_path: Path, disk: Disk) -> None:
    store = DurableStore(tmp_path / "store")
    _put(store, "a/b/c", b"1")
    sync(store.delete_dir("a"))
    disk.calls.clear()
    _put(store, "a/b/c", b"1")
    assert {called for what, called in disk.calls if what == "sync"} >= {
        tmp_path / "store",
        tmp_path / "store/a",
        tmp_path / "store/a/b",
    }


def test_durable_store__syncs_a_folder_too_that_another_process_has_just_made(
    tmp_path: Path, disk: Disk
) -> None:
    (tmp_path / "store/a").mkdir(parents=True)
    _put(DurableStore(tmp_path / "store"), "a/b", b"1")
    assert {called for what, called in disk.calls if what == "sync"} >= {tmp_path, tmp_path / "store"}


def test_durable_store__keeps_to_read_only(tmp_path: Path) -> None:
    _put(DurableStore(tmp_path), "a", b"1")
    store = DurableStore(tmp_path).with_read_only(read_only=True)
    assert isinstance(store, DurableStore)
    with pytest.raises(ValueError, match="read-only"):
        _put(store, "a", b"2")
    with pytest.raises(ValueError, match="read-only"):
        store.set_sync("a", default_buffer_prototype().buffer.from_bytes(b"2"))


def test_durable_store__covers_every_way_in_which_zarr_writes_a_local_file() -> None:
    """A method that zarr adds one day would write without a sync, and this test fails then."""

    def writes(method: object) -> bool:
        return inspect.isfunction(method) and method.__name__.startswith("set")

    def named(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, writes)}

    # those that are defined in terms of the three
    derived = {name for name in named(LocalStore) if name not in vars(LocalStore)}
    assert named(LocalStore) - derived == {"set", "set_sync", "set_if_not_exists"}
    assert {"set", "set_sync", "set_if_not_exists"} <= vars(DurableStore).keys()


def test_durable_store__is_used_for_whatever_zarr_writes(tmp_path: Path, disk: Disk) -> None:
    array = zarr.create_array(DurableStore(tmp_path / "a.zarr"), shape=4, chunks=2, dtype="int32")
    array[:] = np.arange(4)
    moved = [called for what, called in disk.calls if what == "to"]
    assert {path.name for path in moved} == {"zarr.json", "0", "1"}
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a.zarr")[:], np.arange(4))
    assert len([called for what, called in disk.calls if what == "sync" and called.suffix == ".partial"]) == 3


def test_durable__is_refused_for_a_store_in_memory_before_anything_is_made() -> None:
    for store in (MemoryStore(), WrapperStore(MemoryStore())):
        with pytest.raises(ValueError, match=r"durable=True: .* lives in memory and ends with the process"):
            RunWriter(store, PLAN, 0, durable=True)
        assert not sync(store.exists("zarr.json"))


def test_durable__is_refused_for_memory_and_local_files_behind_fsspec_and_obstore(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    stores = pytest.importorskip("obstore.store")
    for memory in (FsspecStore.from_url("memory://durable"), ObjectStore(stores.MemoryStore())):
        with pytest.raises(ValueError, match="lives in memory"):
            durable_location(Location(memory, None))
    for local in (FsspecStore.from_url(f"file://{tmp_path}"), ObjectStore(stores.LocalStore(tmp_path))):
        with pytest.raises(ValueError, match="never syncs local files; pass the path of the folder"):
            durable_location(Location(local, None))


def test_durable__changes_nothing_for_an_object_store() -> None:
    stores = pytest.importorskip("obstore.store")
    location = Location(ObjectStore(stores.S3Store("bucket", region="us-east-1")), None)
    assert durable_location(location) is location
    assert isinstance(durable_location(locate("run.zarr")).store, DurableStore)
