"""Spectra of Gauss-Newton, Fisher and centred G-matrices, from a training run to the opened store."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.curvature import FisherMC

STEPS = 6
BETA = 0.02
KINDS: dict[str, Any] = {
    "ggn": rec.GaussNewton,
    "fisher": rec.Fisher,
    "fisher_mc": lambda k, **options: rec.Fisher(k, draws=3, draw_seed=7, **options),
    "gmatrix_centered": lambda k, **options: rec.GMatrix(k, centered=True, **options),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(48, 8, dtype=torch.float64)
    return model, rec.Objective(F.cross_entropy, x, x[:, :3].argmax(1), l2=BETA)


def train(
    path: Path, probes: list[rec.Probe], *, lr: float = 0.3, stop: int = STEPS, start: int = 0
) -> tuple[xr.DataTree, list[nn.Sequential]]:
    """Train on from a step, and return the opened run with the model as it was at each step."""
    model, objective = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    states = [copy.deepcopy(model)]

    def advance(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            objective.mean_loss(model(objective.inputs), objective.targets).backward()
            optimizer.step()
            states.append(copy.deepcopy(model))

    advance(start)
    with rec.Recorder(
        path,
        model,
        optimizer,
        objective=objective,
        probes=probes,
        schedule=rec.every(1, total_steps=STEPS),
        resume=start > 0,
        start_step=start,
    ):
        advance(stop - start)
    return hx.open(path), states


def dense(model: nn.Sequential, kind: str) -> Tensor:
    """Return the whole matrix by its definition, sample by sample."""
    _, objective = problem()
    parameters = list(model.parameters())
    total = torch.zeros(1)
    gradients: list[Tensor] = []
    for x, y in zip(objective.inputs, objective.targets, strict=True):
        logits = model(x)
        jacobian = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, parameters, retain_graph=True)])
                for f in logits
            ]
        )
        p = logits.detach().softmax(0)
        # of softmax and cross-entropy, where the Gauss-Newton matrix is the Fisher matrix
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(objective)
        gradients.append(jacobian.T @ (p - F.one_hot(y, 3)))
    if kind == "gmatrix_centered":
        centred = torch.stack(gradients) - torch.stack(gradients).mean(0)
        return centred.T @ centred / len(centred)
    return total + (BETA * torch.eye(len(total)) if kind == "ggn" else 0)


def test_groups_and_matrices__have_the_kind_in_their_name() -> None:
    assert rec.GaussNewton(2, blocks="rows").group == "ggn_rows"
    assert rec.Fisher(2, blocks={"a": "*"}).group == "fisher_groups"
    assert rec.Fisher(2, draws=2).group == "fisher_mc"
    assert rec.GMatrix(2, centered=True, blocks="model").group == "gmatrix_centered_model"
    assert rec.Density(FisherMC(2), blocks="module").group == "fisher_mc_density_module"
    assert rec.Trace("gmatrix_centered").group == "gmatrix_centered_trace"


def test_recorded_kinds__are_sound_and_those_of_the_dense_matrix(tmp_path: Path) -> None:
    run, states = train(tmp_path / "run.zarr", [make(3, blocks="model", tol=1e-6) for make in KINDS.values()])
    report = hx.validate(tmp_path / "run.zarr")
    assert report.findings == (), report
    for kind in ("ggn", "fisher", "gmatrix_centered"):
        node = run[f"{kind}_model"].isel(seed=0)
        assert node["converged"].values.all()
        for step in (0, STEPS):
            exact = dense(states[step], kind)
            values = node["eigenvalues"].sel(step=step, layer="model").values
            np.testing.assert_allclose(values, torch.linalg.eigvalsh(exact).flip(0)[:3], rtol=1e-8)
            vectors = torch.from_numpy(node["model/eigenvectors"].sel(step=step).values)
            error = vectors @ exact - torch.from_numpy(values)[:, None] * vectors
            assert float(error.norm(dim=1).max()) <= 1e-6 * float(values.max())
    exact = dense(states[STEPS], "fisher")
    drawn = run["fisher_mc_model"].isel(seed=0).sel(step=STEPS)
    vectors = torch.from_numpy(drawn["model/eigenvectors"].values)
    along = torch.einsum("ki,ij,kj->k", vectors, exact, vectors)
    np.testing.assert_allclose(drawn["eigenvalues"].squeeze("layer"), along, rtol=0.5)
    assert not np.allclose(drawn["eigenvalues"].squeeze("layer"), along, rtol=1e-3)


def test_attributes__say_which_matrix_it_is(tmp_path: Path) -> None:
    probes = [make(2) for make in KINDS.values()]
    probes += [rec.Fisher(2, include_regularizer=True, group="regularised"), rec.GMatrix(2)]
    probes += [rec.GMatrix(2, centered=True, include_regularizer=True, group="centred")]
    run, _ = train(tmp_path / "run.zarr", probes, stop=0)
    beta = {name: node.attrs["regularizer"] for name, node in run.children.items()}
    assert beta == {
        "ggn": BETA,
        "fisher": 0.0,
        "fisher_mc": 0.0,
        "gmatrix_centered": 0.0,
        "regularised": BETA,
        "gmatrix": 0.0,
        "centred": 0.0,  # l2 theta goes with the mean
    }
    xr.testing.assert_equal(run["centred/eigenvalues"], run["gmatrix_centered/eigenvalues"])
    shift = run["regularised/eigenvalues"] - run["fisher/eigenvalues"]
    np.testing.assert_allclose(shift, BETA, rtol=1e-6)
    assert {kind: run[kind].attrs["matrix"] for kind in KINDS} == {kind: kind for kind in KINDS}
    assert {kind: run[f"{kind}/0.bias/eigenvectors"].attrs["matrix"] for kind in KINDS} == {
        kind: kind for kind in KINDS
    }
    assert run["fisher_mc"].attrs["draws"] == 3
    assert run["fisher_mc"].attrs["draw_seed"] == 7
    assert "draws" not in run["fisher"].attrs
    assert run["ggn"].attrs["probe"] == "GaussNewton"
    assert run["ggn"].attrs["samples"] == 48


def test_interrupted_run__goes_on_bit_for_bit(tmp_path: Path) -> None:
    def probes() -> list[rec.Probe]:
        found: list[rec.Probe] = [make(2, dense_up_to=0, cold_every=4) for make in KINDS.values()]
        return [*found, rec.Trace("ggn", products=6), rec.Diagonal("fisher", blocks="model", products=6)]

    whole, _ = train(tmp_path / "whole.zarr", probes())
    train(tmp_path / "parts.zarr", probes(), stop=3)
    parts, _ = train(tmp_path / "parts.zarr", probes(), start=3)
    for name, group in whole.children.items():
        for node in group.subtree:
            other = parts[f"{name}/{node.relative_to(group)}"]
            assert other.attrs == node.attrs
            one = node.to_dataset().drop_vars("committed", errors="ignore")
            xr.testing.assert_identical(one, other.to_dataset().drop_vars("committed", errors="ignore"))
    assert bool((whole["ggn/n_matvec"].sel(layer="0.weight", step=1) > 0).all())


@pytest.mark.filterwarnings("ignore::hild_xr.recorders.recorder.NonFiniteRecordWarning")
def test_diverged_run__is_marked_and_training_goes_on(tmp_path: Path) -> None:
    probes = [make(2) for make in KINDS.values()]
    run, states = train(tmp_path / "run.zarr", [*probes, rec.Trace(), rec.Diagonal()], lr=1e308)
    assert len(states) == STEPS + 1
    for kind in KINDS:
        assert run[f"{kind}/eigenvalues"].isel(step=0).notnull().all()
        assert run[f"{kind}/eigenvalues"].isel(step=-1).isnull().all()
    assert run["hessian_trace/trace"].isel(step=-1).isnull().all()
    assert run["hessian_diagonal/0.weight/diagonal"].isel(step=-1).isnull().all()
    assert hx.validate(tmp_path / "run.zarr").ok


def test_fisher_of_a_loss_that_is_no_likelihood__is_refused_before_a_store_is_made(tmp_path: Path) -> None:
    model, objective = problem()

    def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    other = rec.Objective(smoothed, objective.inputs, objective.targets)
    for probe in (rec.Fisher(1), rec.Fisher(1, draws=2)):
        with (
            pytest.raises(ValueError, match="negative log-likelihood"),
            rec.Recorder(tmp_path / "run.zarr", model, objective=other, probes=[probe], schedule=rec.at([0])),
        ):
            pass
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rec.Fisher(1, draws=0), "draws"),
        (lambda: rec.Trace(products=1), "products, the budget of a sub-block, must be at least 2"),
        (lambda: rec.Diagonal("kfac"), "matrix must be one of 'hessian'"),
    ],
)
def test_settings_that_cannot_be__are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="or a mapping of labels"):
        rec.FrobeniusNorm(blocks=["0.weight"])
