r"""Conjugate and tangent kernels of a model on fixed inputs.

With activations :math:`a(x)` of width h and the derivative J of the outputs by the parameters,

.. math:: K_{CK}(x, x') = \frac1h\, a(x) \cdot a(x'), \qquad K_{NTK}(x, x') = J(x)\, J(x')^T

(Wang et al., "Spectral evolution and invariance in linear-width neural networks",
arXiv 2211.06506). The kernel of the model as it is: factors such as :math:`1/\sqrt h` of the
"NTK parametrisation" are there if the model has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hild_xr.recorders.curvature.blocks import resolve_blocks
from hild_xr.recorders.curvature.columns import LayerFactors, UnitColumns, joined
from hild_xr.recorders.curvature.functional import FunctionalModel, at_least_float32
from hild_xr.recorders.curvature.graph import Graphs
from hild_xr.recorders.curvature.isolation import Measurement, isolated, unwrapped
from hild_xr.recorders.curvature.linear_sites import find_linear_sites
from hild_xr.recorders.curvature.sample_gradients import (
    Cotangents,
    ExplicitGradients,
    FactoredGradients,
    GradientSampler,
    gram,
)
from hild_xr.recorders.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hild_xr.recorders.curvature.functional import Inputs

OutputChoice = Literal["full", "sum"]
"""How the outputs of a tangent kernel are kept: all pairs, or summed over equal ones."""


def conjugate_kernel(
    model: nn.Module,
    inputs: Inputs,
    module: str,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the conjugate kernel :math:`\frac1h A A^T` of a module's activations.

    Parameters
    ----------
    model
        The model, evaluated in eval mode and left as it is.
    inputs
        What the model is called with, M samples along the first dim.
    module
        Qualified name of the module whose output is taken, flattened to h numbers for
        each sample; ``""`` for the model itself. For the features that a layer sees, name the
        module before it.
    batch_size
        Samples evaluated at a time; ``None`` takes all at once.
    dtype
        Precision to compute in; ``None`` keeps the model's.

    Returns
    -------
    Tensor
        Shape (M, M), detached, on the model's device.

    Raises
    ------
    ValueError
        If there is no such module, it is not called once, or its output has no row for each sample.

    Examples
    --------
    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
    >>> conjugate_kernel(model, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), "0")
    tensor([[1., 1.],
            [1., 2.]])
    """
    model = unwrapped(model)
    known = dict(model.named_modules())
    if module not in known:
        raise ValueError(
            f"the model has no module {module!r}: its modules are {', '.join(filter(None, known))}"
        )
    objective = _objective(inputs, batch_size)
    outputs: list[Any] = []
    activations = []
    with isolated(model), torch.no_grad():
        network = FunctionalModel(model, dtype)
        handle = known[module].register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            for batch, targets in objective.batches(dtype):
                outputs.clear()
                network(batch)
                activations.append(_activations(outputs, len(targets), module))
        finally:
            handle.remove()
    features = torch.cat(activations)
    return features @ features.T / features.shape[1]


def tangent_kernel(
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: OutputChoice | int = "full",
    layers: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = 2**30,
) -> Tensor:
    r"""Return the empirical neural tangent kernel :math:`J J^T`.

    Linear layers take part through :math:`(\delta_{mc} \cdot \delta_{m'c'})(h_m \cdot h_{m'} + 1)`, where
    :math:`\delta_{mc}` is the gradient of output c by the layer's output: their gradients are never
    formed. Those of other parameters are, one tensor after the other.

    Parameters
    ----------
    model
        The model, evaluated in eval mode and left as it is. It returns one tensor with a
        row for each sample.
    inputs
        What the model is called with, M samples along the first dim.
    outputs
        ``"full"``: all pairs of the C outputs, row m C + c for output c of sample m.
        ``"sum"``: the sum over c of the kernels of output c with itself. A number: the kernel
        of that output. Outputs of more dims are flattened.
    layers
        Qualified names of the parameters to take part; ``None`` takes all trainable ones.
    batch_size
        Samples evaluated at a time; ``None`` takes all at once.
    dtype
        Precision to compute in; ``None`` keeps the model's.
    max_bytes
        Memory that gradients held as tensors may take. Where one parameter's do not fit,
        pairs of chunks of samples are taken one after the other, and gradients anew.

    Returns
    -------
    Tensor
        Shape (M C, M C) for ``"full"``, else (M, M); detached, on the model's device.

    Raises
    ------
    ValueError
        If ``outputs`` is out of range, a name in ``layers`` is unknown, the model does not
        return one tensor with a row for each sample, or couples the samples.

    Examples
    --------
    >>> model = nn.Linear(2, 3)
    >>> inputs = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    >>> tangent_kernel(model, inputs, outputs=0)
    tensor([[2., 3.],
            [3., 6.]])
    >>> tangent_kernel(model, inputs).shape
    torch.Size([6, 6])
    """
    if outputs not in get_args(OutputChoice) and (not isinstance(outputs, int) or isinstance(outputs, bool)):
        raise ValueError(f"outputs must be 'full', 'sum' or the number of an output; got {outputs!r}")
    objective = _objective(inputs, batch_size)
    objective.check(model)
    names = [name for block in resolve_blocks(model, "layer", layers) for name in block.parameters]
    measuring = Measurement(unwrapped(model))
    with measuring():
        tangent = _Tangent(model, objective, dtype, measuring, outputs, max_bytes)
        return tangent.kernel(names)


