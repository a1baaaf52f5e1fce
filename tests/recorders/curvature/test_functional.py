"""The model as a function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr.recorders as rec
from hild_xr.recorders.curvature import BlockKind, Curvature, MatrixKind, resolve_blocks
from hild_xr.recorders.curvature.functional import FunctionalModel


class TwoNames(nn.Module):
    """Its last layer has a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)])
        self.last = self.layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.layers[0](x)))
        return outputs


class Albert(nn.Module):
    """One block of layers, and so one BatchNorm, used three times; weight and a buffer tied besides."""

    def __init__(self) -> None:
        super().__init__()
        linear, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        block = nn.Sequential(linear, norm, nn.Tanh())
        self.blocks = nn.ModuleList([block, block, block])
        self.first, self.other, self.head = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.head.weight = linear.weight
        self.other.running_mean = norm.running_mean

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.first(x))
        for block in self.blocks:
            x = block(x)
        outputs: Tensor = self.head(x)
        return outputs


def repeated() -> nn.Module:
    block, slope = nn.Linear(3, 3), nn.PReLU()
    return nn.Sequential(nn.Linear(4, 3), slope, block, slope, block, slope, nn.Linear(3, 3))


KINDS: tuple[BlockKind, ...] = ("layer", "rows", "module", "model")
SHARING: dict[str, Callable[[], nn.Module]] = {"two names": TwoNames, "albert": Albert, "repeated": repeated}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under every one of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def sharing(name: str) -> tuple[nn.Module, rec.Objective]:
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    model = SHARING[name]().double()
    with torch.no_grad():
        for _ in range(3):
            model(x)  # running statistics that are not those of the start
    return model, rec.Objective(F.cross_entropy, x, torch.arange(12) % 3)


def dense_matrix(model: nn.Module, objective: rec.Objective, matrix: MatrixKind) -> Tensor:
    """Return the matrix over all parameters by double backward passes, or one sample after the other."""
    parameters = list(model.parameters())
    assert isinstance(objective.inputs, Tensor)

    def gradient(samples: slice) -> Tensor:
        loss = F.cross_entropy(model(objective.inputs[samples]), objective.targets[samples])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])

    if matrix == "gmatrix":
        gradients = torch.stack([gradient(slice(m, m + 1)) for m in range(len(objective))])
        return (gradients.T @ gradients / len(objective)).detach()
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient(slice(None))]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


class Failing(nn.Module):
    """A part of a model that cannot be run."""

    def forward(self, x: Tensor) -> Tensor:
        raise OSError(f"no forward pass of {len(x)} samples")


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_modules_and_tensors_with_several_names__are_left_as_they_are(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model, objective = sharing(name)
    before = tensors(model)
    values = {key: tensor.clone() for key, tensor in before.items()}

    def unchanged() -> bool:
        now = tensors(model)
        return now.keys() == before.keys() and all(
            now[key] is before[key] and torch.equal(now[key], values[key]) for key in before
        )

    objective.value(model)
    assert unchanged()
    with Curvature(model, objective, dtype=dtype) as curvature:
        for matrix in ("hessian", "gmatrix"):
            curvature.eigenpairs(2, matrix=matrix, blocks="model")
    assert unchanged()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        objective=objective,
        probes=[rec.Metrics()],
        schedule=rec.every(1, total_steps=1),
    ):
        assert unchanged()
    with pytest.raises(OSError, match="no forward pass"):
        FunctionalModel(nn.Sequential(model, Failing()))(objective.inputs)
    assert unchanged()


