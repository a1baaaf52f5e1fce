"""Real experiments killed while they train and taken up from their last checkpoint."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.problems import Digits, XorMixture
from hild_xr.recorders.problems.problem import Problem

STEPS, BETWEEN_CHECKPOINTS = 600, 40


def _digits() -> tuple[Problem, rec.Objective, list[rec.Probe]]:
    problem = Digits(hidden=32)
    probes = [
        rec.Metrics(test=problem.objective("test")),
        rec.Weights(schedule=rec.every(7, total_steps=STEPS)),
        rec.Hessian(4, layers=["fc1.weight", "fc2.weight"]),
        rec.GMatrix(4, blocks="rows", layers=["fc2.weight"]),
    ]
    return problem, problem.objective("train"), probes


def _xor() -> tuple[Problem, rec.Objective, list[rec.Probe]]:
    problem = XorMixture(dimension=60, hidden=4, snr=50.0, beta=0.1, planted_centres=(3,))
    probes = [
        rec.Metrics(),
        rec.Weights(schedule=rec.every(1, total_steps=STEPS)),
        rec.Hessian(4, layers=["second.weight"], matrix_up_to=4),
        rec.GMatrix(3, blocks="rows", layers=["first.weight"]),
    ]
    return problem, problem.objective(500, seed=0), probes


Experiment = Callable[[], tuple[Problem, rec.Objective, list[rec.Probe]]]


def _train(experiment: Experiment, folder: Path, told: Any = None) -> None:
    """Train from the last checkpoint on, as a user's script would, and record."""
    torch.set_num_threads(1)
    problem, objective, probes = experiment()
    model = problem.model(seed=0)
    optimizer = problem.optimizer(model)
    if told is not None:
        optimizer.register_step_post_hook(lambda *_: setattr(told, "value", told.value + 1))
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if told is not None:
        told.value = start
    with rec.Recorder(
        folder / "run.zarr",
        model,
        optimizer,
        objective=objective,
        probes=probes,
        schedule=rec.every(25, total_steps=STEPS),
        resume=True,
        start_step=start,
    ) as recorder:
        for step in range(start, STEPS, BETWEEN_CHECKPOINTS):
            problem.train(model, optimizer, steps=BETWEEN_CHECKPOINTS, seed=0, start_step=step)
            recorder.flush()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": recorder.current_step,
            }
            torch.save(state, folder / "checkpoint.new")
            (folder / "checkpoint.new").rename(checkpoint)


@pytest.mark.parametrize("experiment", [_digits, _xor])
def test_killed_and_resumed_run__equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, experiment: Experiment
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    _train(experiment, whole)
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    for kill_at in (*sorted(draw.sample(range(10, STEPS - 10), 5)), None):
        told = context.Value("i", -1, lock=False)  # a killed child would hold the lock for ever
        child = context.Process(target=_train, args=(experiment, killed, told))
        child.start()
        while child.is_alive() and (kill_at is None or told.value < kill_at):
            time.sleep(0.0005)
        if kill_at is not None:
            assert child.is_alive(), "the child ended before it was killed"
            child.kill()
        child.join()
        assert child.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    one, other = hx.open(whole / "run.zarr"), hx.open(killed / "run.zarr")
    compared = 0
    for node in one.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            stored = other[node.path][name]
            if name == "committed":
                assert (stored.values > 0).all()
            else:
                np.testing.assert_array_equal(stored.values, array.values, err_msg=f"{node.path}/{name}")
                compared += 1
    assert compared >= 10
