"""Sharpness against the exact maximum of quadratic losses and a search of the circle."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.landscape import sharpness


def quadratic(theta: NDArray[np.float64], seed: int) -> tuple[nn.Linear, rec.Objective, NDArray[np.float64]]:
    """L = theta^T H theta / 2 as a mean squared error, with its Hessian."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, len(theta))) * np.linspace(0.5, 2, len(theta))
    model = nn.Linear(len(theta), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta)[None])
    objective = rec.Objective(F.mse_loss, torch.from_numpy(x), torch.zeros(20, 1, dtype=torch.float64))
    return model, objective, 2 * x.T @ x / 20


def exact_rise(H: NDArray[np.float64], g: NDArray[np.float64], rho: float) -> float:
    """Maximum of g.e + e.H.e/2 over |e| <= rho, by the secular equation of the trust region."""
    values, vectors = np.linalg.eigh(H)
    c = vectors.T @ g
    top = values[-1]
    nu = brentq(
        lambda shift: np.linalg.norm(c / (top + shift - values)) - rho, 1e-14, 1e3 * (1 + np.linalg.norm(c))
    )
    e = c / (top + nu - values)
    return float(c @ e + 0.5 * values @ e**2)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.05, 3.0))
def test_ascent__finds_the_maximum_of_a_quadratic_in_the_ball(seed: int, rho: float) -> None:
    theta = np.random.default_rng(seed).normal(size=5)
    model, objective, H = quadratic(theta, seed)
    found = sharpness(model, objective, rho, steps=100)
    g = H @ theta
    e = rho * g / np.linalg.norm(g)
    assert float(found.sam_sharpness) == pytest.approx(g @ e + 0.5 * e @ H @ e, rel=1e-9)
    exact = exact_rise(H, g, rho)
    assert float(found.ascent_sharpness) == pytest.approx(exact, rel=1e-4)
    assert float(found.sam_sharpness) <= float(found.ascent_sharpness) <= exact * (1 + 1e-9)


def test_sharpness__at_a_minimum_is_that_of_the_top_eigenvalue() -> None:
    model, objective, H = quadratic(np.zeros(5), seed=0)
    found = sharpness(model, objective, 0.7, steps=100)
    assert math.isnan(found.sam_sharpness), "the gradient has no direction"
    assert float(found.ascent_sharpness) == pytest.approx(0.7**2 * np.linalg.eigvalsh(H)[-1] / 2, rel=1e-4)
    assert math.isnan(sharpness(model, objective, 0.7, restarts=0).ascent_sharpness)


def test_sharpness__of_a_linear_loss_is_rho_times_the_slope() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    objective = rec.Objective(lambda out, y: (out - y).mean(), x, torch.zeros(1, 1, dtype=torch.float64))
    found = sharpness(model, objective, 0.3)
    expected = 0.3 * float(x.norm())
    assert float(found.sam_sharpness) == pytest.approx(expected, rel=1e-9)
    assert float(found.ascent_sharpness) == pytest.approx(expected, rel=1e-6)


def net() -> tuple[nn.Module, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Dropout(0.5)).double()
    x = torch.randn(15, 1, dtype=torch.float64)
    return model, rec.Objective(F.mse_loss, x, torch.sin(3 * x), l2=0.01)


def test_ascent__comes_close_to_a_search_of_the_whole_ball() -> None:
    model, objective = net()
    here = objective.value(model)
    start = [p.detach().clone() for p in model.parameters()]
    best = 0.0
    for radius in (0.5, 1.0):
        for angle in np.linspace(0, 2 * np.pi, 240, endpoint=False):
            with torch.no_grad():
                for p, s, e in zip(model.parameters(), start, (np.cos(angle), np.sin(angle)), strict=True):
                    p.copy_(s + radius * float(e))
            best = max(best, objective.value(model) - here)
    with torch.no_grad():
        for p, s in zip(model.parameters(), start, strict=True):
            p.copy_(s)
    found = float(sharpness(model, objective, 1.0, steps=40, restarts=3).ascent_sharpness)
    assert found == pytest.approx(best, rel=2e-3)


def test_sharpness__leaves_model_and_generator_alone_and_repeats() -> None:
    model, objective = net()
    state, rng = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = (sharpness(model, objective, 0.5, restarts=2, seed=3) for _ in range(2))
    assert first.identical(second)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert first.ascent_sharpness.attrs["rho"] == 0.5
    assert first.ascent_sharpness.attrs["long_name"] == "sharpness by ascent"


def test_sharpness__grows_with_the_radius() -> None:
    model, objective = net()
    rises = [float(sharpness(model, objective, rho, steps=40).ascent_sharpness) for rho in (0.1, 0.3, 1.0)]
    assert rises == sorted(rises)


def test_sharpness__does_not_depend_on_batches() -> None:
    model, objective = net()
    batched = rec.Objective(F.mse_loss, objective.inputs, objective.targets, l2=objective.l2, batch_size=4)
    whole, parts = sharpness(model, objective, 0.5), sharpness(model, batched, 0.5)
    for name in ("sam_sharpness", "ascent_sharpness"):
        assert float(whole[name]) == pytest.approx(float(parts[name]), rel=1e-9)


def test_sharpness__does_not_depend_on_the_order_of_units_or_the_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(15, 2, dtype=torch.float64)
    objective = rec.Objective(F.mse_loss, x, x[:, :1] * x[:, 1:])
    found = sharpness(model, objective, 0.5, restarts=0)
    single = sharpness(
        copy.deepcopy(model).float(), rec.Objective(F.mse_loss, x.float(), objective.targets.float()), 0.5
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order].clone())
        model[0].bias.copy_(model[0].bias[order].clone())
        model[2].weight.copy_(model[2].weight[:, order].clone())
    turned = sharpness(model, objective, 0.5, restarts=0)
    for name in ("sam_sharpness", "ascent_sharpness"):
        assert float(turned[name]) == pytest.approx(float(found[name]), rel=1e-9)
        assert float(single[name]) == pytest.approx(float(found[name]), rel=1e-3)


def test_sharpness__of_a_diverged_model_is_missing() -> None:
    model, objective = net()
    with torch.no_grad():
        model[0].bias.fill_(torch.nan)
    found = sharpness(model, objective, 0.5)
    assert math.isnan(found.sam_sharpness)
    assert math.isnan(found.ascent_sharpness)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rho": 0.0}, "rho"), ({"rho": math.nan}, "rho"), ({"rho": 1.0, "steps": -1}, "cannot be negative")],
)
def test_settings__that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sharpness(*net(), **options)
