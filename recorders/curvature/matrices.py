"""Choose the operator of each block of each curvature matrix, and keep what these share."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.block_parts import union
from hild_xr.recorders.curvature.columns import FisherColumns, FisherMC, GaussNewtonRoots, LossGradients
from hild_xr.recorders.curvature.cross_operators import (
    CrossOfUnion,
    CrossOperator,
    CrossSecondMoment,
    NetworkCrossHessian,
)
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.curvature.graph import Graphs
from hild_xr.recorders.curvature.linear_chain import ChainsOfBatches
from hild_xr.recorders.curvature.linear_sites import find_linear_sites
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    ChainHessian,
    NetworkGaussNewton,
    NetworkHessian,
    SecondMoment,
    WeightedRows,
)
from hild_xr.recorders.curvature.sample_gradients import GradientSampler
from hild_xr.recorders.curvature.second_moments import SecondMoments, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from hild_xr.recorders.curvature.block_parts import BlockPart
    from hild_xr.recorders.curvature.blocks import Block
    from hild_xr.recorders.curvature.columns import Columns
    from hild_xr.recorders.curvature.graph import LossGraph
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.curvature.linear_chain import LinearChain
    from hild_xr.recorders.objective import Objective

_ROOT_UP_TO = 64  # components of an output up to which the Gauss-Newton matrix is held as a second moment


class Matrices:
    """All curvature matrices at a model's current parameters, block by block.

    They share the network's copy, its graph, and the factors and gradients taken from it. A matrix is
    given by its name, or by the options of a Monte Carlo Fisher matrix; see
    :class:`~hild_xr.recorders.curvature.engine.Curvature`, which checks it.

    Parameters
    ----------
    model
        The model, without wrappers.
    objective
        Loss and data.
    dtype
        Precision to compute in; ``None`` keeps the model's.
    measuring
        Isolates the model during a pass; entered by the caller while this is made.
    max_bytes
        Memory that per-sample gradients may take, and what is known of linear layers on several batches.

    Attributes
    ----------
    measuring
        As above.
    network
        The copy of the model that derivatives are taken of.
    graphs
        The graph of each batch.
    loss
        The objective's value, regulariser included.

    Raises
    ------
    NonFiniteCurvatureError
        If the loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dtype: torch.dtype | None,
        measuring: Measurement,
        max_bytes: int,
    ) -> None:
        self.measuring = measuring
        self.network = FunctionalModel(model, dtype)
        self._objective, self._dtype = objective, dtype
        self._sites = {site.weight: site for site in find_linear_sites(self.network, objective, dtype)}
        self.graphs = Graphs(self.network, objective, dtype, list(self._sites.values()), measuring)
        sampler = GradientSampler(self.network, objective, dtype, measuring, max_bytes // 8)
        self._source = Source(self.network, len(objective), self.graphs, sampler, self._sites, max_bytes)
        self._second_moments: dict[str | FisherMC, SecondMoments] = {}
        self._output_curvatures: dict[str, Tensor] = {}
        self._chains: list[LinearChain] = []
        self._without_chain: set[tuple[str, ...]] = set()
        self.loss = self._value()

    def operators(
        self, blocks: Sequence[Block], matrix: str | FisherMC, l2: float
    ) -> Iterator[BlockOperator]:
        """Yield the operator of each block; passes that serve several blocks are made on the call.

        Parameters
        ----------
        blocks
            The blocks.
        matrix
            The matrix.
        l2
            Weight of the regulariser's part.
        """
        if matrix == "hessian":
            self._prepare_output_curvatures([block for block in blocks if block.kind == "rows"])
            self._prepare_chains([block for block in blocks if block.kind != "rows"])
            return (self._hessian(block, l2) for block in blocks)
        with self.measuring():
            self._moments(matrix).prepare(blocks)
        return (self._second_moment(block, matrix, l2) for block in blocks)

    def cross_operator(self, a: BlockPart, b: BlockPart, matrix: str | FisherMC, l2: float) -> CrossOperator:
        """Return the block of rows a and columns b, of disjoint parts; ``l2`` as for :meth:`operators`."""
        if matrix == "hessian":
            return NetworkCrossHessian(a, b, self.graphs, *self._source.vectors(a.block))
        left, right = self.operators([a.block, b.block], matrix, l2)
        if isinstance(left, SecondMoment) and isinstance(right, SecondMoment):
            return CrossSecondMoment(a, b, left, right)
        (whole,) = self.operators([union(self.network.model, a, b)], matrix, l2)
        return CrossOfUnion(a, b, whole)

    def has_site(self, weight: str) -> bool:
        """Whether the parameter is the weight of a linear layer with closed-form curvature."""
        return weight in self._sites

    def _hessian(self, block: Block, l2: float) -> BlockOperator:
        name = block.parameters[0]
        if block.kind == "rows" and name in self._output_curvatures:
            h = self._moments("gmatrix").layer_input(name)
            return WeightedRows(block, h, self._output_curvatures[name], l2)
        return self._through_network(block, l2)

    def _through_network(self, block: Block, l2: float) -> BlockOperator:
        """Return a Hessian block by way of its linear layers alone, or else of the whole network."""
        dtype, device = self._source.vectors(block)
        for whole in self._chains if block.kind != "rows" else ():
            part = whole.holding(block.parameters)
            if part is not None:
                # of several batches only what is documented is held
                room = 0 if self.graphs.kept is None else self._source.max_bytes
                return ChainHessian(block, part, self.measuring, l2, dtype, device, room)
        return NetworkHessian(block, self.graphs, l2, dtype, device)

    def _second_moment(self, block: Block, matrix: str | FisherMC, l2: float) -> BlockOperator:
        moments = self._moments(matrix)
        if matrix in ("gmatrix", "gmatrix_centered"):
            return moments.operator(block, l2=l2, centered=matrix == "gmatrix_centered")
        if matrix == "ggn" and not moments.holds(block):
            return NetworkGaussNewton(block, self.graphs, l2, *self._source.vectors(block))
        return moments.operator(block, ridge=l2)

    def _moments(self, matrix: str | FisherMC) -> SecondMoments:
        """Return what all blocks of a matrix other than the Hessian share."""
        aliases: dict[str | FisherMC, str | FisherMC] = {
            "gmatrix_centered": "gmatrix",
            "fisher_mc": FisherMC(),
        }
        key = aliases.get(matrix, matrix)
        if key not in self._second_moments:
            self._second_moments[key] = SecondMoments(self._source, self._columns(key))
        return self._second_moments[key]

    def _columns(self, matrix: str | FisherMC) -> Columns:
        if matrix == "gmatrix":
            return LossGradients()
        if matrix == "ggn":
            return GaussNewtonRoots(_ROOT_UP_TO)
        return FisherColumns(self._objective, matrix if isinstance(matrix, FisherMC) else None)

    def _prepare_output_curvatures(self, blocks: Sequence[Block]) -> None:
        """Take second derivatives by the outputs of the linear layers whose rows are asked for."""
        asked = dict.fromkeys(block.parameters[0] for block in blocks)  # a layer may be asked for twice
        missing = [name for name in asked if self.has_site(name) and name not in self._output_curvatures]
        if not missing:
            return
        parts: dict[str, list[Tensor]] = {name: [] for name in missing}

        def collect(_weight: float, graph: LossGraph) -> None:
            for name in missing:
                parts[name].append(graph.layers.output_curvature(name))

        self.graphs.each(collect)
        self._output_curvatures |= {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _prepare_chains(self, blocks: Sequence[Block]) -> None:
        """Take what is known of the linear layers in a row of each block, of all batches if there is room."""
        asked = {block.parameters for block in blocks}
        asked -= {names for names in asked if any(one.holding(names) for one in self._chains)}
        missing = sorted(names for names in asked - self._without_chain if self._of_sites(names))
        if not missing or not self._may_fit(missing):
            return
        found = ChainsOfBatches(len(self._objective), self._source.max_bytes)

        def collect(weight: float, graph: LossGraph) -> None:
            found.add(weight, graph.n_samples, graph.layers.chains(missing))

        self.graphs.each(collect)
        self._chains += found.chains
        self._without_chain |= set(missing)  # where there is one now, it is found first

    def _may_fit(self, blocks: Sequence[Sequence[str]]) -> bool:
        """Whether chains of the blocks' own layers alone fit the memory, if they are to hold all batches."""
        shapes = [
            self.network.trainable[name].shape for name in {*chain.from_iterable(blocks)} & {*self._sites}
        ]
        numbers = sum(width_in + 2 * width_out for width_out, width_in in shapes)
        return self.graphs.kept is not None or 4 * numbers * len(self._objective) <= self._source.max_bytes

    def _of_sites(self, names: Sequence[str]) -> bool:
        """Whether all parameters are those of linear layers with closed forms."""
        known = {name for site in self._sites.values() for name in (site.weight, site.bias)}
        return set(names) <= known

    def _value(self) -> float:
        if self.graphs.kept is not None:
            loss = float(self.graphs.kept.loss.detach())
        else:
            with torch.no_grad():
                batches = self._objective.batches(self._dtype)
                losses = [
                    len(targets) * float(self._objective.mean_loss(self.network(inputs), targets))
                    for inputs, targets in batches
                ]
            loss = sum(losses) / len(self._objective)
        loss += self._objective.penalty(self.network)
        if not torch.isfinite(torch.tensor(loss)):
            raise NonFiniteCurvatureError("loss", "the value")
        return loss
