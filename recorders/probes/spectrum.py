"""Probes of curvature spectra: leading eigenpairs of the Hessian and of the G-matrix, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import JsonValue
from torch import nn

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan
from hild_xr.recorders.curvature import Block, BlockKind, BlockSpectrum, check_k, resolve_blocks
from hild_xr.recorders.host_copy import numpy_dtype, to_numpy
from hild_xr.recorders.layers import layer_dims
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.sketching import SketchOption, VectorLayout, as_family, vector_layout
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_EIG, DIM_LAYER, DIM_PARAM

Which = Literal["magnitude", "largest", "smallest"]

_SCALARS = ("n_matvec", "trace")
_PER_PAIR = ("eigenvalues", "residuals", "converged")


class _Spectrum(Probe):
    """What :class:`Hessian` and :class:`GMatrix` share; they differ in the matrix."""

    needs_objective = True
    matrix: Literal["hessian", "gmatrix"]

    def __init__(
        self,
        k: int,
        *,
        blocks: BlockKind = "layer",
        layers: Sequence[str] | None = None,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        matrix_up_to: int = 0,
        sketch: SketchOption = None,
        schedule: Schedule | None = None,
        group: str | None = None,
    ) -> None:
        default = self.matrix if blocks == "layer" else f"{self.matrix}_{blocks}"
        super().__init__(default if group is None else group, schedule)
        self.k, self.blocks, self.layers, self.which = k, blocks, layers, which
        self.tol, self.max_matvec, self.matrix_up_to = tol, max_matvec, matrix_up_to
        self.sketch = as_family(sketch)
        if self.sketch is not None and self.sketch.m < 2 * k:
            raise ValueError(
                f"sketches of m={self.sketch.m} numbers cannot tell the spaces of k={k} eigenvectors apart: "
                f"take m={2 * k} at least, and some 100 k for angles within a few percent"
            )

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs: what matrix, of which data, how exact."""
        return {
            "matrix": self.matrix,
            "blocks": self.blocks,
            "k": self.k,
            "which": self.which,
            "tolerance": self.tol,
            "samples": None if objective is None else len(objective),
            "regularizer": 0.0 if objective is None else objective.l2,
        }

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes; rows carry their eigenvalues themselves, other blocks share one array."""
        del optimizer, objective
        self._blocks = resolve_blocks(model, self.blocks, self.layers)
        check_k(self._blocks, self.k)
        eig = CoordPlan(dim=DIM_EIG, values=tuple(range(self.k)))
        self._layouts = {block.label: self._stored_as(model, block) for block in self._blocks}
        self._nodes = nodes = {block.label: self._node(model, block) for block in self._blocks}
        if self.blocks == "rows":
            return {OWN_NODE: NodePlan(coords={DIM_EIG: eig}), **nodes}
        labels = tuple(block.label for block in self._blocks)
        own = NodePlan(
            arrays=self._numbers((DIM_LAYER,), (len(labels),), _precision(model, self._blocks)),
            coords={DIM_LAYER: CoordPlan(dim=DIM_LAYER, values=labels), DIM_EIG: eig},
        )
        return {OWN_NODE: own, **nodes}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Solve all blocks; one whose parameters were frozen or unfrozen since planning is missing."""
        spectra = self._solve(
            snapshot, [block for block in self._blocks if _as_planned(snapshot.model, block)]
        )
        nodes: dict[str, dict[str, ArrayLike | torch.Tensor]] = {}
        numbers: list[dict[str, ArrayLike]] = []
        for block in self._blocks:
            found = spectra.get(block.label)
            missing = _missing(self._nodes[block.label].arrays)
            nodes[block.label] = missing if found is None else _tensors(found, self._layouts[block.label])
            if self.blocks == "rows" and found is not None:
                nodes[block.label] |= _numbers(found)
            alone = _missing(self._numbers((), (), "float64"))
            numbers.append(alone if found is None else _numbers(found))
        if self.blocks == "rows":
            return {OWN_NODE: {}, **nodes}
        own: Mapping[str, ArrayLike] = {name: np.stack([n[name] for n in numbers]) for name in numbers[0]}
        return {OWN_NODE: own, **nodes}

    def _solve(self, snapshot: Snapshot, blocks: Sequence[Block]) -> dict[str, BlockSpectrum]:
        if not blocks:
            return {}
        return snapshot.curvature.eigenpairs(
            self.k,
            matrix=self.matrix,
            blocks=self.blocks,
            layers=None if self.blocks == "model" else [block.label for block in blocks],
            which=self.which,
            tol=self.tol,
            max_matvec=self.max_matvec,
            matrix_up_to=self.matrix_up_to,
            **self._solver_options(),
        )

    def _solver_options(self) -> dict[str, bool]:
        return {}

    def _numbers(self, dims: tuple[str, ...], shape: tuple[int, ...], precision: str) -> dict[str, ArrayPlan]:
        """Plan what is a number a pair or a block; floats in the precision that they were computed in."""
        dtypes = dict.fromkeys((*_PER_PAIR, *_SCALARS), precision) | {
            "converged": "bool",
            "n_matvec": "int32",
        }
        per_pair = dict.fromkeys(_PER_PAIR, ((*dims, DIM_EIG), (*shape, self.k)))
        per_block = dict.fromkeys(_SCALARS, (dims, shape))
        return {
            name: ArrayPlan(variable=name, dims=all_dims, shape=extent, dtype=dtypes[name])
            for name, (all_dims, extent) in (per_pair | per_block).items()
        }

    def _node(self, model: nn.Module, block: Block) -> NodePlan:
        layout = self._layouts[block.label]
        batch_dims = layout.batch_dims[:-1]
        dtype = _precision(model, [block])
        batch = block.batch_shape
        arrays = self._numbers(batch_dims, batch, dtype) if batch_dims else {}
        arrays["eigenvectors"] = ArrayPlan(
            variable="eigenvectors",
            dims=layout.dims,
            shape=layout.shape,
            dtype=layout.dtype(dtype),
            attrs={
                **layout.attrs,
                "number_dim": DIM_EIG,
                "matrix": self.matrix,
                **_layout(block),
                **self._orthonormality(layout),
            },
        )
        if block.size <= self.matrix_up_to:
            arrays["matrix"] = ArrayPlan(
                variable="matrix",
                dims=(*batch_dims, DIM_PARAM, f"{DIM_PARAM}_"),
                shape=(*batch, block.size, block.size),
                dtype=dtype,
                attrs={"matrix": self.matrix},
            )
        return NodePlan(arrays=arrays)

    def _stored_as(self, model: nn.Module, block: Block) -> VectorLayout:
        batch_dims, vector_dims = _block_dims(model, block, self.blocks)
        sizes = {block.label: block.size}
        if block.kind == "model":
            sizes = {
                name: math.prod(shape) for name, shape in zip(block.parameters, block.shapes, strict=True)
            }
        return vector_layout(
            self.sketch,
            sizes,
            (vector_dims, block.vector_shape),
            ((*batch_dims, DIM_EIG), (*block.batch_shape, self.k)),
        )

    def _orthonormality(self, layout: VectorLayout) -> dict[str, JsonValue]:
        """How far the Gram matrix of sketched eigenvectors is from the identity, for who checks it."""
        if layout.sketch is None:
            return {}
        # k variances of at most 2/m on the diagonal, k(k-1) of at most 1/m beside it
        return {"orthonormal_within": math.sqrt(self.k * (self.k + 1) / layout.sketch.m)}


