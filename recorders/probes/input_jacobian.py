"""Probe of the average gradient outer product (AGOP) of each layer's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import ArrayPlan, NodePlan
from hild_xr.recorders.curvature import isolated
from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs, at_least_float32
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.probe_set import ProbeSet, few_samples, nearest, raw_outputs
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_IN

_KERNEL_DIMS = ("kd", "kh", "kw")


class AGOP(Probe):
    r"""Record the average gradient outer product of layers' inputs into ``/agop/<layer>/agop``.

    With the derivative :math:`J_l(x)` of the model's outputs by the input of layer l,

    .. math:: M_l = \frac1M \sum_{m=1}^M J_l(x_m)^T J_l(x_m)

    The neural feature ansatz says that :math:`W_l^T W_l` is proportional to it, or to a power of
    it (Radhakrishnan et al., arXiv 2212.13881; Beaglehole et al., arXiv 2402.05271). Dims are
    ``(in, in_)``. For a convolution the input is the patch under the kernel, and dims are
    ``(in, kh, kw, in_, kh_, kw_)``: those of the weight without ``out``, twice.

    The derivative is taken through the layer: where its input is also used elsewhere (a skip
    connection), that path does not count. A layer that is used at several places (tokens,
    places of an image, calls) has the sum over them. Where outputs are logits this is the AGOP of
    logits, not of probabilities. It takes one forward pass, and one backward pass for each output.

    Parameters
    ----------
    inputs, batch_size
        As for :class:`~hild_xr.recorders.Features`.
    layers
        Qualified names of the weights of linear layers and convolutions, as in the group
        ``weights``; None for all of them that a forward pass calls.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    TypeError
        If the inputs are no tensors.
    KeyError
        When the recorder starts, if a layer is unknown; the nearest is suggested.
    ValueError
        As for :class:`~hild_xr.recorders.Features`; and when the recorder starts, if a layer is
        neither linear nor a convolution with one group, is not used, or if the model does not
        return one tensor with a row for each sample, which does not see the other samples.

    Examples
    --------
    >>> probe = AGOP(torch.ones(20, 3))
    >>> model = nn.Linear(3, 2, bias=False)
    >>> _ = nn.init.constant_(model.weight, 0.5)
    >>> probe.plan(model, None, None)["weight"].arrays["agop"].dims
    ('in', 'in_')
    >>> probe.record(Snapshot(model, None, None, 0))["weight"]["agop"]
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        inputs: Inputs | None = None,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int | None = None,
        schedule: Schedule | None = None,
        group: str = "agop",
    ) -> None:
        super().__init__(group, schedule)
        self.probe_set = ProbeSet(inputs, batch_size=batch_size)
        self.needs_objective = self.probe_set.needs_objective
        self.layers = layers

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one node a layer, after a pass over a few samples."""
        del optimizer
        data = self.probe_set.data(model, objective)
        data.check(model)
        few = few_samples(data)
        self._layers = _used(model, few, _select(model, self.layers), chosen=self.layers is not None)
        found = average_gradient_outer_products(model, few, self._layers)
        return {name: NodePlan(arrays={"agop": _array(found[name])}) for name in self._layers}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Take the derivatives on the probe set."""
        data = self.probe_set.data(snapshot.model, snapshot.objective)
        found = average_gradient_outer_products(snapshot.model, data, self._layers)
        return {name: {"agop": agop} for name, agop in found.items()}


