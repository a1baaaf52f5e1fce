"""A run in an Icechunk repository: one commit a flush, and a history that can be read."""

from __future__ import annotations

import pickle
import threading
from itertools import pairwise
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from hild_xr.plan import RunPlan
from hild_xr.store import (
    NotAStoreError,
    PlanMismatchError,
    RecordsExistError,
    RunWriter,
    StoreWriteError,
    create,
    open_run,
    refresh_run,
    stored_plan,
)
from hild_xr.store.backends import locate, zarr_array
from hild_xr.store.icechunk_session import BranchStore
from hild_xr.testing import random_record, spectrum_plan


@pytest.fixture
def repository() -> icechunk.Repository:
    return icechunk.Repository.create(icechunk.in_memory_storage())


def history(repository: icechunk.Repository, branch: str = "main") -> list[str]:
    """Messages of all commits, the first one first."""
    return [snapshot.message for snapshot in repository.ancestry(branch=branch)][::-1]


def write_step(writer: RunWriter, plan: RunPlan, seed: int, step: int) -> None:
    for probe in plan.probes:
        writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))


def test_run__in_a_repository_reads_back_as_in_any_store(repository: icechunk.Repository) -> None:
    plan, reference = spectrum_plan(), MemoryStore()
    for target in (repository, reference):
        for seed in plan.seeds:
            with RunWriter(target, plan, seed) as writer:
                for step in plan.probes["metrics"].steps:
                    write_step(writer, plan, seed, step)
    assert open_run(repository).identical(open_run(reference))


def test_flush__makes_one_commit_that_says_what_it_holds(repository: icechunk.Repository) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        begun = len(history(repository))
        writer.flush()
        assert len(history(repository)) == begun, "an empty flush makes no commit"
        for i, step in enumerate(plan.probes["metrics"].steps[:4]):
            writer.write("metrics", step, random_record(plan, "metrics", seed=0, step=step))
            assert len(history(repository)) == begun + i, "a buffered record makes no commit"
            writer.flush()
            assert len(history(repository)) == begun + i + 1
    assert len(history(repository)) == begun + 4
    assert history(repository)[1] == "create a run of 1 seeds and the probes metrics, weights, hessian"
    assert "metrics" in history(repository)[-1]


def test_snapshot__opens_as_the_run_it_was(repository: icechunk.Repository) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        for step in plan.probes["metrics"].steps:
            writer.write("metrics", step, random_record(plan, "metrics", seed=0, step=step))
            writer.flush()
    snapshots = [snapshot.id for snapshot in repository.ancestry(branch="main")][::-1]
    held = []
    for snapshot in snapshots[1:]:
        run = open_run(repository.readonly_session(snapshot_id=snapshot))
        held.append(run["metrics"].sizes["step"])
        whole = open_run(repository)["metrics/train_loss"]
        np.testing.assert_array_equal(run["metrics/train_loss"], whole[:, : held[-1]])
    assert held[0] == 0
    assert held[-1] == 5
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(held))


def test_uncommitted__records_are_seen_by_nobody(repository: icechunk.Repository) -> None:
    plan = spectrum_plan(seeds=(0,))
    location = create(repository, plan)
    assert isinstance(location.store, BranchStore)
    marker = zarr_array(zarr.open_group(location.store, mode="r+"), "metrics/committed")
    marker[0] = 1
    assert open_run(repository)["metrics"].sizes["step"] == 0
    location.commit("now")
    assert open_run(repository)["metrics"].sizes["step"] == 5
    marker[0] = 0  # the handle stays good after the commit
    location.commit("and again")
    assert open_run(repository)["metrics"].sizes["step"] == 0


def test_location__read_only_stays_at_its_snapshot_until_it_is_refreshed(
    repository: icechunk.Repository,
) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        reading = locate(repository, read_only=True)
        write_step(writer, plan, 0, 0)
    marker = zarr_array(zarr.open_group(reading.store, mode="r"), "metrics/committed")
    assert marker[0].tolist() == [0, 0, 0, 0, 0]
    reading = reading.latest()
    marker = zarr_array(zarr.open_group(reading.store, mode="r"), "metrics/committed")
    assert marker[0].tolist() == [1, 0, 0, 0, 0]