@pytest.mark.parametrize("name", SHARING)
def test_modules_with_several_names__train_as_without_a_recorder(name: str, tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, objective: rec.Objective) -> list[float]:
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(objective.inputs), objective.targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, objective = sharing(name)
    plain = copy.deepcopy(model)
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), objective)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=objective,
        probes=[rec.Metrics(), rec.Hessian(k=1, blocks="model")],
        schedule=rec.every(5, total_steps=20),
    ):
        assert train(model, optimizer, objective) == expected
    assert expected[-1] < expected[0]
    for key, tensor in tensors(plain).items():
        assert torch.equal(tensors(model)[key], tensor), key


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
def test_modules_with_several_names__have_the_curvature_of_all_their_uses(
    name: str, matrix: MatrixKind
) -> None:
    model, objective = sharing(name)
    plain = copy.deepcopy(model).eval()
    dense = dense_matrix(plain, objective, matrix)
    order = torch.arange(len(dense)).split([p.numel() for p in plain.parameters()])
    index = dict(zip(dict(plain.named_parameters()), order, strict=True))
    with Curvature(model, objective) as curvature:
        for kind in KINDS:
            for operator in curvature.operators(resolve_blocks(model, kind), matrix):
                block = operator.block
                rows = torch.cat([index[key] for key in block.parameters]).reshape(block.count, block.size)
                found = operator.matrix(torch.arange(block.count))
                expected = torch.stack([dense[row][:, row] for row in rows])
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=block.label)


def test_trainable__shares_memory_and_nothing_else_with_the_parameters() -> None:
    net = nn.Linear(2, 1)
    calls: list[Tensor] = []
    net.weight.register_hook(calls.append)
    function = FunctionalModel(net)
    function(torch.ones(3, 2)).sum().backward()
    assert function.trainable["weight"].data_ptr() == net.weight.data_ptr()
    assert net.weight.grad is None
    assert calls == []


def test_dtype__computes_in_another_precision_on_copies() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    function = FunctionalModel(net, torch.float64)
    outputs = function(torch.ones(3, 2, dtype=torch.float64))
    assert outputs.dtype == torch.float64
    torch.testing.assert_close(outputs.float(), net(torch.ones(3, 2)))
    assert net[0].weight.dtype == torch.float32


def test_call__is_the_same_function_each_time_even_if_the_model_counts_its_calls() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs) * self.calls

    net = Counting()
    function = FunctionalModel(net)
    first, second = function(torch.ones(1, 1)), function(torch.ones(1, 1))
    assert torch.equal(first, second)
    assert float(net.calls) == 0


def test_call__takes_other_values_for_some_parameters() -> None:
    function = FunctionalModel(nn.Linear(2, 1))
    outputs = function(torch.ones(1, 2), {"weight": torch.zeros(1, 2), "bias": torch.tensor([7.0])})
    assert outputs.tolist() == [[7.0]]


def test_init__refuses_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        FunctionalModel(nn.Linear(2, 1).requires_grad_(False))


def test_init__refuses_complex_parameters() -> None:
    with pytest.raises(TypeError, match="'weight' is complex"):
        FunctionalModel(nn.Linear(2, 1, dtype=torch.complex64))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_init__refuses_an_empty_parameter_and_says_what_to_do() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.empty = nn.Linear(2, 1), nn.Linear(2, 0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.full(x), self.empty(x)], dim=1)

    model = Beside()
    objective = rec.Objective(F.mse_loss, torch.ones(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"'empty.weight' of shape \(0, 2\) has no elements.*requires_grad_"):
        objective.value(model)
    model.empty.requires_grad_(False)
    theta = float(model(objective.inputs)[0].detach())
    for matrix, expected in (("hessian", 6.0), ("gmatrix", 12 * theta**2)):  # of (w1 + w2 + b)^2
        with Curvature(model, objective) as curvature:
            pairs = curvature.eigenpairs(1, matrix=matrix, blocks="model")["model"]
        assert pairs.eigenvalues.tolist() == pytest.approx([expected], rel=1e-5)


def test_flat__joins_the_parameters_in_the_order_given() -> None:
    function = FunctionalModel(nn.Linear(2, 1))
    expected = torch.cat([function.trainable["bias"], function.trainable["weight"][0]])
    assert torch.equal(function.flat(("bias", "weight")), expected.detach())
