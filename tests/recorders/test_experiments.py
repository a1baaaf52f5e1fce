from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders import experiments
from hild_xr.recorders.experiments import Experiment
from hild_xr.recorders.problems import Problem


@pytest.mark.parametrize(
    "build",
    [
        experiments.kgmm,
        experiments.xor,
        experiments.xor_wide,
        experiments.digits_softmax,
        experiments.digits_network,
    ],
)
def test_experiments__record_all_they_plan(build: object, tmp_path: Path) -> None:
    whole: Experiment[Problem] = build()
    short = replace(whole, steps=6, schedule=rec.at([0, 2, 6]))
    experiments.record(short, tmp_path / "run.zarr", seeds=(0, 1), progress=False)
    run = hx.open(tmp_path / "run.zarr")
    assert run.attrs["config"]["experiment"] == whole.name
    assert run.attrs["config"]["learning_rate"] == whole.problem.learning_rate
    for name, group in run.children.items():
        assert (group["committed"].values == 1).all(), name
        for node in group.subtree:
            for array in node.to_dataset(inherit=False).data_vars.values():
                if array.name not in ("trace", "converged"):
                    assert np.isfinite(array.values).all(), (node.path, array.name)
                if array.name == "converged":
                    assert array.values.all(), node.path


def test_record__trains_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = replace(experiments.xor(), steps=6, schedule=rec.at([0, 2, 6]))
    problem = short.problem
    model = problem.model(0)
    with (
        pytest.raises(KeyboardInterrupt),
        rec.Recorder(
            tmp_path / "run.zarr",
            model,
            optimizer := problem.optimizer(model),
            objective=short.objective(0),
            probes=short.probes(),
            schedule=short.schedule,
            seeds=(0, 1),
            config=short.config,
        ),
    ):
        problem.train(model, optimizer, steps=3, seed=0)
        raise KeyboardInterrupt
    experiments.record(short, tmp_path / "run.zarr", seeds=(0, 1))
    assert "12/12" in capsys.readouterr().err
    experiments.record(short, tmp_path / "whole.zarr", seeds=(0, 1), progress=False)
    resumed, whole = hx.open(tmp_path / "run.zarr"), hx.open(tmp_path / "whole.zarr")
    for path in (
        "weights/first.weight/weight",
        "hessian/eigenvalues",
        "hessian_rows/first.weight/eigenvectors",
    ):
        np.testing.assert_array_equal(resumed[path].values, whole[path].values)
