"""One forward and one first backward on a batch, kept for all products of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.functional import at_least_float32
from hild_xr.recorders.curvature.linear_sites import Call, LinearSite, recorded_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
    from hild_xr.recorders.objective import Objective


class LossGraph:
    """The graph of a batch's mean loss and of its gradient.

    The gradient is taken once with ``create_graph=True``; a Hessian product is then
    one backward pass through it (reverse over reverse), and autograd leaves out
    what lies upstream of the block asked for.

    Parameters
    ----------
    network
        The model as a function of its parameters.
    objective
        The loss.
    inputs, targets
        The batch.
    sites
        Linear layers whose inputs and outputs are to be kept.

    Attributes
    ----------
    loss
        Mean loss of the batch, regulariser not included.
    n_samples
        Number of samples.
    """

    def __init__(
        self,
        network: FunctionalModel,
        objective: Objective,
        inputs: Inputs,
        targets: Tensor,
        sites: Sequence[LinearSite],
    ) -> None:
        self.n_samples = len(targets)
        with recorded_calls(network.model, [site.module for site in sites]) as calls:
            self.loss = objective.mean_loss(network(inputs), targets)
        for site in sites:
            if [call.h.shape[:-1] for call in calls[site.module]] != [(len(targets),)]:
                raise ValueError(
                    f"the layer {site.module!r} sees only some of the samples (routing to experts, heads for "
                    "groups of samples), which a few of them did not show: make it an instance of a subclass "
                    "of nn.Linear, and the general, slower method is taken"
                )
        if not self.loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any trainable parameter: loss(outputs, targets) must use the "
                "outputs, and neither model nor loss may detach them or run under torch.no_grad"
            )
        self._parameters = network.trainable
        self._calls: dict[str, Call] = {site.weight: calls[site.module][0] for site in sites}
        wanted = [*self._parameters.values(), *(call.z for call in self._calls.values())]
        gradients = torch.autograd.grad(
            self.loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True
        )
        self._gradients = dict(zip(self._parameters, gradients, strict=False))
        self._output_gradients = dict(zip(self._calls, gradients[len(self._parameters) :], strict=True))

    def hessian_product(self, names: Sequence[str], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian block of the named parameters times one vector, tensor by tensor.

        Parameters
        ----------
        names
            The parameters of the block.
        vectors
            One tensor of the parameter's shape for each.

        Returns
        -------
        list of Tensor
            The product's parts, of the parameters' shapes.
        """
        pairs = [(self._gradients[name], vector) for name, vector in zip(names, vectors, strict=True)]
        # A gradient that does not depend on any parameter (a loss linear in it) has no graph.
        pairs = [(gradient, vector) for gradient, vector in pairs if gradient.requires_grad]
        leaves = [self._parameters[name] for name in names]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(
            torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                leaves,
                [vector.to(gradient.dtype) for gradient, vector in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def layer_input(self, weight: str) -> Tensor:
        """Return the input h of a linear layer, shape (n, in), in float32 at least."""
        return at_least_float32(self._calls[weight].h.detach())

    def output_gradient(self, weight: str) -> Tensor:
        """Return the gradient of each sample's loss by the layer's output, shape (n, out)."""
        return at_least_float32(self._output_gradients[weight].detach()) * self.n_samples

    def output_curvature(self, weight: str) -> Tensor:
        """Return the second derivative of each sample's loss by each single output, shape (n, out).

        One backward pass for each output neuron, all samples at once, since no sample
        sees another.
        """
        gradient, z = self._output_gradients[weight], self._calls[weight].z
        curvature = torch.zeros_like(z, requires_grad=False)
        if not gradient.requires_grad:
            return at_least_float32(curvature)
        direction = torch.zeros_like(z, requires_grad=False)
        for c in range(z.shape[1]):
            direction[:, c] = self.n_samples
            (product,) = torch.autograd.grad(
                gradient, z, direction, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            curvature[:, c] = product[:, c]
            direction[:, c] = 0
        return at_least_float32(curvature)
