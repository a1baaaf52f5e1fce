"""Runs of a real recorder are sound: what the solvers return obeys what ``hild-xr validate`` asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec


def _train(path: Path, *, lr: float = 0.1, steps: int = 30) -> None:
    """Train a network of the size of the digits example, on data of its shape."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with rec.Recorder(
        path,
        model,
        optimizer,
        objective=rec.Objective(F.cross_entropy, x, y),
        probes=[
            rec.Metrics(),
            rec.Weights(),
            rec.Hessian(k=10, matrix_up_to=32),
            rec.Hessian(k=3, which="largest", group="largest"),
            rec.Hessian(k=3, blocks="model", max_matvec=8),  # too few products: unconverged pairs
            rec.GMatrix(k=10, blocks="rows"),
            rec.GMatrix(k=10),
        ],
        schedule=rec.every(10, total_steps=steps),
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_recorded_run__is_sound(tmp_path: Path) -> None:
    _train(tmp_path / "run.zarr")
    report = hx.validate(tmp_path / "run.zarr")
    assert report.findings == (), report
    run = hx.open(tmp_path / "run.zarr")
    assert not run["hessian_model/converged"].values.all()
    assert run["hessian/converged"].values.any()


def test_diverged_run__is_sound_with_notes(tmp_path: Path) -> None:
    with pytest.warns(rec.recorder.NonFiniteRecordWarning):
        _train(tmp_path / "run.zarr", lr=1e38)
    report = hx.validate(tmp_path / "run.zarr")
    assert report.ok, report
    noted = {finding.place for finding in report.notes}
    assert noted >= {"metrics", "hessian", "gmatrix"}
    assert all(finding.steps is not None and finding.steps[0] > 0 for finding in report.notes)


def test_solver_fault__would_be_found(tmp_path: Path) -> None:
    import zarr

    _train(tmp_path / "run.zarr", steps=10)
    vectors = zarr.open_array(tmp_path / "run.zarr/gmatrix_rows/2.weight/eigenvectors", mode="r+")
    vectors[0, 1, 3, 9] = np.asarray(vectors[0, 1, 3, 8])
    (finding,) = hx.validate(tmp_path / "run.zarr").errors
    assert finding.place == "gmatrix_rows/2.weight/eigenvectors"
    assert finding.steps == (10, 10)
