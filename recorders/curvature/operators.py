"""Curvature matrices as operators: products, whole matrices and traces of a block.

Every operator has one contract, whatever it is made of (network passes, factors of a
linear layer, per-sample gradients): ``product(vectors, rows)`` multiplies the n-th vector
with sub-block ``rows[n]``. A block that is no batch has the single sub-block 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.precision import chosen_products, may_round
from hild_xr.recorders.curvature.sample_gradients import ExplicitGradients, FactoredGradients, gram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hild_xr.recorders.curvature.blocks import Block
    from hild_xr.recorders.curvature.graph import Graphs, LossGraph
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.curvature.linear_chain import LinearChain
    from hild_xr.recorders.curvature.sample_gradients import GradientSampler, SampleGradients


_LARGE = 2**12  # dimension from which on rounding errors, in any direction, hardly meet those looked for
_WORTH_ROUNDING = 2**28  # multiplications of a product, from which on rounding saves more than it takes


class BlockOperator(ABC):
    """A batch of ``count`` symmetric matrices of dimension ``size``.

    Parameters
    ----------
    block
        The block, for its label and shapes.
    dtype, device
        Of the vectors.
    """

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        self.block, self.dtype, self.device = block, dtype, device
        self.size, self.count = block.size, block.count

    @abstractmethod
    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,), shape (n, p)."""

    def matrix(self, rows: Tensor) -> Tensor:
        """Return whole sub-blocks, shape (n, p, p); here from products with the identity."""
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device).repeat(len(rows), 1)
        columns = self.product(identity, rows.repeat_interleave(self.size))
        return columns.reshape(len(rows), self.size, self.size)

    def rounded(self) -> BlockOperator | None:
        """Return the same matrices of less precise and much cheaper products, if there are; else ``None``."""
        return None

    def trace(self) -> Tensor | None:
        """Return the trace of each sub-block, shape (count,), where it is nearly free; else ``None``."""
        return None

    def diagonal(self) -> Tensor | None:
        """Return the diagonal of each sub-block, shape (count, p), where it is nearly free; else ``None``."""
        return None


