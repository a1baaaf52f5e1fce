"""Cases that every curvature property runs over, and slow, obvious oracles for them."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature import Block
from hild_xr.recorders.curvature.operators import BlockOperator
from hild_xr.recorders.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable


class TiedAttention(nn.Module):
    """Two attention layers over tokens, with the embedding tied to the output layer."""

    def __init__(self, vocabulary: int = 5, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 5, dropout=0.2, batch_first=True, activation="gelu")
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden[:, -1])
        return logits


class Xor(nn.Module):
    """Two-layer ReLU network without biases, s = v . relu(W Y)."""

    def __init__(self, dim: int = 6, hidden: int = 4) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(hidden, dim) / math.sqrt(dim))
        self.v = nn.Parameter(torch.randn(hidden))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.W.T).relu() @ self.v


class Elman(nn.Module):
    """A recurrent network, written out so that ``vmap`` takes it; weights are used at every time."""

    def __init__(self, inputs: int = 3, hidden: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.inward = nn.Linear(inputs, hidden)
        self.around = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inward(inputs[:, 0]).tanh()
        for t in range(1, inputs.shape[1]):
            hidden = (self.inward(inputs[:, t]) + self.around(hidden)).tanh()
        outputs: Tensor = self.out(hidden)
        return outputs


@dataclass
class Case:
    """A model with data, and the dense matrices that its curvature must equal."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    l2: float

    def objective(self, batch_size: int | None = None) -> Objective:
        return Objective(self.loss, self.inputs, self.targets, batch_size=batch_size, l2=self.l2)

    def to(self, dtype: torch.dtype) -> Case:
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return Case(self.name, copy.deepcopy(self.model).to(dtype), self.loss, inputs, targets, self.l2)

    @property
    def trainable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def columns(self, names: tuple[str, ...]) -> Tensor:
        """Return the indices of the named parameters in the flat vector of all trainable ones."""
        offsets, total = {}, 0
        for name, value in self.trainable.items():
            offsets[name] = torch.arange(total, total + value.numel())
            total += value.numel()
        return torch.cat([offsets[name] for name in names])

    def hessian(self) -> Tensor:
        """Return the whole Hessian, regulariser not included, by ``torch.func``."""
        model = copy.deepcopy(self.model).eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                # The second derivatives that torch.func takes of the fused one are wrong in torch 2.13.
                module.forward = functools.partial(_plain_layer_norm, module)  # type: ignore[method-assign]
        trainable = self.trainable

        def mean_loss(flat: Tensor) -> Tensor:
            parts = flat.split([value.numel() for value in trainable.values()])
            state = {n: part.reshape(v.shape) for (n, v), part in zip(trainable.items(), parts, strict=True)}
            return self.loss(torch.func.functional_call(model, state, (self.inputs,)), self.targets)

        enabled = torch.backends.mha.get_fastpath_enabled()
        try:
            # The fused encoder is taken under torch.func and gives a wrong, asymmetric Hessian.
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                hessian: Tensor = torch.func.hessian(mean_loss)(self.flat())
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
        return hessian

    def gradients(self) -> Tensor:
        """Return the per-sample gradients (M, P), regulariser not included, by a loop over samples."""
        model = copy.deepcopy(self.model).eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        rows = []
        for m in range(len(self.targets)):
            value = self.loss(model(self.inputs[m : m + 1]), self.targets[m : m + 1])
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)]))
        return torch.stack(rows)

    def jacobians(self) -> tuple[Tensor, Tensor]:
        """Return the outputs (M, D) and their derivatives (M, D, P), by a loop over samples and outputs."""
        model = copy.deepcopy(self.model).eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        outputs, rows = [], []
        for m in range(len(self.targets)):
            output = model(self.inputs[m : m + 1]).reshape(-1)
            gradients = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in output]
            rows.append(torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]))
            outputs.append(output.detach())
        return torch.stack(outputs), torch.stack(rows)

    def second_moments(self) -> dict[str, Tensor]:
        """Return whole matrices made of the derivatives of the outputs, by their definitions."""
        f, J = self.jacobians()
        shape = () if self.loss is logistic else (f.shape[1],)

        def of_sample(output: Tensor, target: Tensor) -> Tensor:
            return self.loss(output.reshape(1, *shape), target[None])

        ggn = torch.zeros(J.shape[2], J.shape[2], dtype=J.dtype)
        fisher = torch.zeros_like(ggn)
        for output, target, jacobian in zip(f, self.targets, J, strict=True):
            ggn += jacobian.T @ torch.func.hessian(of_sample)(output, target) @ jacobian / len(f)
            labels = [torch.zeros_like(target), torch.ones_like(target)]
            if self.loss is F.cross_entropy:
                labels = list(torch.arange(len(output)))
            for label in labels:
                g = jacobian.T @ torch.func.grad(of_sample)(output, label)
                fisher += torch.exp(-of_sample(output, label)) * torch.outer(g, g) / len(f)
        gradients = self.gradients()
        centred = gradients - gradients.mean(0)
        return {
            "ggn": ggn,
            "fisher": fisher,
            "gmatrix": gradients.T @ gradients / len(f),
            "gmatrix_centered": centred.T @ centred / len(f),
        }

    def flat(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.trainable.values()])


