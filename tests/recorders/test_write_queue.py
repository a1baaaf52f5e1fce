from __future__ import annotations

import logging
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.recorders.write_queue import WriteQueue


@given(sizes=st.lists(st.integers(0, 50), max_size=30), bound=st.integers(1, 60))
def test_jobs__run_once_in_order_and_within_the_bound(sizes: list[int], bound: int) -> None:
    queue, done, held, peak = WriteQueue(bound), [], 0, 0
    lock = threading.Lock()

    def job(i: int) -> None:
        nonlocal held
        done.append(i)
        with lock:
            held -= sizes[i]

    for i, size in enumerate(sizes):
        queue.put(lambda i=i: job(i), size)  # type: ignore[misc]
        with lock:
            held += size
            peak = max(peak, held)
    queue.join()
    queue.stop()
    assert done == list(range(len(sizes)))
    # what runs may have given its bytes back in `held` before the queue knows; never the other way round
    assert peak <= max(bound, max(sizes, default=0))


def test_full_queue__makes_the_caller_wait_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    queue, gate = WriteQueue(max_bytes=100), threading.Event()
    queue.put(lambda: gate.wait() and None, 80)
    threading.Timer(0.2, gate.set).start()
    started = time.monotonic()
    queue.put(lambda: None, 80)
    assert time.monotonic() - started > 0.15
    assert queue.waited_seconds > 0.15
    for _ in range(5):
        queue.put(lambda: time.sleep(0.01), 80)
    queue.stop()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "training waits for the disk" in caplog.text


def test_job_larger_than_the_bound__runs_alone() -> None:
    queue, running = WriteQueue(max_bytes=10), []
    for _ in range(3):
        queue.put(lambda: running.append(1), 1000)
    queue.join()
    queue.stop()
    assert len(running) == 3


def test_error__surfaces_at_the_next_put_and_at_join_and_drops_the_rest() -> None:
    queue, done, gate = WriteQueue(max_bytes=1000), [], threading.Event()

    def fail() -> None:
        gate.wait()
        raise OSError(28, "No space left on device")

    queue.put(fail, 10)
    queue.put(lambda: done.append("after the error"), 10)
    gate.set()
    with pytest.raises(OSError, match="No space left"):
        queue.join()
    with pytest.raises(OSError, match="No space left"):
        queue.put(lambda: done.append("later"), 10)
    with pytest.raises(OSError, match="No space left"):
        queue.check()
    queue.stop()
    assert done == []


def test_error__wakes_a_caller_that_waits_for_room() -> None:
    queue, gate = WriteQueue(max_bytes=10), threading.Event()

    def fail() -> None:
        gate.wait()
        raise OSError("gone")

    queue.put(fail, 10)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(OSError, match="gone"):
        queue.put(lambda: None, 10)
    queue.stop()


def test_idle_job__runs_when_nothing_came() -> None:
    ran = threading.Event()
    queue = WriteQueue(max_bytes=10, idle=ran.set, idle_seconds=0.02)
    assert ran.wait(5.0)
    queue.stop()


def test_stop__finishes_what_is_queued_and_may_come_twice() -> None:
    queue, done = WriteQueue(max_bytes=1000), []
    for i in range(20):
        queue.put(lambda i=i: done.append(i), 10)  # type: ignore[misc]
    queue.stop()
    queue.stop()
    assert done == list(range(20))
    queue.join()
    with pytest.raises(RuntimeError, match="closed"):
        queue.put(lambda: done.append(20), 10)


def test_stop__wakes_a_caller_that_waits_for_room_and_tells_it() -> None:
    queue, gate, told = WriteQueue(max_bytes=10), threading.Event(), []

    def put() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            queue.put(lambda: told.append("run"), 10)
        told.append("told")

    queue.put(lambda: gate.wait() and None, 10)
    waiting = threading.Thread(target=put)
    waiting.start()
    stopping = threading.Thread(target=queue.stop)
    time.sleep(0.05)
    stopping.start()
    waiting.join(10)
    gate.set()
    stopping.join(10)
    assert told == ["told"]


def test_error__keeps_the_trace_of_the_job_alone() -> None:
    queue, lengths = WriteQueue(max_bytes=10), []

    def fail() -> None:
        raise OSError("gone")

    queue.put(fail, 1)
    for _ in range(5):
        with pytest.raises(OSError, match="gone") as caught:
            queue.join()
        lengths.append(len(caught.traceback))
    queue.stop()
    assert len(set(lengths)) == 1


def test_bound__must_leave_room() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        WriteQueue(max_bytes=0)
