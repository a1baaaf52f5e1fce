"""Per-sample gradients: both representations and the sampler, against one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.curvature.isolation import Measurement
from hild_xr.recorders.curvature.sample_gradients import (
    Cotangents,
    ExplicitGradients,
    FactoredGradients,
    GradientSampler,
    SampleGradients,
    gram,
)
from hild_xr.recorders.objective import Objective


def sampler(model: nn.Module, objective: Objective, max_bytes: int = 2**20) -> GradientSampler:
    return GradientSampler(FunctionalModel(model), objective, None, Measurement(model), max_bytes)


def representations() -> list[SampleGradients]:
    generator = torch.Generator().manual_seed(0)
    delta, h = torch.randn(7, 3, generator=generator), torch.randn(7, 4, generator=generator)
    several = torch.randn(7, 2, 3, generator=generator)
    return [
        FactoredGradients(delta, h),
        FactoredGradients(several, h),
        ExplicitGradients(torch.randn(7, 12, generator=generator)),
    ]


@pytest.mark.parametrize("gradients", representations(), ids=["factored", "several", "explicit"])
def test_representation__operations_are_those_of_the_explicit_matrix(gradients: SampleGradients) -> None:
    explicit = gradients.explicit()
    vectors, weights = torch.randn(2, 12), torch.randn(3, len(explicit))
    assert gradients.size == explicit.shape[1] == 12
    torch.testing.assert_close(gradients.apply(vectors), vectors @ explicit.T)
    torch.testing.assert_close(gradients.adjoint(weights), weights @ explicit)
    torch.testing.assert_close(gram([gradients]), explicit @ explicit.T)
    torch.testing.assert_close(gradients.squared_norms(), explicit.square().sum(1))


@pytest.mark.parametrize("tile", [1, 4, 5, 100])
@pytest.mark.parametrize("k", [1, 2])
def test_gram__adds_parameters_up_tile_by_tile(tile: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hild_xr.recorders.curvature.sample_gradients._TILE_ON_CPU", tile)
    delta = torch.randn(7, k, 3) if k > 1 else torch.randn(7, 3)
    parts: list[SampleGradients] = [
        FactoredGradients(delta, torch.randn(7, 4)),
        ExplicitGradients(torch.randn(7 * k, 5)),
    ]
    explicit = torch.cat([part.explicit() for part in parts], dim=1)
    torch.testing.assert_close(gram(parts), explicit @ explicit.T)


def test_factored_with_bias__is_weight_and_bias() -> None:
    delta, h = torch.randn(5, 3), torch.randn(5, 4)
    expected = torch.cat([FactoredGradients(delta, h).explicit(), delta], dim=1)
    torch.testing.assert_close(gram([FactoredGradients(delta, h).with_bias()]), expected @ expected.T)


def test_factored__is_the_gradient_of_a_linear_layer() -> None:
    delta, h = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 5.0], [1.0, 7.0]])
    expected = torch.stack([torch.outer(d, x).reshape(-1) for d, x in zip(delta, h, strict=True)])
    assert torch.equal(FactoredGradients(delta, h).explicit(), expected)


def test_factored__holds_several_gradients_of_a_sample_one_after_the_other() -> None:
    delta, h = torch.randn(3, 2, 4), torch.randn(3, 5)
    expected = torch.stack([torch.outer(delta[m, k], h[m]).reshape(-1) for m in range(3) for k in range(2)])
    torch.testing.assert_close(FactoredGradients(delta, h).explicit(), expected)


@pytest.mark.parametrize("samples", [slice(None), slice(2, 7)])
@pytest.mark.parametrize("max_bytes", [3000, 2**20])
def test_sampler__pulls_back_linear_functions_of_the_outputs(
    get_case: Any, max_bytes: int, samples: slice
) -> None:
    for name in ("mlp-tanh", "cnn", "xor"):
        case = get_case(name)
        names = tuple(case.trainable)
        jacobians = case.jacobians()[1]
        functions = torch.randn(len(jacobians), 2, jacobians.shape[1], dtype=torch.float64)
        shape = () if name == "xor" else functions.shape[2:]
        cotangents = Cotangents(functions.reshape(len(jacobians), 2, *shape), 0)
        found = sampler(case.model, case.objective(), max_bytes).all(names, cotangents, samples)
        expected = (functions @ jacobians)[samples].flatten(0, 1)
        torch.testing.assert_close(torch.cat([found[n] for n in names], 1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [1, 3000, 2**20])
def test_sampler__equals_a_loop_over_samples_for_any_chunk(
    case: Any, dense_matrices: Any, max_bytes: int
) -> None:
    names = tuple(case.trainable)
    found = sampler(case.model, case.objective(), max_bytes).all(names)
    _, expected = dense_matrices(case.name)
    torch.testing.assert_close(torch.cat([found[name] for name in names], 1), expected, rtol=1e-9, atol=1e-12)
    assert not any(gradient.requires_grad for gradient in found.values())


def test_sampler__bounds_the_memory_of_a_chunk(get_case: Any) -> None:
    case = get_case("mlp-tanh")
    sizes = [
        len(chunk["0.weight"])
        for chunk in sampler(case.model, case.objective(), 2 * 5 * 30 * 8).chunks(["0.weight"])
    ]
    assert sizes == [5, 5, 5, 2]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.rnn(inputs)[0][:, -1])
        return outputs


def test_sampler__takes_samples_one_by_one_where_vmap_fails_and_says_so() -> None:
    torch.manual_seed(0)
    net = Recurrent().double()
    inputs, targets = torch.randn(5, 6, 3, dtype=torch.float64), torch.arange(5) % 2
    taken = sampler(net, Objective(F.cross_entropy, inputs, targets))
    with pytest.warns(UserWarning, match="vmap does not support this model .* one by one"):
        found = taken.all(["rnn.weight_hh_l0"])["rnn.weight_hh_l0"]
    taken.all(["out.bias"])  # warns once
    for m in range(5):
        net.zero_grad()
        F.cross_entropy(net(inputs[m : m + 1]), targets[m : m + 1]).backward()
        gradient = net.rnn.weight_hh_l0.grad
        assert gradient is not None
        torch.testing.assert_close(found[m], gradient.reshape(-1), rtol=1e-10, atol=1e-13)


def test_sampler__takes_models_of_several_inputs() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.scale * left * right

    left, right = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    for inputs in ((left, right), {"right": right, "left": left}):
        objective = Objective(F.mse_loss, inputs, torch.zeros(2))
        found = sampler(Product(), objective).all(["scale"])["scale"]
        assert found.tolist() == [[36.0], [400.0]]  # 2 * scale * (left * right)^2
