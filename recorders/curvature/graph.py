"""One forward and one first backward on a batch, kept for all products of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hild_xr.recorders.curvature.backward import pulled_back, vectors_at_once
from hild_xr.recorders.curvature.functional import at_least_float32
from hild_xr.recorders.curvature.linear_layers import LinearLayers
from hild_xr.recorders.curvature.linear_sites import LinearSite, recorded_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.objective import Objective


class LossGraph:
    r"""The graph of a batch's mean loss and of its gradient.

    The gradient is taken once with ``create_graph=True``, in two steps: the cotangent
    :math:`u = \partial L/\partial f` at the outputs f, then :math:`J^T u`. Everything else is
    a backward pass through what is there, and autograd leaves out what lies upstream
    of the block asked for:

    * a Hessian product, through the gradient (reverse over reverse);
    * :math:`J v`, the derivative of :math:`v^T J^T u` by u, in which it is linear
      (a third of the time of a forward-mode product, which runs the network anew);
    * :math:`J^T w`, through the outputs;
    * a product with the loss's own Hessian :math:`\partial^2 L/\partial f^2`, through u.

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
    first
        Number of the batch's first sample among all of the objective.

    Attributes
    ----------
    loss
        Mean loss of the batch, regulariser not included.
    n_samples
        Number of samples.
    targets
        The batch's targets.
    outputs
        The one tensor of the model's outputs that the loss is a function of; ``None``
        where it uses several, changes them in place, or reaches the parameters past them
        (an auxiliary loss kept by a module): there is a Hessian then, and nothing that is
        defined by derivatives at the outputs.
    layers
        The linear layers of ``sites``.
    """

    def __init__(
        self,
        network: FunctionalModel,
        objective: Objective,
        inputs: Inputs,
        targets: Tensor,
        sites: Sequence[LinearSite],
        first: int = 0,
    ) -> None:
        self.n_samples, self.first, self.targets = len(targets), first, targets
        self._activations = _activations(inputs, self.n_samples, network.trainable.values())
        with recorded_calls(network.model, [site.module for site in sites]) as calls:
            outputs = network(inputs)
            before = _places(outputs)
            self.loss = objective.mean_loss(outputs, targets)
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
        self._leaves, self._structure = pytree.tree_flatten(outputs)
        self.output_leaf = _output_leaf(self.loss, before)
        self.outputs: Tensor | None = None if self.output_leaf is None else self._leaves[self.output_leaf]
        self._objective = objective
        of_layers = {site.weight: calls[site.module][0] for site in sites}
        gradients = self._first_backward(
            [*self._parameters.values(), *(call.z for call in of_layers.values())]
        )
        self._gradients = dict(zip(self._parameters, gradients, strict=False))
        by_outputs = dict(zip(of_layers, gradients[len(self._parameters) :], strict=True))
        self.layers = LinearLayers(
            sites, of_layers, by_outputs, self._parameters, self.loss, small=self.vectors_at_once > 1
        )

    def _first_backward(self, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.outputs is None:
            return torch.autograd.grad(
                self.loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True
            )
        (slope,) = torch.autograd.grad(self.loss, self.outputs, create_graph=True)
        if not slope.requires_grad:  # a loss linear in the outputs
            slope = slope.detach().requires_grad_(True)
        self._slope = slope
        # A node of its own: derivatives by it are then those of J^T u by u alone, even if
        # the loss's backward handed out a tensor that the network's own backward uses too.
        self._cotangent = slope.view_as(slope)
        return torch.autograd.grad(
            self.outputs,
            wanted,
            self._cotangent,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def hessian_product(
        self, names: Sequence[str], vectors: Sequence[Tensor], of: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Return the Hessian block of the named parameters times one vector, tensor by tensor.

        Parameters
        ----------
        names
            The parameters of the block.
        vectors
            One tensor of the parameter's shape for each.
        of
            The parameters that number the block's rows, for one beside the diagonal; by
            default those of ``names``.

        Returns
        -------
        list of Tensor
            The product's parts, of the parameters' shapes.
        """
        products = self.hessian_products(names, [vector[None] for vector in vectors], of)
        return [product[0] for product in products]

    def hessian_products(
        self, names: Sequence[str], vectors: Sequence[Tensor], of: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Return the same for n vectors in one pass, all tensors with a first dim n.

        Raises
        ------
        RuntimeError
            If n is above 1 and an operation of the network has no batching rule.
        """
        gradients = [self._gradients[name] for name in names]
        leaves = [self._parameters[name] for name in (names if of is None else of)]
        return pulled_back(gradients, leaves, vectors)

    @property
    def vectors_at_once(self) -> int:
        """Vectors worth taking in one pass, by a guess at the activations."""
        return vectors_at_once(self._activations, self.loss.device)

    def output_products(self, names: Sequence[str], vectors: Sequence[Tensor]) -> Tensor:
        """Return J v, the outputs' derivative along n directions of the named parameters.

        Parameters
        ----------
        names
            The parameters of the block.
        vectors
            One tensor of shape (n, *parameter) for each.

        Returns
        -------
        Tensor
            Shape (n, *outputs).

        Raises
        ------
        ValueError
            If there is no one output (see :meth:`needed_outputs`).
        RuntimeError
            If n is above 1 and an operation of the network has no batching rule.
        """
        self.needed_outputs()
        return pulled_back([self._gradients[name] for name in names], [self._cotangent], vectors)[0]

    def output_adjoints(self, names: Sequence[str], cotangents: Tensor) -> list[Tensor]:
        """Return J^T w for cotangents of shape (n, *outputs): a tensor (n, *parameter) for each name."""
        leaves = [self._parameters[name] for name in names]
        return pulled_back([self.needed_outputs()], leaves, [cotangents])

    def loss_hessian_products(self, directions: Tensor) -> Tensor:
        """Return the mean loss's second derivative by the outputs times directions (n, *outputs)."""
        return pulled_back([self._slope], [self.needed_outputs()], [directions])[0]

    def loss_of_output(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of another output tensor in place of this one, for other targets."""
        self.needed_outputs()
        leaves = [output if i == self.output_leaf else leaf for i, leaf in enumerate(self._leaves)]
        return self._objective.mean_loss(pytree.tree_unflatten(leaves, self._structure), targets)

    def gradient(self, names: Sequence[str]) -> Tensor:
        """Return the gradient of the mean loss by the named parameters, one flat vector."""
        return torch.cat([at_least_float32(self._gradients[name].detach()).reshape(-1) for name in names])

    def layer_adjoint(self, weights: Sequence[str], cotangent: Tensor) -> list[Tensor]:
        """Return J^T w by the outputs of linear layers, each (n, out), in float32 at least."""
        outputs = [self.layers.outputs(weight) for weight in weights]
        products = pulled_back([self.needed_outputs()], outputs, [cotangent[None]])
        return [at_least_float32(product[0]) for product in products]

    def loss_slope(self) -> Tensor:
        """Return the gradient of the mean loss by the outputs, shaped as they are."""
        self.needed_outputs()
        return self._slope.detach()

    def needed_outputs(self) -> Tensor:
        """Return the outputs, for matrices that are defined by derivatives at them.

        Raises
        ------
        ValueError
            If there is no one output tensor that the loss is a function of.
        """
        if self.outputs is None:
            raise ValueError(
                "this matrix is defined by derivatives at the model's outputs, but the loss is no function "
                "of one output tensor: it uses several, changes them in place, or reaches parameters past "
                "them (an auxiliary loss kept by a module). Let the model return one tensor and "
                "loss(outputs, targets) use that alone, or take matrix='hessian' or 'gmatrix'"
            )
        return self.outputs


class Graphs:
    """The graph of each batch: of a single batch kept, of several built anew one after the other.

    Parameters
    ----------
    network
        The model.
    objective
        Loss and data.
    dtype
        Precision the data are brought to.
    sites
        Linear layers whose inputs and outputs are to be kept.
    measuring
        Isolates the model during a pass.

    Attributes
    ----------
    kept
        The graph of a single batch; ``None`` if there are several.
    """

    def __init__(
        self,
        network: FunctionalModel,
        objective: Objective,
        dtype: torch.dtype | None,
        sites: Sequence[LinearSite],
        measuring: Measurement,
    ) -> None:
        self._network, self._objective, self._dtype = network, objective, dtype
        self._sites, self._measuring = list(sites), measuring
        self.kept: LossGraph | None = None
        if objective.single_batch:
            self.kept = self._build(*next(objective.batches(dtype)), 0)

    def each(self, use: Callable[[float, LossGraph], None]) -> None:
        """Call a function with the weight n_batch / M and the graph of each batch, one graph at a time."""
        with self._measuring():
            if self.kept is not None:
                use(1.0, self.kept)
                return
            first = 0
            for inputs, targets in self._objective.batches(self._dtype):
                use(len(targets) / len(self._objective), self._build(inputs, targets, first))
                first += len(targets)

    def _build(self, inputs: Inputs, targets: Tensor, first: int) -> LossGraph:
        return LossGraph(self._network, self._objective, inputs, targets, self._sites, first)


def _activations(inputs: Inputs, n_samples: int, parameters: Iterable[Tensor]) -> int:
    """Guess the size of all activations from the widths of layers and the number of samples or tokens."""
    tensors = pytree.tree_leaves(inputs)
    size = max(tensor.numel() for tensor in tensors)
    tokens = max([n_samples, *(tensor.numel() for tensor in tensors if not tensor.is_floating_point())])
    total: int = 0
    for parameter in parameters:
        if parameter.ndim > 2:  # a convolution keeps most positions, and changes the channels
            total += size * parameter.shape[0] // parameter.shape[1]
        elif parameter.ndim == 2:
            total += tokens * parameter.shape[0]
    most: int = max(total, size, 1)
    return most


def _places(outputs: Any) -> list[tuple[int, Tensor, tuple[Any, int], int]]:
    """Return the tensors among a model's outputs and their places in the graph, before the loss."""
    tensors = [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(outputs)) if isinstance(leaf, Tensor)]
    return [(i, t, (t.grad_fn, t.output_nr), t._version) for i, t in tensors if t.grad_fn is not None]


def _output_leaf(loss: Tensor, outputs: Sequence[tuple[int, Tensor, tuple[Any, int], int]]) -> int | None:
    """Return the number of the one output that the loss is a function of, or ``None``."""
    if any(tensor._version != version for _, tensor, _, version in outputs):
        return None
    places = {place: i for i, _, place, _ in outputs}
    used: list[int] = []
    seen = {(loss.grad_fn, loss.output_nr)}
    stack = list(seen)
    while stack:
        place = stack.pop()
        if place in places:
            used.append(places[place])
            continue
        node = place[0]
        if hasattr(node, "variable"):  # a parameter, past the outputs
            return None
        following = [
            other
            for other in getattr(node, "next_functions", ())
            if other[0] is not None and other not in seen
        ]
        seen.update(following)
        stack.extend(following)
    return used[0] if len(used) == 1 else None
