"""How good eigenpairs really are: residuals in float64 by plain torch, sharing no code with any solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.curvature_states import State

Matrix = Literal["hessian", "gmatrix"]
RESIDUAL = 1e-3
# Errors of eigenvalues are quadratic in residuals: a value further off than this belongs to another pair.
SAME_VALUE = 1e-3
_WHOLE_UP_TO = 300


@dataclass(frozen=True)
class Pairs:
    """Eigenpairs of the block of some parameters.

    Parameters
    ----------
    names
        The parameters of the block.
    eigenvalues
        Shape (k,), by decreasing absolute value.
    eigenvectors
        Shape (k, p), or None where a solver returns values only.
    """

    names: tuple[str, ...]
    eigenvalues: Tensor
    eigenvectors: Tensor | None


class Exact:
    """Products with the blocks of a state's Hessian and G-matrix in float64.

    Parameters
    ----------
    state
        The state, in any precision.
    """

    def __init__(self, state: State) -> None:
        self._state = state.double()
        self._parameters = dict(self._state.model.named_parameters())
        self._gradients: dict[tuple[str, ...], Tensor] = {}

    def products(self, matrix: Matrix, names: Sequence[str], vectors: Tensor) -> Tensor:
        """Return the products of vectors (k, p) with the block of the parameters named."""
        multiply = self._hessian if matrix == "hessian" else self._gmatrix
        return multiply(names, vectors.double())

    def matrix(self, matrix: Matrix, names: Sequence[str]) -> Tensor:
        """Return the whole block, shape (p, p)."""
        size = sum(self._parameters[name].numel() for name in names)
        return self.products(matrix, names, torch.eye(size))

    def residuals(self, matrix: Matrix, pairs: Pairs) -> Tensor:
        r"""Return :math:`|Av - \lambda v| / |\lambda|` of each pair, v brought to length 1, shape (k,)."""
        if pairs.eigenvectors is None:
            raise ValueError("values alone have no residual")
        vectors = F.normalize(pairs.eigenvectors.double(), dim=1)
        values = pairs.eigenvalues.double()
        difference = self.products(matrix, pairs.names, vectors) - values[:, None] * vectors
        residuals: Tensor = difference.norm(dim=1) / values.abs()
        return residuals

    def top(self, matrix: Matrix, names: Sequence[str], k: int) -> Tensor:
        """Return the k eigenvalues of largest absolute value, best first, shape (k,).

        From the whole matrix if it is small, else by Lanczos with two full Gram-Schmidt passes, until two
        values more than asked for have residuals of a hundredth of what solvers are asked for.
        """
        size = sum(self._parameters[name].numel() for name in names)
        if size <= _WHOLE_UP_TO:
            return best_first(torch.linalg.eigvalsh(self.matrix(matrix, names)))[:k]
        basis, filled = torch.empty(64, size, dtype=torch.float64), 0
        projected = torch.zeros(0, 0, dtype=torch.float64)
        vector = F.normalize(torch.randn(size, generator=_generator(), dtype=torch.float64), dim=0)
        while True:
            if filled == len(basis):
                basis = torch.cat([basis, torch.empty_like(basis)])
            basis[filled], filled = vector, filled + 1
            product = self.products(matrix, names, vector[None])[0]
            column = torch.zeros(filled, dtype=torch.float64)
            for _ in range(2):
                coefficients = basis[:filled] @ product
                column += coefficients
                product = product - coefficients @ basis[:filled]
            projected = torch.block_diag(projected, column[-1:, None])
            projected[-1], projected[:, -1] = column, column
            values, vectors = torch.linalg.eigh(projected)
            order: Tensor = values.abs().argsort(descending=True)[: k + 2]
            left = product.norm() * vectors[-1, order].abs()
            if filled >= k + 2 and bool((left <= RESIDUAL / 100 * values[order].abs()).all()):
                return best_first(values)[:k]
            vector = F.normalize(product, dim=0)

    def _hessian(self, names: Sequence[str], vectors: Tensor) -> Tensor:
        leaves = [self._parameters[name] for name in names]
        if tuple(names) not in self._gradients:
            loss = F.cross_entropy(self._state.model(self._state.inputs), self._state.targets)
            self._gradients[tuple(names)] = flat(torch.autograd.grad(loss, leaves, create_graph=True))
        gradient = self._gradients[tuple(names)]
        return torch.stack(
            [flat(torch.autograd.grad(gradient, leaves, v, retain_graph=True)) for v in vectors]
        )

    def _gmatrix(self, names: Sequence[str], vectors: Tensor) -> Tensor:
        # The derivative of all losses along v, weighted sum of all gradients by it: two passes, and
        # the samples' gradients are never formed.
        leaves = {name: self._parameters[name].detach() for name in names}
        products = []
        for vector in vectors:
            parts = torch.split(vector, [leaf.numel() for leaf in leaves.values()])
            tangents = {
                name: part.reshape(leaf.shape)
                for (name, leaf), part in zip(leaves.items(), parts, strict=True)
            }
            scores = torch.func.jvp(self._losses, (leaves,), (tangents,))[1]
            (product,) = torch.func.vjp(self._losses, leaves)[1](scores / len(scores))
            products.append(flat(list(product.values())))
        return torch.stack(products)

    def _losses(self, leaves: dict[str, Tensor]) -> Tensor:
        fixed = {name: parameter.detach() for name, parameter in self._parameters.items()}
        outputs = torch.func.functional_call(self._state.model, fixed | leaves, self._state.inputs)
        return F.cross_entropy(outputs, self._state.targets, reduction="none")


class Demand:
    """What a result of a task has to be: the top k pairs of each block, up to a true residual.

    Parameters
    ----------
    exact, matrix, blocks, k
        What of.
    """

    def __init__(self, exact: Exact, matrix: Matrix, blocks: Sequence[tuple[str, ...]], k: int) -> None:
        self._exact, self._matrix = exact, matrix
        self.values = [exact.top(matrix, names, k) for names in blocks]

    def residual(self, found: Sequence[Pairs]) -> float | None:
        """Return the worst true residual of all pairs, or None where there are only values."""
        if any(pairs.eigenvectors is None for pairs in found):
            return None
        return max(float(self._exact.residuals(self._matrix, pairs).max()) for pairs in found)

    def error(self, found: Sequence[Tensor]) -> float:
        """Return the largest relative error of the values of all blocks, whatever their order."""
        return max(
            float(((values.double().sort().values - true) / true).abs().max())
            for values, true in zip(found, (true.sort().values for true in self.values), strict=True)
        )

    def of(self, block: int) -> Demand:
        """Return the demand on one block."""
        alone = object.__new__(Demand)
        alone._exact, alone._matrix, alone.values = self._exact, self._matrix, [self.values[block]]
        return alone

    def met(self, found: Sequence[Pairs]) -> bool:
        """Whether a result is right."""
        residual = self.residual(found)
        complete = self.error([pairs.eigenvalues for pairs in found]) <= SAME_VALUE
        return complete and (residual is None or residual <= RESIDUAL)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def best_first(values: Tensor) -> Tensor:
    """Order eigenvalues by decreasing absolute value."""
    return values[values.abs().argsort(descending=True)]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4321)