class Hessian(_Spectrum):
    r"""Record the leading eigenpairs of the Hessian of the objective, block by block.

    The block of a layer, of each of its rows, or of the whole model of
    :math:`\nabla^2 L(\theta)`, regulariser included, in eval mode on the
    objective's fixed data. Small blocks are solved densely, others by Lanczos.

    Parameters
    ----------
    k
        Eigenpairs for each block.
    blocks
        ``"layer"``: one block a parameter tensor, into ``/hessian``.
        ``"rows"``: one block an output neuron or class, into ``/hessian_rows``.
        ``"model"``: one block over all trainable parameters, into ``/hessian_model``.
    layers
        Qualified names; None for all trainable tensors (for rows: all with at least two dims).
    which
        ``"magnitude"``, ``"largest"`` or ``"smallest"`` eigenvalues.
    tol
        Relative residual below which an eigenpair counts as converged.
    max_matvec
        Budget of Hessian-vector products a block; None for the solver's own.
    matrix_up_to
        Keep the whole block as ``matrix`` where it has at most this many parameters.
    sketch
        Numbers m that stand for an eigenvector of more than m components, on the dim
        ``sketch`` (:mod:`hild_xr.sketch`), or a :class:`~hild_xr.sketch.JohnsonLindenstrauss`
        with a seed. Sketches of orthonormal vectors are orthonormal only up to about
        ``sqrt(k (k + 1) / m)``, the attr ``orthonormal_within`` (root mean square of
        the Frobenius norm of :math:`U^T U - I`); analysis orthonormalises them.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store, where the default is taken.

    Raises
    ------
    KeyError
        When the recorder starts, if a layer is unknown; the nearest name is suggested.
    ValueError
        When the recorder starts, if k exceeds the size of a block, or a layer is frozen.
        At once, if ``sketch`` is below 2k.

    Examples
    --------
    >>> Hessian(k=4, blocks="rows").group
    'hessian_rows'
    """

    matrix = "hessian"


