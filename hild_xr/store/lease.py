"""One writer a seed: a lock beside a local store, with the name of its holder."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from hild_xr.store.errors import WriterBusyError


class Lease:
    """The right to write one seed of one local store, held until :meth:`release`.

    The lock belongs to the process: the operating system takes it back when the
    process dies, however it dies. It lies in a hidden folder beside the store
    and not in it, so that a copied, packed or published store carries none.

    Parameters
    ----------
    path
        Folder of the store.
    seed
        The seed to write.

    Raises
    ------
    WriterBusyError
        If a live process holds the lease; host, process and time are named.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run.zarr"
    >>> with Lease(folder, seed=0):
    ...     Lease(folder, seed=0)
    Traceback (most recent call last):
        ...
    hild_xr.store.errors.WriterBusyError: seed 0 of ...
    """

    def __init__(self, path: Path, seed: int) -> None:
        # resolved: a store is one store by whatever link it is reached
        path = path.resolve()
        folder = path.with_name(f".{path.name}.writers")
        folder.mkdir(parents=True, exist_ok=True)
        self._holder = folder / f"seed-{seed}.json"
        self._lock = FileLock(folder / f"seed-{seed}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise WriterBusyError(
                f"seed {seed} of {path} is being written by {self._describe_holder()}. "
                "Wait for it to end, or record this seed into another store."
            ) from None
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._holder.write_text(json.dumps(me))

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return "another process that has just started"  # locked, its name not written yet
        return "process {pid} on {host} since {since}".format_map(holder)
