"""Probes of curvature spectra: leading eigenpairs of the Hessian and its kin, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import JsonValue
from torch import nn

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan
from hild_xr.recorders.curvature import (
    Block,
    BlockKind,
    BlockSpectrum,
    MatrixChoice,
    Which,
    check_k,
    resolve_blocks,
)
from hild_xr.recorders.curvature.arguments import whole_number
from hild_xr.recorders.curvature.blocks import Groups, as_planned
from hild_xr.recorders.curvature.solve import SolveOptions
from hild_xr.recorders.host_copy import to_numpy
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.layout import block_dims, block_precision, flat_attrs
from hild_xr.recorders.probes.settings import group_name, matrix_attrs, matrix_name
from hild_xr.recorders.probes.sketching import SketchOption, VectorLayout, as_family, vector_layout
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_EIG, DIM_LAYER, DIM_PARAM

COLD_EVERY = 10
"""Records from one search that begins at random to the next, by default."""

_COUNTS = ("n_matvec", "n_certain")
_SCALARS = (*_COUNTS, "trace")
_PER_PAIR = ("eigenvalues", "residuals", "converged")


class Spectrum(Probe):
    """What the probes of spectra share; they differ in the matrix, which a subclass sets."""

    needs_objective = True
    matrix: MatrixChoice

    def __init__(
        self,
        k: int,
        *,
        blocks: BlockKind | Groups = "layer",
        layers: Sequence[str] | None = None,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        max_seconds: float = math.inf,
        dense_up_to: int | None = None,
        matrix_up_to: int = 0,
        cold_every: int = COLD_EVERY,
        sketch: SketchOption = None,
        schedule: Schedule | None = None,
        group: str | None = None,
        include_regularizer: bool | None = None,
    ) -> None:
        if whole_number("cold_every", cold_every) < 1:
            raise ValueError(f"cold_every counts records from one fresh search to the next; got {cold_every}")
        self.options = SolveOptions(
            k,
            which,
            tol,
            max_matvec,
            dense_up_to=SolveOptions.dense_up_to if dense_up_to is None else dense_up_to,
            matrix_up_to=matrix_up_to,
            max_seconds=max_seconds,
        )
        default = group_name(matrix_name(self.matrix), blocks)
        super().__init__(default if group is None else group, schedule)
        self.include_regularizer = include_regularizer
        self.k, self.blocks, self.layers = int(k), blocks, layers
        self.dense_up_to, self.cold_every = dense_up_to, cold_every
        self._start: dict[str, torch.Tensor] = {}
        self.sketch = as_family(sketch)
        if self.sketch is not None and self.sketch.m < 2 * k:
            raise ValueError(
                f"sketches of m={self.sketch.m} numbers cannot tell the spaces of k={k} eigenvectors apart: "
                f"take m={2 * k} at least, and some 100 k for angles within a few percent"
            )

    def start_from(self, vectors: Mapping[str, torch.Tensor]) -> None:
        """Let the first search after :meth:`plan` begin with these vectors, not at random.

        Parameters
        ----------
        vectors
            Eigenvectors by the block's label, shape (*batch, s, *vector_shape). Blocks without any are
            searched from random vectors.
        """
        self._start = dict(vectors)

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs: what matrix, of which data, how exact."""
        attrs: dict[str, JsonValue] = {
            **matrix_attrs(self.matrix, self.blocks, objective, self.include_regularizer),
            "k": self.k,
            "which": self.options.which,
            "tolerance": float(self.options.tol),
        }
        # left out where they are the default, so that runs recorded before can be resumed
        if self.cold_every != COLD_EVERY:
            attrs["cold_every"] = self.cold_every
        for name, setting in {"search_seed": "seed", "guard": "guard", "probe_steps": "probe_steps"}.items():
            if (value := getattr(self.options, setting)) != getattr(SolveOptions, setting):
                attrs[name] = value
        return attrs if self.dense_up_to is None else {**attrs, "dense_up_to": self.dense_up_to}

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes; rows carry their eigenvalues themselves, other blocks share one array."""
        del optimizer
        self._blocks = resolve_blocks(model, self.blocks, self.layers)
        check_k(self._blocks, self.k)
        self._earlier = self._given()
        self._n_records = 1 if self._earlier else 0
        if objective is not None:
            for block in self._blocks:
                self.options.check_budget(block, matrix_name(self.matrix), len(objective))
        eig = CoordPlan(dim=DIM_EIG, values=tuple(range(self.k)))
        self._layouts = {block.label: self._stored_as(model, block) for block in self._blocks}
        self._nodes = nodes = {block.label: self._node(model, block) for block in self._blocks}
        if self.blocks == "rows":
            return {OWN_NODE: NodePlan(coords={DIM_EIG: eig}), **nodes}
        labels = tuple(block.label for block in self._blocks)
        own = NodePlan(
            arrays=self._numbers((DIM_LAYER,), (len(labels),), block_precision(model, self._blocks)),
            coords={DIM_LAYER: CoordPlan(dim=DIM_LAYER, values=labels), DIM_EIG: eig},
        )
        return {OWN_NODE: own, **nodes}

    def resume(self, n_records: int, last: Callable[[str, str], NDArray[np.generic] | None]) -> None:
        """Go on from the eigenvectors that are stored, as if there had been no interruption."""
        self._n_records = n_records
        for block in self._blocks:
            # sketches are no eigenvectors: with them the next search is a fresh one
            whole = self._layouts[block.label].sketch is None
            vectors = last(block.label, "eigenvectors") if whole else None
            if vectors is not None:
                self._earlier[block.label] = torch.from_numpy(vectors)

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Solve all blocks; one whose parameters were frozen or unfrozen since planning is missing."""
        spectra = self._solve(
            snapshot, [block for block in self._blocks if as_planned(snapshot.model, block)]
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

    def _given(self) -> dict[str, torch.Tensor]:
        """Return the vectors that the caller gave for the blocks."""
        labels = [block.label for block in self._blocks]
        given = {label: self._start[label] for label in labels if label in self._start}
        if self._start and not given:
            raise ValueError(
                f"start holds none of the blocks {', '.join(labels)}, but {', '.join(self._start)}: give "
                "eigenvectors of the same model and the same kind of blocks"
            )
        return given

    def _solve(self, snapshot: Snapshot, blocks: Sequence[Block]) -> dict[str, BlockSpectrum]:
        # forgotten before: whatever goes wrong, the next record begins with a fresh search
        earlier, self._earlier = self._earlier, {}
        is_cold = self._n_records % self.cold_every == 0
        # another for each fresh search: a pair that one start vector hardly holds is not missed by all
        seed = self.options.seed + self._n_records // self.cold_every
        self._n_records += 1
        if not blocks:
            return {}
        labels = {block.label for block in blocks}
        earlier = {label: vectors for label, vectors in earlier.items() if label in labels}
        spectra = snapshot.curvature.eigenpairs(
            self.k,
            matrix=self.matrix,
            blocks=blocks,
            which=self.options.which,
            tol=self.options.tol,
            max_matvec=self.options.max_matvec,
            max_seconds=self.options.max_seconds,
            dense_up_to=self.dense_up_to,
            matrix_up_to=self.options.matrix_up_to,
            include_regularizer=self.include_regularizer,
            start=None if is_cold else earlier,
            guard=self.options.guard,
            probe_steps=self.options.probe_steps,
            seed=seed,
        )
        if self.cold_every > 1:
            self._earlier = {
                # rounded as they are stored, so that a resumed run begins with the same ones
                label: found.eigenvectors.to(self._stored_dtype(label))
                for label, found in spectra.items()
                if found.path in ("lanczos", "warm")
            }
        return spectra

    def _stored_dtype(self, label: str) -> torch.dtype:
        name = self._nodes[label].arrays["eigenvectors"].dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def _numbers(self, dims: tuple[str, ...], shape: tuple[int, ...], precision: str) -> dict[str, ArrayPlan]:
        """Plan what is a number a pair or a block; floats in the precision that they were computed in."""
        dtypes = (
            dict.fromkeys((*_PER_PAIR, *_SCALARS), precision)
            | dict.fromkeys(_COUNTS, "int32")
            | {"converged": "bool"}
        )
        per_pair = dict.fromkeys(_PER_PAIR, ((*dims, DIM_EIG), (*shape, self.k)))
        per_block = dict.fromkeys(_SCALARS, (dims, shape))
        return {
            name: ArrayPlan(variable=name, dims=all_dims, shape=extent, dtype=dtypes[name])
            for name, (all_dims, extent) in (per_pair | per_block).items()
        }

    def _node(self, model: nn.Module, block: Block) -> NodePlan:
        layout = self._layouts[block.label]
        batch_dims = layout.batch_dims[:-1]
        dtype = block_precision(model, [block])
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
                "matrix": matrix_name(self.matrix),
                **flat_attrs(block),
                **self._orthonormality(layout),
            },
        )
        if block.size <= self.options.matrix_up_to:
            arrays["matrix"] = ArrayPlan(
                variable="matrix",
                dims=(*batch_dims, DIM_PARAM, f"{DIM_PARAM}_"),
                shape=(*batch, block.size, block.size),
                dtype=dtype,
                attrs={"matrix": matrix_name(self.matrix)},
            )
        return NodePlan(arrays=arrays)

    def _stored_as(self, model: nn.Module, block: Block) -> VectorLayout:
        batch_dims, vector_dims = block_dims(model, block)
        sizes = {block.label: block.size}
        if block.is_flat:
            sizes = dict(zip(block.parameters, block.sizes, strict=True))
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


