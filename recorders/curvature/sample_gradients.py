r"""Per-sample gradients :math:`g_m`, and what the G-matrix :math:`\frac1M\sum_m g_m g_m^T` needs of them.

Each parameter's gradients are held as the two factors of a linear layer where they
have that form, and as a plain matrix elsewhere. Both know the same three operations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hild_xr.recorders.curvature.functional import at_least_float32, map_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.objective import Objective


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

    def gram(self) -> Tensor:
        """Return J J^T, shape (M, M)."""
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
    >>> gradients.gram()
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

    def gram(self) -> Tensor:
        """Return J J^T, shape (M, M)."""
        return self.matrix @ self.matrix.T

    def squared_norms(self) -> Tensor:
        """Return |g_m|^2, shape (M,)."""
        return self.matrix.square().sum(1)

    def explicit(self) -> Tensor:
        """Return J itself, shape (M, p)."""
        return self.matrix


@dataclass(frozen=True)
class FactoredGradients:
    r"""Per-sample gradients :math:`\delta_m h_m^T` of a linear layer's weight, never formed.

    Parameters
    ----------
    delta
        Gradients by the layer's output, shape (M, out).
    h
        Inputs of the layer, shape (M, in).

    Examples
    --------
    >>> gradients = FactoredGradients(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> gradients.explicit()
    tensor([[1., 0.],
            [2., 2.]])
    >>> gradients.gram()
    tensor([[1., 2.],
            [2., 8.]])
    """

    delta: Tensor
    h: Tensor

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return self.delta.shape[1] * self.h.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """Return J v for each of the vectors (n, p), shape (n, M)."""
        shape = (self.delta.shape[1], self.h.shape[1])
        return torch.stack([((self.h @ v.reshape(shape).T) * self.delta).sum(1) for v in vectors])

    def adjoint(self, weights: Tensor) -> Tensor:
        """Return J^T u for each of the weights (n, M), shape (n, p)."""
        return torch.stack([((self.delta * w[:, None]).T @ self.h).reshape(-1) for w in weights])

    def gram(self) -> Tensor:
        """Return J J^T, shape (M, M)."""
        return (self.delta @ self.delta.T) * (self.h @ self.h.T)

    def squared_norms(self) -> Tensor:
        """Return |g_m|^2, shape (M,)."""
        return self.delta.square().sum(1) * self.h.square().sum(1)

    def explicit(self) -> Tensor:
        """Return J itself, shape (M, p)."""
        return (self.delta[:, :, None] * self.h[:, None, :]).flatten(1)


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

    def chunks(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Yield per-sample gradients by name, flattened to (chunk, p), for chunks of samples in order."""
        leaves = [self._network.trainable[name] for name in names]
        bytes_per_sample = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        size = min(max(1, self._max_bytes // (2 * bytes_per_sample)), 512)
        for start in range(0, len(self._objective), size):
            inputs, targets = self._objective.samples(slice(start, start + size), self._dtype)
            # torch.func.grad differentiates under no_grad too; the other parameters need no graph.
            with self._measuring(), torch.no_grad():
                gradients = self._gradients(names, inputs, targets)
            yield {name: at_least_float32(g).reshape(len(targets), -1) for name, g in gradients.items()}

    def all(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradients of all samples by name, each (M, p)."""
        parts = list(self.chunks(names))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _gradients(self, names: Sequence[str], inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        chosen = {name: self._network.trainable[name].detach() for name in names}
        gradient = torch.func.grad(self._sample_loss)
        if self._vectorised:
            try:
                vectorised: dict[str, Tensor] = torch.func.vmap(gradient, in_dims=(None, 0, 0))(
                    chosen, inputs, targets
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
        singles = [gradient(chosen, _sample(inputs, m), targets[m]) for m in range(len(targets))]
        return {name: torch.stack([single[name] for single in singles]) for name in names}

    def _sample_loss(self, chosen: dict[str, Tensor], inputs: Inputs, target: Tensor) -> Tensor:
        outputs = self._network(map_inputs(lambda x: x[None], inputs), chosen)
        return self._objective.mean_loss(outputs, target[None])


def _sample(inputs: Inputs, m: int) -> Inputs:
    return map_inputs(lambda tensor: tensor[m], inputs)