class GMatrix(_Spectrum):
    r"""Record the leading eigenpairs of the G-matrix, block by block.

    :math:`G = \frac{1}{M}\sum_m \nabla \ell_m \nabla \ell_m^T`, the uncentred
    second moment of per-sample gradients on the objective's fixed data
    (arXiv 2310.03010).

    Parameters
    ----------
    k, blocks, layers, which, tol, max_matvec, matrix_up_to, sketch, schedule, group
        As for :class:`Hessian`; groups are ``/gmatrix``, ``/gmatrix_rows``, ``/gmatrix_model``.
    include_regularizer
        Take the gradients of the regularised loss; by default those of the data part.

    Raises
    ------
    KeyError, ValueError
        As for :class:`Hessian`.

    Examples
    --------
    >>> GMatrix(k=10).group
    'gmatrix'
    """

    matrix = "gmatrix"

    def __init__(
        self,
        k: int,
        *,
        blocks: BlockKind = "layer",
        layers: Sequence[str] | None = None,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        matrix_up_to: int = 0,
        sketch: SketchOption = None,
        schedule: Schedule | None = None,
        group: str | None = None,
        include_regularizer: bool = False,
    ) -> None:
        super().__init__(
            k,
            blocks=blocks,
            layers=layers,
            which=which,
            tol=tol,
            max_matvec=max_matvec,
            matrix_up_to=matrix_up_to,
            sketch=sketch,
            schedule=schedule,
            group=group,
        )
        self.include_regularizer = include_regularizer

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs; the regulariser is 0 where it is left out."""
        shared = super().attrs(objective)
        if not self.include_regularizer:
            shared["regularizer"] = 0.0
        return shared

    def _solver_options(self) -> dict[str, bool]:
        return {"include_regularizer": self.include_regularizer}


def _block_dims(model: nn.Module, block: Block, blocks: BlockKind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Dims that number the blocks of a layer, and dims of an eigenvector."""
    if blocks == "model":
        return (), (DIM_PARAM,)
    dims = layer_dims(model)[block.label]
    return (dims[:1], dims[1:]) if blocks == "rows" else ((), dims)


def _missing(arrays: Mapping[str, ArrayPlan]) -> dict[str, ArrayLike]:
    return {name: array.missing() for name, array in arrays.items()}


def _as_planned(model: nn.Module, block: Block) -> bool:
    """Whether the same parameters require a gradient as at planning."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = set(block.parameters)
    return held == trainable if block.kind == "model" else held <= trainable


def _precision(model: nn.Module, blocks: Sequence[Block]) -> str:
    parameters = dict(model.named_parameters())
    names = [name for block in blocks for name in block.parameters]
    return str(np.result_type(*(numpy_dtype(parameters[name]) for name in names)))


def _layout(block: Block) -> dict[str, JsonValue]:
    """How a flat vector is cut into tensors, for blocks over several of them."""
    if block.kind != "model":
        return {}
    return {"layers": list(block.parameters), "layer_shapes": [list(shape) for shape in block.shapes]}


def _numbers(found: BlockSpectrum) -> dict[str, ArrayLike]:
    return {name: to_numpy(getattr(found, name)) for name in (*_PER_PAIR, *_SCALARS)}


def _tensors(found: BlockSpectrum, layout: VectorLayout) -> dict[str, ArrayLike | torch.Tensor]:
    tensors: dict[str, ArrayLike | torch.Tensor] = {"eigenvectors": layout(found.eigenvectors)}
    if found.matrix is not None:
        tensors["matrix"] = found.matrix
    return tensors