class Hessian(Spectrum):
    r"""Record the leading eigenpairs of the Hessian of the objective, block by block.

    The block of a layer, of each of its rows, of a module, of any group of parameters or of the
    whole model of :math:`\nabla^2 L(\theta)`, regulariser included, in eval mode on the
    objective's fixed data. Small blocks are solved densely, others by Lanczos.

    Parameters
    ----------
    k
        Eigenpairs for each block.
    blocks
        ``"layer"``: one block a parameter tensor, into ``/hessian``.
        ``"rows"``: one block an output neuron or class, into ``/hessian_rows``.
        ``"module"``: one block over the parameters that a module holds itself (weight and
        bias), by its qualified name, into ``/hessian_module``.
        ``"model"``: one block over all trainable parameters, into ``/hessian_model``.
        A mapping: one block a label over the parameters that it names, in full or by
        patterns, as ``{"head": ["fc.*"]}``, into ``/hessian_groups``; they may overlap.
        Eigenvectors of blocks over several tensors lie on a flat dim ``param``; their attrs
        ``layers`` and ``layer_shapes`` say how, and
        :func:`hild_xr.analysis.flatten_like` brings weights into the same order.
    layers
        Labels of the blocks to take (names of parameters, or of modules); None for all
        trainable ones (for rows: all with at least two dims).
    which
        ``"magnitude"``, ``"largest"`` or ``"smallest"`` eigenvalues, or ``"both"`` ends:
        largest, smallest, second largest, and so on.
    tol
        Relative residual below which an eigenpair counts as converged. The error of an
        eigenvalue is at most its square over the relative gap, the angle of an eigenvector
        at most the residual over the gap.
    max_matvec
        Budget of Hessian-vector products a block; None for the solver's own.
    max_seconds
        Time for a block that is solved through products. What is found by then is recorded with its true
        residuals, and depends on the machine: two runs are then not equal bit for bit.
    dense_up_to
        Solve blocks of at most this many parameters as whole matrices, which misses no
        eigenpair; None for the solver's own rule.
    matrix_up_to
        Keep the whole block as ``matrix`` where it has at most this many parameters.
    cold_every
        Of blocks solved through products, every so many records are searched from random
        vectors, others each time. Those between begin with the eigenvectors of the record before, which takes
        a quarter to two thirds of the products; an outlier that emerges from directions of
        its own is found at the next fresh search at the latest. 1 searches afresh each time.
        A resumed run goes on from the stored eigenvectors, bit for bit; where ``sketch``
        keeps them from being stored, its first search is a fresh one.
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
    include_regularizer
        Whether the l2 term takes part, by default it does.

    Raises
    ------
    ValueError
        When the recorder starts, if k exceeds the size of a block, ``max_matvec`` is too small to search
        one, a name or pattern is unknown (the nearest name is suggested) or frozen, or a label can
        be no folder. At once, if a number is out of range, or ``sketch`` is below 2k.
    TypeError
        At once, if a number is none, or ``blocks`` is neither a text nor a mapping.

    Examples
    --------
    >>> Hessian(k=4, blocks="rows").group
    'hessian_rows'
    >>> Hessian(k=4, blocks={"body": ["encoder.*"], "head": ["fc.weight", "fc.bias"]}).group
    'hessian_groups'
    """

    matrix = "hessian"


