"""Processes really killed with SIGKILL while they write."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import numpy as np

from hild_xr.plan import RunPlan
from hild_xr.store import RunWriter, open_run
from hild_xr.testing import random_record, spectrum_plan


def _record_forever(path: Path, plan: RunPlan, resume_at: int | None, attempt: int, told: object) -> None:
    """Write records, telling after each flush up to which step everything is committed."""
    with RunWriter(path, plan, 0, resume_at=resume_at) as writer:
        for i, step in enumerate(plan.probes["hessian"].steps):
            if resume_at is not None and step <= resume_at:
                continue
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step, attempt=attempt))
            if i % 3 == 0:
                writer.flush()
                told.value = step  # type: ignore[attr-defined]


def _assert_all_records_are_whole(path: Path, plan: RunPlan, at_least: int) -> int:
    """Check every visible number against the attempt that its marker names; return the last common step."""
    run, last = open_run(path), []
    for probe, contents in plan.probes.items():
        steps = run[probe]["step"].values
        attempts = run[probe]["committed"].isel(seed=0).values
        assert (attempts > 0).all(), "a step between two committed ones is missing"
        assert len(steps) > 0
        assert steps[-1] >= at_least
        last.append(int(steps[-1]))
        for node, name, _ in contents.arrays():
            stored = run["/".join(part for part in (probe, node, name) if part)].isel(seed=0).values
            for i, step in enumerate(steps):
                written = random_record(plan, probe, seed=0, step=int(step), attempt=int(attempts[i]))[node][
                    name
                ]
                np.testing.assert_array_equal(stored[i], written)
    return min(last)


def test_kill__loses_no_committed_record_and_shows_no_torn_one(tmp_path: Path) -> None:
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    kills = 0
    for trial in range(6):
        plan = spectrum_plan(steps=tuple(range(4000)), seeds=(0,), columns=draw.choice([4, 3000]))
        path, resume_at = tmp_path / f"run{trial}.zarr", None
        for attempt in range(1, 6):
            told = context.Value("l", -1)
            writer = context.Process(target=_record_forever, args=(path, plan, resume_at, attempt, told))
            writer.start()
            while told.value < 0 and writer.is_alive():
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.08))
            writer.kill()
            writer.join()
            kills += 1
            reached = _assert_all_records_are_whole(path, plan, at_least=told.value)
            resume_at = draw.randint(0, reached)
    assert kills == 30
