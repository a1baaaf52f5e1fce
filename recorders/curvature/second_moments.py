"""Choose how the blocks of a second moment of gradients are held: factors, tensors, or the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.columns import LayerFactors, LossGradients, joined
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    FactoredRowsSecondMoment,
    NetworkSecondMoment,
    RowsSecondMoment,
    SecondMoment,
    StreamedSecondMoment,
    WeightedRows,
    sum_tensors,
)
from hild_xr.recorders.curvature.sample_gradients import (
    Cotangents,
    ExplicitGradients,
    FactoredGradients,
    GradientSampler,
    SampleGradients,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hild_xr.recorders.curvature.blocks import Block
    from hild_xr.recorders.curvature.columns import Columns
    from hild_xr.recorders.curvature.functional import FunctionalModel
    from hild_xr.recorders.curvature.graph import Graphs, LossGraph
    from hild_xr.recorders.curvature.linear_sites import LinearSite


_SMALL = 256  # parameters of a block whose whole matrix may be asked for


@dataclass(frozen=True)
class Source:
    """What gradients are taken from.

    Parameters
    ----------
    network
        The model.
    n_samples
        Number of samples M.
    graphs
        The graph of each batch.
    sampler
        Makes per-sample gradients of any parameter.
    sites
        Linear layers with closed forms, by their weight.
    max_bytes
        Memory that gradients held as tensors may take, and that their factors may take.
    """

    network: FunctionalModel
    n_samples: int
    graphs: Graphs
    sampler: GradientSampler
    sites: Mapping[str, LinearSite]
    max_bytes: int

    def vectors(self, block: Block) -> tuple[torch.dtype, torch.device]:
        """Return dtype and device of a block's vectors: half precision is multiplied, not orthogonalised."""
        leaf = self.network.trainable[block.parameters[0]]
        return torch.promote_types(leaf.dtype, torch.float32), leaf.device


