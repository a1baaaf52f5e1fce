"""Probes of traces, Frobenius norms and diagonals of curvature matrices, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan
from hild_xr.recorders.curvature import Block, BlockKind, Estimate, MatrixChoice, resolve_blocks
from hild_xr.recorders.curvature.blocks import Groups, as_planned
from hild_xr.recorders.curvature.traces import check_products
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.layout import block_dims, block_precision, flat_attrs
from hild_xr.recorders.probes.settings import group_name, matrix_attrs, matrix_name
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_LAYER

Values = Mapping[str, "ArrayLike | Tensor"]


class _Estimated(Probe):
    """What these probes share; they differ in the quantity, which names the variable and the method."""

    needs_objective = True
    quantity: Literal["trace", "frobenius_norm", "diagonal"]

    def __init__(
        self,
        matrix: MatrixChoice = "hessian",
        *,
        products: int = 30,
        blocks: BlockKind | Groups = "layer",
        layers: Sequence[str] | None = None,
        include_regularizer: bool | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        group: str | None = None,
    ) -> None:
        check_products(products)
        default = group_name(f"{matrix_name(matrix)}_{self.quantity}", blocks)
        super().__init__(default if group is None else group, schedule)
        self.matrix, self.products, self.blocks, self.layers = matrix, products, blocks, layers
        self.include_regularizer, self.seed = include_regularizer, seed

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs: what matrix, of which data, how exact."""
        return {
            **matrix_attrs(self.matrix, self.blocks, objective, self.include_regularizer),
            "products": self.products,
            "probe_seed": self.seed,
        }

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes; rows and diagonals have one each, other numbers share an array over layers."""
        del optimizer, objective
        self._blocks = resolve_blocks(model, self.blocks, self.layers)
        self._own = () if self.blocks == "rows" else self._names_of_own()
        own, labels = NodePlan(), tuple(block.label for block in self._blocks)
        if self._own:
            shared = {
                name: self._array(name, (DIM_LAYER,), (len(labels),), "float64", {}) for name in self._own
            }
            own = NodePlan(arrays=shared, coords={DIM_LAYER: CoordPlan(dim=DIM_LAYER, values=labels)})
        self._arrays = {block.label: self._arrays_of(model, block) for block in self._blocks}
        nodes = {
            label: {name: array for name, array in arrays.items() if name not in self._own}
            for label, arrays in self._arrays.items()
        }
        return {OWN_NODE: own} | {label: NodePlan(arrays=kept) for label, kept in nodes.items() if kept}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Estimate all blocks; one whose parameters were frozen or unfrozen since planning is missing."""
        there = [block for block in self._blocks if as_planned(snapshot.model, block)]
        found = self._estimates(snapshot, there)
        values = {label: self._values(found.get(label), arrays) for label, arrays in self._arrays.items()}
        own = {name: np.stack([np.asarray(v[name]) for v in values.values()]) for name in self._own}
        nodes = {
            label: {name: value for name, value in of_block.items() if name not in self._own}
            for label, of_block in values.items()
        }
        return {OWN_NODE: own} | {label: kept for label, kept in nodes.items() if kept}

    def _names_of_own(self) -> tuple[str, ...]:
        """Return what is one number a block."""
        return (*self._names, "n_matvec")

    @property
    def _names(self) -> tuple[str, str]:
        return self.quantity, f"{self.quantity}_standard_error"

    def _arrays_of(self, model: nn.Module, block: Block) -> dict[str, ArrayPlan]:
        """Plan what is known of a block."""
        dims, _ = block_dims(model, block)
        names = (*self._names, "n_matvec")
        return {name: self._array(name, dims, block.batch_shape, "float64", {}) for name in names}

    def _array(
        self,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: str,
        attrs: dict[str, JsonValue],
    ) -> ArrayPlan:
        return ArrayPlan(
            variable=name,
            dims=dims,
            shape=shape,
            dtype="int32" if name == "n_matvec" else dtype,
            attrs={"matrix": matrix_name(self.matrix), **attrs},
        )

    def _estimates(self, snapshot: Snapshot, blocks: Sequence[Block]) -> dict[str, Estimate]:
        if not blocks:
            return {}
        curvature = snapshot.curvature
        methods = {
            "trace": curvature.trace,
            "frobenius_norm": curvature.frobenius_norm,
            "diagonal": curvature.diagonal,
        }
        return methods[self.quantity](
            self.matrix,
            blocks,
            products=self.products,
            include_regularizer=self.include_regularizer,
            seed=self.seed,
        )

    def _values(self, found: Estimate | None, arrays: Mapping[str, ArrayPlan]) -> Values:
        if found is None:
            return {name: array.missing() for name, array in arrays.items()}
        value, error = self._names
        return {value: found.value, error: found.standard_error, "n_matvec": found.n_matvec}