class NetworkOperator(BlockOperator):
    """Block of a curvature matrix through backward passes of the network.

    With a single batch the graph is kept, and each vector costs its backward passes only.
    With several batches each *call* of :meth:`product` builds the graph of every batch
    anew (a forward and a first backward pass on all data), and all vectors of the call
    share it: hand over several at once.

    Several vectors are taken in one pass where the network is so small that a pass is
    mostly overhead, and one by one where torch cannot batch an operation, as
    GroupNorm's second derivative.

    Parameters
    ----------
    block
        The block.
    graphs
        The graph of each batch: the retained one, or one after the other built anew.
    l2
        Added to the diagonal.
    dtype, device
        Of the vectors.
    """

    def __init__(
        self,
        block: Block,
        graphs: Graphs,
        l2: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(block, dtype, device)
        self._graphs, self._l2 = graphs, l2
        self._batchable: bool | None = None  # not decided yet

    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        of_batches: list[Tensor] = []

        def multiply(weight: float, graph: LossGraph) -> None:
            of_batches.append(self._of_chunks(graph, vectors, rows.tolist()).mul_(weight))

        self._graphs.each(multiply)
        products = sum_tensors(of_batches).to(vectors.dtype)
        return products.add_(vectors, alpha=self._l2) if self._l2 else products

    @chosen_products()
    def _of_chunks(self, graph: LossGraph, vectors: Tensor, rows: list[int]) -> Tensor:
        if self._batchable is None:
            self._batchable = self._can_batch(graph)
        products: list[Tensor] = []
        while (start := sum(map(len, products))) < len(vectors):
            stop = start + (graph.vectors_at_once if self._batchable else 1)
            chunk, chunk_rows = vectors[start:stop], rows[start:stop]
            if len(chunk) == 1:
                products.append(self._of_graph(graph, chunk, chunk_rows))
                continue
            # No filter turns warnings into errors here: it would do so in every thread, the loaders' of
            # the user's data too. What torch itself takes one by one inside a pass it keeps silent about.
            try:
                products.append(self._of_graph(graph, chunk, chunk_rows))
            except RuntimeError:
                self._batchable = False  # one by one from here on
        return products[0] if len(products) == 1 else torch.cat(products)

    def _can_batch(self, graph: LossGraph) -> bool:  # noqa: ARG002 (for the Hessian)
        """Whether a pass may take several vectors, for all that is known before one is tried."""
        return True

    @abstractmethod
    def _of_graph(self, graph: LossGraph, vectors: Tensor, rows: list[int]) -> Tensor:
        """Return the products of vectors (n, p) with sub-blocks of the batch's matrix, in one pass."""

    def _parts(self, vectors: Tensor, rows: list[int]) -> list[Tensor]:
        if self.block.kind == "rows":
            part = torch.zeros(len(rows), *self.block.shapes[0], dtype=self.dtype, device=self.device)
            part[torch.arange(len(rows)), rows] = vectors.reshape(len(rows), *self.block.vector_shape)
            return [part]
        return _parameter_parts(self.block, vectors)

    def _vectors(self, parts: list[Tensor], rows: list[int]) -> Tensor:
        if self.block.kind == "rows":
            return parts[0][torch.arange(len(rows)), rows].reshape(len(rows), -1)
        return torch.cat([part.reshape(len(rows), -1) for part in parts], dim=1)


class NetworkHessian(NetworkOperator):
    """Hessian block: one backward pass through the first one for each vector."""

    def _can_batch(self, graph: LossGraph) -> bool:
        """Whether no GroupNorm is there, of whose second derivative torch mixes up the dims.

        Mostly that fails. It does not, and gives wrong numbers, where sizes agree by chance: with one
        group, as many positions as channels, and as many samples, or one.
        """
        return not _has_group_norm(graph.loss)

    def _of_graph(self, graph: LossGraph, vectors: Tensor, rows: list[int]) -> Tensor:
        return self._vectors(graph.hessian_products(self.block.parameters, self._parts(vectors, rows)), rows)


class ChainHessian(BlockOperator):
    """Hessian block of linear layers in a row, which the network is not asked for.

    Parameters
    ----------
    block
        A block of whole parameters.
    chain
        The layers.
    measuring
        Keeps out what the caller has set, as autocast.
    l2
        Added to the diagonal.
    dtype, device
        Of the vectors.
    max_bytes
        Memory that the chain and its rounded copy may take together.
    """

    def __init__(
        self,
        block: Block,
        chain: LinearChain,
        measuring: Measurement,
        l2: float,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int = 2**30,
    ) -> None:
        super().__init__(block, dtype, device)
        self._chain, self._measuring, self._l2, self._max_bytes = chain, measuring, l2, max_bytes

    def rounded(self) -> ChainHessian | None:
        """Return the same block of factors rounded to bfloat16, where that is allowed and pays."""
        chain = self._chain
        pays = self.size >= _LARGE and chain.work(self.block.parameters) >= _WORTH_ROUNDING
        fits = chain.dtype == torch.float32 and 2 * chain.nbytes <= self._max_bytes
        if not (pays and fits and may_round(self.device)):
            return None
        low = chain.rounded()
        return ChainHessian(self.block, low, self._measuring, self._l2, self.dtype, self.device)

    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG002 (one sub-block)
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        with self._measuring(), chosen_products():
            factors = vectors.detach().to(self._chain.dtype)
            products, names = torch.empty_like(factors, dtype=self.dtype), self.block.parameters
            at_once = self._chain.vectors_at_once
            for start in range(0, len(vectors), at_once):
                there = slice(start, start + at_once)
                self._chain.multiply(
                    dict(zip(names, _parameter_parts(self.block, factors[there]), strict=True)),
                    dict(zip(names, _parameter_parts(self.block, products[there]), strict=True)),
                )
            products = products.add_(vectors.detach(), alpha=self._l2) if self._l2 else products
        return products.to(vectors.dtype)


class NetworkGaussNewton(NetworkOperator):
    r"""Generalized Gauss-Newton block :math:`J^T \frac{\partial^2 L}{\partial f^2} J`.

    One pass through the first backward for :math:`Jv`, one through the network for
    :math:`J^T`; the loss in between costs little.
    """

    def _of_graph(self, graph: LossGraph, vectors: Tensor, rows: list[int]) -> Tensor:
        along = graph.output_products(self.block.parameters, self._parts(vectors, rows))
        weighted = graph.loss_hessian_products(along)
        return self._vectors(graph.output_adjoints(self.block.parameters, weighted), rows)


class NetworkSecondMoment(NetworkOperator):
    r"""Block of :math:`\frac1M\sum_m\sum_k g_{mk} g_{mk}^T`, :math:`g_{mk} = J_m^T a_{mk} + s` never formed.

    Parameters
    ----------
    block, graphs, l2, dtype, device
        As for :class:`NetworkOperator`.
    columns
        Returns the columns a of a batch at its outputs, shape (n, K, *output).
    shift
        s, shape (count, p); ``None`` for nothing.
    sampler
        Makes the g chunk by chunk for the trace; ``None`` leaves the trace out.
    """

    def __init__(
        self,
        block: Block,
        graphs: Graphs,
        l2: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        columns: Callable[[LossGraph], Tensor],
        shift: Tensor | None = None,
        sampler: GradientSampler | None = None,
    ) -> None:
        super().__init__(block, graphs, l2, dtype, device)
        self._columns, self._shift, self._sampler = columns, shift, sampler

    def _of_graph(self, graph: LossGraph, vectors: Tensor, rows: list[int]) -> Tensor:
        names, columns = self.block.parameters, self._columns(graph)
        flat = columns.reshape(*columns.shape[:2], -1)
        along = graph.output_products(names, self._parts(vectors, rows))
        scores = flat @ along.reshape(*along.shape[:2], -1, 1).to(flat.dtype)  # (vectors, samples, K, 1)
        if self._shift is not None:
            scores = scores + (self._shift[rows] * vectors).sum(1)[:, None, None, None].to(scores.dtype)
        weighted = (flat.mT @ scores).reshape(along.shape)
        products = self._vectors(graph.output_adjoints(names, weighted), rows).to(vectors.dtype)
        if self._shift is not None:
            products = products + scores.sum((1, 2)) * self._shift[rows]
        return products / graph.n_samples

    def trace(self) -> Tensor | None:
        """Return the trace of each sub-block, shape (count,), or ``None``."""
        if self._sampler is None:
            return None
        return gradient_trace(self.block, self._sampler, self._shift) + self._l2 * self.size


class WeightedRows(BlockOperator):
    r"""Rows of a linear layer's Hessian: :math:`\frac1M\sum_m s_{mc} h_m h_m^T + \beta I`.

    Parameters
    ----------
    block
        A block of rows.
    h
        Inputs of the layer, shape (M, in).
    weights
        :math:`s_{mc}`, second derivatives by the outputs, shape (M, out).
    l2
        :math:`\beta`.
    """

    def __init__(self, block: Block, h: Tensor, weights: Tensor, l2: float) -> None:
        super().__init__(block, h.dtype, h.device)
        self._h, self._weights, self._l2 = h, weights / len(h), l2

    @chosen_products()
    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        scores = (self._h @ vectors.T) * _columns(self._weights, rows)
        return scores.T @ self._h + self._l2 * vectors

    @chosen_products()
    def matrix(self, rows: Tensor) -> Tensor:
        """Return whole sub-blocks, shape (n, p, p)."""
        identity = self._l2 * torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([(self._h * self._weights[:, row, None]).T @ self._h + identity for row in rows])

    def trace(self) -> Tensor:
        """Return the trace of each sub-block, shape (count,)."""
        return self._h.square().sum(1) @ self._weights + self._l2 * self.size

    def diagonal(self) -> Tensor:
        """Return the diagonal of each sub-block, shape (count, p)."""
        return self._weights.T @ self._h.square() + self._l2


class FactoredRowsSecondMoment(BlockOperator):
    r"""Rows of a linear layer's G-matrix, from its factors.

    Row c has the per-sample gradients :math:`\delta_{mc} h_m + s_c`, where the shift
    :math:`s_c` is the regulariser's gradient or zero.

    Parameters
    ----------
    block
        A block of rows.
    h
        Inputs of the layer, shape (M, in).
    delta
        Gradients by the outputs, shape (M, out).
    shift
        Added to each per-sample gradient, shape (out, in); ``None`` for nothing.
    """

    def __init__(self, block: Block, h: Tensor, delta: Tensor, shift: Tensor | None) -> None:
        super().__init__(block, h.dtype, h.device)
        self._h, self._delta, self._shift = h, delta, shift

    @chosen_products()
    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        delta = _columns(self._delta, rows)
        scores = (self._h @ vectors.T) * delta
        if self._shift is not None:
            scores += (self._shift[rows] * vectors).sum(1)
        products = (scores * delta).T @ self._h
        if self._shift is not None:
            products += scores.sum(0)[:, None] * self._shift[rows]
        return products / len(self._h)

    @chosen_products()
    def matrix(self, rows: Tensor) -> Tensor:
        """Return whole sub-blocks, shape (n, p, p)."""
        return torch.stack(
            [gradients.T @ gradients / len(self._h) for gradients in map(self._gradients, rows)]
        )

    def trace(self) -> Tensor:
        """Return the trace of each sub-block, shape (count,)."""
        trace = self._h.square().sum(1) @ self._delta.square()
        if self._shift is not None:
            mean = self._delta.T @ self._h
            trace += 2 * (mean * self._shift).sum(1) + len(self._h) * self._shift.square().sum(1)
        return trace / len(self._h)

    def diagonal(self) -> Tensor:
        """Return the diagonal of each sub-block, shape (count, p)."""
        squares = self._delta.square().T @ self._h.square() / len(self._h)
        if self._shift is None:
            return squares
        return squares + 2 * self._shift * (self._delta.T @ self._h) / len(self._h) + self._shift.square()

    def _gradients(self, row: Tensor) -> Tensor:
        gradients = self._h * self._delta[:, row, None]
        return gradients if self._shift is None else gradients + self._shift[row]


class RowsSecondMoment(BlockOperator):
    """Rows of a G-matrix from per-sample gradients held as a tensor.

    Parameters
    ----------
    block
        A block of rows.
    gradients
        Per-sample gradients, shape (out, M, p), regulariser included where wanted.
    ridge
        Added to the diagonal.
    """

    def __init__(self, block: Block, gradients: Tensor, ridge: float = 0.0) -> None:
        super().__init__(block, gradients.dtype, gradients.device)
        self._gradients, self._ridge = gradients, ridge

    @chosen_products()
    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        gradients = self._gradients if len(rows) == self.count and _in_order(rows) else self._gradients[rows]
        scores = gradients @ vectors[:, :, None]
        return (gradients.mT @ scores)[:, :, 0] / gradients.shape[1] + self._ridge * vectors

    @chosen_products()
    def matrix(self, rows: Tensor) -> Tensor:
        """Return whole sub-blocks, shape (n, p, p)."""
        gradients = self._gradients[rows]
        return with_ridge(gradients.mT @ gradients / gradients.shape[1], self._ridge)

    def trace(self) -> Tensor:
        """Return the trace of each sub-block, shape (count,)."""
        return self._gradients.square().sum((1, 2)) / self._gradients.shape[1] + self._ridge * self.size

    def diagonal(self) -> Tensor:
        """Return the diagonal of each sub-block, shape (count, p)."""
        return self._gradients.square().mean(1) + self._ridge


class SecondMoment(BlockOperator):
    r"""Second moment :math:`\frac1M J^TJ + \rho I` of a block, from the gradients J of its parameters.

    Parameters
    ----------
    block
        The block.
    parts
        Gradients of each of its parameters.
    n_samples
        Number M of gradients: of samples, or of samples times outputs.
    shift
        Added to each gradient, shape (p,); ``None`` for nothing.
    dtype, device
        Of the vectors.
    ridge
        :math:`\rho`, added to the diagonal.
    """

    def __init__(
        self,
        block: Block,
        parts: Sequence[SampleGradients],
        n_samples: int,
        shift: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(block, dtype, device)
        self.n_samples, self.ridge = n_samples, ridge
        self._parts, self._shift = parts, shift
        self._sizes = [part.size for part in parts]

    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG002 (one sub-block)
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        return self.adjoint(self.apply(vectors)) / self.n_samples + self.ridge * vectors

    @chosen_products()
    def apply(self, vectors: Tensor) -> Tensor:
        """Return J v for vectors (n, p), shape (n, M)."""
        pieces = zip(self._parts, torch.split(vectors, self._sizes, dim=1), strict=True)
        scores = sum_tensors(part.apply(piece) for part, piece in pieces)
        return scores if self._shift is None else scores + (vectors @ self._shift)[:, None]

    @chosen_products()
    def adjoint(self, weights: Tensor) -> Tensor:
        """Return J^T u for weights (n, M), shape (n, p)."""
        vectors = torch.cat([part.adjoint(weights) for part in self._parts], dim=1)
        return vectors if self._shift is None else vectors + weights.sum(1, keepdim=True) * self._shift

    @chosen_products()
    def gram(self) -> Tensor:
        """Return J J^T / M, shape (M, M): it has the nonzero eigenvalues of J^T J / M, ridge left out."""
        factored = [part for part in self._parts if isinstance(part, FactoredGradients)]
        matrices = [part for part in self._parts if isinstance(part, ExplicitGradients)]
        explicit = {part.matrix.data_ptr(): part for part in matrices}
        # A bias has the gradients delta of its layer: one matrix product serves both.
        biased = {id(part) for part in factored if explicit.pop(part.delta.data_ptr(), None) is not None}
        whole = [part.with_bias() if id(part) in biased else part for part in factored]
        products = gram([*whole, *explicit.values()])
        if self._shift is not None:
            cross = self._data_scores(self._shift)
            products += cross[:, None] + cross[None, :] + self._shift.square().sum()
        return products.div_(self.n_samples)

    def norm_from_gram(self, gram: Tensor) -> Tensor:
        r"""Return :math:`\|\frac1M J^TJ + \rho I\|_F`, shape (1,), float64, from what :meth:`gram` gives."""
        squared = gram.double().square().sum()
        return (squared + 2 * self.ridge * self.trace().double() - self.ridge**2 * self.size).sqrt()

    @chosen_products()
    def matrix(self, rows: Tensor) -> Tensor:  # noqa: ARG002 (one sub-block)
        """Return whole sub-blocks, shape (n, p, p)."""
        gradients = torch.cat([part.explicit() for part in self._parts], dim=1)
        if self._shift is not None:
            gradients = gradients + self._shift
        return with_ridge((gradients.T @ gradients)[None] / self.n_samples, self.ridge)

    def trace(self) -> Tensor:
        """Return the trace of each sub-block, shape (count,)."""
        squares = sum_tensors(part.squared_norms() for part in self._parts)
        if self._shift is not None:
            squares = squares + 2 * self._data_scores(self._shift) + self._shift.square().sum()
        return squares.mean().reshape(1) + self.ridge * self.size

    def _data_scores(self, vector: Tensor) -> Tensor:
        pieces = zip(self._parts, torch.split(vector, self._sizes), strict=True)
        return sum_tensors(part.apply(piece[None])[0] for part, piece in pieces)


class StreamedSecondMoment(BlockOperator):
    """G-matrix of a block whose per-sample gradients do not fit the memory: taken anew for each product.

    Parameters
    ----------
    block
        The block; of rows, or one block.
    sampler
        Makes the per-sample gradients chunk by chunk.
    n_samples
        M.
    shift
        Added to each per-sample gradient, shape (count, p); ``None`` for nothing.
    dtype, device
        Of the vectors.
    """

    def __init__(
        self,
        block: Block,
        sampler: GradientSampler,
        n_samples: int,
        shift: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(block, dtype, device)
        self._sampler, self._n_samples, self._shift = sampler, n_samples, shift

    def product(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,)."""
        products = torch.zeros_like(vectors)
        for gradients in gradient_chunks(self.block, self._sampler, self._shift):
            for n, row in enumerate(rows.tolist()):
                products[n] += (gradients[:, row] @ vectors[n]) @ gradients[:, row]
        return products / self._n_samples

    def trace(self) -> Tensor:
        """Return the trace of each sub-block, shape (count,)."""
        return gradient_trace(self.block, self._sampler, self._shift)


def gradient_chunks(block: Block, sampler: GradientSampler, shift: Tensor | None) -> Iterator[Tensor]:
    """Yield the per-sample gradients of a block with a shift (count, p), shape (chunk, count, p)."""
    for chunk in sampler.chunks(block.parameters):
        flat = torch.cat([chunk[name] for name in block.parameters], dim=1)
        gradients = flat.reshape(len(flat), block.count, block.size)
        yield gradients if shift is None else gradients + shift


def gradient_trace(block: Block, sampler: GradientSampler, shift: Tensor | None) -> Tensor:
    """Return the mean squared norm of a block's per-sample gradients, shape (count,)."""
    traces = [(len(chunk), chunk.square().sum((0, 2))) for chunk in gradient_chunks(block, sampler, shift)]
    return sum_tensors(trace for _, trace in traces) / sum(n for n, _ in traces)


def with_ridge(matrices: Tensor, ridge: float) -> Tensor:
    """Add a number to the diagonals of matrices, in place.

    Examples
    --------
    >>> with_ridge(torch.zeros(1, 2, 2), 0.5)
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.5000]]])
    """
    if ridge:
        matrices.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return matrices


def split(vector: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Cut a flat vector into tensors of the shapes given.

    Examples
    --------
    >>> split(torch.arange(5), [(2, 2), (1,)])
    [tensor([[0, 1],
            [2, 3]]), tensor([4])]
    """
    parts = torch.split(vector, [torch.Size(shape).numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _parameter_parts(block: Block, vectors: Tensor) -> list[Tensor]:
    """Return views of vectors (n, p) of the shapes of the block's parameters, (n, *parameter)."""
    pieces = torch.split(vectors, list(block.sizes), dim=1)
    return [piece.view(len(piece), *shape) for piece, shape in zip(pieces, block.shapes, strict=True)]


def sum_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Add tensors of one shape.

    Examples
    --------
    >>> sum_tensors(iter([torch.tensor(1), torch.tensor(2)]))
    tensor(3)
    """
    first, *others = tensors
    for other in others:
        first = first + other
    return first


def _has_group_norm(loss: Tensor) -> bool:
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if "GroupNorm" in node.name():
            return True
        following = {other for other, _ in node.next_functions} - seen
        seen |= following
        stack.extend(following)
    return False


def _columns(values: Tensor, rows: Tensor) -> Tensor:
    # Lanczos multiplies all rows at once most of the time: no gather then.
    return values if len(rows) == values.shape[1] and _in_order(rows) else values[:, rows]


def _in_order(rows: Tensor) -> bool:
    return bool((rows == torch.arange(len(rows), device=rows.device)).all())
