"""Recorded kernels against activations and explicit Jacobians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.analysis import relative_drift
from hild_xr.recorders.curvature import conjugate_kernel


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def jacobian(model: nn.Module, names: list[str] | None = None) -> Tensor:
    """Derivatives of all outputs by the parameters, (samples, outputs, parameters), one by one."""
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]
    model.eval()
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in model(X).reshape(-1)
    ]
    model.train()
    return torch.stack(rows).reshape(len(X), -1, rows[0].numel())


def recorded(probe: rec.Probe, model: nn.Module) -> dict[str, Any]:
    probe.plan(model, None, None)
    values = probe.record(rec.Snapshot(model, None, None, 0))
    return {node: np.asarray(*arrays.values()) for node, arrays in values.items()}


@pytest.mark.parametrize("batch_size", [None, 5])
def test_tangent_kernel__is_that_of_explicit_jacobians(batch_size: int | None) -> None:
    model = net()
    J = jacobian(model).numpy()
    options = {"batch_size": batch_size}
    found = recorded(rec.TangentKernel(X, **options), model)[""]
    np.testing.assert_allclose(found, np.einsum("mcp,ncp->mn", J, J), rtol=1e-10)
    found = recorded(rec.TangentKernel(X, output=1, **options), model)[""]
    np.testing.assert_allclose(found, J[:, 1] @ J[:, 1].T, rtol=1e-10)
    J = jacobian(model, ["3.weight"]).numpy()
    found = recorded(rec.TangentKernel(X, layers=["3.weight"], **options), model)[""]
    np.testing.assert_allclose(found, np.einsum("mcp,ncp->mn", J, J), rtol=1e-10)


@pytest.mark.parametrize("side", ["output", "input"])
def test_conjugate_kernel__is_the_mean_product_of_activations(side: Any) -> None:
    model = net()
    features = rec.Features(X, side=side)
    features.plan(model, None, None)
    activations = features.record(rec.Snapshot(model, None, None, 0))
    found = recorded(rec.ConjugateKernel(X, side=side), model)
    assert list(found) == ["0", "3"]
    for name, kernel in found.items():
        a = np.asarray(activations[name]["activations"])
        np.testing.assert_allclose(kernel, a @ a.T / a.shape[1], rtol=1e-12)
        if side == "output":
            np.testing.assert_allclose(kernel, conjugate_kernel(model, X, name).numpy(), rtol=1e-12)


def test_kernels__are_stored_at_each_step(tmp_path: Path) -> None:
    model = net()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        probes=[rec.ConjugateKernel(X), rec.TangentKernel(X, output=2, layers=["0.weight"])],
        schedule=rec.every(1, total_steps=1),
    ) as recorder:
        with torch.no_grad():
            model.get_parameter("3.weight").mul_(2.0)
            model.get_parameter("3.bias").mul_(2.0)
        recorder.step()
    run = hx.open(tmp_path / "run.zarr")
    tangent, conjugate = run["tangent_kernel/tangent_kernel"], run["conjugate_kernel/3/conjugate_kernel"]
    for kernel in (tangent, conjugate):
        assert kernel.dims == ("seed", "step", "sample", "sample_")
        assert kernel.dtype == np.float64
        # the outputs double, and so do their derivatives by the first layer
        np.testing.assert_allclose(kernel.values[0, 1], 4 * kernel.values[0, 0], rtol=1e-12)
        np.testing.assert_allclose(kernel.values, kernel.values.swapaxes(-1, -2), rtol=1e-12)
        # of the whole kernel, without arguments: it is four times what it was
        drift = relative_drift(kernel, 0)
        assert drift.dims == ("seed", "step")
        np.testing.assert_allclose(drift, [[0.0, 3.0]], rtol=1e-12)
    assert conjugate.attrs["side"] == "output"
    assert run["tangent_kernel"].attrs["output"] == 2
    assert run["tangent_kernel"].attrs["layers"] == ["0.weight"]


def test_kernels__of_half_precision_models_are_stored_in_float32() -> None:
    model, x = net().to(torch.bfloat16), X.to(torch.bfloat16)
    for probe in (rec.ConjugateKernel(x), rec.TangentKernel(x)):
        for node in probe.plan(model, None, None).values():
            (array,) = node.arrays.values()
            assert array.dtype == "float32"
        for kernel in recorded(probe, model).values():
            assert kernel.dtype == np.float32


def test_tangent_kernel__of_a_layer_frozen_since_planning_is_missing() -> None:
    model = net()
    probe = rec.TangentKernel(X, layers=["0.weight"])
    probe.plan(model, None, None)
    model.get_parameter("0.weight").requires_grad_(False)
    kernel = np.asarray(probe.record(rec.Snapshot(model, None, None, 0))[""]["tangent_kernel"])
    assert kernel.shape == (12, 12)
    assert np.isnan(kernel).all()


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x).sum(0)
        return out


@pytest.mark.parametrize(
    ("options", "model", "words"),
    [
        ({"output": 3}, net(), "the model has 3 outputs, numbered from 0; there is no 3"),
        ({"output": -1}, net(), "there is no -1"),
        ({"layers": ["0.wieght"]}, net(), "did you mean"),
        ({}, Summed(), r"one tensor with a row for each sample, got \(2,\)"),
    ],
)
def test_tangent_kernel__that_cannot_be_is_refused_when_planned(
    options: Any, model: nn.Module, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        rec.TangentKernel(X.to(next(model.parameters()).dtype), **options).plan(model, None, None)


def test_tangent_kernel__takes_the_number_of_an_output() -> None:
    output: Any = "full"
    with pytest.raises(TypeError, match="the number of an output, or None for their sum; got 'full'"):
        rec.TangentKernel(X, output=output)
