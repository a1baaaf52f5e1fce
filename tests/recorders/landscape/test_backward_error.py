"""Backward error analysis: closed forms of one dimension, and orders of convergence."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.landscape import discretization_error, modified_loss


def parabola(a: float, start: float = 1.0) -> tuple[nn.Linear, rec.Objective]:
    """L = a w^2 / 2."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    one = torch.ones(1, 1, dtype=torch.float64)
    return model, rec.Objective(lambda out, y: 0.5 * a * (out - y).square().mean(), one, 0 * one)


def net(samples: int = 16) -> tuple[nn.Module, list[rec.Objective]]:
    """A smooth network and its data in two batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.randn(samples, 2, dtype=torch.float64)
    half = samples // 2
    return model, [rec.Objective(F.mse_loss, x[s], y[s], l2=0.01) for s in (slice(half), slice(half, None))]


@pytest.mark.parametrize("a", [0.5, 3.0])
@pytest.mark.parametrize("learning_rate", [0.01, 0.1, 0.3])
def test_errors__on_a_parabola_have_their_closed_form(a: float, learning_rate: float) -> None:
    model, objective = parabola(a)
    h = learning_rate * a
    plain = discretization_error(model, objective, learning_rate)
    assert float(plain) == pytest.approx(abs(math.exp(-h) - (1 - h)), rel=1e-6, abs=1e-12)
    corrected = discretization_error(model, objective, learning_rate, corrected=True)
    assert float(corrected) == pytest.approx(abs(math.exp(-h * (1 + h / 2)) - (1 - h)), rel=1e-5, abs=1e-12)
    assert plain.attrs["units"] == "1"
    modified = modified_loss(model, objective, learning_rate)
    assert float(modified) == pytest.approx(a / 2 + learning_rate / 4 * a**2, rel=1e-12)


def orders(errors: list[float]) -> list[float]:
    return [math.log2(big / small) for big, small in pairwise(errors)]


@pytest.mark.parametrize(("corrected", "order"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("batches", ["one", "in turn", "the other way round"])
def test_error__falls_with_the_second_power_and_the_third_when_corrected(
    corrected: bool, order: int, batches: str
) -> None:
    model, objectives = net()
    taken = {"one": objectives[:1], "in turn": objectives, "the other way round": objectives[::-1]}[batches]
    errors = [
        float(discretization_error(model, taken, rate, corrected=corrected))
        for rate in (0.04, 0.02, 0.01, 0.005)
    ]
    assert min(errors) > 1e-9, "the solver's own error would hide the order"
    np.testing.assert_allclose(orders(errors), order, atol=0.1)


def test_correction__is_the_gradient_of_the_modified_loss() -> None:
    model, (objective, _) = net()
    rate, step = 0.1, 1e-5
    slopes = []
    for parameter in model.parameters():
        for i in range(parameter.numel()):
            values = []
            for move in (step, -step):
                with torch.no_grad():
                    parameter.view(-1)[i] += move
                values.append(float(modified_loss(model, objective, rate)))
                with torch.no_grad():
                    parameter.view(-1)[i] -= move
            slopes.append((values[0] - values[1]) / (2 * step))
    from hild_xr.recorders.landscape.backward_error import _velocity
    from hild_xr.recorders.landscape.loss_surface import LossSurface

    with LossSurface(model, objective) as surface:
        velocity = _velocity([surface], surface.start, rate, corrected=True)
    np.testing.assert_allclose(velocity.numpy(), -np.array(slopes), rtol=1e-6, atol=1e-8)


def test_modified_loss__of_sgd_takes_the_mean_square_of_its_batches() -> None:
    model, batches = net()
    whole = rec.Objective(
        F.mse_loss,
        torch.cat([torch.as_tensor(b.inputs) for b in batches]),
        torch.cat([b.targets for b in batches]),
        l2=0.01,
    )
    squares = []
    for batch in batches:
        penalty = 0.005 * sum(p.square().sum() for p in model.parameters())
        loss = F.mse_loss(model(batch.inputs), batch.targets) + penalty
        slope = torch.autograd.grad(loss, list(model.parameters()))
        squares.append(sum(float(g.square().sum()) for g in slope))
    expected = whole.value(model) + 0.25 * 0.2 * np.mean(squares)
    assert float(modified_loss(model, whole, 0.2, batches=batches)) == pytest.approx(expected, rel=1e-10)
    assert float(modified_loss(model, whole, 0.2)) < expected, "noise of the batches adds to it"


def test_error__leaves_the_model_alone() -> None:
    model, objectives = net()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    discretization_error(model, objectives, 0.1, corrected=True)
    modified_loss(model, objectives[0], 0.1)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_error__of_a_diverged_model_is_missing() -> None:
    model, objective = parabola(1.0, start=math.nan)
    assert math.isnan(discretization_error(model, objective, 0.1))
    assert math.isnan(modified_loss(model, objective, 0.1))


def test_flow__into_what_is_not_defined_is_missing() -> None:
    model, one = nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1, dtype=torch.float64)
    nn.init.constant_(model.weight, 0.1)
    objective = rec.Objective(lambda out, y: (out * y).sqrt().mean(), one, one)
    # the step ends below 0, where the root is not real; the flow reaches 0 in finite time
    assert math.isnan(discretization_error(model, objective, 1.0))


def test_settings__that_cannot_be_are_refused() -> None:
    model, objective = parabola(1.0)
    for rate in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="learning rate"):
            modified_loss(model, objective, rate)
        with pytest.raises(ValueError, match="learning rate"):
            discretization_error(model, objective, rate)
    with pytest.raises(ValueError, match="no objective"):
        discretization_error(model, [], 0.1)
    with pytest.raises(ValueError, match="no objective"):
        modified_loss(model, objective, 0.1, batches=[])
    with pytest.raises(ValueError, match="rtol"):
        discretization_error(model, objective, 0.1, rtol=0.0)