def test_refresh__leaves_the_old_tree_on_its_snapshot(repository: icechunk.Repository) -> None:
    plan, attempts = spectrum_plan(seeds=(0,)), {}
    with RunWriter(repository, plan, 0) as writer:
        write_step(writer, plan, 0, 0)
    for attempt in (1, 2):
        with RunWriter(repository, plan, 0, resume_at=0) as writer:
            record = random_record(plan, "weights", seed=0, step=1, attempt=attempt)
            writer.write("weights", 1, record)
        attempts[attempt] = record["fc.weight"]["weight"]
        if attempt == 1:
            old = open_run(repository)
    new = refresh_run(old)
    for tree, attempt in ((old, 1), (new, 2), (old, 1)):
        shown = tree["weights/fc.weight/weight"].sel(seed=0, step=1).values
        np.testing.assert_array_equal(shown, attempts[attempt])
    assert refresh_run(new) is new
    assert refresh_run(old) is not old


def test_refresh__of_a_tree_that_was_pickled_shows_what_came_since(tmp_path: Path) -> None:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)))
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        write_step(writer, plan, 0, 0)
        writer.flush()
        travelled = pickle.loads(pickle.dumps(open_run(repository)))
        write_step(writer, plan, 0, 1)
    assert refresh_run(travelled)["weights"].sizes["step"] == 2
    assert travelled["weights"].sizes["step"] == 1


def test_refresh__shows_a_branch_that_was_set_back_and_recorded_anew(
    repository: icechunk.Repository,
) -> None:
    plan, written = spectrum_plan(seeds=(0,)), {}
    create(repository, plan)
    begun = repository.lookup_branch("main")
    for attempt in (1, 2):
        repository.reset_branch("main", begun)
        with RunWriter(repository, plan, 0) as writer:
            record = random_record(plan, "metrics", seed=0, step=0, attempt=attempt)
            writer.write("metrics", 0, record)
        written[attempt] = record[""]["train_loss"]
        if attempt == 1:
            old = open_run(repository)
    new = refresh_run(old)
    assert new["metrics/committed"].values.tolist() == old["metrics/committed"].values.tolist()
    assert new["metrics/train_loss"].values.tolist() == [[written[2]]]
    assert old["metrics/train_loss"].values.tolist() == [[written[1]]]


def test_tree__stays_when_the_store_it_was_opened_from_goes_on(repository: icechunk.Repository) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        write_step(writer, plan, 0, 0)
        write_step(writer, plan, 0, 1)
    reading, writing = BranchStore(repository, read_only=True), BranchStore(repository)
    trees = [open_run(store) for store in (reading, writing)]
    with RunWriter(writing, plan, 0, resume_at=0) as writer:
        writer.write("metrics", 1, random_record(plan, "metrics", seed=0, step=1, attempt=2))
    reading.renew()
    expected = random_record(plan, "metrics", seed=0, step=1)[""]["train_loss"]
    for tree in trees:
        assert tree["metrics/train_loss"].values[0, 1] == expected


