r"""Matrices :math:`\frac1M\sum_m\sum_k J_m^T a_{mk} a_{mk}^T J_m`, by their columns a at the outputs.

With :math:`J_m` the derivative of a sample's outputs by the parameters, all of these are
one sum with other columns:

* G-matrix: the gradient of the sample's loss, K = 1;
* generalized Gauss-Newton: a root of the loss's second derivative, where that is
  positive semi-definite;
* Fisher: the gradients for all targets, each with the root of its probability;
* Monte Carlo Fisher: the gradients for some targets drawn;
* tangent kernel: unit vectors.

Columns at the outputs are small. Pulled back to the outputs of linear layers they replace
the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.functional import at_least_float32
from hild_xr.recorders.curvature.likelihood import Noise, check_draws, predictive, unit_columns
from hild_xr.recorders.curvature.sample_gradients import FactoredGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hild_xr.recorders.curvature.graph import LossGraph
    from hild_xr.recorders.objective import Objective


@dataclass(frozen=True)
class FisherMC:
    r"""Monte Carlo Fisher matrix: gradients for targets drawn from the model's own prediction.

    .. math:: F \approx \frac{1}{MS}\sum_m\sum_{s=1}^S g_{ms} g_{ms}^T,
       \quad g_{ms} = \nabla_\theta\, \ell(f_\theta(x_m), y_{ms}), \quad y_{ms} \sim p_\theta(\cdot|x_m)

    The draws are part of the matrix: the same seed gives the same one, whatever the batches.

    Parameters
    ----------
    draws
        Targets S drawn for each sample; the error falls as :math:`1/\sqrt{MS}`.
    seed
        Seed of the draws.

    Raises
    ------
    ValueError
        If ``draws`` is below 1 or ``seed`` below 0.

    Examples
    --------
    >>> FisherMC(draws=4)
    FisherMC(draws=4, seed=0)
    """

    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_draws(self.draws, self.seed)


class Columns(ABC):
    """Columns of each sample at the outputs, and pulled back to linear layers."""

    @abstractmethod
    def at_outputs(self, graph: LossGraph) -> Tensor | None:
        """Return the columns of a batch, shape (n, K, *output); ``None`` where they are not to be had."""

    def at_layers(self, graph: LossGraph, columns: Tensor | None, weights: Sequence[str]) -> list[Tensor]:
        """Return the columns at the outputs of linear layers, each of shape (n, K, out)."""
        if columns is None:
            raise ValueError("columns at layers need columns at the outputs")
        if not weights:
            return []
        pulled = [graph.layer_adjoint(weights, columns[:, k]) for k in range(columns.shape[1])]
        return [torch.stack(of_layer, dim=1) for of_layer in zip(*pulled, strict=True)]


class LossGradients(Columns):
    """Columns of the G-matrix; at linear layers the first backward pass has them already."""

    def at_outputs(self, graph: LossGraph) -> Tensor | None:
        """Return the gradient of each sample's loss, shape (n, 1, *output)."""
        if not has_rows(graph):
            return None
        return graph.loss_slope()[:, None] * graph.n_samples

    def at_layers(self, graph: LossGraph, columns: Tensor | None, weights: Sequence[str]) -> list[Tensor]:  # noqa: ARG002
        """Return the gradient by the outputs of linear layers, each of shape (n, 1, out)."""
        return [graph.layers.output_gradient(weight)[:, None] for weight in weights]


