"""Traces, Frobenius norms and diagonals from a training run to the opened store."""

from __future__ import annotations

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

STEPS = 3
GROUPS = {"all": "*", "biases": ["*.bias"]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(32, 12)
    return model, rec.Objective(F.cross_entropy, x, x[:, :3].argmax(1), l2=0.1)


def record(path: Path, probes: list[rec.Probe], after_step: Any = None) -> tuple[xr.DataTree, nn.Sequential]:
    model, objective = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with rec.Recorder(
        path, model, optimizer, objective=objective, probes=probes, schedule=rec.every(1, total_steps=STEPS)
    ):
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            objective.mean_loss(model(objective.inputs), objective.targets).backward()
            if after_step is not None:
                after_step(step, model)
            optimizer.step()
    return hx.open(path), model


def all_probes(blocks: Any) -> list[rec.Probe]:
    return [probe(blocks=blocks, products=20) for probe in (rec.Trace, rec.FrobeniusNorm, rec.Diagonal)]


@pytest.mark.parametrize("blocks", ["layer", "rows", GROUPS])
def test_estimates__are_within_their_errors_of_the_whole_matrix(tmp_path: Path, blocks: Any) -> None:
    run, model = record(tmp_path / "run.zarr", all_probes(blocks))
    report = hx.validate(tmp_path / "run.zarr")
    assert report.findings == (), report
    suffix = {"layer": "", "rows": "_rows"}.get(str(blocks), "_groups")
    with Curvature(model, problem()[1], dtype=torch.float64) as curvature:
        spectra = curvature.eigenpairs(1, "hessian", blocks, matrix_up_to=10_000)
    n_exact = 0
    for label, spectrum in spectra.items():
        assert spectrum.matrix is not None
        exact = {
            "trace": spectrum.trace,
            "frobenius_norm": spectrum.matrix.square().sum((-1, -2)).sqrt(),
            "diagonal": spectrum.matrix.diagonal(dim1=-2, dim2=-1),
        }
        for name, expected in exact.items():
            group = run[f"hessian_{name}{suffix}"].isel(seed=0, step=-1)
            in_node = blocks == "rows" or name == "diagonal"
            found = group[label].to_dataset() if in_node else group.to_dataset().sel(layer=label)
            values = found[name].values.reshape(expected.shape)
            errors = found[f"{name}_standard_error"].values.reshape(expected.shape)
            assert found[name].dtype == (np.float32 if name == "diagonal" else np.float64)
            # five standard errors: hundreds of entries are looked at
            assert np.all(
                np.abs(values - expected.numpy()) <= 5 * errors + 1e-4 * np.abs(expected.numpy()).max()
            )
            n_exact += int((errors == 0).all())
            products = found["n_matvec"] if blocks == "rows" else group["n_matvec"].sel(layer=label)
            assert int(products.max()) <= 20
    assert n_exact > 0


def test_diagonal__lies_on_the_dims_of_the_weights(tmp_path: Path) -> None:
    probes: list[rec.Probe] = [rec.Diagonal(), rec.Diagonal(blocks="rows"), rec.Diagonal(blocks=GROUPS)]
    run, model = record(tmp_path / "run.zarr", [*probes, rec.Weights()])
    by_layer = run["hessian_diagonal/0.weight/diagonal"]
    assert by_layer.dims == run["weights/0.weight/weight"].dims == ("seed", "step", "out", "in")
    assert by_layer.attrs["vector_dims"] == ["out", "in"]
    by_row = run["hessian_diagonal_rows/0.weight/diagonal"]
    assert by_row.dims == by_layer.dims
    assert by_row.attrs["vector_dims"] == ["in"]
    flat = run["hessian_diagonal_groups/all/diagonal"]
    assert flat.dims == ("seed", "step", "param")
    assert flat.attrs["layers"] == [name for name, _ in model.named_parameters()]
    weights = run["weights"].hild.flatten_like(flat)
    assert weights.sizes["param"] == flat.sizes["param"]
    # both are exact: they are the same numbers
    np.testing.assert_allclose(by_row, by_layer, rtol=1e-4, atol=1e-6)


def test_block_frozen_on_the_way__is_missing(tmp_path: Path) -> None:
    def freeze(step: int, model: nn.Module) -> None:
        model.get_parameter("0.bias").requires_grad_(step < 2)

    run, _ = record(tmp_path / "run.zarr", all_probes("layer"), freeze)
    assert hx.validate(tmp_path / "run.zarr").ok
    for values in (
        run["hessian_trace/trace"].sel(layer="0.bias").isel(seed=0),
        run["hessian_diagonal/0.bias/diagonal"].isel(seed=0, out=0),
    ):
        assert values.isnull().values.tolist() == [False, False, True, True]
    assert run["hessian_trace/trace"].sel(layer="0.weight").notnull().all()


def test_estimates__are_the_same_bits_for_the_same_seed(tmp_path: Path) -> None:
    one, _ = record(tmp_path / "one.zarr", [rec.Trace(products=4, seed=1)])
    two, _ = record(tmp_path / "two.zarr", [rec.Trace(products=4, seed=1)])
    other, _ = record(tmp_path / "other.zarr", [rec.Trace(products=4, seed=2)])
    xr.testing.assert_identical(one["hessian_trace"].to_dataset(), two["hessian_trace"].to_dataset())
    assert not one["hessian_trace/trace"].equals(other["hessian_trace/trace"])
    assert other["hessian_trace"].attrs["probe_seed"] == 2
