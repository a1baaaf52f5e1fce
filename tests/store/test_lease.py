from __future__ import annotations

import errno
import fcntl
import gc
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from hild_xr.store import RunWriter, StoreWriteError
from hild_xr.store.backends import locate
from hild_xr.store.errors import WriterBusyError
from hild_xr.store.lease import Lease, LocalLease, lease_for
from hild_xr.store.store_lease import StoreLease
from hild_xr.testing import random_record, spectrum_plan

PLAN = spectrum_plan()
FORK = multiprocessing.get_context("fork")


def _keys(store: Store) -> list[str]:
    async def listed() -> list[str]:
        return [key async for key in store.list()]

    return sorted(sync(listed()))


def _started(target: Callable[..., None], *args: object) -> tuple[ForkProcess, Event]:
    """Start a process and wait until it sets the event that it gets."""
    ready = FORK.Event()
    process = FORK.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(30)
    return process, ready


def _hold(take: Callable[[], Lease], ready: Event) -> None:
    lease = take()
    ready.set()
    time.sleep(60)
    lease.release()


# --- the lock beside a local store


def test_local_lease__refuses_a_second_writer_of_the_seed_and_names_the_first(tmp_path: Path) -> None:
    first = LocalLease(tmp_path / "run.zarr", 0)
    with pytest.raises(WriterBusyError, match=f"process {os.getpid()} on .* since 2"):
        LocalLease(tmp_path / "run.zarr", 0)
    LocalLease(tmp_path / "run.zarr", 1).release()
    LocalLease(tmp_path / "other.zarr", 0).release()
    first.release()
    first.release()
    LocalLease(tmp_path / "run.zarr", 0).release()


def test_local_lease__is_one_by_whatever_link_the_store_is_reached(tmp_path: Path) -> None:
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "run.zarr")
    lease = LocalLease(tmp_path / "run.zarr", 0)
    with pytest.raises(WriterBusyError):
        LocalLease(tmp_path / "link.zarr", 0)
    lease.release()


def test_local_lease__of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    holder, _ = _started(_hold, partial(LocalLease, tmp_path / "run.zarr", 0))
    with pytest.raises(WriterBusyError, match=f"process {holder.pid}"):
        LocalLease(tmp_path / "run.zarr", 0)
    holder.kill()
    holder.join()
    LocalLease(tmp_path / "run.zarr", 0).release()


def _hold_with_worker(path: Path, pids: object, ready: Event) -> None:
    lease = LocalLease(path, 0)
    worker = os.fork()
    if worker == 0:
        lease.release()
        del lease
        gc.collect()
        ready.set()
        time.sleep(60)
        os._exit(0)
    pids.value = worker  # type: ignore[attr-defined]
    time.sleep(60)


def test_local_lease__belongs_to_its_process_and_not_to_a_forked_worker(tmp_path: Path) -> None:
    """As a data loader forks them: a worker neither frees the lease of its parent nor keeps it."""
    worker = FORK.Value("l", 0)
    holder, _ = _started(_hold_with_worker, tmp_path / "run.zarr", worker)
    try:
        with pytest.raises(WriterBusyError, match=f"process {holder.pid}"):
            LocalLease(tmp_path / "run.zarr", 0)
        holder.kill()
        holder.join()
        LocalLease(tmp_path / "run.zarr", 0).release()
    finally:
        os.kill(worker.value, signal.SIGKILL)


