from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from hild_xr.store.errors import WriterBusyError
from hild_xr.store.lease import Lease


def test_lease__refuses_a_second_writer_of_the_seed_and_names_the_first(tmp_path: Path) -> None:
    with Lease(tmp_path / "run.zarr", 0):
        with pytest.raises(WriterBusyError, match=f"process {os.getpid()} on .* since 2"):
            Lease(tmp_path / "run.zarr", 0)
        with Lease(tmp_path / "run.zarr", 1), Lease(tmp_path / "other.zarr", 0):
            pass
    with Lease(tmp_path / "run.zarr", 0):
        pass


def _hold(path: Path, ready: object) -> None:
    lease = Lease(path, 0)
    ready.set()  # type: ignore[attr-defined]
    signal.pause()
    lease.release()


def test_lease__of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run.zarr", ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(WriterBusyError, match=f"process {holder.pid}"):
        Lease(tmp_path / "run.zarr", 0)
    holder.kill()
    holder.join()
    with Lease(tmp_path / "run.zarr", 0):
        pass
