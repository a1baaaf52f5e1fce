"""Linear layers with closed-form curvature: found where the form holds, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.curvature.linear_sites import LinearSite, find_linear_sites
from hild_xr.recorders.objective import Objective


def sites(net: nn.Module, n: int = 6, shape: tuple[int, ...] = (4,)) -> list[LinearSite]:
    objective = Objective(F.cross_entropy, torch.randn(n, *shape), torch.arange(n) % 3)
    return find_linear_sites(FunctionalModel(net), objective, None)


def test_find__takes_the_layers_of_an_mlp() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False))
    assert sites(net) == [LinearSite("0", "0.weight", "0.bias"), LinearSite("2", "2.weight", None)]
    assert sites(nn.Linear(4, 3)) == [LinearSite("", "weight", "bias")]


def test_find__leaves_a_frozen_weight_out_and_a_frozen_bias_aside() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    assert sites(net) == [LinearSite("1", "1.weight", None)]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.fc(self.fc(inputs)))
        return outputs


class ByHand(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.fc(F.linear(inputs, self.fc.weight)))
        return outputs


class OverTokens(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.fc(inputs[:, None].expand(-1, 3, -1)).mean(1))
        return outputs


class OverTable(Twice):
    """The layer runs over a table of two rows, whatever the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(2, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(inputs @ self.fc(self.table).T @ self.table)
        return outputs


class Unused(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        self.fc(inputs)
        outputs: Tensor = self.out(inputs)
        return outputs


@pytest.mark.parametrize("kind", [Twice, ByHand, OverTokens, OverTable, Unused])
def test_find__leaves_out_a_layer_without_the_closed_form(kind: type[Twice]) -> None:
    assert [site.module for site in sites(kind())] == ["out"]
    assert [site.module for site in sites(kind(), n=2)] == ["out"]


def test_find__leaves_out_a_tied_weight() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    assert [site.module for site in sites(net)] == ["3"]


def test_find__leaves_out_layers_that_are_changed_from_outside() -> None:
    hooked, parametrized, patched = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    nn.utils.parametrizations.weight_norm(parametrized)
    patched.forward = lambda inputs: inputs @ patched.weight.T  # type: ignore[method-assign, assignment]
    assert [sites(net) for net in (hooked, parametrized, patched)] == [[], [], []]


def test_find__accepts_a_layer_called_by_keyword() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.fc(input=inputs)
            return outputs

    assert [site.module for site in sites(ByName())] == ["fc"]


def test_find__leaves_no_hooks_behind() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    sites(net)
    assert not net[0]._forward_hooks


def test_find__refuses_a_loss_with_a_hidden_regulariser() -> None:
    net = nn.Linear(4, 3)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * net.weight.square().sum()

    objective = Objective(loss, torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.raises(
        ValueError, match=r"reaches the parameter 'weight' past the model.*Objective\(l2=\.\.\.\)"
    ):
        find_linear_sites(FunctionalModel(net), objective, None)


def test_find__refuses_a_module_that_keeps_its_weights_aside() -> None:
    class Aside(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.aside = [self.weight]

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.aside[0].T + self.bias

    with pytest.raises(ValueError, match="past the model"):
        sites(Aside())


def test_find__works_for_every_case(case: Any) -> None:
    expected = {
        "mlp-tanh": ["0", "2", "4"],
        "mlp-relu": ["0", "2", "4"],
        "cnn": ["5"],
        "attention": [],
        "rnn": ["out"],
        "gmm": [""],
        "xor": [],
        "frozen": ["0", "2"],
    }
    name = case.name
    net, objective = case.model, case.objective()
    found = find_linear_sites(FunctionalModel(net.eval()), objective, None)
    assert [site.module for site in found] == expected[name]
