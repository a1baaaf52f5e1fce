from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.adapters.distributed import FullyShardedRecorder, RankZeroRecorder
from hild_xr.store import PlanMismatchError

Run = Callable[..., subprocess.CompletedProcess[str]]
Compare = Callable[[xr.DataTree, xr.DataTree], None]


def told(folder: Path, rank: int) -> Any:
    return json.loads((folder / f"rank-{rank}.json").read_text())


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_two_ranks__record_what_one_process_records(
    tmp_path: Path,
    one_process: xr.DataTree,
    run_two_ranks: Run,
    assert_same_records: Compare,
    scenario: str,
) -> None:
    done = run_two_ranks(scenario, tmp_path)
    assert done.returncode == 0, done.stderr
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/step"], [0, 2, 4, 6])
    np.testing.assert_array_equal(run["metrics/step"], [0, 3, 6])
    assert (run["weights/committed"] == 1).all()
    moved = np.abs(np.diff(np.asarray(run["weights/0.weight/weight"]), axis=1)).max(axis=(0, 2, 3))
    assert (moved > 1e-3).all(), "each record is of another state"
    assert_same_records(run, one_process)


def test_slow_record__does_not_trip_the_timeout_of_training(tmp_path: Path, run_two_ranks: Run) -> None:
    done = run_two_ranks("slow_record", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (hx.open(tmp_path / "run.zarr")["weights/committed"] == 1).all()


def test_slow_record__of_a_plain_recorder_does(tmp_path: Path, run_two_ranks: Run) -> None:
    """Else the test above would prove nothing."""
    done = run_two_ranks("slow_record_alone", tmp_path)
    assert done.returncode != 0
    assert "imed out" in done.stderr


def test_error_on_rank_zero__is_raised_on_all_ranks(tmp_path: Path, run_two_ranks: Run) -> None:
    done = run_two_ranks("errors", tmp_path)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path, 0)[0] == ["OSError", "the disk is full", 2]
    kind, message, step = told(tmp_path, 1)[0]
    assert (kind, step) == ("RuntimeError", 2)
    assert message == "recording failed on rank 0, so all ranks stop. OSError: the disk is full"
    assert told(tmp_path, 0)[1][0] == "RecordsExistError"
    kind, message, step = told(tmp_path, 1)[1]
    assert (kind, step) == ("RuntimeError", 0)
    assert "RecordsExistError: seed 0 already has records up to step 0" in message


@pytest.fixture(scope="module")
def sharded_errors(tmp_path_factory: pytest.TempPathFactory, run_two_ranks: Run) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    done = run_two_ranks("sharded_errors", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_sharded_model__names_the_recorder_for_it(sharded_errors: Path) -> None:
    kind, message = told(sharded_errors, 0)["rank zero"]
    assert kind == "TypeError"
    assert "6 parameters of the model are sharded" in message
    assert "adapters.distributed.FullyShardedRecorder" in message
    assert "6 parameters of the model are sharded" in told(sharded_errors, 1)["rank zero"][1]
    assert not (sharded_errors / "run.zarr").exists()


def test_sharded_model__is_refused_by_a_plain_recorder(sharded_errors: Path) -> None:
    for rank in (0, 1):
        kind, message = told(sharded_errors, rank)["plain"]
        assert kind == "TypeError"
        assert "adapters.distributed.FullyShardedRecorder" in message


def test_replica__of_another_architecture_is_refused_with_the_differences(sharded_errors: Path) -> None:
    kind, message = told(sharded_errors, 0)["other replica"]
    assert kind == "ValueError"
    assert "0.weight: model ((5, 6), torch.float64), replica ((5, 6), torch.float32)" in message
    assert "2.weight: model ((4, 5), torch.float64), replica None" in message
    assert message.endswith("and 1 more")
    assert told(sharded_errors, 1)["other replica"][0] == "RuntimeError"


def test_replica__that_is_sharded_itself_is_refused(sharded_errors: Path) -> None:
    assert told(sharded_errors, 0)["sharded replica"][0] == "TypeError"
    assert told(sharded_errors, 1)["sharded replica"][0] == "RuntimeError"


def test_one_process__is_recorded_as_by_a_plain_recorder(
    tmp_path: Path, one_process: xr.DataTree, scenarios: ModuleType
) -> None:
    """The same script runs without torch.distributed."""
    model = scenarios.network()
    optimizer = scenarios.optimizer_of(model)
    with RankZeroRecorder(tmp_path / "run.zarr", model, optimizer, **scenarios.settings()) as recorder:
        scenarios.train(model, optimizer)
    assert recorder.current_step == scenarios.STEPS
    run = hx.open(tmp_path / "run.zarr").load()
    for node in one_process.subtree:
        xr.testing.assert_identical(
            run[node.path].to_dataset().drop_attrs(deep=False), node.to_dataset().drop_attrs(deep=False)
        )


def test_resume__goes_on_from_the_step_of_the_checkpoint(
    tmp_path: Path, one_process: xr.DataTree, scenarios: ModuleType, assert_same_records: Compare
) -> None:
    model = scenarios.network()
    optimizer = scenarios.optimizer_of(model)
    with RankZeroRecorder(tmp_path / "run.zarr", model, optimizer, **scenarios.settings()):
        scenarios.train(model, optimizer)
    again = RankZeroRecorder(
        tmp_path / "run.zarr", model, optimizer, resume=True, start_step=6, **scenarios.settings()
    )
    with again:
        pass
    assert again.current_step == 6
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/committed"], [[1, 1, 1, 1]])
    assert_same_records(run, one_process)


def test_replica__holds_the_buffers_too(tmp_path: Path, scenarios: ModuleType) -> None:
    """The accuracy in eval mode depends on BatchNorm's running statistics."""

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()

    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y = scenarios.data()
    objective = rec.Objective(nn.functional.cross_entropy, x, y)
    with FullyShardedRecorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        replica=build,
        objective=objective,
        probes=[rec.Metrics()],
        schedule=rec.at([scenarios.STEPS]),
    ):
        scenarios.train(model, optimizer)
    run = hx.open(tmp_path / "run.zarr")
    assert run["metrics/train_loss"].values.item() == objective.value(model)
    assert run["metrics/learning_rate"].values.item() == 0.3


def test_error_of_one_process__is_that_of_a_plain_recorder(tmp_path: Path, scenarios: ModuleType) -> None:
    model = scenarios.network()
    for config in ({}, {"width": 5}):
        recorder = RankZeroRecorder(
            tmp_path / "run.zarr",
            model,
            probes=[rec.Weights(layers=["0.bias"])],
            schedule=rec.at([0]),
            config=config,
        )
        if not config:
            with recorder:
                pass
    with pytest.raises(PlanMismatchError, match="config/width"):
        recorder.start()


def test_replica__is_frozen_where_the_model_is(tmp_path: Path, scenarios: ModuleType) -> None:
    """Also if nothing is gathered before the probes plan: frozen layers have no Hessian."""
    model = scenarios.network()
    optimizer = scenarios.optimizer_of(model)
    with FullyShardedRecorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        replica=copy.deepcopy(model).requires_grad_(True),
        objective=rec.Objective(nn.functional.cross_entropy, *scenarios.data()),
        probes=[rec.Hessian(k=1)],
        schedule=rec.at([2]),
    ):
        scenarios.train(model, optimizer)
    layers = hx.open(tmp_path / "run.zarr")["hessian/layer"].values
    assert list(layers) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]
