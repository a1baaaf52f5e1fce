"""A bounded queue and one thread that writes, so that training does not wait for the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

logger = logging.getLogger("hild_xr")

WAKE_BYTES = 1_000_000
"""Small jobs are left to pile up to this size, or ..."""

WAKE_JOBS = 64
"""... this number, or ..."""

WAKE_SECONDS = 1.0
"""... this age. A thread that wakes for each of them takes the interpreter from training every time."""

PATIENCE_SECONDS = 1.0
"""Say what is going on when waiting for the disk takes longer."""

Job = Callable[[], None]


@dataclass
class _State:
    """What the two threads share, guarded by the condition."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[tuple[Job, int]] = field(default_factory=deque)
    nbytes: int = 0
    busy: bool = False
    urgent: bool = False
    stopping: bool = False
    finished: bool = False
    error: BaseException | None = None
    trace: TracebackType | None = None


class WriteQueue:
    """Run jobs one after the other in a thread of their own.

    Parameters
    ----------
    max_bytes
        Bound on the bytes of the jobs that are waiting or running. A job that does
        not fit waits in :meth:`put`; one that is larger by itself runs alone.
    idle
        Called in the thread when nothing came for ``idle_seconds``.
    idle_seconds
        How long that is.

    Examples
    --------
    >>> done = []
    >>> queue = WriteQueue(max_bytes=100)
    >>> queue.put(lambda: done.append("a"), nbytes=60)
    >>> queue.put(lambda: done.append("b"), nbytes=60)    # waits until the first is done
    >>> queue.join()
    >>> done
    ['a', 'b']
    >>> queue.stop()
    """

    def __init__(self, max_bytes: int, idle: Job | None = None, idle_seconds: float = 30.0) -> None:
        if max_bytes < 1:
            raise ValueError(f"the queue needs room for at least one byte; got {max_bytes}")
        self._max_bytes, self._idle, self._idle_seconds = max_bytes, idle, idle_seconds
        self._state = _State()
        self.waited_seconds = 0.0
        # A daemon, for a thread that the interpreter waits for would keep a failed script from ending.
        self._thread = threading.Thread(target=self._run, name="hild-xr writer", daemon=True)
        self._thread.start()

    def put(self, job: Job, nbytes: int) -> None:
        """Queue a job; wait while the bound is reached, and say so once.

        Raises
        ------
        BaseException
            Whatever an earlier job raised.
        RuntimeError
            If the queue is stopped.
        """
        state = self._state
        with state.changed:
            if self._is_full(nbytes):
                self._wait_for_room(nbytes)
            self._raise_error()
            if state.stopping:
                raise RuntimeError(
                    "the writer was closed while this record waited for it; it was not written"
                )
            state.waiting.append((job, nbytes))
            state.nbytes += nbytes
            if state.nbytes >= WAKE_BYTES or len(state.waiting) >= WAKE_JOBS:
                self._wake()

    def join(self) -> None:
        """Wait until all jobs are done.

        Raises
        ------
        BaseException
            Whatever a job raised.
        """
        state = self._state
        with state.changed:
            self._wake()
            if not state.changed.wait_for(self._is_done, PATIENCE_SECONDS):
                logger.warning(
                    "writing %d records, %s, that wait for the disk", len(state.waiting), _size(state.nbytes)
                )
                state.changed.wait_for(self._is_done)
            self._raise_error()

    def drop(self) -> None:
        """Forget the jobs that have not begun."""
        with self._state.changed:
            self._state.waiting.clear()

    def stop(self) -> None:
        """Let the jobs that are queued finish and end the thread; a second call does nothing."""
        with self._state.changed:
            self._state.stopping = True
            self._state.changed.notify_all()
            # Not Thread.join: once that is interrupted, it takes the thread for dead.
            self._state.changed.wait_for(lambda: self._state.finished)

    def check(self) -> None:
        """Raise what a job raised, if one did; later jobs are dropped."""
        # without the lock: an error that is set a moment later is raised at the next check
        self._raise_error()

    def _is_full(self, nbytes: int) -> bool:
        state = self._state
        return (
            state.error is None
            and not state.stopping
            and state.nbytes > 0
            and state.nbytes + nbytes > self._max_bytes
        )

    def _wait_for_room(self, nbytes: int) -> None:
        if not self.waited_seconds:
            logger.warning(
                "training waits for the disk: %s of records are queued, the bound is %s. "
                "Record less often, fewer layers, or onto a faster disk.",
                _size(self._state.nbytes),
                _size(self._max_bytes),
            )
        started = time.monotonic()
        self._wake()
        self._state.changed.wait_for(lambda: not self._is_full(nbytes))
        self.waited_seconds += time.monotonic() - started

    def _wake(self) -> None:
        self._state.urgent = True
        self._state.changed.notify_all()

    def _is_done(self) -> bool:
        return (not self._state.waiting and not self._state.busy) or self._state.finished

    def _raise_error(self) -> None:
        if self._state.error is not None:
            # with the trace of the job alone: it is raised at every step until training stops
            raise self._state.error.with_traceback(self._state.trace)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            job, nbytes = taken
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:  # noqa: BLE001  all of it is raised again in the thread that trains
                error = raised
            # The job holds the record: it goes before its bytes are given back.
            del taken, job
            self._finished(nbytes, error)
        with self._state.changed:
            self._state.finished = True
            self._state.changed.notify_all()

    def _next(self) -> tuple[Job, int] | None:
        """Wait for a job; None when the queue is stopped and empty."""
        state = self._state
        with state.changed:
            if not state.waiting:
                state.urgent = False
                self._wait_for_work()
            if not state.waiting:
                return None
            state.busy = True
            return state.waiting.popleft()

    def _wait_for_work(self) -> None:
        """Wait for jobs that are urgent or of some age, or for the end; add the idle job if none came."""
        state, idle_since = self._state, time.monotonic()
        while not (state.urgent and state.waiting) and not state.stopping:
            state.changed.wait(WAKE_SECONDS if self._idle is None else min(WAKE_SECONDS, self._idle_seconds))
            if state.waiting:
                return
            if self._idle is not None and time.monotonic() - idle_since >= self._idle_seconds:
                state.waiting.append((self._idle, 0))
                return

    def _finished(self, nbytes: int, error: BaseException | None) -> None:
        state = self._state
        with state.changed:
            state.busy = False
            state.nbytes -= nbytes
            if error is not None:
                state.trace = error.__traceback__
                state.error = error
                state.waiting.clear()
                state.nbytes = 0
            state.changed.notify_all()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB"