class GMatrix(Spectrum):
    r"""Record the leading eigenpairs of the G-matrix, block by block.

    :math:`G = \frac{1}{M}\sum_m \nabla \ell_m \nabla \ell_m^T`, the uncentred second moment of
    per-sample gradients on the objective's fixed data (arXiv 2310.03010), or with ``centered``
    their covariance :math:`\frac{1}{M}\sum_m (\nabla \ell_m - \bar g)(\nabla \ell_m - \bar g)^T`,
    :math:`\bar g` the mean: the noise of the gradient.

    Parameters
    ----------
    k, blocks, layers, which, tol, max_matvec, max_seconds, dense_up_to, matrix_up_to
    cold_every, sketch, schedule, group
        As for :class:`Hessian`; groups are ``/gmatrix``, ``/gmatrix_rows``, ``/gmatrix_centered``
        and so on.
    include_regularizer
        Take the gradients of the regularised loss; by default those of the data part. It makes no
        difference to the centred matrix.
    centered
        Subtract the mean gradient.

    Raises
    ------
    ValueError, TypeError
        As for :class:`Hessian`.

    Examples
    --------
    >>> GMatrix(k=10).group, GMatrix(k=10, centered=True).group
    ('gmatrix', 'gmatrix_centered')
    """

    def __init__(
        self,
        k: int,
        *,
        blocks: BlockKind | Groups = "layer",
        layers: Sequence[str] | None = None,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        max_seconds: float = math.inf,
        dense_up_to: int | None = None,
        matrix_up_to: int = 0,
        cold_every: int = COLD_EVERY,
        sketch: SketchOption = None,
        schedule: Schedule | None = None,
        group: str | None = None,
        include_regularizer: bool | None = None,
        centered: bool = False,
    ) -> None:
        self.matrix = "gmatrix_centered" if centered else "gmatrix"
        super().__init__(
            k,
            blocks=blocks,
            layers=layers,
            which=which,
            tol=tol,
            max_matvec=max_matvec,
            max_seconds=max_seconds,
            dense_up_to=dense_up_to,
            matrix_up_to=matrix_up_to,
            cold_every=cold_every,
            sketch=sketch,
            schedule=schedule,
            group=group,
            include_regularizer=include_regularizer,
        )


def _missing(arrays: Mapping[str, ArrayPlan]) -> dict[str, ArrayLike]:
    return {name: array.missing() for name, array in arrays.items()}


def _numbers(found: BlockSpectrum) -> dict[str, ArrayLike]:
    return {name: to_numpy(getattr(found, name)) for name in (*_PER_PAIR, *_SCALARS)}


def _tensors(found: BlockSpectrum, layout: VectorLayout) -> dict[str, ArrayLike | torch.Tensor]:
    tensors: dict[str, ArrayLike | torch.Tensor] = {"eigenvectors": layout(found.eigenvectors)}
    if found.matrix is not None:
        tensors["matrix"] = found.matrix
    return tensors