def _plain_layer_norm(module: nn.LayerNorm, inputs: Tensor) -> Tensor:
    centred = inputs - inputs.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return normed * module.weight + module.bias


def logistic(scores: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, labels)


def _classes(n: int, k: int) -> Tensor:
    return torch.arange(n) % k


def _build() -> dict[str, Case]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    relu = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 3)
    )
    linear = nn.Linear(6, 3, bias=False)
    frozen = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    frozen[0].bias.requires_grad_(False)
    cases = [
        Case("mlp-tanh", mlp, F.cross_entropy, torch.randn(17, 5), _classes(17, 3), 0.0),
        Case("mlp-relu", relu, F.cross_entropy, torch.randn(31, 5), _classes(31, 3), 0.05),
        Case("cnn", cnn, F.cross_entropy, torch.randn(11, 1, 5, 5), _classes(11, 3), 0.0),
        Case(
            "attention", TiedAttention(), F.cross_entropy, torch.randint(0, 5, (9, 4)), _classes(9, 5), 0.02
        ),
        Case("rnn", Elman(), F.cross_entropy, torch.randn(13, 4, 3), _classes(13, 3), 0.1),
        Case("gmm", linear, F.cross_entropy, torch.randn(40, 6), _classes(40, 3), 0.1),
        Case("xor", Xor(), logistic, torch.randn(50, 6), _classes(50, 2).float(), 0.1),
        Case("frozen", frozen, F.cross_entropy, torch.randn(8, 5), _classes(8, 3), 0.3),
    ]
    return {case.name: case.to(torch.float64) for case in cases}


CASES = _build()


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each case in turn, in float64."""
    found: Case = CASES[request.param].to(torch.float64)
    return found


@pytest.fixture
def get_case() -> Callable[[str], Case]:
    """Return a function that gives a case by its name, in float64."""
    return lambda name: CASES[name].to(torch.float64)


@pytest.fixture(scope="session")
def whole_matrices() -> Callable[[str], dict[str, Tensor]]:
    """Return a function that gives the whole matrices of a case by their kind, data part only, made once."""
    made: dict[str, dict[str, Tensor]] = {}

    def give(name: str) -> dict[str, Tensor]:
        if name not in made:
            made[name] = {"hessian": CASES[name].hessian(), **CASES[name].second_moments()}
        return made[name]

    return give


@pytest.fixture(scope="session")
def dense_matrices() -> Callable[[str], tuple[Tensor, Tensor]]:
    """Return a function that gives the whole Hessian and the per-sample gradients of a case, made once."""
    made: dict[str, tuple[Tensor, Tensor]] = {}

    def give(name: str) -> tuple[Tensor, Tensor]:
        if name not in made:
            made[name] = (CASES[name].hessian(), CASES[name].gradients())
        return made[name]

    return give


class MatrixOperator(BlockOperator):
    """Whole matrices (count, p, p) behind the contract of an operator: a batch of rows if count > 1."""

    def __init__(self, matrices: Tensor) -> None:
        shape = tuple(matrices.shape[:2]) if len(matrices) > 1 else (matrices.shape[1],)
        block = Block("planted", "rows" if len(matrices) > 1 else "layer", ("planted",), (shape,))
        super().__init__(block, matrices.dtype, matrices.device)
        self.matrices, self.products = matrices, 0

    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        self.products += len(vectors)
        if len(self.matrices) == 1:
            return vectors @ self.matrices[0].T
        return (self.matrices[rows] @ vectors[:, :, None])[:, :, 0]


@pytest.fixture(scope="session")
def operator_of() -> Callable[[Tensor], MatrixOperator]:
    """Return a function that wraps matrices (count, p, p), or one matrix (p, p)."""
    return lambda matrices: MatrixOperator(matrices.reshape(-1, *matrices.shape[-2:]))


@pytest.fixture(scope="session")
def planted() -> Callable[[Tensor], Tensor]:
    """Return a function that makes a matrix of the eigenvalues given, in a random basis."""

    def make(eigenvalues: Tensor, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(eigenvalues), len(eigenvalues))
        basis: Tensor = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
        return (basis * eigenvalues.double()) @ basis.T

    return make
