"""Runs in an object store that speaks the protocol of S3 (moto's server on this machine), and on fsspec."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.store import from_url
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from hild_xr.plan import RunPlan
from hild_xr.store import NotAStoreError, PlanMismatchError, RunWriter, create, open_run, stored_plan
from hild_xr.store.backends import locate
from hild_xr.store.root import CREATING, stored_root
from hild_xr.testing import random_record, spectrum_plan


@dataclass
class Server:
    """A server, with the requests it was asked."""

    address: str
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    asked = Server(f"http://{host}:{port}")
    _listen_to(moto, asked.requests)
    environment = {
        "AWS_ENDPOINT_URL": asked.address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{asked.address}/bucket", method="PUT")).close()
        yield asked
    moto.stop()


def _listen_to(moto: ThreadedMotoServer, requests: list[str]) -> None:
    werkzeug: Any = moto._server
    application = werkzeug.app

    def listening(environ: dict[str, str], start_response: Callable[..., object]) -> object:
        requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        return application(environ, start_response)

    werkzeug.app = listening


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}/run.zarr"


def record_all(target: str | Store, plan: RunPlan) -> None:
    for seed in plan.seeds:
        with RunWriter(target, plan, seed) as writer:
            for probe, contents in plan.probes.items():
                for step in contents.steps:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))


def assert_holds_all(target: str | Store, plan: RunPlan) -> None:
    """Check that every planned record can be read, with the numbers it was written with."""
    run = open_run(target)
    for probe, contents in plan.probes.items():
        np.testing.assert_array_equal(run[probe]["step"], contents.steps)
        assert (run[probe]["committed"].values == 1).all()
        for node, name, _ in contents.arrays():
            stored = run["/".join(part for part in (probe, node, name) if part)].values
            for row, seed in enumerate(plan.seeds):
                for i, step in enumerate(contents.steps):
                    written = random_record(plan, probe, seed=seed, step=step)[node][name]
                    np.testing.assert_array_equal(stored[row, i], written)


class DyingStore(WrapperStore[Store]):
    """A store whose writer dies: after a number of puts, each raises."""

    def __init__(self, store: Store, puts: int) -> None:
        super().__init__(store)
        self.left = puts

    async def set(self, key: str, value: Buffer) -> None:
        self._count()
        await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._count()
        await self._store.set_if_not_exists(key, value)

    def _count(self) -> None:
        if self.left == 0:
            raise ConnectionAbortedError("killed")
        self.left -= 1


def test_conditional_put__is_refused_by_the_server(url: str) -> None:
    import obstore

    store = from_url(url)
    obstore.put(store, "zarr.json", b"first", mode="create")
    with pytest.raises(AlreadyExistsError, match="412 Precondition Failed"):
        obstore.put(store, "zarr.json", b"second", mode="create")
    assert obstore.get(store, "zarr.json").bytes() == b"first"


def test_run__on_s3_reads_back_what_was_written(url: str) -> None:
    plan = spectrum_plan()
    record_all(url, plan)
    assert_holds_all(url, plan)
    location = locate(url)
    assert isinstance(location.store, ObjectStore)
    assert location.path is None
    assert str(location) == url
    reference = MemoryStore()
    record_all(reference, plan)
    assert open_run(url).identical(open_run(reference))


def test_run__on_s3_goes_on_after_its_writer_ended(url: str) -> None:
    plan = spectrum_plan(steps=(0, 1, 2, 5, 10), seeds=(0,))
    with RunWriter(url, plan, 0) as writer:
        for step in (0, 1, 2):
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step))
    with RunWriter(url, plan, 0, resume_at=1) as writer:
        for step in (2, 5, 10):
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step, attempt=2))
    run = open_run(url)
    assert run["weights"]["committed"].values.tolist() == [[1, 1, 2, 2, 2]]
    for i, (step, attempt) in enumerate([(0, 1), (1, 1), (2, 2), (5, 2), (10, 2)]):
        written = random_record(plan, "weights", seed=0, step=step, attempt=attempt)["fc.weight"]["weight"]
        np.testing.assert_array_equal(run["weights/fc.weight/weight"][0, i], written)


def test_open__asks_an_object_store_little(url: str, server: Server) -> None:
    plan = spectrum_plan()
    record_all(url, plan)
    server.requests.clear()
    open_run(url)
    # the root, whether it is still there, and a marker for each seed and probe; nothing for the arrays
    assert len(server.requests) <= 2 + len(plan.seeds) * len(plan.probes), server.requests
    assert not any(request.startswith(("PUT", "POST", "DELETE")) for request in server.requests)
    assert not any("list-type" in request for request in server.requests)


def test_stored_plan__of_a_url_where_nothing_is(url: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no run at {url}"):
        stored_plan(url)
    with pytest.raises(FileNotFoundError, match=f"no run at {url}"):
        open_run(url)


def test_create__in_a_bucket_that_is_not_there_says_so(server: Server) -> None:
    with pytest.raises(GenericError, match="NoSuchBucket"):
        create("s3://nobucket/run.zarr", spectrum_plan())


def test_create__touches_nothing_where_something_else_is(url: str) -> None:
    import obstore

    obstore.put(from_url(url), "weights/zarr.json", b"what a deleted run left")
    with pytest.raises(NotAStoreError, match=r"holds no run but something else, such as 'weights/zarr.json'"):
        create(url, spectrum_plan())
    assert [item["path"] for page in obstore.list(from_url(url)) for item in page] == ["weights/zarr.json"]


@pytest.mark.parametrize("store", ["s3", "memory"])
def test_create__by_threads_that_start_together_ends_with_one_plan(store: str, url: str) -> None:
    for trial in range(20):
        shared = MemoryStore()
        target = shared if store == "memory" else f"{url}/{trial}"
        widths = (4, 4, 4, 4) if trial % 4 == 0 else (4, 4, 5, 5)
        barrier = threading.Barrier(4)
        outcomes: list[int] = []

        def begin(width: int, target: str | Store, barrier: threading.Barrier, outcomes: list[int]) -> None:
            barrier.wait()
            try:
                create(target, spectrum_plan(columns=width), root_attrs={"by": threading.get_ident()})
                outcomes.append(width)
            except PlanMismatchError:
                outcomes.append(-width)

        threads = [threading.Thread(target=begin, args=(w, target, barrier, outcomes)) for w in widths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = stored_plan(target)
        width = winner.probes["weights"].nodes["fc.weight"].arrays["weight"].shape[1]
        assert sorted(outcomes) == sorted(w if w == width else -w for w in widths)
        assert open_run(target)["weights/fc.weight/weight"].sizes["in"] == width
        if store == "memory":
            assert shared._store_dict.keys() == complete(winner).keys()


RECORD_ONE_SEED = """
import sys
from hild_xr.store import RunWriter
from hild_xr.testing import random_record, spectrum_plan

