"""One forward and one first backward on a batch, kept for all products of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hild_xr.recorders.curvature.activation_links import ActivationLink, find_link
from hild_xr.recorders.curvature.functional import at_least_float32
from hild_xr.recorders.curvature.linear_sites import Call, LinearSite, recorded_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
    from hild_xr.recorders.curvature.isolation import Measurement
    from hild_xr.recorders.objective import Objective


_AT_ONCE_ON_CPU = 2**20  # numbers in the activations of vectors taken at once
_AT_ONCE_ON_GPU = 2**27

_FEW_OUTPUTS = 65  # of a layer, whose second derivatives are then held whole


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
        self._calls: dict[str, Call] = {site.weight: calls[site.module][0] for site in sites}
        self._links: dict[str, tuple[str, ActivationLink] | None] = {}
        self._leaves, self._structure = pytree.tree_flatten(outputs)
        self.output_leaf = _output_leaf(self.loss, before)
        self.outputs: Tensor | None = None if self.output_leaf is None else self._leaves[self.output_leaf]
        self._objective = objective
        wanted = [*self._parameters.values(), *(call.z for call in self._calls.values())]
        gradients = self._first_backward(wanted)
        self._gradients = dict(zip(self._parameters, gradients, strict=False))
        self._output_gradients = dict(zip(self._calls, gradients[len(self._parameters) :], strict=True))

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
        return _pulled_back(gradients, leaves, vectors)

    @property
    def vectors_at_once(self) -> int:
        """Vectors worth taking in one pass: as many as keep it small, by a guess at the activations.

        On one CPU thread this took 0.2 to 0.7 of the time for a 64-32-10 net on 200 to 1000
        samples. For larger activations (784-256-256-10 on 2048 samples) it would take up to
        twice the time, so vectors go one by one there.
        """
        affordable = _AT_ONCE_ON_CPU if self.loss.device.type == "cpu" else _AT_ONCE_ON_GPU
        return max(1, affordable // self._activations)

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
        return _pulled_back([self._gradients[name] for name in names], [self._cotangent], vectors)[0]

    def output_adjoints(self, names: Sequence[str], cotangents: Tensor) -> list[Tensor]:
        """Return J^T w for cotangents of shape (n, *outputs): a tensor (n, *parameter) for each name."""
        leaves = [self._parameters[name] for name in names]
        return _pulled_back([self.needed_outputs()], leaves, [cotangents])

    def loss_hessian_products(self, directions: Tensor) -> Tensor:
        """Return the mean loss's second derivative by the outputs times directions (n, *outputs)."""
        return _pulled_back([self._slope], [self.needed_outputs()], [directions])[0]

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
        calls = [self._calls[weight].z for weight in weights]
        products = _pulled_back([self.needed_outputs()], calls, [cotangent[None]])
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

    def layer_input(self, weight: str) -> Tensor:
        """Return the input h of a linear layer, shape (n, in), in float32 at least."""
        return at_least_float32(self._calls[weight].h.detach())

    def output_gradient(self, weight: str) -> Tensor:
        """Return the gradient of each sample's loss by the layer's output, shape (n, out)."""
        return at_least_float32(self._output_gradients[weight].detach()) * self.n_samples

    def output_curvature(self, weight: str) -> Tensor:
        """Return the second derivative of each sample's loss by each single output, shape (n, out).

        One backward pass for each output neuron, all samples at once, since no sample
        sees another; fewer and shorter ones where only activations lie between this layer and
        the next (see :mod:`hild_xr.recorders.curvature.activation_links`).
        """
        found = self._link(weight)
        if found is None:
            units = torch.eye(self._calls[weight].z.shape[1], device=self.loss.device, dtype=self.loss.dtype)
            return at_least_float32(self._quadratic_forms(weight, units))
        following, link = found
        columns = self._parameters[following].detach()
        forms = self._quadratic_forms(following, columns)
        return at_least_float32(link.slope**2 * forms + link.bend * (self._slopes(following) @ columns))

    def _quadratic_forms(self, weight: str, columns: Tensor) -> Tensor:
        """Return w_c^T H w_c for columns (out, n_columns) and each sample's H by a layer's outputs."""
        out, size = columns.shape
        found = self._link(weight)
        if found is not None and len(self._parameters[found[0]]) < min(out, size, _FEW_OUTPUTS):
            return self._forms_behind(*found, columns)
        if out < size:
            products = self._second_derivatives(weight) @ columns
            return (products * columns).sum(1)
        forms = [self._by_outputs(weight, column) @ column for column in columns.T]
        return torch.stack(forms, dim=1)

    def _forms_behind(self, following: str, link: ActivationLink, columns: Tensor) -> Tensor:
        """Return the same with H taken apart: through an activation, into a layer of few outputs."""
        behind = self._parameters[following].detach()
        bend = link.bend * (self._slopes(following) @ behind)
        forms = bend @ columns**2
        second = self._second_derivatives(following)
        pushed = [link.slope @ (row[:, None] * columns) for row in behind]
        for i, one in enumerate(pushed):
            for j, other in enumerate(pushed):
                forms += second[:, i, j, None] * one * other
        return forms

    def _second_derivatives(self, weight: str) -> Tensor:
        """Return each sample's whole second derivative by a layer's outputs, shape (n, out, out)."""
        z = self._calls[weight].z
        units = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
        return torch.stack([self._by_outputs(weight, unit) for unit in units], dim=1)

    def _by_outputs(self, weight: str, direction: Tensor) -> Tensor:
        """Return each sample's second derivative by a layer's outputs times a direction (out,)."""
        gradient, z = self._output_gradients[weight], self._calls[weight].z
        directions = (self.n_samples * direction.to(z.dtype)).expand(1, *z.shape)
        return _pulled_back([gradient], [z], [directions])[0][0]

    def _slopes(self, weight: str) -> Tensor:
        return self._output_gradients[weight].detach() * self.n_samples

    def _link(self, weight: str) -> tuple[str, ActivationLink] | None:
        """Return the layer behind this one, and what lies between, where that is only an activation."""
        if weight not in self._links:
            self._links[weight] = None
            for other, call in self._calls.items():
                link = None if other == weight else find_link(self.loss, self._calls[weight].z, call.h)
                if link is not None:
                    self._links[weight] = (other, link)
        return self._links[weight]


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


def _pulled_back(of: Sequence[Tensor], by: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Return vector-Jacobian products for n cotangents (n, *of) of each tensor, each of shape (n, *by)."""
    n = len(cotangents[0])
    # What depends on no parameter (the gradient of a loss linear in them) has no graph.
    pairs = [(o, c.to(o.dtype)) for o, c in zip(of, cotangents, strict=True) if o.grad_fn is not None]
    products: Sequence[Tensor | None] = [None] * len(by)
    if pairs:
        products = torch.autograd.grad(
            [o for o, _ in pairs],
            by,
            [c if n > 1 else c[0] for _, c in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=n > 1,
        )
    zeros = [tensor.new_zeros(n, *tensor.shape) for tensor in by]
    return [
        zero if product is None else product if n > 1 else product[None]
        for product, zero in zip(products, zeros, strict=True)
    ]


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
