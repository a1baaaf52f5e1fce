"""Probe of spectral densities of the Hessian and its kin, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan
from hild_xr.recorders.curvature import (
    Block,
    BlockKind,
    MatrixChoice,
    Precision,
    SpectralDensity,
    resolve_blocks,
)
from hild_xr.recorders.curvature.blocks import Groups, as_planned
from hild_xr.recorders.curvature.densities import DensityOptions
from hild_xr.recorders.layers import layer_dims
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.settings import group_name, matrix_attrs, matrix_name
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_LAYER, DIM_NODE, DIM_PROBE

_RULE = ("quadrature_nodes", "quadrature_weights")
_NUMBERS = (
    "trace",
    "trace_standard_error",
    "quadrature_error",
    "sampling_error",
    "product_error",
    "n_matvec",
)


class Density(Probe):
    r"""Record the spectral density of a curvature matrix, block by block.

    The density :math:`\frac1p\sum_i\delta_{\lambda_i}` stands as ``quadrature_nodes`` and
    ``quadrature_weights`` of each probe (stochastic Lanczos quadrature, arXiv 1901.10159):
    the mean over ``probe`` of ``(weights * f(nodes)).sum("node")`` estimates
    :math:`\frac1p\mathrm{tr} f(A)`, be f a power, a Gaussian or a step. Beside it stand the trace
    and its standard error (exact for the matrices that know it), and what the density is worth:
    ``quadrature_error`` and ``sampling_error``, both Wasserstein-1 distances, and
    ``product_error``. Blocks whose eigenvalues fit the nodes are exact.

    Every record draws the same probes, so two records differ by what training changed and not by
    chance.

    Parameters
    ----------
    matrix
        ``"hessian"``, ``"gmatrix"`` or another of :class:`~hild_xr.recorders.curvature.Curvature`,
        or a :class:`~hild_xr.recorders.curvature.FisherMC` with options.
    k_steps
        Products with each probe.
    probes
        Random vectors for each block; 1 is enough for a million parameters, 10 for a thousand.
    n_nodes
        Nodes of the rule of a probe; None for 200, or ``4 k_steps`` if that is more.
    blocks, layers
        As for :class:`~hild_xr.recorders.Hessian`.
    precision
        ``"bfloat16"`` for products that are twice as fast on some processors and wrong by
        ``product_error``.
    include_regularizer
        Whether the l2 term takes part; None for the matrix's default.
    seed
        Seed of the random vectors.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store; by default the matrix and ``_density``.

    Raises
    ------
    ValueError
        At once, if a number is out of range or a name unknown; when the recorder starts, if a
        layer is.
    TypeError
        At once, if ``blocks`` is neither a text nor a mapping.

    Examples
    --------
    >>> Density(k_steps=30).group, Density("gmatrix", blocks="rows").group
    ('hessian_density', 'gmatrix_density_rows')
    """

    needs_objective = True

    def __init__(
        self,
        matrix: MatrixChoice = "hessian",
        *,
        k_steps: int = 50,
        probes: int = 2,
        n_nodes: int | None = None,
        blocks: BlockKind | Groups = "layer",
        layers: Sequence[str] | None = None,
        precision: Precision = "full",
        include_regularizer: bool | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        group: str | None = None,
    ) -> None:
        default = group_name(f"{matrix_name(matrix)}_density", blocks)
        super().__init__(default if group is None else group, schedule)
        self._options = DensityOptions(k_steps, probes, n_nodes, seed, precision)
        self.matrix, self.blocks, self.layers = matrix, blocks, layers
        self.include_regularizer = include_regularizer

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs: what matrix, of which data, how exact."""
        options = self._options
        return {
            **matrix_attrs(self.matrix, self.blocks, objective, self.include_regularizer),
            "k_steps": options.k_steps,
            "probes": options.probes,
            "probe_seed": options.seed,
            "precision": options.precision,
        }

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes; rows carry their densities themselves, other blocks share one array."""
        del optimizer, objective
        self._blocks = resolve_blocks(model, self.blocks, self.layers)
        coords = {
            DIM_PROBE: CoordPlan(dim=DIM_PROBE, values=tuple(range(self._options.probes))),
            DIM_NODE: CoordPlan(dim=DIM_NODE, values=tuple(range(self._options.nodes_per_probe))),
        }
        if self.blocks == "rows":
            dims = layer_dims(model)
            self._arrays = {
                block.label: self._planned(dims[block.label][:1], block.batch_shape) for block in self._blocks
            }
            nodes = {label: NodePlan(arrays=arrays) for label, arrays in self._arrays.items()}
            return {OWN_NODE: NodePlan(coords=coords), **nodes}
        labels = tuple(block.label for block in self._blocks)
        arrays = self._planned((DIM_LAYER,), (len(labels),))
        self._arrays = dict.fromkeys(labels, self._planned((), ()))
        coords[DIM_LAYER] = CoordPlan(dim=DIM_LAYER, values=labels)
        return {OWN_NODE: NodePlan(arrays=arrays, coords=coords)}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Find all densities; that of a block whose parameters were frozen or unfrozen is missing."""
        found = self._densities(
            snapshot, [block for block in self._blocks if as_planned(snapshot.model, block)]
        )
        values = {
            label: _values(found[label])
            if label in found
            else {name: array.missing() for name, array in arrays.items()}
            for label, arrays in self._arrays.items()
        }
        if self.blocks == "rows":
            return {OWN_NODE: {}, **values}
        names = (*_RULE, *_NUMBERS)
        return {OWN_NODE: {name: np.stack([np.asarray(v[name]) for v in values.values()]) for name in names}}

    def _densities(self, snapshot: Snapshot, blocks: Sequence[Block]) -> dict[str, SpectralDensity]:
        if not blocks:
            return {}
        options = self._options
        return snapshot.curvature.density(
            self.matrix,
            blocks,
            k_steps=options.k_steps,
            probes=options.probes,
            n_nodes=options.n_nodes,
            precision=options.precision,
            include_regularizer=self.include_regularizer,
            seed=options.seed,
        )

    def _planned(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, ArrayPlan]:
        rule = (self._options.probes, self._options.nodes_per_probe)
        extents = dict.fromkeys(_RULE, ((*dims, DIM_PROBE, DIM_NODE), (*shape, *rule)))
        extents |= dict.fromkeys(_NUMBERS, (dims, shape))
        return {
            name: ArrayPlan(
                variable=name,
                dims=all_dims,
                shape=extent,
                dtype="int32" if name == "n_matvec" else "float64",
                attrs={"matrix": matrix_name(self.matrix)},
            )
            for name, (all_dims, extent) in extents.items()
        }


def _values(found: SpectralDensity) -> dict[str, ArrayLike | Tensor]:
    trace, error = found.trace()
    return {
        "quadrature_nodes": found.nodes,
        "quadrature_weights": found.weights,
        "trace": trace,
        "trace_standard_error": error,
        "quadrature_error": found.quadrature_error,
        "sampling_error": found.sampling_error(),
        "product_error": found.product_error,
        "n_matvec": found.n_matvec,
    }