url, seed, plan = sys.argv[1], int(sys.argv[2]), spectrum_plan(seeds=(0, 1, 2))
print("ready", flush=True)
sys.stdin.readline()
with RunWriter(url, plan, seed) as writer:
    for probe, contents in plan.probes.items():
        for step in contents.steps:
            writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
"""


def test_processes__that_start_together_on_s3_record_every_seed(url: str) -> None:
    plan = spectrum_plan(seeds=(0, 1, 2))
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RECORD_ONE_SEED, url, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for seed in plan.seeds
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    errors = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        errors.append(worker.communicate(timeout=60)[1])
    assert errors == ["", "", ""]
    assert_holds_all(url, plan)


def complete(plan: RunPlan, **root_attrs: object) -> dict[str, bytes]:
    store = MemoryStore()
    create(store, plan, root_attrs=root_attrs)
    return {key: value.to_bytes() for key, value in store._store_dict.items()}


def test_create__whose_creator_dies_is_completed_by_the_next() -> None:
    plan = spectrum_plan()
    whole = complete(plan, by="first")
    for puts in range(len(whole) + 1):
        store = MemoryStore()
        with pytest.raises(ConnectionAbortedError):
            create(DyingStore(store, puts), plan, root_attrs={"by": "first"})
        with pytest.raises(FileNotFoundError, match=r"it holds no zarr\.json|is being created; try again"):
            open_run(store)
        if puts:
            with pytest.raises(PlanMismatchError):
                create(store, spectrum_plan(columns=5))
        create(store, plan, root_attrs={"by": "second" if puts else "first"})
        assert {key: value.to_bytes() for key, value in store._store_dict.items()} == whole
    store = MemoryStore()
    create(DyingStore(store, len(whole) + 1), plan)
    assert stored_plan(store) == plan


def test_create__whose_creator_dies_on_s3_is_completed_by_the_next(url: str) -> None:
    plan = spectrum_plan()
    for puts in (1, 7):
        target = f"{url}/{puts}"
        with pytest.raises(ConnectionAbortedError):
            create(DyingStore(locate(target).store, puts), plan)
        with pytest.raises(FileNotFoundError, match="is being created; try again"):
            open_run(target)
        record_all(target, plan)
        assert_holds_all(target, plan)


def test_create__leaves_a_root_alone_that_another_creator_has_completed() -> None:
    plan, store = spectrum_plan(), MemoryStore()
    puts = len(complete(plan))

    class SlowStore(DyingStore):
        """Lets another creator finish just before its own last look at the root."""

        async def get(self, *args: Any, **kwargs: Any) -> Buffer | None:
            if self.left == 1 and (found := done.get("zarr.json")) is not None:
                store._store_dict["zarr.json"] = found
            return await super().get(*args, **kwargs)

    other = MemoryStore()
    create(other, plan, root_attrs={"edited": "since"})
    done = dict(other._store_dict)
    slow = SlowStore(store, puts + 1)
    create(slow, plan)
    assert slow.left == 1, "the last put was not needed"
    root = stored_root(locate(store))
    assert root is not None
    assert CREATING not in root["attributes"]
    assert root["attributes"]["edited"] == "since"


def test_run__by_an_fsspec_url_reads_back_what_was_written(request: pytest.FixtureRequest) -> None:
    plan, url = spectrum_plan(), f"memory://{request.node.name}/run.zarr"
    assert isinstance(locate(url).store, FsspecStore)
    try:
        record_all(url, plan)
        assert_holds_all(url, plan)
        with pytest.raises(PlanMismatchError, match=url):
            create(url, spectrum_plan(columns=5))
    finally:
        fsspec.filesystem("memory").rm(f"/{request.node.name}", recursive=True)


def test_locate__replaces_a_store_that_writes_local_files_in_place(tmp_path: Any) -> None:
    store = FsspecStore.from_url(f"file://{tmp_path}/run.zarr")
    location = locate(store)
    assert type(location.store) is LocalStore
    assert location.path == tmp_path / "run.zarr"
    record_all(store, spectrum_plan())
    assert_holds_all(str(tmp_path / "run.zarr"), spectrum_plan())


def test_locate__says_why_a_url_cannot_be_used() -> None:
    with pytest.raises(
        ValueError, match=r"cannot use 'az://container/run.zarr': .*Account must be specified"
    ):
        locate("az://container/run.zarr")
    with pytest.raises(ValueError, match="Protocol not known: nosuch"):
        locate("nosuch://host/run.zarr")


def test_locate__does_not_show_a_password() -> None:
    pytest.importorskip("fsspec")
    location = locate("memory://me:hunter2@host/run.zarr")
    assert "hunter2" not in str(location)


def test_run__on_the_web_is_read(tmp_path: Any) -> None:
    import functools
    import http.server

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    plan = spectrum_plan()
    record_all(str(tmp_path / "run.zarr"), plan)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}/run.zarr"
        assert_holds_all(address, plan)
        with pytest.raises(FileNotFoundError, match="no run at"):
            open_run(f"{address}/nothing")
        web.shutdown()
