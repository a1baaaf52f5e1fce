"""Loss, gradient and Hessian products on a flat vector against autograd on the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.landscape.loss_surface import LossSurface


def start(batch_size: int | None = None) -> tuple[nn.Module, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))
    return model, rec.Objective(F.cross_entropy, x, y, l2=0.3, batch_size=batch_size)


def full_loss(model: nn.Module, objective: rec.Objective) -> torch.Tensor:
    penalty = 0.5 * objective.l2 * sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(objective.inputs), objective.targets) + penalty


@pytest.mark.parametrize("batch_size", [None, 4])
def test_surface__is_the_objective_of_the_model(batch_size: int | None) -> None:
    model, objective = start(batch_size)
    model.eval()
    loss = full_loss(model, objective)
    slope = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in slope])
    vector = torch.randn_like(flat)
    product = torch.autograd.grad(flat @ vector, list(model.parameters()))
    model.train()
    with LossSurface(model, objective) as surface:
        value, gradient = surface.gradient(surface.start)
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert surface.loss(surface.start) == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(gradient, flat.detach(), rtol=1e-10, atol=1e-14)
        expected = torch.cat([g.reshape(-1) for g in product])
        torch.testing.assert_close(
            surface.hessian_product(surface.start, vector), expected, rtol=1e-10, atol=1e-14
        )
        moved = surface.loss(surface.start + 0.1 * vector)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()) + 0.1 * vector, model.parameters()
        )
    assert moved == pytest.approx(objective.value(model), rel=1e-12)


def test_surface__leaves_the_model_alone_and_takes_no_part_of_what_is_frozen() -> None:
    model, objective = start()
    model[0].requires_grad_(False)
    state, rng = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    with torch.inference_mode(), LossSurface(model, objective) as surface:
        assert len(surface.start) == 5 * 3 + 3
        surface.hessian_product(surface.start, surface.gradient(surface.start + 1)[1])
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_surface__of_a_half_precision_model_is_in_float32() -> None:
    model, objective = start()
    model, objective = (
        model.to(torch.bfloat16),
        rec.Objective(
            F.cross_entropy,
            objective.inputs.to(torch.bfloat16),
            objective.targets,
        ),
    )
    with LossSurface(model, objective) as surface:
        assert surface.start.dtype == torch.float32
        small = torch.full_like(surface.start, 1e-4)
        assert surface.loss(surface.start + small) != surface.loss(surface.start)


def test_hessian_product__of_a_loss_that_is_linear_is_that_of_the_regulariser() -> None:
    model = nn.Linear(3, 1)
    objective = rec.Objective(
        lambda out, y: (out[:, 0] * y).mean(), torch.randn(5, 3), torch.randn(5), l2=0.5
    )
    with LossSurface(model, objective) as surface:
        vector = torch.randn(4)
        torch.testing.assert_close(surface.hessian_product(surface.start, vector), 0.5 * vector)
