"""Layers with an activation between them: which are, and the second derivatives that go through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, linear_layers, resolve_blocks
from hild_xr.recorders.curvature.activation_links import ActivationLink, Flow, _factors, find_link
from hild_xr.recorders.curvature.operators import WeightedRows
from hild_xr.recorders.objective import Objective


def linked(
    between: Callable[[Tensor], Tensor], extra: Callable[[Tensor, Tensor], Tensor] | None = None
) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(*s, generator=generator) for s in ((7, 4), (4, 5), (5, 3)))
    z = (x.requires_grad_() @ first).clone()
    h = between(z)
    loss = (h @ second).square().mean()
    return find_link(Flow(loss if extra is None else loss + extra(z, h)), z, h) is not None


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
    link = find_link(Flow((h @ torch.ones(5, 2, dtype=torch.float64)).sum()), start, h)
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


@pytest.mark.parametrize("which", [0, 1])
def test_link__is_none_where_numbers_change_places_that_one_draw_takes_for_equal(which: int) -> None:
    """Of one sample, two factors of a draw are equal by chance now and then; two draws are needed."""
    z = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    same, other = (factors[0] for factors in _factors(z)[:: 1 if which == 0 else -1])
    pairs = [(i, j) for i in range(300) for j in range(i) if same[i] == same[j] and other[i] != other[j]]
    i, j = pairs[0]
    order = list(range(300))
    order[i], order[j] = j, i
    start = z.clone()
    h = start[:, order].abs()  # with slopes of one size, and no second derivatives that would tell
    assert find_link(Flow((h @ torch.ones(300, 2)).sum()), start, h) is None


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z * torch.sigmoid(z.mean(1, keepdim=True)),
    "softmax": lambda z: z * torch.softmax(z, 1),
    "over samples": lambda z: z * torch.sigmoid(z.mean(0)),
    "next": lambda z: z + z**2 * z.roll(1, 1),
    "squares": lambda z: z + z.square().sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (2, 1), (3, 3), (7, 5)])
def test_link__is_none_where_only_second_derivatives_mix(name: str, shape: tuple[int, int]) -> None:
    z = torch.zeros(shape, dtype=torch.float64)
    jacobian, second = torch.func.jacrev(GATES[name])(z), torch.func.jacrev(torch.func.jacrev(GATES[name]))(z)
    d = z.numel()
    index = torch.arange(d)
    off = second.reshape(d, d, d).clone()
    off[index, index, index] = 0
    off_first = jacobian.reshape(d, d).clone()
    off_first[index, index] = 0
    assert bool((off_first == 0).all())
    mixes = bool((off != 0).any())
    assert mixes == (name != "next" and shape[0 if name == "over samples" else 1] > 1)
    start = z.requires_grad_().clone()
    h = GATES[name](start)
    assert (find_link(Flow((h @ torch.ones(shape[1], 1).double()).sum()), start, h) is None) == mixes


class Gated(nn.Module):
    """A gate of all outputs of a layer, which begins at zero."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
        self.gate = gate
        nn.init.zeros_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.gate(self.first(x)))
        return outputs


@pytest.mark.parametrize("name", ["mean", "softmax", "squares"])
@pytest.mark.parametrize("few", [1, 65])
def test_rows__behind_a_gate_at_zero_are_those_of_the_dense_matrix(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Gated(GATES[name]).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    objective = Objective(F.cross_entropy, x, torch.arange(9) % 3)
    monkeypatch.setattr(linear_layers, "_FEW_OUTPUTS", few)

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(model.second(model.gate(x @ weight.T)), objective.targets)

    dense = torch.func.hessian(loss)(model.first.weight.detach()).detach()
    with Curvature(model, objective) as curvature:
        (operator,) = curvature.operators(resolve_blocks(model, "rows", "first.weight"), "hessian")
        assert isinstance(operator, WeightedRows)
        found = operator.matrix(torch.arange(6))
    expected = torch.stack([dense[c, :, c, :] for c in range(6)])
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


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

    monkeypatch.setattr(linear_layers, "_FEW_OUTPUTS", few)
    calls: list[object] = []

    def noted(flow: Flow, z: Tensor, h: Tensor) -> ActivationLink | None:
        calls.append(link := find_link(flow, z, h))
        return link

    monkeypatch.setattr(linear_layers, "find_link", noted)
    through = curvatures()
    assert any(link is not None for link in calls) == (name != "norm")
    monkeypatch.setattr(linear_layers, "find_link", lambda *_: None)
    for label, values in curvatures().items():
        torch.testing.assert_close(through[label], values, rtol=1e-9, atol=1e-12, msg=label)
