"""What the graph of a batch tells of its linear layers: their inputs, and derivatives by their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.activation_links import Flow, find_link
from hild_xr.recorders.curvature.backward import pulled_back
from hild_xr.recorders.curvature.functional import at_least_float32
from hild_xr.recorders.curvature.linear_chain import ChainActivation, ChainLayer, LinearChain
from hild_xr.recorders.curvature.precision import chosen_products

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hild_xr.recorders.curvature.linear_sites import Call, LinearSite

_FEW_OUTPUTS = 65  # of a layer, whose second derivatives are then held whole
_HELD_UP_TO = 16  # outputs of which chains hold them as numbers, and multiply faster than by a backward pass
_SAME_GRADIENT = 1e-3  # relative difference up to which two ways to one gradient agree


class LinearLayers:
    """Linear layers of a network on a batch, within its graph.

    Parameters
    ----------
    sites
        The layers.
    calls
        Input and output of each, by the name of its weight.
    gradients
        Derivatives of the mean loss by the outputs, with their graph, by the same names.
    parameters
        The network's trainable parameters by their names.
    loss
        The mean loss, with its graph.
    small
        Whether the network is so small that it takes several vectors in one pass.
    """

    def __init__(
        self,
        sites: Sequence[LinearSite],
        calls: Mapping[str, Call],
        gradients: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        loss: Tensor,
        *,
        small: bool = False,
    ) -> None:
        self._sites = {site.weight: site for site in sites}
        self._calls, self._gradients, self._parameters, self._loss = calls, gradients, parameters, loss
        self._small = small
        self._owners = {site.weight: site.weight for site in sites}
        self._owners |= {site.bias: site.weight for site in sites if site.bias is not None}
        self._flow: Flow | None = None
        self._links: dict[str, tuple[str, ChainActivation] | None] = {}

    def outputs(self, weight: str) -> Tensor:
        """Return the outputs z of a layer in the graph, shape (n, out)."""
        return self._calls[weight].z

    def inputs(self, weight: str) -> Tensor:
        """Return the inputs h of a layer, shape (n, in), in float32 at least."""
        return at_least_float32(self._calls[weight].h.detach())

    def output_gradient(self, weight: str) -> Tensor:
        """Return the gradient of each sample's loss by the layer's output, shape (n, out)."""
        gradient = at_least_float32(self._gradients[weight].detach())
        return gradient * len(gradient)

    @chosen_products()
    def output_curvature(self, weight: str) -> Tensor:
        """Return the second derivative of each sample's loss by each single output, shape (n, out).

        One backward pass for each output neuron, all samples at once, since no sample
        sees another; fewer and shorter ones where only activations lie between this layer and
        the next (see :mod:`hild_xr.recorders.curvature.activation_links`).
        """
        found = self._link(weight)
        if found is None:
            z = self.outputs(weight)
            units = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
            return at_least_float32(self._quadratic_forms(weight, units))
        following, link = found
        forms = self._quadratic_forms(following, self._parameters[following].detach())
        return at_least_float32(link.slope**2 * forms + link.bend * len(link.bend))

    def chains(self, blocks: Sequence[Sequence[str]]) -> list[LinearChain]:
        """Return the layers in a row that the parameters of each block are of, with all linked behind them.

        One chain for each row that is no part of another. None for a block with a parameter of no such
        layer, or of layers that are not all in one row; nor for a small network with many outputs, whose
        passes take several vectors at once.

        Parameters
        ----------
        blocks
            Weights and biases of each block, in any order.
        """
        rows = [row for row in map(self._row, blocks) if row is not None and self._is_worth_it(row)]
        whole: list[tuple[str, ...]] = []
        for row in sorted(rows, key=len, reverse=True):
            if not any(row[0] in longer for longer in whole):
                whole.append(row)
        return [self._chain(row) for row in whole]

    def _row(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Return the layers from the first that some parameters are of to the last, if they are in a row."""
        asked = {self._owners.get(name, "") for name in names}
        if "" in asked or not all(self._precision(weight) for weight in asked):
            return None
        row = max((self._following(weight) for weight in asked), key=len)
        return tuple(row) if asked <= set(row) else None

    def _is_worth_it(self, row: Sequence[str]) -> bool:
        return not self._small or self.outputs(row[-1]).shape[1] <= _HELD_UP_TO

    def _chain(self, row: Sequence[str]) -> LinearChain:
        layers = [
            ChainLayer(
                weight,
                self._sites[weight].bias,
                self._parameters[weight].detach(),
                self._calls[weight].h.detach(),
                self._gradients[weight].detach(),
            )
            for weight in row
        ]
        links = [self._link(weight) for weight in row[:-1]]
        return LinearChain(layers, [link[1] for link in links if link is not None], self._seconds(row[-1]))

    def _seconds(self, weight: str) -> Tensor | Callable[[Tensor], Tensor]:
        """Return the mean loss's second derivative by a layer's outputs, as a chain wants it."""
        if self.outputs(weight).shape[1] <= _HELD_UP_TO:
            of_samples = self._second_derivatives(weight)  # by the output of the last dim first
            return (of_samples / len(of_samples)).permute(2, 1, 0).contiguous()

        def multiply(directions: Tensor) -> Tensor:
            return self._second_derivative_products(weight, directions.transpose(0, 1)).transpose(0, 1)

        return multiply

    def _following(self, weight: str) -> list[str]:
        """Return a layer and those that follow it in a row."""
        row = [weight]
        while (found := self._link(row[-1])) is not None:
            row.append(found[0])
        return row

    def _precision(self, weight: str) -> torch.dtype | None:
        """Return the precision a layer computes in, if it is its parameters' own and enough of it."""
        dtypes = {t.dtype for t in (self._calls[weight].h, self.outputs(weight), self._parameters[weight])}
        return dtypes.pop() if dtypes in ({torch.float32}, {torch.float64}) else None

    def _second_derivative_products(self, weight: str, directions: Tensor) -> Tensor:
        """Multiply directions (k, n, out) with the mean loss's second derivative by a layer's outputs."""
        return pulled_back([self._gradients[weight]], [self.outputs(weight)], [directions])[0]

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

    def _forms_behind(self, following: str, link: ChainActivation, columns: Tensor) -> Tensor:
        """Return the same with H taken apart: through an activation, into a layer of few outputs."""
        behind = self._parameters[following].detach()
        forms = (link.bend * len(link.bend)) @ columns**2
        second = self._second_derivatives(following)
        pushed = [link.slope @ (row[:, None] * columns) for row in behind]
        for i, one in enumerate(pushed):
            for j, other in enumerate(pushed):
                forms += second[:, i, j, None] * one * other
        return forms

    def _second_derivatives(self, weight: str) -> Tensor:
        """Return each sample's whole second derivative by a layer's outputs, shape (n, out, out)."""
        z = self.outputs(weight)
        units = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
        return torch.stack([self._by_outputs(weight, unit) for unit in units], dim=1)

    def _by_outputs(self, weight: str, direction: Tensor) -> Tensor:
        """Return each sample's second derivative by a layer's outputs times a direction (out,)."""
        z = self.outputs(weight)
        directions = (len(z) * direction.to(z.dtype)).expand(1, *z.shape)
        return self._second_derivative_products(weight, directions)[0]

    def _link(self, weight: str) -> tuple[str, ChainActivation] | None:
        """Return the layer behind this one, and what lies between, where that is only an activation."""
        if weight not in self._links:
            self._links[weight] = self._find_link(weight)
        return self._links[weight]

    def _find_link(self, weight: str) -> tuple[str, ChainActivation] | None:
        if self._flow is None:
            self._flow = Flow(self._loss)
        z = self.outputs(weight)
        inputs = {call.h.grad_fn: name for name, call in self._calls.items() if call.h.grad_fn is not None}
        end = self._flow.meets(z, inputs)
        if end is None:
            return None
        following = inputs[end]
        if self._precision(weight) is None or self._precision(weight) != self._precision(following):
            return None
        link = find_link(self._flow, z, self._calls[following].h)
        if link is None:
            return None
        pulled = self._gradients[following].detach() @ self._parameters[following].detach()
        # Something else on the way back, as a hook, would be seen here.
        if not _agree(link.slope * pulled, self._gradients[weight].detach()):
            return None
        return following, ChainActivation(link.slope, link.bend * pulled)


def _agree(one: Tensor, other: Tensor) -> bool:
    scale = other.abs().max() if other.numel() else 0.0
    return bool(((one - other).abs() <= _SAME_GRADIENT * (other.abs() + _SAME_GRADIENT * scale)).all())