class SecondMoments:
    r"""The blocks of one matrix :math:`\frac1M\sum_m\sum_k g_{mk} g_{mk}^T`.

    All blocks share what is taken from the network: the columns at the outputs and, once
    a block needs them, at the outputs of all linear layers.

    Parameters
    ----------
    source
        What gradients are taken from.
    columns
        The columns at the outputs.
    """

    def __init__(self, source: Source, columns: Columns) -> None:
        self._source, self._columns = source, columns
        self._of_loss = isinstance(columns, LossGradients)
        self._biases = {site.bias: weight for weight, site in source.sites.items() if site.bias is not None}
        self._surveyed = False
        self._values: Tensor | None = None
        self._cotangents: Cotangents | None = None
        self._n_columns = 1
        self._factored: frozenset[str] = frozenset()
        self._factors: dict[str, FactoredGradients] = {}
        self._explicit: dict[str, Tensor] = {}

    def holds(self, block: Block) -> bool:
        """Whether the block's gradients are held, as factors or tensors: they fit the memory, and it pays.

        A product with factors reads all K columns of each sample twice. That is less
        work than two passes through the network for a few columns, for layers that narrow,
        and where the gradients make a small whole matrix or Gram matrix; it is more for wide
        layers and ten classes (31 ms against 22 ms for a 784-256-256-10 net).
        """
        self._survey()
        if self._values is None and not self._of_loss:
            return False
        return self._fits(self._unfactored(block.parameters)) and self._pays(block)

    def prepare(self, blocks: Sequence[Block]) -> None:
        """Take the per-sample gradients of all blocks in one pass, if they fit the memory together."""
        names = [name for block in blocks if self.holds(block) for name in self._unfactored(block.parameters)]
        missing = [name for name in dict.fromkeys(names) if name not in self._explicit]
        if missing and self._fits([*self._explicit, *missing]):
            self._explicit |= self._source.sampler.all(missing, self._cotangents)

    def operator(
        self, block: Block, *, ridge: float = 0.0, l2: float = 0.0, centered: bool = False
    ) -> BlockOperator:
        """Return the operator of a block.

        Parameters
        ----------
        block
            The block.
        ridge
            Added to the diagonal.
        l2
            Its product with the parameters is added to each gradient.
        centered
            Subtract the mean gradient from each; the regulariser's part then cancels.
        """
        shift = l2 * self._source.network.flat(block.parameters) if l2 and not centered else None
        if not self.holds(block):
            return self._through_network(block, ridge, shift, centered)
        if block.kind == "rows":
            return self._rows(block, ridge, shift, centered)
        return self._flat(block, ridge, shift, centered)

    def layer_input(self, weight: str) -> Tensor:
        """Return the inputs of a linear layer, shape (M, in)."""
        return self._factor(weight).h

    def parts(self, block: Block) -> list[SampleGradients]:
        """Return the gradients of each of a block's parameters."""
        explicit = self._explicit_gradients(self._unfactored(block.parameters))
        parts: list[SampleGradients] = []
        for name in block.parameters:
            if name in explicit:
                parts.append(ExplicitGradients(explicit[name]))
            elif name in self._factored:
                parts.append(self._factor(name))
            else:
                parts.append(ExplicitGradients(self._factor(self._biases[name]).delta.flatten(0, -2)))
        return parts

    def _rows(self, block: Block, ridge: float, shift: Tensor | None, centered: bool) -> BlockOperator:
        shape = (block.count, block.size)
        shift = None if shift is None else shift.reshape(shape)
        if block.parameters[0] in self._factored:
            factor = self._factor(block.parameters[0])
            delta, h = factor.delta, factor.h
            if not self._of_loss:
                return WeightedRows(block, h, delta.reshape(len(h), -1, block.count).square().mean(1), ridge)
            if centered:
                shift = -(delta.T @ h) / len(h)
            return FactoredRowsSecondMoment(block, h, delta, shift)
        gradients = self._explicit_gradients(block.parameters)[block.parameters[0]]
        gradients = gradients.reshape(-1, *shape).transpose(0, 1)
        if centered:
            gradients = gradients - gradients.mean(1, keepdim=True)
        return RowsSecondMoment(block, gradients if shift is None else gradients + shift[:, None], ridge)

    def _flat(self, block: Block, ridge: float, shift: Tensor | None, centered: bool) -> BlockOperator:
        n, parts = self._source.n_samples * self._n_columns, self.parts(block)
        vectors = self._source.vectors(block)
        if centered:
            ones = torch.ones(1, n, dtype=vectors[0], device=vectors[1])
            shift = -SecondMoment(block, parts, n, None, *vectors).adjoint(ones)[0] / n
        return SecondMoment(block, parts, n, shift, *vectors, ridge)

    def _through_network(
        self, block: Block, ridge: float, shift: Tensor | None, centered: bool
    ) -> BlockOperator:
        source, vectors = self._source, self._source.vectors(block)
        if centered:
            means: list[Tensor] = []
            source.graphs.each(lambda weight, graph: means.append(weight * graph.gradient(block.parameters)))
            shift = -sum_tensors(means)
        rows_shift = None if shift is None else shift.reshape(block.count, block.size)
        if self._values is None:
            return StreamedSecondMoment(block, source.sampler, source.n_samples, rows_shift, *vectors)
        return NetworkSecondMoment(
            block,
            source.graphs,
            ridge,
            *vectors,
            columns=self._batch_columns,
            shift=rows_shift,
            sampler=source.sampler if self._of_loss else None,
        )

    def _batch_columns(self, graph: LossGraph) -> Tensor:
        if self._values is None:
            raise ValueError("a product through the network needs columns at its outputs")
        return self._values[graph.first : graph.first + graph.n_samples]

    def _scaled(self, columns: Tensor) -> Tensor:
        # The operators take the mean over samples and columns; the matrix has the sum over columns.
        return columns if self._n_columns == 1 else columns * self._n_columns**0.5

    def _survey(self) -> None:
        """Take the columns at the outputs; with them the factors, where these come for free."""
        if self._surveyed:
            return
        self._surveyed = True
        found: list[Tensor | None] = []
        leaves: list[int | None] = []

        def collect(_weight: float, graph: LossGraph) -> None:
            found.append(self._columns.at_outputs(graph))
            leaves.append(graph.output_leaf)

        if self._of_loss:
            self._take_factors(collect)
        else:
            self._source.graphs.each(collect)
        columns = [batch for batch in found if batch is not None]
        if len(columns) == len(found) and leaves[0] is not None:
            self._values = _padded(columns)
            self._n_columns = self._values.shape[1]
            if not self._of_loss:  # the sampler differentiates the loss itself
                self._cotangents = Cotangents(self._scaled(self._values), leaves[0])
        if self._of_loss or (self._values is not None and self._factors_fit(self._values)):
            self._factored = frozenset(self._source.sites)

    def _take_factors(self, also: Callable[[float, LossGraph], None] | None = None) -> None:
        """Take inputs and columns of all linear layers in one pass."""
        factors = LayerFactors(self._columns, list(self._source.sites))

        def collect(share: float, graph: LossGraph) -> None:
            if also is not None:
                also(share, graph)
            factors.take(graph, None if self._of_loss else self._batch_columns(graph))

        self._source.graphs.each(collect)
        for weight, factor in factors.joined().items():
            delta = self._scaled(factor.delta)
            self._factors[weight] = FactoredGradients(delta[:, 0] if delta.shape[1] == 1 else delta, factor.h)

    def _factor(self, weight: str) -> FactoredGradients:
        self._survey()
        if not self._factors:
            self._take_factors()
        return self._factors[weight]

    def _factors_fit(self, columns: Tensor) -> bool:
        widths = sum(self._source.network.trainable[weight].shape[0] for weight in self._source.sites)
        return columns.shape[:2].numel() * widths * columns.element_size() <= self._source.max_bytes

    def _pays(self, block: Block) -> bool:
        if self._n_columns == 1 or block.kind == "rows" or block.size <= _SMALL:
            return True
        n_rows = self._source.n_samples * self._n_columns
        if n_rows < block.size and n_rows**2 * 8 <= self._source.max_bytes:  # the Gram matrix
            return True
        shapes = [
            self._source.network.trainable[name].shape for name in block.parameters if name in self._factored
        ]
        narrows = self._n_columns * sum(shape[0] for shape in shapes) <= sum(shape[1] for shape in shapes)
        return bool(shapes) and narrows and not self._unfactored(block.parameters)

    def _explicit_gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self._explicit]
        return self._explicit | (self._source.sampler.all(missing, self._cotangents) if missing else {})

    def _unfactored(self, names: Sequence[str]) -> list[str]:
        self._survey()
        return [n for n in names if n not in self._factored and self._biases.get(n) not in self._factored]

    def _fits(self, names: Sequence[str]) -> bool:
        leaves = [self._source.network.trainable[name] for name in names]
        bytes_per_row = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        return self._source.n_samples * self._n_columns * bytes_per_row <= self._source.max_bytes


def _padded(batches: Sequence[Tensor]) -> Tensor:
    """Join the columns (n, K, ...) of batches, with columns of zeros where a batch needed fewer."""
    most = max(batch.shape[1] for batch in batches)
    return joined([batch if batch.shape[1] == most else _pad(batch, most) for batch in batches])


def _pad(batch: Tensor, n_columns: int) -> Tensor:
    padded = batch.new_zeros(len(batch), n_columns, *batch.shape[2:])
    padded[:, : batch.shape[1]] = batch
    return padded