def test_writer__is_closed_in_another_thread_than_it_was_made_in(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(RunWriter, tmp_path / "run.zarr", PLAN, 0).result()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(writer.write, "metrics", 0, random_record(PLAN, "metrics", seed=0, step=0)).result()
    writer.close()
    with RunWriter(tmp_path / "run.zarr", PLAN, 0, resume_at=0):
        pass


# --- which lease a store gets


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_lease_for__gives_a_heartbeat_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    location = locate(tmp_path / "run.zarr")
    lease = lease_for(location, PLAN, 0)
    assert isinstance(lease, StoreLease)
    with pytest.raises(
        WriterBusyError, match=rf"seed 0 of {location} .* process {os.getpid()} on .* since 2"
    ):
        lease_for(location, PLAN, 0)
    assert [path.name for path in tmp_path.iterdir()] == [".run.zarr.writers"]
    lease.release()
    assert _keys(LocalStore(tmp_path / ".run.zarr.writers")) == ["seed-0.lock"]


def test_lease_for__passes_on_what_is_not_about_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        lease_for(locate(tmp_path / "run.zarr"), PLAN, 0)


def test_lease_for__leaves_icechunk_to_refuse_conflicts_itself() -> None:
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    assert lease_for(locate(repository), PLAN, 0) is None


def test_live_writer__does_not_disturb_a_stranger_who_lists_the_store() -> None:
    store = MemoryStore()
    with RunWriter(store, PLAN, 0) as writer:
        writer.write("metrics", 0, random_record(PLAN, "metrics", seed=0, step=0))
        writer.flush()
        assert any("writers" in key for key in _keys(store))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            members = dict(zarr.open_group(store, mode="r", use_consolidated=False).members(max_depth=None))
            stranger: object = store
            tree = xr.open_datatree(stranger, engine="zarr", consolidated=False)
        assert not any("writers" in name for name in members)
        assert tree["metrics/train_loss"].shape == (2, 5)
        np.testing.assert_array_equal(members["hessian/committed"].nchunks_initialized, 1)
    assert [key for key in _keys(store) if "writers" in key] == ["hessian/committed/writers/seed-0/attempts"]


# --- the lease with a heartbeat


def _fsspec_store() -> Store:
    pytest.importorskip("fsspec")
    store = FsspecStore.from_url(f"memory://lease-{time.monotonic_ns()}")
    assert isinstance(store, Store)
    return store


def _obstore_store() -> Store:
    memory = pytest.importorskip("obstore.store").MemoryStore()
    return ObjectStore(memory)


@pytest.fixture(params=[MemoryStore, _fsspec_store, _obstore_store], ids=["memory", "fsspec", "obstore"])
def store(request: pytest.FixtureRequest) -> Store:
    made = request.param()
    assert isinstance(made, Store)
    return made


def _lease(store: Store, seconds: float = 60.0) -> StoreLease:
    return StoreLease(store, "a/writers/seed-0", what="seed 0 of here", takeover_seconds=seconds)


def test_store_lease__refuses_a_second_writer_of_the_process_at_once_and_leaves_nothing(store: Store) -> None:
    first = _lease(store)
    began = time.monotonic()
    with pytest.raises(WriterBusyError, match=f"seed 0 of here .* process {os.getpid()} on .* since 2"):
        _lease(store)
    assert time.monotonic() - began < 5
    first.check()
    first.release()
    first.release()
    assert _keys(store) == []
    _lease(store).release()
    assert _keys(store) == []


def test_store_lease__is_won_by_one_of_many_that_ask_at_the_same_instant(store: Store) -> None:
    barrier = threading.Barrier(8)

    def ask(_: int) -> StoreLease | None:
        barrier.wait()
        try:
            return _lease(store)
        except WriterBusyError:
            return None

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            won = [lease for lease in pool.map(ask, range(8)) if lease is not None]
            assert len(won) == 1
            won[0].check()
            won[0].release()
    assert _keys(store) == []


@pytest.fixture(scope="module")
def bucket() -> Iterator[Store]:
    """An empty bucket of an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3_store = pytest.importorskip("obstore.store").S3Store
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    s3 = s3_store(
        "bucket",
        endpoint=f"http://{host}:{port}",
        region="us-east-1",
        access_key_id="x",
        secret_access_key="x",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    http = pytest.importorskip("urllib3")
    assert http.request("PUT", f"http://{host}:{port}/bucket").status == 200
    yield ObjectStore(s3)
    server.stop()


def test_store_lease__on_s3_is_won_by_one_of_many_that_ask_at_the_same_instant(bucket: Store) -> None:
    test_store_lease__is_won_by_one_of_many_that_ask_at_the_same_instant(bucket)


def _foreign(
    store: Store, generation: int = 1, *, beats: int = 0, seconds: float = 0.5, **more: object
) -> None:
    """Write the lease of a process on another host."""
    record = {
        "host": "node7",
        "pid": 42,
        "since": "2001-01-01T00:00:00+0000",
        "token": f"foreign{generation}",
        "takeover_seconds": seconds,
        "beats": beats,
        **more,
    }
    stored = default_buffer_prototype().buffer.from_bytes(json.dumps(record).encode())
    sync(store.set(f"a/writers/seed-0/{generation}", stored))


@pytest.mark.parametrize("renewed", ["1999-01-01T00:00:00+0000", "2999-01-01T00:00:00+0000"])
def test_store_lease__judges_by_the_heartbeat_it_sees_and_not_by_clocks(
    renewed: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, stop = MemoryStore(), threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.05):
            _foreign(store, beats=(beats := beats + 1), seconds=3.0, renewed=renewed)

    _foreign(store, seconds=3.0, renewed=renewed)
    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(WriterBusyError, match=r"being written by process 42 on node7 since 2001"):
        _lease(store)
    stop.set()
    heart.join()
    _foreign(store, seconds=0.5, renewed=renewed)
    began = time.monotonic()
    lease = _lease(store)  # our own 60 s do not count, the holder's do
    assert 0.5 <= time.monotonic() - began < 10
    assert "waiting up to 0.5 s" in caplog.text
    lease.check()
    lease.release()
    assert _keys(store) == []


def test_store_lease__that_is_released_while_another_waits_is_taken_at_once() -> None:
    store = MemoryStore()
    _foreign(store, seconds=60.0)
    threading.Timer(0.2, lambda: sync(store.delete("a/writers/seed-0/1"))).start()
    began = time.monotonic()
    _lease(store).release()
    assert time.monotonic() - began < 30


def test_store_lease__that_was_taken_over_says_so_and_touches_nothing_of_the_other() -> None:
    store = MemoryStore()
    lease = _lease(store)
    _foreign(store, 2)
    with pytest.raises(WriterBusyError, match=r"taken over by process 42 on node7 since 2001.*60.0 s"):
        lease.check()
    with pytest.raises(WriterBusyError):
        lease.renew()
    lease.release()
    assert "a/writers/seed-0/2" in _keys(store)


def test_store_lease__finds_the_newest_of_many_generations_and_deletes_all_in_the_end() -> None:
    store = MemoryStore()
    for generation in range(1, 12):
        _foreign(store, generation, seconds=0.1)
    lease = _lease(store)
    assert "a/writers/seed-0/12" in _keys(store)
    lease.release()
    assert _keys(store) == []


def test_store_lease__whose_object_was_deleted_or_is_not_ours_is_lost() -> None:
    store = MemoryStore()
    lease = _lease(store)
    sync(store.delete("a/writers/seed-0/1"))
    with pytest.raises(WriterBusyError, match="its lease was deleted"):
        lease.check()
    _foreign(store, 1)
    with pytest.raises(WriterBusyError, match="taken over by process 42"):
        lease.check()


class _FailingStore(WrapperStore[MemoryStore]):
    """Fails while ``unreachable`` is set."""

    unreachable = False
    failures = 0

    async def set(self, key: str, value: Buffer) -> None:
        if self.unreachable:
            self.failures += 1
            raise ConnectionError("no route to host")
        await self._store.set(key, value)

    async def delete(self, key: str) -> None:
        if self.unreachable:
            raise ConnectionError("no route to host")
        await self._store.delete(key)


def _until(condition: Callable[[], object]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def _beats(store: Store) -> int:
    stored = sync(store.get("a/writers/seed-0/1", default_buffer_prototype()))
    assert stored is not None
    return int(json.loads(stored.to_bytes())["beats"])


def test_heartbeat__goes_on_when_the_store_is_reachable_again() -> None:
    store = _FailingStore(MemoryStore())
    lease = _lease(store, seconds=0.15)
    _until(lambda: _beats(store) > 1)
    store.unreachable = True
    _until(lambda: store.failures > 2)
    store.unreachable, before = False, _beats(store)
    _until(lambda: _beats(store) > before + 1)
    lease.release()
    assert _keys(store) == []


def test_lost_lease__tells_why_it_could_not_be_renewed() -> None:
    store = _FailingStore(MemoryStore())
    lease = _lease(store, seconds=0.15)
    store.unreachable = True
    _until(lambda: store.failures > 0)
    _foreign(store._store, 2)
    _until(lambda: not lease._heart.is_alive())
    with pytest.raises(WriterBusyError, match="last renewal failed: no route to host"):
        lease.check()


def test_release__on_an_unreachable_store_leaves_the_lease_to_run_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = _FailingStore(MemoryStore())
    lease = _lease(store, seconds=0.3)
    store.unreachable = True
    lease.release()
    assert "runs out by itself: no route to host" in caplog.text
    store.unreachable = False
    _lease(store).release()
    assert _keys(store) == []


def test_lease_that_is_dropped__stops_beating() -> None:
    store = MemoryStore()
    lease = _lease(store, seconds=0.15)
    heart = lease._heart
    del lease
    gc.collect()
    heart.join(30)
    assert not heart.is_alive()
    _lease(store).release()


# --- real processes

SECONDS = 2.4


def _local_store_lease(folder: Path) -> StoreLease:
    return StoreLease(LocalStore(folder), "seed-0", what="seed 0", takeover_seconds=SECONDS)


def test_store_lease__of_a_killed_process_is_taken_over_after_the_stated_time(tmp_path: Path) -> None:
    holder, _ = _started(_hold, partial(_local_store_lease, tmp_path))
    began = time.monotonic()
    with pytest.raises(WriterBusyError, match=f"process {holder.pid} on"):
        _local_store_lease(tmp_path)
    assert time.monotonic() - began < SECONDS
    holder.kill()
    holder.join()
    began = time.monotonic()
    lease = _local_store_lease(tmp_path)
    assert time.monotonic() - began >= SECONDS
    lease.release()
    assert _keys(LocalStore(tmp_path)) == []


def _no_flock(*args: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def _record_until_lost(path: Path, told: object, go_on: Event, ready: Event) -> None:
    writer = RunWriter(path, PLAN, 0)
    writer.write("metrics", 0, random_record(PLAN, "metrics", seed=0, step=0))
    writer.flush()
    writer.write("metrics", 1, random_record(PLAN, "metrics", seed=0, step=1))
    ready.set()
    go_on.wait(60)
    try:
        writer.close()
    except StoreWriteError as error:
        told.put(str(error))  # type: ignore[attr-defined]
    else:
        told.put("written")  # type: ignore[attr-defined]


def test_writer__that_was_paused_and_taken_over_stops_and_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _no_flock)
    writer_module = RunWriter.__init__.__globals__
    monkeypatch.setitem(writer_module, "lease_for", partial(lease_for, takeover_seconds=SECONDS))
    path, told, go_on = tmp_path / "run.zarr", FORK.Queue(), FORK.Event()
    paused, _ = _started(_record_until_lost, path, told, go_on)
    assert paused.pid is not None
    os.kill(paused.pid, signal.SIGSTOP)
    with RunWriter(path, PLAN, 0, resume_at=0) as second:
        os.kill(paused.pid, signal.SIGCONT)
        go_on.set()
        message = told.get(timeout=30)
        paused.join()
        assert f"taken over by process {os.getpid()} on" in message
        assert "steps 1 to 1 were not written" in message
        second.write("metrics", 1, random_record(PLAN, "metrics", seed=0, step=1, attempt=2))
    stored = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(stored["metrics/committed"][0], [1, 2, 0, 0, 0])
    expected = random_record(PLAN, "metrics", seed=0, step=1, attempt=2)[""]["train_loss"]
    assert stored["metrics/train_loss"][0, 1] == expected
    assert sorted(_keys(LocalStore(tmp_path / ".run.zarr.writers"))) == ["seed-0.lock", "seed-0/attempts"]
