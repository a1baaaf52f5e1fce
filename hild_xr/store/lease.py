"""One writer a seed: which kind of lease a store needs, and the lock beside a local one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from zarr.storage import LocalStore

from hild_xr.plan import RunPlan
from hild_xr.store import holder
from hild_xr.store.backends import Location
from hild_xr.store.errors import WriterBusyError
from hild_xr.store.store_lease import TAKEOVER_SECONDS, StoreLease

# What a file system without locks answers: Lustre mounted without flock, NFS without its lock service.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})


class Lease(Protocol):
    """The right to write one seed of one store, held from construction until :meth:`release`."""

    def check(self) -> None:
        """Raise WriterBusyError if another process holds the lease now."""

    def next_attempt(self, seen: int) -> int:
        """Return the number of a new attempt, larger than ``seen`` and than any it has returned before."""

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""


def lease_for(
    location: Location, plan: RunPlan, seed: int, *, takeover_seconds: float = TAKEOVER_SECONDS
) -> Lease | None:
    """Take the lease that suits a store.

    =====================  ========================================================
    local folder           :class:`LocalLease`; free at once when its holder dies
    without file locks     :class:`StoreLease` in the hidden folder beside the store
    any other zarr store   :class:`StoreLease` in the store
    Icechunk               None: Icechunk itself refuses commits that conflict
    =====================  ========================================================

    Parameters
    ----------
    location
        Where the store is.
    plan
        Its plan.
    seed
        The seed to write.
    takeover_seconds
        How long the heartbeat of a :class:`StoreLease` stands still before another may take it.

    Raises
    ------
    WriterBusyError
        If a live process holds the lease; host, process and time are named.

    Examples
    --------
    >>> from hild_xr.store.backends import locate
    >>> from hild_xr.testing import spectrum_plan
    >>> lease = lease_for(locate("run.zarr"), spectrum_plan(), seed=0)
    >>> type(lease).__name__
    'LocalLease'
    >>> lease.release()
    """
    what = f"seed {seed} of {location}"
    if location.path is None:
        if location.is_transactional:
            return None
        # Below an array, because readers that list a hierarchy look into groups only and warn of what is
        # no node. All writers of a run have the same plan and so look in the same place.
        folder = f"{min(plan.probes)}/committed/writers/seed-{seed}"
        return StoreLease(location.store, folder, what=what, takeover_seconds=takeover_seconds)
    try:
        return LocalLease(location.path, seed)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return StoreLease(
        LocalStore(_writers_folder(location.path)),
        f"seed-{seed}",
        what=what,
        takeover_seconds=takeover_seconds,
    )


class LocalLease:
    """The right to write one seed of one local store, held until :meth:`release`.

    The lock belongs to the process: the operating system takes it back when the
    process dies, however it dies, and its forked children neither keep it nor
    can give it back. It lies in a hidden folder beside the store and not in it,
    so that a copied, packed or published store carries none.

    A file system may be mounted such that locks hold on one host only (Lustre's
    ``localflock``, NFS with ``nolock``). There a writer on another host is not
    refused; it is found when the marker turns out to have changed.

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
    OSError
        If the file system has no locks.

    Examples
    --------
    >>> lease = LocalLease(Path("run.zarr"), seed=0)
    >>> LocalLease(Path("run.zarr"), seed=0)
    Traceback (most recent call last):
        ...
    hild_xr.store.errors.WriterBusyError: seed 0 of ...
    >>> lease.release()
    """

    def __init__(self, path: Path, seed: int) -> None:
        folder = _writers_folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._holder = folder / f"seed-{seed}.json"
        self._attempts = folder / f"seed-{seed}.attempts"
        # Not thread-local, or a writer that is closed in another thread would keep the lock. No fallback:
        # filelock's own soft lock stays behind when its holder dies on another host.
        self._lock = FileLock(
            folder / f"seed-{seed}.lock", timeout=0, thread_local=False, fallback_to_soft=False
        )
        try:
            self._lock.acquire()
        except Timeout:
            raise WriterBusyError(
                f"seed {seed} of {path} is being written by {self._describe_holder()}. "
                "Wait for it to end, or record this seed into another store."
            ) from None
        self._holder.write_text(json.dumps(holder.this_process()))

    def check(self) -> None:
        """Do nothing: a lock is not lost while its process lives."""

    def next_attempt(self, seen: int) -> int:
        """Return the number of a new attempt, larger than ``seen`` and than any it has returned before.

        The marker alone does not tell: an attempt that was withdrawn by one that
        committed nothing has left no trace in it, and a reader that still shows the
        withdrawn records must not take those of a later attempt for them. The count
        goes on when the store is deleted and recorded anew, for the same reason.
        """
        try:
            count = int(self._attempts.read_text())
        except (FileNotFoundError, ValueError):  # there is none, or it was half written when power failed
            count = 0
        attempt = 1 + max(seen, count)
        new = self._attempts.with_suffix(".new")
        new.write_text(str(attempt))
        new.replace(self._attempts)
        return attempt

    def release(self) -> None:
        """Give the lease back; a second call, or one in a forked child, does nothing."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _describe_holder(self) -> str:
        try:
            return holder.in_words(self._holder.read_bytes())
        except FileNotFoundError:
            return holder.in_words(b"")  # locked, its name not written yet


def _writers_folder(path: Path) -> Path:
    path = path.resolve()  # a store is one store by whatever link it is reached
    return path.with_name(f".{path.name}.writers")
