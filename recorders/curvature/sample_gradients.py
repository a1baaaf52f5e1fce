r"""Per-sample gradients :math:`g_m`, and what the G-matrix :math:`\frac1M\sum_m g_m g_m^T` needs of them.

Each parameter's gradients are held as the two factors of a linear layer where they
have that form, and as a plain matrix elsewhere. Both know the same three operations.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hild_xr.recorders.curvature.functional import at_least_float32, map_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.objective import Objective

_TILE_ON_CPU = 256
_TILE_ON_GPU = 4096


class SampleGradients(Protocol):
    """The M x p matrix J of per-sample gradients of one parameter."""

    @property
    def size(self) -> int:
        """Number of parameters p."""
        ...

    def apply(self, vectors: Tensor) -> Tensor:
        """Return J v for each of the vectors (n, p), shape (n, M)."""
        ...

    def adjoint(self, weights: Tensor) -> Tensor:
        """Return J^T u for each of the weights (n, M), shape (n, p)."""
        ...

    @property
    def n_rows(self) -> int:
        """Number of gradients: of samples, or of samples times outputs."""
        ...

    @property
    def rows_per_sample(self) -> int:
        """Rows that are taken together."""
        ...

    def products(self, here: slice, there: slice) -> Tensor:
        """Return the scalar products of some rows with some others."""
        ...

    def squared_norms(self) -> Tensor:
        """Return |g_m|^2, shape (M,)."""
        ...

    def explicit(self) -> Tensor:
        """Return J itself, shape (M, p)."""
        ...


@dataclass(frozen=True)
class ExplicitGradients:
    """Per-sample gradients as a matrix (M, p).

    Examples
    --------
    >>> gradients = ExplicitGradients(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> gram([gradients])
    tensor([[1., 1.],
            [1., 2.]])
    """

    matrix: Tensor

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return self.matrix.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """Return J v for each of the vectors (n, p), shape (n, M)."""
        return vectors @ self.matrix.T

    def adjoint(self, weights: Tensor) -> Tensor:
        """Return J^T u for each of the weights (n, M), shape (n, p)."""
        return weights @ self.matrix

    @property
    def n_rows(self) -> int:
        """Number of gradients."""
        return len(self.matrix)

    @property
    def rows_per_sample(self) -> int:
        """Rows that are taken together: any."""
        return 1

    def products(self, here: slice, there: slice) -> Tensor:
        """Return the scalar products of some rows with some others."""
        return self.matrix[here] @ self.matrix[there].T

    def squared_norms(self) -> Tensor:
        """Return |g_m|^2, shape (M,)."""
        return self.matrix.square().sum(1)

    def explicit(self) -> Tensor:
        """Return J itself, shape (M, p)."""
        return self.matrix


@dataclass(frozen=True)
class FactoredGradients:
    r"""Per-sample gradients :math:`\delta_m h_m^T` of a linear layer's weight, never formed.

    A sample may have several: those of its outputs, say. They share its input, and
    count as one row each, sample by sample.

    Parameters
    ----------
    delta
        Gradients by the layer's output, shape (M, out), or (M, K, out) for K of each sample.
    h
        Inputs of the layer, shape (M, in).

    Examples
    --------
    >>> gradients = FactoredGradients(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> gradients.explicit()
    tensor([[1., 0.],
            [2., 2.]])
    >>> gram([gradients])
    tensor([[1., 2.],
            [2., 8.]])
    """

    delta: Tensor
    h: Tensor

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return self.delta.shape[-1] * self.h.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """Return J v for each of the vectors (n, p), shape (n, M K)."""
        shape = (self.delta.shape[-1], self.h.shape[1])
        return torch.stack([self._scores(self.h @ v.reshape(shape).T) for v in vectors])

    def adjoint(self, weights: Tensor) -> Tensor:
        """Return J^T u for each of the weights (n, M K), shape (n, p)."""
        return torch.stack([(self._weighted(w).T @ self.h).reshape(-1) for w in weights])

    @property
    def n_rows(self) -> int:
        """Number of gradients M K."""
        return len(self.h) * self.rows_per_sample

    @property
    def rows_per_sample(self) -> int:
        """Number K of gradients of a sample."""
        return 1 if self.delta.ndim == 2 else self.delta.shape[1]

    def products(self, here: slice, there: slice) -> Tensor:
        """Return the scalar products of some rows with some others, of whole samples."""
        k = self.rows_per_sample
        a, b = (slice(rows.start // k, rows.stop // k) for rows in (here, there))
        inputs = self.h[a] @ self.h[b].T
        products = self.delta[a].flatten(0, -2) @ self.delta[b].flatten(0, -2).T
        products.view(len(inputs), k, -1, k).mul_(inputs[:, None, :, None])
        return products

    def with_bias(self) -> FactoredGradients:
        """Return the gradients of weight and bias together, whose input is 1."""
        return FactoredGradients(self.delta, torch.nn.functional.pad(self.h, (0, 1), value=1.0))

    def squared_norms(self) -> Tensor:
        """Return |g_m|^2, shape (M K,)."""
        squares = self.h.square().sum(1)
        inputs = squares if self.delta.ndim == 2 else squares[:, None]
        return (self.delta.square().sum(-1) * inputs).reshape(-1)

    def explicit(self) -> Tensor:
        """Return J itself, shape (M K, p)."""
        inputs = self.h if self.delta.ndim == 2 else self.h[:, None]
        return (self.delta[..., :, None] * inputs[..., None, :]).flatten(-2).flatten(0, -2)

    def _scores(self, outputs: Tensor) -> Tensor:
        if self.delta.ndim == 2:
            return (outputs * self.delta).sum(1)
        return (self.delta @ outputs[:, :, None]).reshape(-1)

    def _weighted(self, weights: Tensor) -> Tensor:
        if self.delta.ndim == 2:
            return self.delta * weights[:, None]
        return (weights.reshape(len(self.h), 1, -1) @ self.delta)[:, 0]


@dataclass(frozen=True)
class Cotangents:
    """Linear functions of each sample's outputs.

    Parameters
    ----------
    values
        Shape (M, K, *output).
    output_leaf
        Which of the tensors that the model returns they are functions of.
    """

    values: Tensor
    output_leaf: int


def gram(parts: Sequence[SampleGradients]) -> Tensor:
    """Return J J^T of the gradients of several parameters, shape (rows, rows).

    Tile by tile, each of which stays in the cache while the parameters are added up, and half of
    them: the others are their transposes.
    """
    n, unit = parts[0].n_rows, parts[0].rows_per_sample
    first = parts[0].products(slice(0, unit), slice(0, unit))
    side = max(1, (_TILE_ON_CPU if first.device.type == "cpu" else _TILE_ON_GPU) // unit) * unit
    products = first.new_empty(n, n)
    tiles = [slice(start, min(start + side, n)) for start in range(0, n, side)]
    for i, here in enumerate(tiles):
        for there in tiles[i:]:
            tile = parts[0].products(here, there)
            for part in parts[1:]:
                tile += part.products(here, there)
            products[here, there] = tile
            products[there, here] = tile.T
    return products


class GradientSampler:
    """Per-sample gradients of any module, by ``vmap`` over the samples.

    Parameters
    ----------
    network
        The model.
    objective
        Loss and data.
    dtype
        Precision the data are brought to.
    measuring
        Isolates the model during a pass.
    max_bytes
        Memory that the gradients of one chunk of samples may take.

    Warns
    -----
    UserWarning
        If ``vmap`` does not support the model (some recurrent layers, data-dependent
        control flow): the samples are then taken one by one, exact but slower.
    """

    def __init__(
        self,
        network: FunctionalModel,
        objective: Objective,
        dtype: torch.dtype | None,
        measuring: Measurement,
        max_bytes: int,
    ) -> None:
        self._network, self._objective, self._dtype = network, objective, dtype
        self._measuring, self._max_bytes = measuring, max_bytes
        self._vectorised = True

    def chunks(
        self, names: Sequence[str], cotangents: Cotangents | None = None, samples: slice = slice(None)
    ) -> Iterator[dict[str, Tensor]]:
        """Yield per-sample gradients by name, flattened to (chunk, p), for chunks of samples in order.

        Parameters
        ----------
        names
            Qualified names of the parameters.
        cotangents
            What to differentiate instead of the loss: K linear functions of each sample's
            outputs. A chunk of samples then gives K rows for each of them.
        samples
            The samples to take, a slice with step 1.
        """
        leaves = [self._network.trainable[name] for name in names]
        bytes_per_sample = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        bytes_per_sample *= 1 if cotangents is None else cotangents.values.shape[1]
        size = min(max(1, self._max_bytes // (2 * bytes_per_sample)), 512)
        first, last, _ = samples.indices(len(self._objective))
        for start in range(first, last, size):
            index = slice(start, min(start + size, last))
            inputs, targets = self._objective.samples(index, self._dtype)
            # torch.func.grad differentiates under no_grad too; the other parameters need no graph.
            with self._measuring(), torch.no_grad():
                if cotangents is None:
                    gradients = self._gradients(names, torch.func.grad(self._sample_loss), inputs, targets)
                else:
                    pull = functools.partial(self._pulled_back, leaf=cotangents.output_leaf)
                    gradients = self._gradients(names, pull, inputs, cotangents.values[index])
                    gradients = {name: g.flatten(0, 1) for name, g in gradients.items()}
            yield {name: at_least_float32(g).reshape(len(g), -1) for name, g in gradients.items()}

    def all(
        self, names: Sequence[str], cotangents: Cotangents | None = None, samples: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Return the gradients of all samples by name, each (M, p), or (M K, p) with cotangents."""
        parts = list(self.chunks(names, cotangents, samples))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _gradients(
        self,
        names: Sequence[str],
        of_sample: Callable[[dict[str, Tensor], Inputs, Tensor], dict[str, Tensor]],
        inputs: Inputs,
        other: Tensor,
    ) -> dict[str, Tensor]:
        chosen = {name: self._network.trainable[name].detach() for name in names}
        if self._vectorised:
            try:
                vectorised: dict[str, Tensor] = torch.func.vmap(of_sample, in_dims=(None, 0, 0))(
                    chosen, inputs, other
                )
            except (RuntimeError, ValueError) as error:
                self._vectorised = False
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"torch.func.vmap does not support this model ({reason}); its per-sample gradients "
                    "are taken one by one, which is exact but slower",
                    stacklevel=2,
                )
            else:
                return vectorised
        singles = [of_sample(chosen, _sample(inputs, m), other[m]) for m in range(len(other))]
        return {name: torch.stack([single[name] for single in singles]) for name in names}

    def _sample_loss(self, chosen: dict[str, Tensor], inputs: Inputs, target: Tensor) -> Tensor:
        outputs = self._network(map_inputs(lambda x: x[None], inputs), chosen)
        return self._objective.mean_loss(outputs, target[None])

    def _pulled_back(
        self, chosen: dict[str, Tensor], inputs: Inputs, cotangents: Tensor, leaf: int
    ) -> dict[str, Tensor]:
        def output(parameters: dict[str, Tensor]) -> Tensor:
            outputs = self._network(map_inputs(lambda x: x[None], inputs), parameters)
            found: Tensor = pytree.tree_leaves(outputs)[leaf]
            return found[0]

        value, pull = torch.func.vjp(output, chosen)[:2]
        # One by one: a vmap inside would meet double batching, which fewer operations support.
        pulled: list[dict[str, Tensor]] = [pull(one)[0] for one in cotangents.to(value.dtype)]
        return {name: torch.stack([one[name] for one in pulled]) for name in chosen}


def _sample(inputs: Inputs, m: int) -> Inputs:
    return map_inputs(lambda tensor: tensor[m], inputs)
