r"""Blocks beside the diagonal: how two parts of the parameter vector are coupled.

For disjoint parts a and b the rectangular block :math:`A_{ab}` of a curvature matrix A
maps vectors of b to vectors of a, and :math:`A_{ba} = A_{ab}^T`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.block_parts import BlockPart
from hild_xr.recorders.curvature.blocks import Block
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.operators import BlockOperator, SecondMoment, split, sum_tensors

if TYPE_CHECKING:
    from hild_xr.recorders.curvature.graph import Graphs, LossGraph


class CrossOperator(ABC):
    """A rectangular block of shape (p_a, p_b) through products.

    Parameters
    ----------
    a, b
        The parts that number rows and columns.
    dtype, device
        Of the vectors.

    Attributes
    ----------
    shape
        (p_a, p_b).
    """

    def __init__(self, a: BlockPart, b: BlockPart, dtype: torch.dtype, device: torch.device) -> None:
        self.a, self.b, self.dtype, self.device = a, b, dtype, device
        self.shape = (a.size, b.size)

    @property
    def name(self) -> str:
        """Name in error messages."""
        return f"{self.a.label} x {self.b.label}"

    @abstractmethod
    def product(self, vectors: Tensor) -> Tensor:
        """Return the products of vectors of b, shape (n, p_b), as vectors of a, shape (n, p_a)."""

    @abstractmethod
    def adjoint_product(self, vectors: Tensor) -> Tensor:
        """Return the products of vectors of a, shape (n, p_a), with the transpose, shape (n, p_b)."""

    def matrix(self) -> Tensor:
        """Return the whole block, shape (p_a, p_b), from as many products as its smaller side is long."""
        n_rows, n_columns = self.shape
        if n_rows <= n_columns:
            return self.adjoint_product(torch.eye(n_rows, dtype=self.dtype, device=self.device))
        return self.product(torch.eye(n_columns, dtype=self.dtype, device=self.device)).T


class _CrossBothWays(CrossOperator):
    """A block whose products and those of its transpose are one operation, with the parts swapped."""

    def product(self, vectors: Tensor) -> Tensor:
        """Return the products of vectors of b, shape (n, p_b), as vectors of a, shape (n, p_a)."""
        return self._products(vectors, self.b, self.a)

    def adjoint_product(self, vectors: Tensor) -> Tensor:
        """Return the products of vectors of a, shape (n, p_a), with the transpose, shape (n, p_b)."""
        return self._products(vectors, self.a, self.b)

    @abstractmethod
    def _products(self, vectors: Tensor, source: BlockPart, target: BlockPart) -> Tensor:
        """Return the products of vectors of one part as vectors of the other."""


class NetworkCrossHessian(_CrossBothWays):
    """Off-diagonal Hessian block through backward passes that visit no more than they need.

    The regulariser has no part beside the diagonal.

    Parameters
    ----------
    a, b
        The parts.
    graphs
        As for :class:`~hild_xr.recorders.curvature.operators.NetworkHessian`.
    dtype, device
        Of the vectors.
    """

    def __init__(
        self,
        a: BlockPart,
        b: BlockPart,
        graphs: Graphs,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(a, b, dtype, device)
        self._graphs = graphs

    def _products(self, vectors: Tensor, source: BlockPart, target: BlockPart) -> Tensor:
        whole = _embedded(vectors, source, source.block)
        of_batches: list[Tensor] = []

        def multiply(weight: float, graph: LossGraph) -> None:
            products = []
            for vector in whole:
                parts = graph.hessian_product(
                    source.block.parameters, split(vector, source.block.shapes), target.block.parameters
                )
                products.append(torch.cat([part.reshape(-1) for part in parts]))
            of_batches.append(weight * torch.stack(products).to(self.dtype))

        self._graphs.each(multiply)
        return _taken(sum_tensors(of_batches), target, target.block)


class CrossSecondMoment(_CrossBothWays):
    r"""Off-diagonal block :math:`\frac1M J_a^T J_b` of a second-moment matrix.

    Parameters
    ----------
    a, b
        The parts.
    left, right
        Second moments of the whole parameters of a and of b.
    """

    def __init__(self, a: BlockPart, b: BlockPart, left: SecondMoment, right: SecondMoment) -> None:
        super().__init__(a, b, left.dtype, left.device)
        self.left, self.right = left, right

    def _products(self, vectors: Tensor, source: BlockPart, target: BlockPart) -> Tensor:
        given, wanted = (self.right, self.left) if source is self.b else (self.left, self.right)
        scores = given.apply(_embedded(vectors, source, source.block))
        return _taken(wanted.adjoint(scores) / wanted.n_samples, target, target.block)


class CrossOfUnion(_CrossBothWays):
    """Off-diagonal block of any matrix, cut out of the diagonal block of both parts together.

    Costs a product with that larger block; serves every kind of matrix that knows no
    shorter way.

    Parameters
    ----------
    a, b
        The parts.
    whole
        Operator of a flat block that holds both (see :func:`union`).
    """

    def __init__(self, a: BlockPart, b: BlockPart, whole: BlockOperator) -> None:
        super().__init__(a, b, whole.dtype, whole.device)
        self._whole = whole

    def _products(self, vectors: Tensor, source: BlockPart, target: BlockPart) -> Tensor:
        rows = torch.zeros(len(vectors), dtype=torch.int64, device=self.device)
        products = self._whole.product(_embedded(vectors, source, self._whole.block), rows)
        return _taken(products, target, self._whole.block)


def coupling_ratio(
    operator: CrossOperator, left: BlockOperator, right: BlockOperator, max_bytes: int = 2**30
) -> float:
    r"""Return the coupling ratio of two parts, exactly.

    .. math:: \frac{\|A_{ab}\|_F}{\sqrt{\|A_{aa}\|_F \|A_{bb}\|_F}}

    At most 1 for a positive semi-definite matrix, and 0 exactly where the parts do not
    interact. For a second-moment matrix of few samples it is taken from the M x M
    Gram matrices of per-sample gradients,
    :math:`\langle K_a, K_b \rangle / (\|K_a\| \|K_b\|)` under the root: the
    uncentred kernel alignment of Cortes et al. 2012.

    Parameters
    ----------
    operator
        The off-diagonal block.
    left, right
        Blocks on the diagonal, of ``operator.a.own`` and ``operator.b.own``.
    max_bytes
        Memory that whole matrices may take.

    Returns
    -------
    float
        NaN if a block on the diagonal is zero.

    Raises
    ------
    NonFiniteCurvatureError
        If an entry is NaN or infinite.
    ValueError
        If whole matrices do not fit the memory.
    """
    a, b = operator.a, operator.b
    if isinstance(left, SecondMoment) and isinstance(right, SecondMoment):
        few = left.n_samples < left.size + right.size
        if few and 32 * left.n_samples**2 <= max_bytes:
            return _ratio(operator.name, *_norms_by_grams(left, right))
    needed = 16 * max(a.size, b.size) ** 2
    if needed > max_bytes:
        raise ValueError(
            f"the coupling of {operator.name} needs whole matrices of {a.size} and {b.size} parameters, some "
            f"{needed:,} bytes, and max_bytes is {max_bytes:,}: take smaller parts, or the leading singular "
            "values (cross_singular)"
        )
    norms = []
    for part, side in ((a, left), (b, right)):
        row = torch.tensor([part.row or 0], device=side.device)
        norms.append(side.matrix(row).double().norm())
    return _ratio(operator.name, operator.matrix().double().norm(), *norms)


def _norms_by_grams(left: SecondMoment, right: SecondMoment) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms of the block beside the diagonal and of both on it."""
    grams = left.gram().double(), right.gram().double()
    cross = (grams[0] * grams[1]).sum().clamp(min=0).sqrt()
    return cross, left.norm_from_gram(grams[0]), right.norm_from_gram(grams[1])


def _ratio(name: str, cross: Tensor, left: Tensor, right: Tensor) -> float:
    numbers = [float(norm) for norm in (cross, left, right)]
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteCurvatureError(name, "an entry of the matrix")
    scale = math.sqrt(numbers[1]) * math.sqrt(numbers[2])
    return numbers[0] / scale if scale > 0 else math.nan


def _embedded(vectors: Tensor, part: BlockPart, block: Block) -> Tensor:
    """Return vectors of a part (n, p) as flat vectors of a block that holds it, zero elsewhere."""
    if part.row is None and part.block == block:
        return vectors
    whole = vectors.new_zeros(len(vectors), sum(block.sizes))
    whole[:, part.within(block)] = vectors
    return whole


def _taken(vectors: Tensor, part: BlockPart, block: Block) -> Tensor:
    """Return the components of a part from flat vectors of a block that holds it."""
    return vectors if part.row is None and part.block == block else vectors[:, part.within(block)]