class _Tangent:
    """Columns of unit vectors pulled back to the parameters, and their inner products."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dtype: torch.dtype | None,
        measuring: Measurement,
        outputs: OutputChoice | int,
        max_bytes: int,
    ) -> None:
        network = FunctionalModel(model, dtype)
        self._outputs, self._max_bytes, self._n = outputs, max_bytes, len(objective)
        self._network = network
        self._sampler = GradientSampler(network, objective, dtype, measuring, max_bytes // 4)
        sites = {site.weight: site for site in find_linear_sites(network, objective, dtype)}
        self._biases = {site.bias: weight for weight, site in sites.items() if site.bias is not None}
        columns, leaf, self._factors = _pulled_back(
            Graphs(network, objective, dtype, list(sites.values()), measuring), list(sites), outputs
        )
        self._cotangents = Cotangents(columns, leaf)

    def kernel(self, names: Sequence[str]) -> Tensor:
        size = self._n * (self._cotangents.values.shape[1] if self._outputs == "full" else 1)
        like = at_least_float32(self._cotangents.values)
        kernel = torch.zeros(size, size, dtype=like.dtype, device=like.device)
        for name in names:
            if name in self._factors:
                kernel += self._of_factors(self._factors[name])
            elif self._biases.get(name) in self._factors:
                delta = self._factors[self._biases[name]].delta
                kernel += self._of_factors(FactoredGradients(delta, torch.ones_like(delta[:, 0, :1])))
            else:
                self._add_sampled(kernel, name)
        return kernel

    def _of_factors(self, factors: FactoredGradients) -> Tensor:
        if self._outputs != "sum":
            return gram([factors])
        flat = factors.delta.flatten(1)
        return (flat @ flat.T) * (factors.h @ factors.h.T)

    def _add_sampled(self, kernel: Tensor, name: str) -> None:
        """Add the part of a parameter whose gradients are formed, in pairs of chunks of samples."""
        leaf, n_columns = self._network.trainable[name], self._cotangents.values.shape[1]
        per_sample = n_columns * leaf.numel() * kernel.element_size()
        size = max(1, min(self._n, self._max_bytes // (2 * per_sample)))
        starts = range(0, self._n, size)
        rows_of_sample = n_columns if self._outputs == "full" else 1
        for i in starts:
            left = self._sampled(name, slice(i, i + size))
            for j in starts[: i // size + 1]:
                right = left if j == i else self._sampled(name, slice(j, j + size))
                block = left @ right.T
                rows, columns = (slice(s * rows_of_sample, (s + size) * rows_of_sample) for s in (i, j))
                kernel[rows, columns] += block
                if j != i:
                    kernel[columns, rows] += block.T

    def _sampled(self, name: str, index: slice) -> Tensor:
        gradients = self._sampler.all([name], self._cotangents, index)[name]
        if self._outputs == "sum":
            return gradients.reshape(len(gradients) // self._cotangents.values.shape[1], -1)
        return ExplicitGradients(gradients).matrix


def _pulled_back(
    graphs: Graphs, weights: Sequence[str], outputs: OutputChoice | int
) -> tuple[Tensor, int, Mapping[str, FactoredGradients]]:
    """Return the unit columns at the outputs, which leaf these are, and the factors of linear layers."""
    unit = UnitColumns()
    columns: list[Tensor] = []
    leaves: list[int] = []
    factors = LayerFactors(unit, weights)

    def collect(_weight: float, graph: Any) -> None:
        at_outputs = unit.at_outputs(graph)
        if not isinstance(outputs, str):
            if not 0 <= outputs < at_outputs.shape[1]:
                raise ValueError(
                    f"the model has {at_outputs.shape[1]} outputs, numbered from 0; there is no {outputs}"
                )
            at_outputs = at_outputs[:, outputs : outputs + 1]
        columns.append(at_outputs)
        leaves.append(graph.output_leaf)
        factors.take(graph, at_outputs)

    graphs.each(collect)
    return joined(columns), leaves[0], factors.joined()


def _objective(inputs: Inputs, batch_size: int | None) -> Objective:
    """Return an objective whose loss is linear in the outputs, to look at the model alone."""
    first = pytree.tree_leaves(inputs)[0]
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise TypeError(
            f"inputs must be torch tensors with samples along the first dim, got {type(first).__name__}"
        )
    targets = torch.zeros(len(first), device=first.device)
    return Objective(_sum_of_outputs, inputs, targets, batch_size=batch_size)


def _sum_of_outputs(outputs: Any, targets: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != targets.shape:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            "a tangent kernel needs a model that returns one tensor with a row for each of the "
            f"{len(targets)} samples, got {got}: wrap the model in a module that returns that"
        )
    return outputs.reshape(len(targets), -1).sum(1).mean()


def _activations(outputs: Sequence[Any], n_samples: int, module: str) -> Tensor:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].shape[:1] != (n_samples,):
        got = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in outputs]
        raise ValueError(
            f"the module {module!r} must be called once with one tensor out, a row for each of the "
            f"{n_samples} samples; its outputs were {got}: name a module for which that holds"
        )
    return at_least_float32(outputs[0].reshape(n_samples, -1).clone())