class Trace(_Estimated):
    r"""Record the trace of a curvature matrix, block by block, with its standard error.

    Exact where that is nearly free (G, small blocks), else by Hutch++ (Meyer, Musco, Musco and
    Woodruff 2021, arXiv 2010.09649); the standard error is 0 where it is exact. Every record
    draws the same random vectors.

    Parameters
    ----------
    matrix
        ``"hessian"``, ``"gmatrix"`` or another of :class:`~hild_xr.recorders.curvature.Curvature`,
        or a :class:`~hild_xr.recorders.curvature.FisherMC` with options.
    products
        Products with the matrix allowed for each block.
    blocks, layers
        As for :class:`~hild_xr.recorders.Hessian`.
    include_regularizer
        Whether the l2 term takes part; None for the matrix's default.
    seed
        Seed of the random vectors.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store; by default the matrix and ``_trace``.

    Raises
    ------
    ValueError
        At once, if ``products`` is below 2 or the matrix unknown; when the recorder starts, if a
        layer is.
    TypeError
        At once, if ``blocks`` is neither a text nor a mapping.

    Examples
    --------
    >>> Trace().group, Trace("gmatrix", blocks="rows").group
    ('hessian_trace', 'gmatrix_trace_rows')
    """

    quantity = "trace"


class FrobeniusNorm(_Estimated):
    """Record the Frobenius norm of a curvature matrix, block by block, with its standard error.

    See :func:`~hild_xr.recorders.curvature.traces.frobenius_norm` for how.

    Parameters
    ----------
    matrix, products, blocks, layers, include_regularizer, seed, schedule, group
        As for :class:`Trace`; the group's name ends in ``_frobenius_norm``.

    Raises
    ------
    ValueError, TypeError
        As for :class:`Trace`.

    Examples
    --------
    >>> FrobeniusNorm("ggn").group
    'ggn_frobenius_norm'
    """

    quantity = "frobenius_norm"


class Diagonal(_Estimated):
    """Record the diagonal of a curvature matrix on the dims of the weights, with its standard error.

    See :func:`~hild_xr.recorders.curvature.diagonals.diagonal` for how. The values are kept in
    the precision of the parameters.

    Parameters
    ----------
    matrix, products, blocks, layers, include_regularizer, seed, schedule, group
        As for :class:`Trace`; the group's name ends in ``_diagonal``.

    Raises
    ------
    ValueError, TypeError
        As for :class:`Trace`.

    Examples
    --------
    >>> Diagonal("fisher").group
    'fisher_diagonal'
    """

    quantity = "diagonal"

    def _names_of_own(self) -> tuple[str, ...]:
        return ("n_matvec",)

    def _arrays_of(self, model: nn.Module, block: Block) -> dict[str, ArrayPlan]:
        batch, vector = block_dims(model, block)
        dims, shape = (*batch, *vector), (*block.batch_shape, *block.vector_shape)
        attrs: dict[str, JsonValue] = {"vector_dims": list(vector), **flat_attrs(block)}
        precision = block_precision(model, [block])
        entries = {name: self._array(name, dims, shape, precision, attrs) for name in self._names}
        return entries | {"n_matvec": self._array("n_matvec", batch, block.batch_shape, "int32", {})}
