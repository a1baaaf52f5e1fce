"""What the recorder promises about its thread: order, bounds, errors, and every way a run can end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.plan import ArrayPlan, NodePlan
from hild_xr.recorders.probes.base import NodeValues
from hild_xr.store import NotEnoughSpaceError, RunWriter, StoreWriteError


def _model(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(width, width, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    weights = [next(model.parameters()).detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, next(model.parameters()).shape[1])).square().mean().backward()
        optimizer.step()
        weights.append(next(model.parameters()).detach().clone())
    return weights


def _slow_writer(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write: Callable[..., None] = RunWriter.write

    def slow(self: RunWriter, *arguments: object) -> None:
        time.sleep(seconds)
        write(self, *arguments)

    monkeypatch.setattr(RunWriter, "write", slow)


def test_slow_disk__does_not_hold_up_training_and_records_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_writer(monkeypatch, 0.01)
    model, optimizer = _model()
    recorder = rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=50)
    ).start()
    started = time.monotonic()
    weights = _train(model, optimizer, 50)
    trained = time.monotonic() - started
    recorder.close()
    assert time.monotonic() - started > 0.5 > 2 * trained
    stored = hx.open(tmp_path / "run.zarr")["weights/weight/weight"].values[0]
    np.testing.assert_array_equal(stored, torch.stack(weights).numpy())


def test_queue__keeps_memory_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _slow_writer(monkeypatch, 0.02)
    model, optimizer = _model(width=1000)  # 4 MB a record
    process, peak, stop = psutil.Process(), 0, threading.Event()
    _train(model, optimizer, 3)
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[rec.Weights()],
        schedule=rec.every(1, total_steps=60),
        queue_bytes=20_000_000,
    ) as recorder:
        _train_in_place(model, optimizer, 60)
    assert not recorder._copier._pool, "a closed recorder holds no copies"
    stop.set()
    watcher.join()
    # The bound, the block of the writer (one record), and what Python and zarr load on first use.
    assert peak < 20_000_000 + 4_000_000 + 30_000_000
    assert [r.levelno for r in caplog.records if "training waits" in r.message] == [logging.WARNING]
    assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 61


def _train_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(1, next(model.parameters()).shape[1])
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class Broken(rec.Probe):
    """Return a record of the wrong shape at one step."""

    def __init__(self, at: int) -> None:
        super().__init__("broken", None)
        self.at = at

    def plan(self, *arguments: object) -> dict[str, NodePlan]:
        return {"": NodePlan(arrays={"train_loss": ArrayPlan(variable="train_loss")})}

    def record(self, snapshot: rec.Snapshot) -> NodeValues:
        return {"": {"train_loss": np.zeros(3) if snapshot.step == self.at else 1.0}}


def test_error_of_the_writer__stops_training_at_a_next_step_and_keeps_what_was_good(tmp_path: Path) -> None:
    model, optimizer = _model()
    with (
        pytest.raises(ValueError, match=r"train_loss: expected shape \(\), got \(3,\)"),
        rec.Recorder(
            tmp_path / "run.zarr",
            model,
            optimizer,
            probes=[Broken(5)],
            schedule=rec.every(1, total_steps=10**6),
        ) as recorder,
    ):
        _train(model, optimizer, 10**6)
    assert 5 <= recorder.current_step < 10_000
    assert hx.open(tmp_path / "run.zarr")["broken"].sizes["step"] == 5


def test_error_of_the_writer__is_raised_at_close_when_no_step_follows(tmp_path: Path) -> None:
    model, optimizer = _model()
    recorder = rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[Broken(3)], schedule=rec.every(1, total_steps=10)
    ).start()
    _train(model, optimizer, 3)
    with pytest.raises(ValueError, match="expected shape"):
        recorder.close()
    recorder.close()
    again = rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[Broken(-1)],
        schedule=rec.every(1, total_steps=10),
        resume=True,
        start_step=2,
    )
    with again:
        pass  # the lease was given back


def test_error__is_not_raised_twice_in_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreWriteError("the disk is gone")

    monkeypatch.setattr(RunWriter, "write", fail)
    model, optimizer = _model()
    with (
        pytest.raises(StoreWriteError, match="the disk is gone") as caught,
        rec.Recorder(
            tmp_path / "run.zarr",
            model,
            optimizer,
            probes=[rec.Weights()],
            schedule=rec.every(1, total_steps=9),
        ) as recorder,
    ):
        recorder.flush()
    assert caught.value.__context__ is None


def test_flush__commits_what_was_recorded_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_writer(monkeypatch, 0.02)
    model, optimizer = _model()
    with rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=20)
    ) as recorder:
        _train(model, optimizer, 7)
        recorder.flush()
        assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 8


def test_records_that_wait__are_committed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hild_xr.recorders.recorder.FLUSH_SECONDS", 0.05)
    model, optimizer = _model()
    with rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=20)
    ):
        _train(model, optimizer, 3)
        deadline = time.monotonic() + 10
        while hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] < 4:  # no further step is taken
            assert time.monotonic() < deadline
            time.sleep(0.01)


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests behind it
import sys, time, torch
from hild_xr import recorders as rec
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = rec.Recorder(
    sys.argv[1], model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=100_000)
)
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
"""


