"""Layers with an activation between them: which are, and the second derivatives that go through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, graph
from hild_xr.recorders.curvature.activation_links import find_link
from hild_xr.recorders.objective import Objective


def linked(
    between: Callable[[Tensor], Tensor], extra: Callable[[Tensor, Tensor], Tensor] | None = None
) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(*s, generator=generator) for s in ((7, 4), (4, 5), (5, 3)))
    z = (x.requires_grad_() @ first).clone()
    h = between(z)
    loss = (h @ second).square().mean()
    return find_link(loss if extra is None else loss + extra(z, h), z, h) is not None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "product": lambda z: z * torch.sigmoid(1.7 * z),
    "scaled": lambda z: 0.5 * torch.tanh(z) + torch.arange(5.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_link__is_found_through_an_activation_with_its_derivatives(name: str) -> None:
    assert linked(ACTIVATIONS[name])
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    start = z.clone()
    h = ACTIVATIONS[name](start)
    link = find_link((h @ torch.ones(5, 2, dtype=torch.float64)).sum(), start, h)
    assert link is not None
    step = 1e-4
    with torch.no_grad():
        ahead, behind, here = (ACTIVATIONS[name](z + s) for s in (step, -step, 0))
    torch.testing.assert_close(link.slope, (ahead - behind) / (2 * step), rtol=0, atol=1e-6)
    torch.testing.assert_close(link.bend, (ahead - 2 * here + behind) / step**2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "between",
    [
        lambda z: F.layer_norm(z, (5,)),
        lambda z: torch.softmax(z, -1),
        lambda z: z.flip(0),
        lambda z: z.flip(1),
        lambda z: torch.tanh(z) + z.mean(),
        lambda z: torch.tanh(z @ torch.eye(5)) * z[:, :1],
        lambda z: torch.tanh(z.detach()) * z.sum(1, keepdim=True),
        lambda z: z.cumsum(0),
    ],
)
def test_link__is_none_where_numbers_mix(between: Callable[[Tensor], Tensor]) -> None:
    assert not linked(between)


@pytest.mark.parametrize(
    "extra",
    [
        lambda z, h: (1e-3 * z).square().sum(),
        lambda z, h: h.square().sum(),
        lambda z, h: (h @ torch.ones(5, 2)).sum(),
        lambda z, h: (0 * z).sum(),
    ],
)
def test_link__is_none_where_the_loss_has_another_way(extra: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not linked(torch.tanh, extra)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        outputs: Tensor = self.head(h + torch.tanh(self.second(h)))
        return outputs


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "shallow": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "two hidden": lambda: nn.Sequential(
        nn.Linear(4, 7), nn.SiLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)
    ),
    "deep": lambda: nn.Sequential(
        nn.Linear(4, 5),
        nn.GELU(),
        nn.Linear(5, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
        nn.Softplus(),
        nn.Linear(4, 3),
    ),
    "relu": lambda: nn.Sequential(
        nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "wide head": lambda: nn.Sequential(
        nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
    "norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "residual": Residual,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("few", [1, 65])
def test_output_curvature__through_links_equals_that_without(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x = torch.randn(9, 4, dtype=torch.float64)
    objective = Objective(F.cross_entropy, x, torch.arange(9) % 3)

    def curvatures() -> dict[str, Tensor]:
        with Curvature(model, objective, dense_up_to=0) as curvature:
            found = curvature.eigenpairs(2, "hessian", "rows")
            return {label: spectrum.eigenvalues for label, spectrum in found.items()} | {
                f"{label}, trace": spectrum.trace for label, spectrum in found.items()
            }

    monkeypatch.setattr(graph, "_FEW_OUTPUTS", few)
    calls: list[object] = []

    def noted(*args: Tensor) -> object:
        calls.append(find_link(*args))
        return calls[-1]

    monkeypatch.setattr(graph, "find_link", noted)
    through = curvatures()
    assert any(link is not None for link in calls) == (name != "norm")
    monkeypatch.setattr(graph, "find_link", lambda *_: None)
    for label, values in curvatures().items():
        torch.testing.assert_close(through[label], values, rtol=1e-9, atol=1e-12, msg=label)