@dataclass(frozen=True)
class GaussNewtonRoots(Columns):
    r"""Columns of the generalized Gauss-Newton matrix: :math:`AA^T = \partial^2\ell_m/\partial f^2`.

    Parameters
    ----------
    up_to
        Most components of an output for which a root is taken.
    """

    up_to: int

    def at_outputs(self, graph: LossGraph) -> Tensor | None:
        """Return the columns; ``None`` for large outputs and for a loss that is not convex in them."""
        if not has_rows(graph):
            return None
        hessians = self._loss_hessians(graph)
        if hessians is None or not bool(hessians.isfinite().all()):
            return None
        eigenvalues, vectors = torch.linalg.eigh(hessians.to("cpu", torch.float64))
        rounding = 20 * torch.finfo(hessians.dtype).eps * eigenvalues.abs().amax()
        if bool(eigenvalues.min() < -10 * rounding):
            return None
        columns = (vectors * eigenvalues.clamp(min=0).sqrt()[:, None]).mT.flip(1)
        needed = int((eigenvalues.amax(0) > rounding).sum())
        shape = (*columns.shape[:1], max(needed, 1), *graph.loss_slope().shape[1:])
        kept: Tensor = columns[:, : max(needed, 1)].reshape(shape).to(hessians)
        return kept

    def _loss_hessians(self, graph: LossGraph) -> Tensor | None:
        slope = graph.loss_slope()
        size = slope[0].numel()
        if size > self.up_to:
            return None
        found = torch.empty(len(slope), size, size, dtype=slope.dtype, device=slope.device)
        direction = torch.zeros(len(slope), size, dtype=slope.dtype, device=slope.device)
        for d in range(size):
            direction[:, d] = graph.n_samples
            (product,) = graph.loss_hessian_products(direction.reshape(1, *slope.shape))
            found[:, d] = product.reshape(len(slope), size)
            direction[:, d] = 0
        return (found + found.mT) / 2


@dataclass(frozen=True)
class FisherColumns(Columns):
    """Columns of the Fisher matrix, over all targets or over drawn ones.

    Parameters
    ----------
    objective
        Its loss tells the distribution of the targets.
    drawn
        Options of the draws; ``None`` sums over all targets.
    """

    objective: Objective
    drawn: FisherMC | None = None

    def at_outputs(self, graph: LossGraph) -> Tensor:
        """Return the columns.

        Raises
        ------
        ValueError
            If the loss is no negative log-likelihood (see
            :func:`~hild_xr.recorders.curvature.likelihood.predictive`).
        """
        outputs = graph.needed_outputs()
        outputs, targets = at_least_float32(outputs.detach()), graph.targets
        targets = at_least_float32(targets) if targets.is_floating_point() else targets
        loss = graph.loss_of_output
        with torch.no_grad():
            likelihood = predictive(loss, outputs, targets)
            if self.drawn is None:
                return likelihood.columns(loss, outputs)
            noise = Noise(self.drawn.draws, self.drawn.seed, len(self.objective), graph.first)
            return likelihood.drawn_columns(loss, outputs, noise)


class UnitColumns(Columns):
    """Unit vectors: the gradients of each output by itself."""

    def at_outputs(self, graph: LossGraph) -> Tensor:
        """Return the identity for each sample, shape (n, D, *output)."""
        return unit_columns(graph.loss_slope())


class LayerFactors:
    """Inputs of linear layers and columns at their outputs, taken batch by batch.

    Parameters
    ----------
    columns
        Pulls columns at the outputs back to the layers.
    weights
        Qualified names of the layers' weights.
    """

    def __init__(self, columns: Columns, weights: Sequence[str]) -> None:
        self._columns, self._weights = columns, list(weights)
        self._deltas: dict[str, list[Tensor]] = {weight: [] for weight in self._weights}
        self._inputs: dict[str, list[Tensor]] = {weight: [] for weight in self._weights}

    def take(self, graph: LossGraph, at_outputs: Tensor | None) -> None:
        """Take what a batch has, given its columns at the outputs, shape (n, K, *output)."""
        deltas = self._columns.at_layers(graph, at_outputs, self._weights)
        for weight, delta in zip(self._weights, deltas, strict=True):
            self._deltas[weight].append(delta)
            self._inputs[weight].append(graph.layers.inputs(weight))

    def joined(self) -> dict[str, FactoredGradients]:
        """Return the factors of all batches taken by weight, with delta of shape (M, K, out)."""
        return {
            weight: FactoredGradients(joined(self._deltas[weight]), joined(self._inputs[weight]))
            for weight in self._weights
        }


def joined(batches: Sequence[Tensor]) -> Tensor:
    """Join the samples of batches; those of a single one are not copied."""
    return batches[0] if len(batches) == 1 else torch.cat(list(batches))


def has_rows(graph: LossGraph) -> bool:
    """Whether there is one output tensor with a row for each sample."""
    return graph.outputs is not None and graph.outputs.shape[:1] == (graph.n_samples,)