def _run(tmp_path: Path, then: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + then, str(tmp_path / "run.zarr")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("then", "code", "says"),
    [
        ("recorder.start()\ntrain(20)", 0, ""),
        ("recorder.start()\ntrain(20)\nraise RuntimeError('diverged')", 1, "diverged"),
        ("with recorder:\n    train(20)\n    sys.exit(3)", 3, ""),
        (
            "import threading\nrecorder.start()\nt = threading.Thread(target=train, args=(20,))\nt.start()",
            0,
            "",
        ),
    ],
)
def test_interpreter_exit__commits_what_is_complete(tmp_path: Path, then: str, code: int, says: str) -> None:
    ended = _run(tmp_path, then)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 21


def test_forked_child__leaves_the_parents_run_alone(tmp_path: Path) -> None:
    fork = "import os\nrecorder.start()\ntrain(5)\npid = os.fork()\nif not pid: sys.exit(0)\n"
    ended = _run(tmp_path, fork + "os.waitpid(pid, 0)\ntrain(5)")
    assert ended.returncode == 0, ended.stderr
    assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 11


def test_interrupt__commits_what_is_complete(tmp_path: Path) -> None:
    script = SCRIPT + "with recorder:\n    print('started', flush=True)\n    train(100_000)"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run.zarr")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in stderr
    run = hx.open(tmp_path / "run.zarr")
    assert run["weights"].sizes["step"] % 64 != 0 or run["weights"].sizes["step"] > 64
    assert bool((run["weights/committed"] > 0).all())


def test_disk_too_small__is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    model, optimizer = _model(width=100)

    def recorder(**options: bool) -> rec.Recorder:
        return rec.Recorder(
            tmp_path / "deep" / "run.zarr",
            model,
            optimizer,
            probes=[rec.Weights()],
            schedule=rec.every(1, total_steps=30),
            **options,
        )

    with pytest.raises(NotEnoughSpaceError, match=r"0\.00 GB more .* 1 seeds.*check_space=False"):
        recorder().start()
    assert list(tmp_path.iterdir()) == []
    with recorder(check_space=False):
        _train(model, optimizer, 10)
    usage.free = 20 * 40_000 - 1  # one byte less than the records that are not there yet
    with pytest.raises(NotEnoughSpaceError):
        rec.Recorder(
            tmp_path / "deep" / "run.zarr", model, optimizer, probes=[rec.Weights()],
            schedule=rec.every(1, total_steps=30), resume=True, start_step=1,
        ).start()  # fmt: skip
    usage.free += 1
    with rec.Recorder(
        tmp_path / "deep" / "run.zarr", model, optimizer, probes=[rec.Weights()],
        schedule=rec.every(1, total_steps=30), resume=True, start_step=10,
    ):  # fmt: skip
        pass


def test_estimate__counts_the_time_of_every_record(tmp_path: Path) -> None:
    class Slow(Broken):
        def record(self, snapshot: rec.Snapshot) -> NodeValues:
            time.sleep(0.02)
            return super().record(snapshot)

    model, optimizer = _model()
    recorder = rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[Slow(-1)], schedule=rec.every(1, total_steps=999)
    )
    assert 20 <= recorder.estimate().seconds < 100
    assert "1000 records for this seed, about 0:00:2" in str(recorder.estimate())


def test_estimate__leaves_warnings_to_the_run(tmp_path: Path) -> None:
    model, optimizer = _model()
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)  # beyond float16
    recorder = rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[rec.Weights(dtype="float16")],
        schedule=rec.every(1, total_steps=9),
    )
    with pytest.warns(rec.OutOfRangeWarning):
        recorder.estimate()
    with pytest.warns(rec.OutOfRangeWarning), recorder:
        pass


def test_estimate__is_shown_before_the_first_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = _model()
    with rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=9),
        progress=True,
    ):  # fmt: skip
        shown = capsys.readouterr().err
    assert "10 records for this seed, about" in shown
    assert os.fspath(tmp_path) in shown


