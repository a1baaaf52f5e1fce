"""The objective as a function of one flat parameter vector, to be walked on without touching the model."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.curvature.isolation import isolated, unwrapped
from hild_xr.recorders.objective import Objective


class LossSurface:
    r"""Loss, gradient and Hessian products of an objective at any :math:`\theta`.

    Trainable parameters lie one after the other in a vector; what is frozen and the buffers stay
    those of the model. Everything is in eval mode. Used as a context manager.

    Parameters
    ----------
    model
        The model, found unchanged afterwards.
    objective
        Loss and data; the regulariser takes part.
    dtype
        Precision to compute in; None for that of the model, float32 if that is a half one, in
        which a small move away from the weights would be rounded off.

    Attributes
    ----------
    start
        The model's own :math:`\theta`, detached; inside the context.

    Raises
    ------
    ValueError
        If model, loss and data do not fit together, or no parameter is trainable.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> objective = Objective(nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1))
    >>> with LossSurface(model, objective) as surface:
    ...     loss, gradient = surface.gradient(torch.tensor([2.0, 0.0]))
    ...     surface.hessian_product(surface.start, torch.tensor([1.0, 0.0]))
    tensor([1., 0.])
    >>> loss, gradient
    (2.0, tensor([2., 0.]))
    """

    def __init__(self, model: nn.Module, objective: Objective, dtype: torch.dtype | None = None) -> None:
        objective.check(model)
        if dtype is None and any(p.dtype.itemsize < 4 for p in model.parameters()):
            dtype = torch.float32
        self._model, self._objective, self._dtype = unwrapped(model), objective, dtype

    def __enter__(self) -> LossSurface:
        self._measuring = isolated(self._model)
        self._measuring.__enter__()
        # here, since leaves made under torch.inference_mode could not be differentiated by
        self._network = FunctionalModel(self._model, self._dtype)
        self._leaves = {name: leaf.detach() for name, leaf in self._network.trainable.items()}
        self.start = torch.cat([leaf.reshape(-1) for leaf in self._leaves.values()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._measuring.__exit__(kind, error, trace)

    def loss(self, theta: Tensor) -> float:
        """Return the loss."""
        with torch.no_grad():
            return sum(weight * float(value) for weight, value in self._parts(theta)) + self._penalty(theta)

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient."""
        theta = theta.detach().requires_grad_()
        total, gradient = 0.0, self._objective.l2 * theta.detach()
        for weight, value in self._parts(theta):
            gradient = gradient + weight * torch.autograd.grad(value, theta)[0]
            total += weight * float(value.detach())
        return total + self._penalty(theta.detach()), gradient

    def hessian_product(self, theta: Tensor, vector: Tensor) -> Tensor:
        """Return the Hessian times a vector."""
        theta = theta.detach().requires_grad_()
        product = self._objective.l2 * vector
        for weight, value in self._parts(theta):
            (slope,) = torch.autograd.grad(value, theta, create_graph=True)
            if slope.requires_grad:  # else the loss is linear
                product = product + weight * torch.autograd.grad(slope, theta, vector)[0]
        return product.detach()

    def _parts(self, theta: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield the mean loss of each batch with its weight, batch by batch so that one graph is held."""
        pieces = theta.split([leaf.numel() for leaf in self._leaves.values()])
        trainable = {
            name: piece.reshape(leaf.shape).to(leaf.dtype)
            for (name, leaf), piece in zip(self._leaves.items(), pieces, strict=True)
        }
        for inputs, targets in self._objective.batches(self._dtype):
            outputs = self._network(inputs, trainable)
            yield len(targets) / len(self._objective), self._objective.mean_loss(outputs, targets)

    def _penalty(self, theta: Tensor) -> float:
        if self._objective.l2 == 0:
            return 0.0
        return 0.5 * self._objective.l2 * float(theta.double().square().sum())
