"""Steps in the dominant space and beside it: on a quadratic with known factors, and on a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hild_xr import recorders as rec
from hild_xr.recorders.curvature import Curvature

CURVATURES = torch.tensor([1.0, 0.5], dtype=torch.float64)


def quadratic() -> tuple[nn.Module, rec.Objective]:
    """Loss sum h w^2 / 2 with h = (1, .5): one sample for each axis."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    inputs = torch.diag(CURVATURES.sqrt())
    return model, rec.Objective(nn.functional.mse_loss, inputs, torch.zeros(2, 1, dtype=torch.float64))


def step(model: nn.Module, objective: rec.Objective, lr: float, part: Any, k: int = 1) -> None:
    with Curvature(model, objective) as curvature:
        spectra = curvature.eigenpairs(k, blocks="model")
    model.zero_grad()
    objective.mean_loss(model(objective.inputs), objective.targets).backward()
    if part is not None:
        rec.project_gradient(model, spectra, part)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(lr * parameter.grad)


@pytest.mark.parametrize(
    ("part", "factors"), [(None, (-0.9, 0.05)), ("dominant", (-0.9, 1)), ("bulk", (1, 0.05))]
)
def test_quadratic__moves_along_the_kept_axes_by_the_known_factors(
    part: Any, factors: tuple[float, float]
) -> None:
    model, objective = quadratic()
    for _ in range(3):
        step(model, objective, 1.9, part)
    expected = torch.tensor([factors], dtype=torch.float64) ** 3
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-12)


def network() -> tuple[nn.Module, rec.Objective]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (60,), generator=generator)
    inputs = 2 * torch.randn(3, 5, generator=generator)[targets] + torch.randn(60, 5, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, rec.Objective(nn.functional.cross_entropy, inputs.double(), targets)


@pytest.mark.parametrize("blocks", ["model", "layer", "module", {"all but one": ["0.*", "2.weight"]}])
def test_parts__are_projections_that_add_up(blocks: Any) -> None:
    model, objective = network()
    with Curvature(model, objective) as curvature:
        spectra = curvature.eigenpairs(2, blocks=blocks)
    objective.mean_loss(model(objective.inputs), objective.targets).backward()
    parts = {part: copy.deepcopy(model) for part in ("dominant", "bulk")}
    part: Any
    for part, one in parts.items():
        for parameter, original in zip(one.parameters(), model.parameters(), strict=True):
            parameter.grad = original.grad.clone()
        rec.project_gradient(one, spectra, part)
    whole, dominant, bulk = (
        {name: p.grad for name, p in one.named_parameters()} for one in (model, *parts.values())
    )
    covered = {name for spectrum in spectra.values() for name in spectrum.block.parameters}
    for name in whole:
        if name not in covered:
            assert torch.equal(dominant[name], whole[name])
            continue
        torch.testing.assert_close(dominant[name] + bulk[name], whole[name])
    for spectrum in spectra.values():
        flat = [
            torch.cat([g[n].reshape(-1) for n in spectrum.block.parameters]) for g in (whole, dominant, bulk)
        ]
        basis = spectrum.eigenvectors.reshape(2, -1)
        torch.testing.assert_close(flat[1], basis.T @ (basis @ flat[0]))
        torch.testing.assert_close(basis @ flat[2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rows__are_projected_one_by_one() -> None:
    model, objective = network()
    with Curvature(model, objective) as curvature:
        spectra = curvature.eigenpairs(2, blocks="rows", layers=["0.weight"])
    objective.mean_loss(model(objective.inputs), objective.targets).backward()
    before = model[0].weight.grad.clone()
    rec.project_gradient(model, spectra, "dominant")
    basis = spectra["0.weight"].eigenvectors
    expected = torch.einsum("rki,rkj,rj->ri", basis, basis, before)
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_training__goes_on_beside_the_dominant_space_and_stops_within_it() -> None:
    """The finding of the paper: late in training Bulk steps are as good as whole ones, Dom steps are not."""
    model, objective = network()
    for _ in range(300):
        step(model, objective, 0.5, None, k=3)
    start = objective.value(model)
    losses = {}
    for part in (None, "dominant", "bulk"):
        one = copy.deepcopy(model)
        for _ in range(150):
            step(one, objective, 0.5, part, k=3)
        losses[part] = start - objective.value(one)
    assert losses["bulk"] > 0.6 * losses[None]
    assert losses["dominant"] < 0.3 * losses[None]


@pytest.mark.parametrize(
    ("break_it", "part", "message"),
    [
        (None, "both", "part must be one of 'dominant', 'bulk'"),
        ("gradient", "bulk", "'0.weight' of block 'model' has no gradient"),
        ("converged", "bulk", "not all eigenpairs of block 'model' have converged"),
        ("twice", "bulk", "'0.weight' is in two blocks"),
    ],
)
def test_bad_input__is_refused_before_anything_changed(break_it: str | None, part: Any, message: str) -> None:
    model, objective = network()
    options: dict[str, Any] = {"max_matvec": 6, "dense_up_to": 0} if break_it == "converged" else {}
    blocks = {"model": ["*"], "again": ["0.weight"]} if break_it == "twice" else {"model": ["*"]}
    with Curvature(model, objective) as curvature:
        spectra = curvature.eigenpairs(2, blocks=blocks, **options)
    objective.mean_loss(model(objective.inputs), objective.targets).backward()
    if break_it == "gradient":
        model[0].weight.grad = None
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        rec.project_gradient(model, spectra, part)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert gradient is parameter.grad is None or torch.equal(parameter.grad, gradient)
