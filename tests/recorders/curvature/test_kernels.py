"""Conjugate and tangent kernels against their definitions and the closed forms of a two-layer network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature import conjugate_kernel, resolve_blocks, tangent_kernel


@pytest.mark.parametrize(("batch_size", "max_bytes"), [(None, 2**30), (4, 20_000), (None, 2000)])
def test_tangent__equals_the_products_of_explicit_derivatives(
    case: Any, batch_size: int | None, max_bytes: int
) -> None:
    J = case.jacobians()[1]  # (M, C, P)
    names = [block.label for block in resolve_blocks(case.model, "layer")]
    if case.name in ("attention", "cnn", "rnn"):
        names = names[:1] if max_bytes == 2000 else names[:4]  # pairs of small chunks take their time
    J = J[:, :, case.columns(tuple(names))]
    for outputs, expected in (
        ("full", J.flatten(0, 1) @ J.flatten(0, 1).T),
        ("sum", torch.einsum("mcp,ncp->mn", J, J)),
        (0, J[:, 0] @ J[:, 0].T),
    ):
        found = tangent_kernel(
            case.model, case.inputs, outputs=outputs, layers=names, batch_size=batch_size, max_bytes=max_bytes
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert not found.requires_grad


def test_tangent__takes_all_parameters_unless_told(get_case: Any) -> None:
    for name in ("mlp-tanh", "cnn", "rnn"):
        case = get_case(name)
        J = case.jacobians()[1].flatten(0, 1)
        torch.testing.assert_close(tangent_kernel(case.model, case.inputs), J @ J.T, rtol=1e-10, atol=1e-12)


class TwoLayers(nn.Module):
    """f(x) = v . tanh(W x / sqrt(d)) / sqrt(h): the NTK parametrisation."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.W, self.act = nn.Linear(d, h, bias=False), nn.Tanh()
        self.v = nn.Parameter(torch.randn(h))
        nn.init.normal_(self.W.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        d, h = inputs.shape[1], len(self.v)
        outputs: Tensor = self.act(self.W(inputs / math.sqrt(d))) @ self.v / math.sqrt(h)
        return outputs


def test_kernels__of_two_layers_have_the_closed_forms() -> None:
    torch.manual_seed(0)
    d, h = 7, 12
    net = TwoLayers(d, h).double()
    X = torch.randn(9, d, dtype=torch.float64)
    hidden = (X @ net.W.weight.detach().T / math.sqrt(d)).tanh()
    slopes = (1 - hidden.square()) * net.v.detach()
    conjugate = hidden @ hidden.T / h
    tangent = (X @ X.T / d) * (slopes @ slopes.T / h) + conjugate
    for batch_size in (None, 4):
        torch.testing.assert_close(conjugate_kernel(net, X, "act", batch_size=batch_size), conjugate)
        torch.testing.assert_close(tangent_kernel(net, X, batch_size=batch_size), tangent)
    torch.testing.assert_close(tangent_kernel(net, X, layers="v"), conjugate)
    torch.testing.assert_close(
        tangent_kernel(net.float(), X.float(), dtype=torch.float64), tangent, rtol=1e-5, atol=1e-5
    )


def test_conjugate__flattens_activations_and_measures_in_eval_mode(get_case: Any) -> None:
    case = get_case("cnn")
    case.model.train()
    with torch.no_grad():
        maps = case.model.eval()[:3](case.inputs).flatten(1)
    case.model.train()
    # module 3 is the dropout: in eval mode it changes nothing
    torch.testing.assert_close(conjugate_kernel(case.model, case.inputs, "3"), maps @ maps.T / maps.shape[1])
    assert case.model.training
    assert not any(module._forward_hooks for module in case.model.modules())


def test_conjugate__refuses_modules_without_one_row_a_sample(get_case: Any) -> None:
    case = get_case("rnn")
    with pytest.raises(ValueError, match=r"no module 'inwards': its modules are inward, around, out"):
        conjugate_kernel(case.model, case.inputs, "inwards")
    with pytest.raises(ValueError, match=r"'around' must be called once .*name a module"):
        conjugate_kernel(case.model, case.inputs, "around")
    assert not case.model.around._forward_hooks


@pytest.mark.parametrize("outputs", ["all", -1, 3, True, 1.0])
def test_tangent__refuses_outputs_that_are_not_there(get_case: Any, outputs: Any) -> None:
    case = get_case("gmm")
    with pytest.raises(ValueError, match=r"outputs must be 'full'|there is no"):
        tangent_kernel(case.model, case.inputs, outputs=outputs)


def test_tangent__refuses_models_that_couple_samples_or_return_no_tensor() -> None:
    class Centred(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = super().forward(inputs)
            return outputs - outputs.mean(0)

    class Several(nn.Linear):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(inputs), inputs

    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="changes with the other samples"):
        tangent_kernel(Centred(3, 2), x)
    with pytest.raises(ValueError, match=r"one tensor with a row for each.*wrap the model"):
        tangent_kernel(Several(3, 2), x)


def test_kernels__of_a_model_with_several_inputs() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.scale * left * right

    inputs = {"right": torch.tensor([3.0, 5.0]), "left": torch.tensor([1.0, 2.0])}
    assert tangent_kernel(Product(), inputs).tolist() == [[9.0, 30.0], [30.0, 100.0]]
    assert conjugate_kernel(Product(), inputs, "").tolist() == [[36.0, 120.0], [120.0, 400.0]]
