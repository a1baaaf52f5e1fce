"""Curvature of a model on an objective: the public kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, get_args

import torch
from torch import Tensor

from hild_xr.recorders.curvature.blocks import Block, BlockKind, check_k, resolve_blocks
from hild_xr.recorders.curvature.eigensolvers import Which, ranking
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.curvature.graph import LossGraph
from hild_xr.recorders.curvature.isolation import Measurement, unwrapped
from hild_xr.recorders.curvature.linear_sites import find_linear_sites
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    FactoredRowsSecondMoment,
    NetworkHessian,
    RowsSecondMoment,
    SecondMoment,
    StreamedSecondMoment,
    WeightedRows,
)
from hild_xr.recorders.curvature.sample_gradients import (
    ExplicitGradients,
    FactoredGradients,
    GradientSampler,
    SampleGradients,
)
from hild_xr.recorders.curvature.solve import SolveOptions, solve
from hild_xr.recorders.curvature.spectrum import BlockSpectrum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from torch import nn

    from hild_xr.recorders.curvature.functional import Inputs
    from hild_xr.recorders.objective import Objective

MatrixKind = Literal["hessian", "gmatrix"]
"""The Hessian of the objective, or the G-matrix of its per-sample gradients."""


class Curvature:
    r"""Hessian and G-matrix of an objective at a model's current parameters.

    .. math::

        H = \nabla^2 L(\theta), \qquad
        G = \frac1M \sum_{m=1}^M g_m g_m^T, \quad g_m = \nabla_\theta\, \ell(f_\theta(x_m), y_m)

    Make one for each record and use it as a context: on entering, one forward and
    one first backward pass build a graph that all blocks and both matrices share; on
    leaving it is freed. If the objective has several batches no graph is kept, and
    each product builds them anew, one batch at a time.

    The model is measured in eval mode and found unchanged (see
    :func:`~hild_xr.recorders.curvature.isolation.isolated`). Its parameters must not
    change inside the context.

    Parameters
    ----------
    model
        The model.
    objective
        Loss and data.
    dtype
        Precision to compute in; ``None`` keeps the model's. ``torch.float64`` copies
        parameters and data.
    dense_up_to
        Blocks of at most this size are solved as whole matrices.
    max_bytes
        Memory that per-sample gradients may take; the same again for the bases of rows
        solved at once. A G-matrix that does not fit is multiplied from gradients taken
        anew, chunk by chunk.

    Raises
    ------
    NonFiniteCurvatureError
        On entering, if the loss is NaN or infinite.
    ValueError
        On entering, if model, loss and data do not fit together (see
        :meth:`~hild_xr.recorders.objective.Objective.check`).

    Examples
    --------
    >>> from hild_xr.recorders.objective import Objective
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> loss, inputs, targets = torch.nn.functional.cross_entropy, torch.eye(3), torch.tensor([0, 1, 1])
    >>> objective = Objective(loss, inputs, targets, l2=0.1)
    >>> with Curvature(model, objective) as curvature:
    ...     hessian = curvature.eigenpairs(2, "hessian", "rows")
    ...     gmatrix = curvature.eigenpairs(2, "gmatrix", "rows")
    >>> hessian["weight"].eigenvalues.shape, hessian["weight"].eigenvectors.shape
    (torch.Size([2, 2]), torch.Size([2, 2, 3]))
    >>> bool((hessian["weight"].eigenvalues >= 0.1).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        dtype: torch.dtype | None = None,
        dense_up_to: int = 128,
        max_bytes: int = 2**30,
    ) -> None:
        self.model, self.objective = unwrapped(model), objective
        self.dense_up_to, self.max_bytes = dense_up_to, max_bytes
        self._dtype = dtype
        self._state: _State | None = None

    def __enter__(self) -> Self:
        self.objective.check(self.model)
        measuring = Measurement(self.model)
        with measuring():
            self._state = _State(self.model, self.objective, self._dtype, measuring, self.max_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = None

    @property
    def loss(self) -> float:
        """The objective's value, regulariser included."""
        return self._entered().loss

    def eigenpairs(
        self,
        k: int,
        matrix: MatrixKind = "hessian",
        blocks: BlockKind = "layer",
        layers: Sequence[str] | None = None,
        *,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        matrix_up_to: int = 0,
        include_regularizer: bool | None = None,
        seed: int = 0,
    ) -> dict[str, BlockSpectrum]:
        """Return k eigenpairs of each block.

        Parameters
        ----------
        k
            Number of eigenpairs.
        matrix
            ``"hessian"`` or ``"gmatrix"``.
        blocks
            ``"layer"``, ``"rows"`` or ``"model"`` (see
            :func:`~hild_xr.recorders.curvature.blocks.resolve_blocks`).
        layers
            Qualified names of the parameters to take; ``None`` takes all that fit.
        which
            ``"magnitude"`` (decreasing absolute value), ``"largest"`` or ``"smallest"``.
        tol
            Relative residual up to which a pair counts as converged. The error of an
            eigenvalue is quadratic in the residual, the angle of an eigenvector is the
            residual over the gap.
        max_matvec
            Products allowed for each block solved through products; default ``40 k + 200``.
        matrix_up_to
            Blocks of at most this size come with the whole matrix.
        include_regularizer
            Whether the l2 term takes part: adds beta I to the Hessian's blocks (default
            yes), or beta theta to each per-sample gradient of G (default no).
        seed
            Seed of random start vectors.

        Returns
        -------
        dict of str to BlockSpectrum
            By the block's label, in the model's order.

        Raises
        ------
        NonFiniteCurvatureError
            If a product is NaN or infinite; it names the block.
        ValueError
            If an argument is out of range, or k does not fit a block.
        RuntimeError
            Outside of the ``with`` block.
        """
        chosen = resolve_blocks(self.model, blocks, layers)
        check_k(chosen, k)
        ranking(torch.zeros(1), which)
        options = SolveOptions(
            k, which, tol, max_matvec, seed, self.dense_up_to, matrix_up_to, self.max_bytes
        )
        with self._entered().measuring():
            return {
                operator.block.label: solve(operator, options)
                for operator in self.operators(chosen, matrix, include_regularizer)
            }

    def operators(
        self, blocks: Sequence[Block], matrix: MatrixKind = "hessian", include_regularizer: bool | None = None
    ) -> Iterator[BlockOperator]:
        """Yield the matrix of each block as an operator, for products, whole matrices and traces.

        Parameters
        ----------
        blocks
            From :func:`~hild_xr.recorders.curvature.blocks.resolve_blocks`.
        matrix
            ``"hessian"`` or ``"gmatrix"``.
        include_regularizer
            As in :meth:`eigenpairs`.

        Yields
        ------
        BlockOperator
            One for each block; valid inside the ``with`` block.

        Raises
        ------
        ValueError
            If ``matrix`` is unknown.
        RuntimeError
            Outside of the ``with`` block.
        """
        if matrix not in get_args(MatrixKind):
            raise ValueError(
                f"matrix must be one of {', '.join(map(repr, get_args(MatrixKind)))}; got {matrix!r}"
            )
        state = self._entered()
        if matrix == "hessian":
            l2 = 0.0 if include_regularizer is False else self.objective.l2
            state.prepare_output_curvatures([block for block in blocks if block.kind == "rows"])
            return (state.hessian(block, l2) for block in blocks)
        l2 = self.objective.l2 if include_regularizer else 0.0
        state.prepare_sample_gradients(blocks)
        return (state.gmatrix(block, l2) for block in blocks)

    def _entered(self) -> _State:
        if self._state is None:
            raise RuntimeError(
                "the graph lives inside the context only: write "
                "'with Curvature(model, objective) as curvature:' and ask inside"
            )
        return self._state


class _State:
    """What lives from entering to leaving: the network's copy, the graph, and factors taken from it."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dtype: torch.dtype | None,
        measuring: Measurement,
        max_bytes: int,
    ) -> None:
        self._objective, self._dtype, self._max_bytes = objective, dtype, max_bytes
        self.measuring = measuring
        self._network = FunctionalModel(model, dtype)
        self._sites = {site.weight: site for site in find_linear_sites(self._network, objective, dtype)}
        self._biases = {site.bias: site for site in self._sites.values() if site.bias is not None}
        self._sampler = GradientSampler(self._network, objective, dtype, measuring, max_bytes // 8)
        self._factors: dict[str, FactoredGradients] = {}
        self._output_curvatures: dict[str, Tensor] = {}
        self._explicit: dict[str, Tensor] = {}
        self._graph: LossGraph | None = None
        if objective.single_batch:
            self._graph = self._build(*next(objective.batches(dtype)))
        self.loss = self._value()

    def each_graph(self, use: Callable[[float, LossGraph], None]) -> None:
        """Call a function with the weight n_batch / M and the graph of each batch, one graph at a time."""
        with self.measuring():
            if self._graph is not None:
                use(1.0, self._graph)
                return
            for inputs, targets in self._objective.batches(self._dtype):
                use(len(targets) / len(self._objective), self._build(inputs, targets))

    def hessian(self, block: Block, l2: float) -> BlockOperator:
        if block.label in self._output_curvatures and block.kind == "rows":
            h = self._factor(block.label).h
            return WeightedRows(block, h, self._output_curvatures[block.label], l2)
        return NetworkHessian(block, self.each_graph, l2, *self._vectors(block))

    def gmatrix(self, block: Block, l2: float) -> BlockOperator:
        n_samples = len(self._objective)
        shift = l2 * self._network.flat(block.parameters) if l2 else None
        if block.kind == "rows":
            rows_shift = None if shift is None else shift.reshape(block.count, block.size)
            if block.label in self._sites:
                factors = self._factor(block.label)
                return FactoredRowsSecondMoment(block, factors.h, factors.delta, rows_shift)
            if self._fits(block.parameters):
                gradients = self._explicit_gradients(block.parameters)[block.label]
                gradients = gradients.reshape(n_samples, block.count, block.size).transpose(0, 1)
                return RowsSecondMoment(
                    block, gradients if rows_shift is None else gradients + rows_shift[:, None]
                )
            return StreamedSecondMoment(block, self._sampler, n_samples, rows_shift, *self._vectors(block))
        if self._fits(self._unfactored(block.parameters)):
            return SecondMoment(block, self._parts(block), n_samples, shift, *self._vectors(block))
        flat_shift = None if shift is None else shift[None]
        return StreamedSecondMoment(block, self._sampler, n_samples, flat_shift, *self._vectors(block))

    def prepare_output_curvatures(self, blocks: Sequence[Block]) -> None:
        """Take second derivatives by the outputs of the linear layers whose rows are asked for."""
        missing = [
            b.label for b in blocks if b.label in self._sites and b.label not in self._output_curvatures
        ]
        if not missing:
            return
        parts: dict[str, list[Tensor]] = {name: [] for name in missing}

        def collect(_weight: float, graph: LossGraph) -> None:
            for name in missing:
                parts[name].append(graph.output_curvature(name))

        self.each_graph(collect)
        self._output_curvatures |= {name: torch.cat(tensors) for name, tensors in parts.items()}

    def prepare_sample_gradients(self, blocks: Sequence[Block]) -> None:
        """Take the per-sample gradients of all blocks in one pass, if they fit the memory together."""
        names = self._unfactored([name for block in blocks for name in block.parameters])
        missing = [name for name in names if name not in self._explicit]
        if missing and self._fits([*self._explicit, *missing]):
            self._explicit |= self._sampler.all(missing)

    def _parts(self, block: Block) -> list[SampleGradients]:
        explicit = self._explicit_gradients(self._unfactored(block.parameters))
        parts: list[SampleGradients] = []
        for name in block.parameters:
            if name in self._sites:
                parts.append(self._factor(name))
            elif name in self._biases:
                parts.append(ExplicitGradients(self._factor(self._biases[name].weight).delta))
            else:
                parts.append(ExplicitGradients(explicit[name]))
        return parts

    def _factor(self, weight: str) -> FactoredGradients:
        """Return the factors of a linear layer; those of all layers are taken in one pass."""
        if not self._factors:
            parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._sites}

            def collect(_weight: float, graph: LossGraph) -> None:
                for name in self._sites:
                    parts[name].append((graph.output_gradient(name), graph.layer_input(name)))

            self.each_graph(collect)
            for name, pairs in parts.items():
                deltas, hs = zip(*pairs, strict=True)
                self._factors[name] = FactoredGradients(torch.cat(deltas), torch.cat(hs))
        return self._factors[weight]

    def _explicit_gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self._explicit]
        return self._explicit | (self._sampler.all(missing) if missing else {})

    def _unfactored(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._sites and name not in self._biases]

    def _fits(self, names: Sequence[str]) -> bool:
        leaves = [self._network.trainable[name] for name in names]
        return (
            len(self._objective) * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
            <= self._max_bytes
        )

    def _vectors(self, block: Block) -> tuple[torch.dtype, torch.device]:
        """Return dtype and device of a block's vectors: half precision is multiplied, not orthogonalised."""
        leaf = self._network.trainable[block.parameters[0]]
        return torch.promote_types(leaf.dtype, torch.float32), leaf.device

    def _build(self, inputs: Inputs, targets: Tensor) -> LossGraph:
        return LossGraph(self._network, self._objective, inputs, targets, list(self._sites.values()))

    def _value(self) -> float:
        if self._graph is not None:
            loss = float(self._graph.loss.detach())
        else:
            with torch.no_grad():
                batches = self._objective.batches(self._dtype)
                losses = [
                    len(targets) * float(self._objective.mean_loss(self._network(inputs), targets))
                    for inputs, targets in batches
                ]
            loss = sum(losses) / len(self._objective)
        loss += self._objective.penalty(self._network)
        if not torch.isfinite(torch.tensor(loss)):
            raise NonFiniteCurvatureError("loss", "the value")
        return loss


def eigenpairs(
    model: nn.Module,
    objective: Objective,
    k: int,
    matrix: MatrixKind = "hessian",
    blocks: BlockKind = "layer",
    layers: Sequence[str] | None = None,
    *,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_matvec: int | None = None,
    matrix_up_to: int = 0,
    include_regularizer: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, BlockSpectrum]:
    """Return k eigenpairs of each block of a curvature matrix, in one call.

    The same as :meth:`Curvature.eigenpairs` inside ``with Curvature(model, objective, dtype=dtype)``;
    for several matrices or blockings at the same parameters use the class, which
    shares the passes through the network.

    Parameters
    ----------
    model, objective, dtype
        See :class:`Curvature`.
    k, matrix, blocks, layers, which, tol, max_matvec, matrix_up_to, include_regularizer, seed
        See :meth:`Curvature.eigenpairs`.

    Returns
    -------
    dict of str to BlockSpectrum
        By the block's label.

    Raises
    ------
    NonFiniteCurvatureError
        If the loss or a product is NaN or infinite.
    ValueError
        If an argument is out of range, or model, loss and data do not fit together.

    Examples
    --------
    >>> from hild_xr.recorders.objective import Objective
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> eigenpairs(model, objective, 1)["weight"].eigenvalues
    tensor([18.], dtype=torch.float64)
    """
    with Curvature(model, objective, dtype=dtype) as curvature:
        return curvature.eigenpairs(
            k,
            matrix,
            blocks,
            layers,
            which=which,
            tol=tol,
            max_matvec=max_matvec,
            matrix_up_to=matrix_up_to,
            include_regularizer=include_regularizer,
            seed=seed,
        )
