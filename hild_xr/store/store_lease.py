"""A lease with a heartbeat, for stores whose holder's death no operating system reports."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
import weakref

from pydantic import JsonValue
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from hild_xr.store import holder
from hild_xr.store.errors import WriterBusyError
from hild_xr.store.raw import read_keys

TAKEOVER_SECONDS = 60.0
"""A lease whose heartbeat stood still for so long is taken over."""

SETTLE_SECONDS = 0.5
"""Wait for rivals before reading back, on a store without a conditional write."""

JOIN_SECONDS = 10.0
"""Wait so long for a renewal that is under way when the lease is released."""

logger = logging.getLogger("hild_xr")


class StoreLease:
    """The right to write one seed, as an object in the store that its holder renews.

    The object's key ends in a generation. A free lease is generation 1; a lease
    whose holder died is taken over by writing the next generation on condition
    that it is not there, so one of several rivals wins, and each reads back who
    did. The holder renews its object every third of ``takeover_seconds``.

    Clocks of hosts are never compared. A lease is dead when the one who wants it
    has itself seen it unchanged for ``takeover_seconds`` of its own monotonic
    clock; so a dead holder costs its successor that wait, and a live one is
    noticed after at most a third of it.

    A holder that was paused that long, and taken over, must stop: :meth:`check`
    raises. Between a check and the write that follows it nothing holds a pause
    off, so the writer also compares its marker before it replaces it. A store
    without a conditional write (fsspec) is read back after
    :data:`SETTLE_SECONDS`; rivals further apart than that are found by the check.

    Parameters
    ----------
    store
        Where the objects lie.
    folder
        Prefix of their keys.
    what
        What is leased, for messages: "seed 0 of s3://bucket/run.zarr".
    takeover_seconds
        As described; the holder's own value counts for all who want its lease.

    Raises
    ------
    WriterBusyError
        If a live process holds the lease; host, process and time are named.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> store = MemoryStore()
    >>> lease = StoreLease(store, "writers/seed-0", what="seed 0")
    >>> StoreLease(store, "writers/seed-0", what="seed 0")
    Traceback (most recent call last):
        ...
    hild_xr.store.errors.WriterBusyError: seed 0 is being written by process ...
    >>> lease.release()
    >>> store._store_dict
    {}
    """

    def __init__(
        self, store: Store, folder: str, *, what: str, takeover_seconds: float = TAKEOVER_SECONDS
    ) -> None:
        self._store, self._folder, self._what = store, folder, what
        self._token = uuid.uuid4().hex
        self._record: dict[str, JsonValue] = {
            **holder.this_process(),
            "token": self._token,
            "takeover_seconds": takeover_seconds,
            "beats": 0,
        }
        self._pid = os.getpid()
        self._trouble: Exception | None = None
        _HELD[self._token] = self
        try:
            self._generation = self._acquire()
        except BaseException:
            del _HELD[self._token]
            raise
        self._stop = threading.Event()
        self._heart = threading.Thread(
            target=_beat,
            args=(weakref.ref(self), self._stop, takeover_seconds / 3),
            name=f"hild-xr lease of {what}",
            daemon=True,
        )
        self._heart.start()

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises
        ------
        WriterBusyError
            If it was taken over; the one who has it now is named.
        """
        keys = [self._key(generation) for generation in (self._generation, self._generation + 1)]
        mine, newer = read_keys(self._store, keys)
        if newer is None and mine is not None and holder.read(mine).get("token") == self._token:
            return
        other = newer if newer is not None else mine
        if other is None:
            raise WriterBusyError(f"{self._what} is no longer leased to this process: its lease was deleted")
        cause = "" if self._trouble is None else f" (its last renewal failed: {self._trouble})"
        raise WriterBusyError(
            f"{self._what} was taken over by {holder.in_words(other)}, because this process did not renew "
            f"its lease for {self._record['takeover_seconds']} s{cause}"
        )

    def next_attempt(self, seen: int) -> int:
        """Return the number of a new attempt, larger than ``seen`` and than any it has returned before.

        Examples
        --------
        >>> from zarr.storage import MemoryStore
        >>> lease = StoreLease(MemoryStore(), "writers/seed-0", what="seed 0")
        >>> lease.next_attempt(3), lease.next_attempt(0)
        (4, 5)
        >>> lease.release()
        """
        key = f"{self._folder}/attempts"
        count = read_keys(self._store, [key])[0] or b"0"
        attempt = 1 + max(seen, int(count))
        sync(self._store.set(key, default_buffer_prototype().buffer.from_bytes(str(attempt).encode())))
        return attempt

    def release(self) -> None:
        """Give the lease back and delete its objects; a second call, or a forked child's, does nothing."""
        if self._pid != os.getpid() or _HELD.pop(self._token, None) is None:
            return
        self._stop.set()
        self._heart.join(timeout=JOIN_SECONDS)
        try:
            self.check()
            # From the newest down: an older one is dead, and holds off whoever comes now until all are gone.
            for generation in range(self._generation, 0, -1):
                sync(self._store.delete(self._key(generation)))
        except WriterBusyError:
            pass  # what is there now belongs to another
        except Exception as error:  # noqa: BLE001 an unreachable store is no reason to fail: see the message
            logger.warning(
                "could not delete the lease of %s, so it runs out by itself: %s", self._what, error
            )

    def renew(self) -> None:
        """Renew the lease now.

        Raises
        ------
        WriterBusyError
            If it was taken over.
        """
        self.check()
        self._record["beats"] = int(str(self._record["beats"])) + 1
        sync(self._store.set(self._key(self._generation), self._buffer()))

    def _acquire(self) -> int:
        while True:
            generation, stored = self._newest()
            if stored is not None and not self._stands_still(generation, stored):
                continue  # it was released meanwhile
            key = self._key(generation + 1)
            sync(self._store.set_if_not_exists(key, self._buffer()))
            if type(self._store).set_if_not_exists is Store.set_if_not_exists:
                time.sleep(SETTLE_SECONDS)
            won = self._get(generation + 1)
            if won is not None and holder.read(won).get("token") != self._token:
                raise self._busy(won)
            if won is not None:
                return generation + 1

    def _newest(self) -> tuple[int, bytes | None]:
        """Return the newest generation and its object, or 0 and None.

        Listings may be cached, reads are not: a listing only says where to begin reading.
        """
        listed = sync(self._list())
        for start in sorted({1, *listed[-1:]}, reverse=True):
            generation, stored = start, self._get(start)
            while stored is not None:
                newer = self._get(generation + 1)
                if newer is None:
                    return generation, stored
                generation, stored = generation + 1, newer
        return 0, None

    def _stands_still(self, generation: int, first: bytes) -> bool:
        """Watch a lease: True if it is dead, False if it is given back; raise if it lives."""
        record = holder.read(first)
        if str(record.get("token")) in _HELD and record.get("pid") == os.getpid():
            raise self._busy(first)
        stated = record.get("takeover_seconds")
        patience = stated if isinstance(stated, int | float) else TAKEOVER_SECONDS
        logger.warning(
            "%s is leased to %s; waiting up to %g s to see whether it lives",
            self._what,
            holder.in_words(first),
            patience,
        )
        began = time.monotonic()
        while time.monotonic() - began < patience:
            time.sleep(patience / 30)
            now = self._get(generation)
            if now is None:
                return False
            if now != first:
                raise self._busy(now)
        return True

    def _busy(self, stored: bytes) -> WriterBusyError:
        return WriterBusyError(
            f"{self._what} is being written by {holder.in_words(stored)}. "
            "Wait for it to end, or record this seed into another store."
        )

    def _key(self, generation: int) -> str:
        return f"{self._folder}/{generation}"

    def _buffer(self) -> Buffer:
        renewed = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        stored = json.dumps({**self._record, "renewed": renewed}).encode()
        return default_buffer_prototype().buffer.from_bytes(stored)

    def _get(self, generation: int) -> bytes | None:
        return read_keys(self._store, [self._key(generation)])[0]

    async def _list(self) -> list[int]:
        names = [key.rsplit("/", 1)[-1] async for key in self._store.list_dir(self._folder)]
        return sorted(int(name) for name in names if name.isdigit())


# Leases of this process, so that a second writer in it is refused at once. Weak: one that is lost without
# being released stops beating and can be taken over.
_HELD: weakref.WeakValueDictionary[str, StoreLease] = weakref.WeakValueDictionary()


def _beat(reference: weakref.ref[StoreLease], stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        lease = reference()
        if lease is None:
            return
        try:
            lease.renew()
        except WriterBusyError:
            return  # the writer's next check raises it where someone sees it
        except Exception as error:  # noqa: BLE001 the network may come back; told if the lease is lost by it
            lease._trouble = error
        else:
            lease._trouble = None
        del lease