def average_gradient_outer_products(
    model: nn.Module, data: Objective, layers: Mapping[str, str]
) -> dict[str, Tensor]:
    r"""Average gradient outer products of the inputs of some layers.

    A layer :math:`z = W h + b` has :math:`\partial f/\partial h = \delta^T W` with
    :math:`\delta = \partial f/\partial z`, so the average needed is one of outer products of
    :math:`\delta`, and no derivative by an input is ever formed.

    Parameters
    ----------
    model
        The model, in eval mode and left as it is.
    data
        Its inputs, batch by batch.
    layers
        Qualified name of a weight to that of its module.

    Returns
    -------
    dict of str to Tensor
        Of shape (in, in), or (in, \*kernel, in, \*kernel) for a convolution; float32 at least.

    Raises
    ------
    ValueError
        If the model does not return one tensor with a row for each sample.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> data = Objective(nn.functional.mse_loss, torch.ones(4, 2), torch.ones(4, 1))
    >>> average_gradient_outer_products(model, data, {"weight": ""})["weight"]
    tensor([[4., 4.],
            [4., 4.]])
    """
    model = unwrapped(model)
    modules = {name: model.get_submodule(module) for name, module in layers.items()}
    with isolated(model), _watched(modules) as outputs_of:
        network = FunctionalModel(model)
        # by attribute: under a parametrisation (weight norm) the weight is no parameter itself
        weights = {
            name: at_least_float32(getattr(module, name.rpartition(".")[2]).detach())
            for name, module in modules.items()
        }
        sums = {name: weight.new_zeros(len(weight), len(weight)) for name, weight in weights.items()}
        for inputs, targets in data.batches():
            for calls in outputs_of.values():
                calls.clear()
            for column in _flat(network(inputs), len(targets)).sum(0):
                _add_outer_products(sums, outputs_of, weights, column)
    return {name: _pulled_back(weights[name], outer / len(data)) for name, outer in sums.items()}


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Collect the outputs of layers, one for each call, as the forward pass uses them."""
    outputs_of: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # all that comes before is frozen
        outputs_of[name].append(output)
        return output.clone()  # an activation that works in place leaves the output as it was

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: hook(name, output))
        for name, module in modules.items()
    ]
    try:
        yield outputs_of
    finally:
        for handle in handles:
            handle.remove()


def _flat(outputs: Any, n_samples: int) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (n_samples,):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the AGOP needs a model that returns one tensor with a row for each of the {n_samples} samples, "
            f"got {got}: wrap the model in a module that returns that"
        )
    return outputs.reshape(n_samples, -1)


def _add_outer_products(
    sums: dict[str, Tensor],
    outputs_of: Mapping[str, Sequence[Tensor]],
    weights: Mapping[str, Tensor],
    column: Tensor,
) -> None:
    """Add the outer products of the derivatives of one output by the outputs z of the layers."""
    calls = [(name, z) for name, outputs in outputs_of.items() for z in outputs]
    if not calls:
        return
    deltas = torch.autograd.grad(
        column, [z for _, z in calls], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for (name, _), delta in zip(calls, deltas, strict=True):
        rows = at_least_float32(delta)
        # channels of a convolution are the second dim, features of a linear layer the last one
        rows = (rows.movedim(1, -1) if weights[name].ndim > 2 else rows).flatten(0, -2)
        sums[name] += rows.T @ rows


def _pulled_back(weight: Tensor, outer: Tensor) -> Tensor:
    flat, shape = weight.flatten(1), weight.shape[1:]
    return (flat.T @ outer @ flat).reshape(*shape, *shape)


def _used(model: nn.Module, few: Objective, layers: Mapping[str, str], *, chosen: bool) -> dict[str, str]:
    """Leave out layers that a forward pass does not call, unless they were asked for by name."""
    model = unwrapped(model)
    modules = {name: model.get_submodule(module) for name, module in layers.items()}
    with _watched(modules) as outputs_of:
        raw_outputs(model, few)
    unused = [name for name, calls in outputs_of.items() if not calls]
    if unused and (chosen or len(unused) == len(layers)):
        raise ValueError(
            f"layers {unused} are not called in a forward pass: leave them out with layers=[...]"
        )
    return {name: module for name, module in layers.items() if name not in unused}


def _select(model: nn.Module, layers: Sequence[str] | None) -> dict[str, str]:
    """Return the weights of linear layers and convolutions, each with the name of its module."""
    known = {
        f"{name}.weight" if name else "weight": (name, module)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    fitting = [name for name, (_, module) in known.items() if getattr(module, "groups", 1) == 1]
    names = fitting if layers is None else _checked(model, layers, list(known), fitting)
    if not names:
        raise ValueError("the model has no linear layer and no convolution with one group; nothing to record")
    return {name: known[name][0] for name in names}


def _checked(
    model: nn.Module, layers: Sequence[str], known: Sequence[str], fitting: Sequence[str]
) -> list[str]:
    if isinstance(layers, str):
        raise TypeError(f"layers is a sequence of names; got the text {layers!r}: write [{layers!r}]")
    names = list(layers)
    for name in names:
        if name not in known and name not in dict(model.named_parameters()):
            raise KeyError(nearest("weight", name, known))
        if name not in fitting:
            raise ValueError(
                f"{name!r} is not the weight of a linear layer or of a convolution with groups=1; "
                f"the AGOP can be recorded for: {', '.join(fitting)}"
            )
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"layers must name at least one weight and none twice; got {names}")
    return names


def _array(agop: Tensor) -> ArrayPlan:
    # in, and the last of the kernel's dims that there are
    inputs = (DIM_IN, *_KERNEL_DIMS[len(_KERNEL_DIMS) + 1 - agop.ndim // 2 :])
    dims = (*inputs, *(f"{dim}_" for dim in inputs))
    # a matrix is one vector: norms and drifts go over all of its dims
    attrs: dict[str, JsonValue] = {"vector_dims": list(dims)}
    return ArrayPlan(
        variable="agop",
        dims=dims,
        shape=tuple(agop.shape),
        dtype=numpy_dtype(agop),
        attrs=attrs,
    )