def test_seeds__written_at_once_all_arrive() -> None:
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    plan = spectrum_plan(seeds=tuple(range(4)))
    barrier = threading.Barrier(4)
    failed: list[Exception] = []

    def record(seed: int) -> None:
        barrier.wait()
        try:
            with RunWriter(repository, plan, seed) as writer:
                for step in plan.probes["metrics"].steps:
                    write_step(writer, plan, seed, step)
                    writer.flush()
        except Exception as error:  # noqa: BLE001 shown by the main thread
            failed.append(error)

    threads = [threading.Thread(target=record, args=(seed,)) for seed in plan.seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    run = open_run(repository)
    for probe, contents in plan.probes.items():
        assert (run[probe]["committed"] > 0).all()
        for node, name, _ in contents.arrays():
            stored = run["/".join(part for part in (probe, node, name) if part)].values
            for seed in plan.seeds:
                for i, step in enumerate(contents.steps):
                    written = random_record(plan, probe, seed=seed, step=step)[node][name]
                    np.testing.assert_array_equal(stored[seed, i], written)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_second_writer__of_a_seed_refuses_the_first_by_the_conflict(
    order: tuple[int, int], repository: icechunk.Repository
) -> None:
    plan = spectrum_plan(seeds=(0,))
    writers = [RunWriter(repository, plan, 0) for _ in range(2)]
    for i in order:
        writers[i].write("metrics", 0, random_record(plan, "metrics", seed=0, step=0, attempt=i))
        if i == 1:
            writers[i].flush()
            continue
        for _ in range(2):
            with pytest.raises(StoreWriteError, match="another writer has committed what this one wrote"):
                writers[i].flush()
    for writer in writers:
        writer.abandon()
    written = random_record(plan, "metrics", seed=0, step=0, attempt=1)[""]["train_loss"]
    assert open_run(repository)["metrics/train_loss"].values.tolist() == [[written]]
    assert len(history(repository)) == 5, "repository, run, two beginnings, one flush"


def test_second_writer__of_a_seed_with_records_is_refused_at_once(repository: icechunk.Repository) -> None:
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(repository, plan, 0) as writer:
        write_step(writer, plan, 0, 0)
        writer.flush()
        with pytest.raises(RecordsExistError):
            RunWriter(repository, plan, 0)
        write_step(writer, plan, 0, 1)
    assert open_run(repository)["metrics"].sizes["step"] == 2


def test_create__by_threads_that_start_together_ends_with_one_plan() -> None:
    for _ in range(10):
        repository = icechunk.Repository.create(icechunk.in_memory_storage())
        barrier = threading.Barrier(4)
        outcomes: list[int] = []

        def begin(columns: int, repository: icechunk.Repository, barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                create(repository, spectrum_plan(columns=columns))
                outcomes.append(columns)  # noqa: B023 all threads of a round end before the next
            except PlanMismatchError:
                outcomes.append(-columns)  # noqa: B023

        threads = [threading.Thread(target=begin, args=(c, repository, barrier)) for c in (4, 4, 5, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = stored_plan(repository).probes["weights"].nodes["fc.weight"].arrays["weight"].shape[1]
        assert sorted(outcomes) == sorted([winner, winner, winner - 9, winner - 9])
        assert len(history(repository)) == 2


def test_create__refuses_a_repository_that_holds_something_else(repository: icechunk.Repository) -> None:
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="mine", shape=3, dtype="f4")
    session.commit("mine")
    with pytest.raises(NotAStoreError):
        create(repository, spectrum_plan())
    assert history(repository)[-1] == "mine"


def test_branch__other_than_main_holds_a_run_of_its_own(repository: icechunk.Repository) -> None:
    repository.create_branch("dev", repository.lookup_branch("main"))
    plan = spectrum_plan(seeds=(0,))
    with RunWriter(BranchStore(repository, "dev"), plan, 0) as writer:
        write_step(writer, plan, 0, 0)
    assert open_run(repository.readonly_session("dev"))["metrics"].sizes["step"] == 1
    assert open_run(BranchStore(repository, "dev", read_only=True))["metrics"].sizes["step"] == 1
    with pytest.raises(FileNotFoundError, match="no run at branch 'main' of an Icechunk repository"):
        open_run(repository)


def test_session__that_writes_is_not_a_target(repository: icechunk.Repository) -> None:
    with pytest.raises(TypeError, match=r"pass the icechunk\.Repository itself"):
        locate(repository.writable_session("main"))
    with pytest.raises(TypeError, match="ends with its first commit"):
        locate(repository.readonly_session("main"))
