"""Processes that start at the same instant on a store that does not exist yet."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import zarr

from hild_xr.plan import RunPlan
from hild_xr.store import PlanMismatchError, RunWriter, stored_plan
from hild_xr.testing import random_record, spectrum_plan

FORK = multiprocessing.get_context("fork")
STEPS, SEEDS = (0, 1, 2, 5), (0, 1, 2, 3)
PLAN = spectrum_plan(steps=STEPS, seeds=SEEDS)
OTHER = spectrum_plan(steps=STEPS, seeds=SEEDS, columns=5)


def _record_rounds(
    folder: Path, rounds: int, seed: int, plan: RunPlan, started: Barrier, outcome: object
) -> None:
    """Record one seed of each round's run; all processes go on to a round together."""
    for i in range(rounds):
        started.wait(60)
        try:
            with RunWriter(folder / f"run{i}.zarr", plan, seed) as writer:
                for step in STEPS:
                    for probe in plan.probes:
                        writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
        except PlanMismatchError as error:
            said = f"PlanMismatchError: {error}"
        except BaseException:  # noqa: BLE001 told to the test, which fails
            said = traceback.format_exc()
        else:
            said = "recorded"
        outcome.put((i, seed, said))  # type: ignore[attr-defined]


def _race(folder: Path, rounds: int, plans: list[RunPlan]) -> list[dict[int, str]]:
    """Let one process a plan race; return what each seed met in each round."""
    started, outcome = FORK.Barrier(len(plans)), FORK.Queue()
    processes = [
        FORK.Process(target=_record_rounds, args=(folder, rounds, seed, plan, started, outcome))
        for seed, plan in enumerate(plans)
    ]
    for process in processes:
        process.start()
    met: list[dict[int, str]] = [{} for _ in range(rounds)]
    for _ in range(rounds * len(plans)):
        i, seed, said = outcome.get(timeout=60)
        met[i][seed] = said
    for process in processes:
        process.join()
    return met


def _assert_recorded(path: Path, plan: RunPlan, seeds: list[int]) -> None:
    """These seeds hold all their records, read by plain zarr, and the others none."""
    assert stored_plan(path) == plan
    root = zarr.open_group(path, mode="r")
    for probe, contents in plan.probes.items():
        committed = np.asarray(root[f"{probe}/committed"][:])
        np.testing.assert_array_equal(committed, [[int(seed in seeds)] * len(STEPS) for seed in plan.seeds])
        for node, name, _ in contents.arrays():
            stored = root["/".join(part for part in (probe, node, name) if part)]
            for seed in seeds:
                for i, step in enumerate(STEPS):
                    expected = random_record(plan, probe, seed=seed, step=step)[node][name]
                    np.testing.assert_array_equal(stored[plan.seeds.index(seed), i], expected)


def _assert_nothing_left_over(folder: Path, rounds: int) -> None:
    """Beside each run lie locks and attempt counts of its seeds and no more, in it nothing half written."""
    runs = {f"run{i}.zarr" for i in range(rounds)}
    assert {path.name for path in folder.iterdir()} == runs | {f".{run}.writers" for run in runs}
    kept = {path.name for path in folder.glob(".run*.writers/*")}
    assert kept <= {f"seed-{seed}.{what}" for seed in SEEDS for what in ("lock", "attempts")}
    assert list(folder.rglob("*.partial")) == []


def test_four_seeds_that_start_at_once__all_arrive(tmp_path: Path) -> None:
    for i, met in enumerate(_race(tmp_path, 20, [PLAN] * 4)):
        assert met == dict.fromkeys(SEEDS, "recorded")
        _assert_recorded(tmp_path / f"run{i}.zarr", PLAN, [*SEEDS])
    _assert_nothing_left_over(tmp_path, 20)


def test_two_plans_that_start_at_once__one_wins_and_the_other_is_refused(tmp_path: Path) -> None:
    plans = [PLAN, OTHER, PLAN, OTHER]
    for i, met in enumerate(_race(tmp_path, 10, plans)):
        path = tmp_path / f"run{i}.zarr"
        winners = [seed for seed, said in met.items() if said == "recorded"]
        assert sorted(winners) in ([0, 2], [1, 3])
        for loser in set(SEEDS) - set(winners):
            assert met[loser].startswith("PlanMismatchError:")
            assert "created from another plan; nothing was written" in met[loser]
        _assert_recorded(path, plans[winners[0]], winners)
    _assert_nothing_left_over(tmp_path, 10)