def test_several_optimizers__count_the_last_ones_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = (
        torch.optim.SGD(part.parameters(), lr=lr) for part, lr in zip(model, (0.1, 0.2), strict=True)
    )
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        [first, second],
        objective=rec.Objective(nn.functional.mse_loss, torch.ones(1, 2), torch.ones(1, 2)),
        probes=[rec.Weights(), rec.Metrics()],
        schedule=rec.every(1, total_steps=4),
    ) as recorder:
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            first.step()
            second.step()
    assert recorder.current_step == 4
    last = hx.open(tmp_path / "run.zarr")["weights/0.weight/weight"].values[0, -1]
    np.testing.assert_array_equal(last, model[0].weight.detach().numpy())


def test_probes__may_be_given_to_several_recorders(tmp_path: Path) -> None:
    """A probe remembers what it planned; two models must not share that."""
    probes = [rec.Metrics(), rec.Weights()]
    plain, optimizer = _model()
    named = nn.Sequential(OrderedDict(inner=nn.Linear(4, 4, bias=False)))
    pairs = [(plain, optimizer), (named, torch.optim.SGD(named.parameters(), lr=0.1))]
    objective = rec.Objective(nn.functional.mse_loss, torch.ones(1, 4), torch.ones(1, 4))
    recorders = [
        rec.Recorder(
            tmp_path / f"{i}.zarr",
            model,
            optimizer,
            objective=objective,
            probes=probes,
            schedule=rec.every(1, total_steps=3),
        )
        for i, (model, optimizer) in enumerate(pairs)
    ]
    with recorders[0], recorders[1]:
        trained = [torch.stack(_train(model, optimizer, 3)).numpy() for model, optimizer in pairs]
    for i, name in enumerate(("weight", "inner.weight")):
        stored = hx.open(tmp_path / f"{i}.zarr")[f"weights/{name}/weight"].values[0]
        np.testing.assert_array_equal(stored, trained[i])


def test_probe_that_records_rarely__is_committed_by_time_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hild_xr.recorders.recorder.FLUSH_SECONDS", 0.3)
    model, optimizer = _model()
    objective = rec.Objective(nn.functional.mse_loss, torch.ones(1, 4), torch.ones(1, 4))
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=objective,
        probes=[rec.Metrics(), rec.Weights(schedule=rec.every(10**6, total_steps=10**6))],
        schedule=rec.every(1, total_steps=10**6),
    ):
        deadline = time.monotonic() + 20
        while hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 0:
            assert time.monotonic() < deadline
            _train(model, optimizer, 20)


def test_forked_child__may_leave_the_block_and_train_on(tmp_path: Path) -> None:
    script = """
import os
with recorder:
    train(5)
    pid = os.fork()
    if not pid:
        train(200)
        recorder.flush()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    train(5)
"""
    ended = _run(tmp_path, script)
    assert ended.returncode == 0, ended.stderr
    assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 11


@pytest.mark.parametrize(("interrupts", "kept"), [(1, 21), (2, None)])
def test_interrupts_while_closing__write_what_waits_or_drop_it(
    tmp_path: Path, interrupts: int, kept: int | None
) -> None:
    script = """
from hild_xr.store import RunWriter
write = RunWriter.write
RunWriter.write = lambda self, *a: (time.sleep(0.1), write(self, *a))
recorder.start()
train(20)
print("closing", flush=True)
recorder.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script, str(tmp_path / "run.zarr")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(interrupts):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert b"interrupt again to drop them" in stderr
    assert b"KeyboardInterrupt" in stderr
    steps = hx.open(tmp_path / "run.zarr")["weights"].sizes["step"]
    assert steps == kept if kept is not None else 2 <= steps < 21
    assert hx.validate(tmp_path / "run.zarr").ok


def test_step__outside_the_block_is_not_counted(tmp_path: Path) -> None:
    model, optimizer = _model()
    recorder = rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()], schedule=rec.every(1, total_steps=9)
    )
    with pytest.raises(RuntimeError, match="inside its with block"):
        recorder.step()
    assert recorder.current_step == 0
    with recorder.start() as same:
        assert same is recorder


def test_queue_without_room__is_refused_before_a_store_is_made(tmp_path: Path) -> None:
    model, optimizer = _model()
    with pytest.raises(ValueError, match="queue_bytes"):
        rec.Recorder(
            tmp_path / "run.zarr", model, optimizer, probes=[rec.Weights()],
            schedule=rec.every(1, total_steps=9), queue_bytes=0,
        )  # fmt: skip
