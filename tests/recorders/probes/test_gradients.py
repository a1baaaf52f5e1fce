"""The recorded gradient against one backward pass of the whole objective."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.curvature import NonFiniteCurvatureError
from hild_xr.recorders.probes.gradients import objective_gradient

L2 = 0.3


class Net(nn.Module):
    """Dropout and BatchNorm behave otherwise in training; one parameter is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop, self.unused = nn.Dropout(0.5), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.drop(self.norm(self.fc1(x)).relu()))
        return out


def start(samples: int = 20, batch_size: int | None = None) -> tuple[Net, rec.Objective]:
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(samples, 6, dtype=torch.float64), torch.randint(3, (samples,))
    return model, rec.Objective(F.cross_entropy, x, y, l2=L2, batch_size=batch_size)


def by_autograd(model: nn.Module, objective: rec.Objective) -> dict[str, torch.Tensor]:
    """The slow, obvious version: loss and penalty in one graph, in eval mode."""
    model.eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    penalty = 0.5 * objective.l2 * sum(p.square().sum() for p in trainable.values())
    loss = F.cross_entropy(model(objective.inputs), objective.targets) + penalty
    found = torch.autograd.grad(loss, list(trainable.values()))
    model.train()
    return dict(zip(trainable, found, strict=True))


@pytest.mark.parametrize("batch_size", [None, 7])
def test_gradient__is_that_of_the_regularised_loss_in_eval_mode(batch_size: int | None) -> None:
    model, objective = start(batch_size=batch_size)
    expected = by_autograd(model, objective)
    found = objective_gradient(model, objective, list(expected))
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["unused"], L2 * torch.ones(4, dtype=torch.float64))


def test_gradient__is_the_slope_of_the_objective() -> None:
    model, objective = start()
    (gradient,) = objective_gradient(model, objective, ["fc1.weight"]).values()
    direction = torch.randn_like(gradient)
    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            model.fc1.weight.add_(direction, alpha=h)
        values.append(objective.value(model))
        with torch.no_grad():
            model.fc1.weight.add_(direction, alpha=-h)
    slope = (values[0] - values[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_measuring__leaves_the_model_as_it_was() -> None:
    model, objective = start()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    objective_gradient(model, objective, ["fc2.weight"])
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_record__holds_the_gradient_of_each_step(tmp_path: Path) -> None:
    model, objective = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [by_autograd(model, objective)]
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=objective,
        probes=[rec.Gradient()],
        schedule=rec.every(1, total_steps=2),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(objective.inputs), objective.targets).backward()
            optimizer.step()
            expected.append(by_autograd(model, objective))
    run = hx.open(tmp_path / "run.zarr")
    assert run["gradients"].attrs["regularizer"] == L2
    assert run["gradients"].attrs["samples"] == 20
    for name in ("fc1.weight", "fc2.bias", "norm.weight"):
        stored = run[f"gradients/{name}/gradient"]
        assert stored.attrs["vector_dims"] == list(stored.dims[2:])
        assert stored.attrs["long_name"] == "gradient"
        exact = np.stack([gradients[name].numpy() for gradients in expected])
        np.testing.assert_allclose(stored.values[0], exact, rtol=1e-9, atol=1e-14)
    assert run["gradients/fc1.weight/gradient"].dims == ("seed", "step", "out", "in")


def test_layers__select_and_frozen_ones_are_refused() -> None:
    model, _ = start()
    assert list(rec.Gradient(layers=["fc2.bias"]).plan(model, None, None)) == ["fc2.bias"]
    model.fc1.weight.requires_grad_(False)
    assert "fc1.weight" not in rec.Gradient().plan(model, None, None)
    with pytest.raises(ValueError, match=r"'fc1.weight' is frozen"):
        rec.Gradient(layers=["fc1.weight"]).plan(model, None, None)
    with pytest.raises(ValueError, match=r"did you mean 'fc2\.bias'"):
        rec.Gradient(layers=["fc2.bais"]).plan(model, None, None)


def test_layer_frozen_after_planning__is_missing() -> None:
    model, objective = start()
    probe = rec.Gradient(sketch=16)
    probe.plan(model, None, objective)
    for parameter in model.fc1.parameters():
        parameter.requires_grad_(False)
    expected = by_autograd(model, objective)["fc2.bias"]
    found = probe.record(rec.Snapshot(model, None, objective, 0))
    assert np.isnan(np.asarray(found["fc1.weight"]["gradient"])).all()
    assert np.asarray(found["fc1.weight"]["gradient"]).shape == (16,)
    np.testing.assert_allclose(np.asarray(found["fc2.bias"]["gradient"]), expected.numpy(), rtol=1e-10)
    model.requires_grad_(False)
    found = probe.record(rec.Snapshot(model, None, objective, 0))
    assert all(np.isnan(np.asarray(node["gradient"])).all() for node in found.values())


def test_gradient_that_is_not_finite__names_the_layer_and_is_recorded_as_missing(tmp_path: Path) -> None:
    model, objective = start()
    with torch.no_grad():
        model.fc2.bias[0] = math.nan
    with pytest.raises(NonFiniteCurvatureError, match=r"the gradient of 'fc2\.weight'"):
        objective_gradient(model, objective, ["fc2.weight"])
    with (
        pytest.warns(rec.NonFiniteRecordWarning, match=r"the gradient of 'fc1\.weight'"),
        rec.Recorder(
            tmp_path / "run.zarr",
            model,
            objective=objective,
            probes=[rec.Gradient()],
            schedule=rec.at([0]),
        ),
    ):
        pass
    run = hx.open(tmp_path / "run.zarr")
    assert run["gradients/fc1.weight/gradient"].isnull().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_models__are_summed_and_stored_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).to(dtype)
    x, y = torch.randn(20, 6).to(dtype), torch.randint(3, (20,))
    objective = rec.Objective(F.cross_entropy, x, y, batch_size=7)
    array = rec.Gradient().plan(model, None, objective)["weight"].arrays["gradient"]
    found = objective_gradient(model, objective, ["weight"])["weight"]
    assert array.dtype == "float32"
    assert found.dtype == torch.float32
    exact = objective_gradient(model.float(), rec.Objective(F.cross_entropy, x.float(), y), ["weight"])[
        "weight"
    ]
    torch.testing.assert_close(found, exact, rtol=0.05, atol=5e-3)


def test_loss_without_parameters__says_so() -> None:
    model, _ = start()
    objective = rec.Objective(
        lambda outputs, targets: F.cross_entropy(outputs.detach(), targets),
        torch.randn(4, 6, dtype=torch.float64),
        torch.randint(3, (4,)),
    )
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        objective_gradient(model, objective, ["fc1.weight"])


def test_gradient__without_objective_is_refused(tmp_path: Path) -> None:
    recorder = rec.Recorder(tmp_path / "run.zarr", start()[0], probes=[rec.Gradient()], schedule=rec.at([0]))
    with pytest.raises(ValueError, match=r"\['gradients'\] need an objective"):
        recorder.plan()
