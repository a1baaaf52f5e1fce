"""A run's writer behind a queue: what the recorder hands over is written while training goes on."""

from __future__ import annotations

import logging
from contextlib import suppress

from hild_xr.recorders.host_copy import HostCopy
from hild_xr.recorders.write_queue import WriteQueue
from hild_xr.store import RunWriter, StoreError

logger = logging.getLogger("hild_xr")


class AsyncWriter:
    """Write the records of one seed in a thread of their own.

    Parameters
    ----------
    writer
        The writer; from here on only the thread writes with it.
    max_bytes
        Bound on the bytes that wait for the disk.
    idle_seconds
        Commit what is buffered when nothing came for this long.
    """

    def __init__(self, writer: RunWriter, max_bytes: int, idle_seconds: float) -> None:
        self._writer = writer
        self._queue = WriteQueue(max_bytes, idle=writer.flush, idle_seconds=idle_seconds)

    @property
    def location(self) -> str:
        """Where the run is."""
        return str(self._writer.location)

    def holds(self, group: str, step: int) -> bool:
        """Whether a planned step of a probe is recorded, or passed by."""
        return self._writer.holds(group, step)

    def put(self, group: str, step: int, copy: HostCopy) -> None:
        """Queue a record.

        Raises
        ------
        StoreWriteError
            If an earlier record could not be written.
        """

        def write() -> None:
            self._writer.write(group, step, copy.wait())
            copy.release()

        self._queue.put(write, copy.nbytes)

    def check(self) -> None:
        """Raise the error of an earlier write, if there was one."""
        self._queue.check()

    def flush(self) -> None:
        """Write and commit everything that was put, and wait for it."""
        self._queue.put(self._writer.flush, nbytes=0)
        self._queue.join()

    def close(self) -> None:
        """Write and commit what is queued, end the thread and give the lease back.

        Raises
        ------
        StoreWriteError
            If anything could not be written, also what was reported before.
        """
        try:
            self._flush_though_interrupted()
        except BaseException:
            self._queue.drop()
            self._queue.stop()
            # What is complete in the buffers may fit by now; the error is raised in any case.
            with suppress(StoreError):
                self._writer.flush()
            raise
        finally:
            self.abandon()

    def _flush_though_interrupted(self) -> None:
        try:
            self.flush()
        except KeyboardInterrupt:
            logger.warning("the records that wait are written first; interrupt again to drop them")
            self.flush()
            raise

    def abandon(self) -> None:
        """End the thread and give the lease back without committing what is buffered."""
        self._queue.stop()
        self._writer.abandon()
