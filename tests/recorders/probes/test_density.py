"""Densities from a training run to the opened store."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.curvature import Curvature

STEPS = 4
NUMBERS = ("trace", "trace_standard_error", "quadrature_error", "sampling_error", "product_error", "n_matvec")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(64, 24, dtype=torch.float64)
    return model, rec.Objective(F.cross_entropy, x, x[:, :3].argmax(1), l2=0.02)


def record(
    path: Path, probes: list[rec.Probe], after_step: Any = None, lr: float = 0.3
) -> tuple[xr.DataTree, list[nn.Sequential]]:
    """Train, and return the opened run with the model as it was at each record."""
    model, objective = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    states = [copy.deepcopy(model)]
    with rec.Recorder(
        path, model, optimizer, objective=objective, probes=probes, schedule=rec.every(1, total_steps=STEPS)
    ):
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            objective.mean_loss(model(objective.inputs), objective.targets).backward()
            if after_step is not None:
                after_step(step, model)
            optimizer.step()
            states.append(copy.deepcopy(model))
    return hx.open(path), states


def probes() -> list[rec.Probe]:
    return [
        rec.Density(k_steps=12, probes=3, n_nodes=30),
        rec.Density("gmatrix", blocks="rows", k_steps=12, n_nodes=30),
        rec.Density(blocks={"all": "*"}, k_steps=12, n_nodes=30, precision="bfloat16"),
    ]


def test_density__reaches_the_store_and_is_sound(tmp_path: Path) -> None:
    run, states = record(tmp_path / "run.zarr", probes())
    report = hx.validate(tmp_path / "run.zarr")
    assert report.findings == (), report
    group = run["hessian_density"]
    assert group["quadrature_nodes"].dims == ("seed", "step", "layer", "probe", "node")
    assert group["quadrature_weights"].dtype == np.float64
    assert group.attrs["matrix"] == "hessian"
    assert group.attrs["regularizer"] == 0.02
    rows = run["gmatrix_density_rows/0.weight"]
    assert rows["quadrature_nodes"].dims == ("seed", "step", "out", "probe", "node")
    assert run["gmatrix_density_rows"].attrs["regularizer"] == 0.0
    for step, model in enumerate(states):
        with Curvature(model, problem()[1]) as curvature:
            found = curvature.density(k_steps=12, probes=3, n_nodes=30)
            spectra = curvature.eigenpairs(1, matrix_up_to=10_000)
        for label, density in found.items():
            stored = group.to_dataset().sel(layer=label, step=step).squeeze("seed")
            assert np.array_equal(stored["quadrature_nodes"], density.nodes)
            assert np.array_equal(stored["quadrature_weights"], density.weights)
            exact = spectra[label].matrix.diagonal().sum()
            error = float(stored["trace_standard_error"])
            assert abs(float(stored["trace"]) - float(exact)) <= 4 * error + 1e-9
            mean = (stored["quadrature_weights"] * stored["quadrature_nodes"]).sum("node").mean("probe")
            assert float(mean) * states[0].get_parameter(label).numel() == pytest.approx(
                float(stored["trace"])
            )


def test_density__says_which_blocks_are_exact(tmp_path: Path) -> None:
    run, _ = record(tmp_path / "run.zarr", probes())
    group = run["hessian_density"].to_dataset()
    small, large = group.sel(layer="0.bias"), group.sel(layer="0.weight")
    assert (small["sampling_error"] == 0).all()
    assert (small["trace_standard_error"] == 0).all()
    assert (large["sampling_error"] > 0).all()
    assert (large["n_matvec"] == 36).all()
    rows = run["gmatrix_density_rows/0.weight"]
    assert (rows["trace_standard_error"] == 0).all()
    np.testing.assert_allclose(rows["quadrature_weights"].sum("node"), 1)


def test_density__is_the_same_bits_for_the_same_seed(tmp_path: Path) -> None:
    one, _ = record(tmp_path / "one.zarr", probes())
    two, _ = record(tmp_path / "two.zarr", probes())
    for group in ("hessian_density", "hessian_density_groups", "gmatrix_density_rows/0.weight"):
        for name in ("quadrature_nodes", "quadrature_weights", *NUMBERS):
            assert np.array_equal(one[f"{group}/{name}"], two[f"{group}/{name}"])


def test_density__leaves_training_as_it_was(tmp_path: Path) -> None:
    _, with_probe = record(tmp_path / "one.zarr", probes())
    _, without = record(tmp_path / "two.zarr", [rec.Metrics()])
    for one, two in zip(with_probe[-1].parameters(), without[-1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.get_float32_matmul_precision() == "highest"


def test_density__of_a_layer_frozen_on_the_way_is_missing(tmp_path: Path) -> None:
    def freeze(step: int, model: nn.Module) -> None:
        model.get_parameter("0.weight").requires_grad_(step < 3)

    run, _ = record(tmp_path / "run.zarr", probes(), freeze)
    nodes = run["hessian_density/quadrature_nodes"].sel(layer="0.weight").squeeze("seed")
    assert nodes.isnull().all(["probe", "node"]).values.tolist() == [False] * 3 + [True] * 2
    assert run["hessian_density/quadrature_nodes"].sel(layer="2.weight").notnull().all()
    assert run["gmatrix_density_rows/0.weight/trace"].isel(step=-1).isnull().all()


@pytest.mark.filterwarnings("ignore::hild_xr.recorders.recorder.NonFiniteRecordWarning")
def test_density__of_a_diverged_run_is_marked(tmp_path: Path) -> None:
    run, _ = record(tmp_path / "run.zarr", probes(), lr=1e308)
    nodes = run["hessian_density/quadrature_nodes"]
    assert nodes.isel(step=0).notnull().all()
    assert nodes.isel(step=-1).isnull().all()
    assert hx.validate(tmp_path / "run.zarr").ok


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrix": "hesian"}, "matrix must be one of 'hessian'"),
        ({"k_steps": 0}, "k_steps must be at least 1"),
        ({"precision": "half"}, "precision must be one of"),
    ],
)
def test_density__refuses_settings_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rec.Density(**settings)
