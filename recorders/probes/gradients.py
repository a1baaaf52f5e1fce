"""Probe of the gradient of the objective, on the dims of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import ArrayPlan, NodePlan
from hild_xr.recorders.curvature import NonFiniteCurvatureError, isolated, resolve_blocks
from hild_xr.recorders.curvature.functional import FunctionalModel, at_least_float32
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.layers import layer_dims
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.sketching import SketchOption, VectorLayout, as_family, vectors_of_layer
from hild_xr.recorders.schedule import Schedule


class Gradient(Probe):
    r"""Record the gradient of the objective into ``/gradients/<layer>/gradient``.

    :math:`\nabla L(\theta)` of :class:`~hild_xr.recorders.Objective`, regulariser
    included (the group's attr ``regularizer`` is its :math:`\beta`; subtract
    :math:`\beta\theta` for the data part), in eval mode on fixed data: not the
    gradient of a training batch. It takes one forward and one backward pass, batch by
    batch; the graph that curvature probes share is built for second derivatives and
    would cost more where no such probe is due.

    Parameters
    ----------
    layers
        Qualified names; None for all trainable tensors.
    sketch, sketch_rows
        As for :class:`~hild_xr.recorders.Weights`.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    ValueError
        When the recorder starts, if a layer is unknown or frozen.

    Examples
    --------
    >>> Gradient(sketch=64).plan(nn.Linear(300, 10), None, None)["weight"].arrays["gradient"].dims
    ('sketch',)
    """

    needs_objective = True

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        sketch: SketchOption = None,
        sketch_rows: bool = False,
        schedule: Schedule | None = None,
        group: str = "gradients",
    ) -> None:
        super().__init__(group, schedule)
        if sketch_rows and sketch is None:
            raise ValueError("sketch_rows=True needs sketch=m, the numbers that stand for a row")
        self.layers, self.sketch, self.sketch_rows = layers, as_family(sketch), sketch_rows

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return what the gradient is taken of: how many samples, which regulariser."""
        return {
            "samples": None if objective is None else len(objective),
            "regularizer": 0.0 if objective is None else objective.l2,
        }

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one node a layer."""
        del optimizer, objective
        dims, parameters = layer_dims(model), dict(model.named_parameters())
        blocks = resolve_blocks(model, "layer", self.layers)
        self._layouts = {
            block.label: vectors_of_layer(
                self.sketch, block.label, dims[block.label], block.vector_shape, rows=self.sketch_rows
            )
            for block in blocks
        }
        self._arrays = {name: _array(parameters[name], layout) for name, layout in self._layouts.items()}
        return {name: NodePlan(arrays={"gradient": array}) for name, array in self._arrays.items()}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Take the gradient; a layer that was frozen since planning is missing."""
        if snapshot.objective is None:
            raise ValueError("the objective that was there at planning is gone")
        trainable = {name for name, p in snapshot.model.named_parameters() if p.requires_grad}
        names = [name for name in self._layouts if name in trainable]
        found = objective_gradient(snapshot.model, snapshot.objective, names) if names else {}
        return {
            name: {"gradient": layout(found[name]) if name in found else self._arrays[name].missing()}
            for name, layout in self._layouts.items()
        }


def objective_gradient(model: nn.Module, objective: Objective, names: Sequence[str]) -> dict[str, Tensor]:
    r"""Gradient of the objective by some parameters, regulariser included.

    .. math:: \nabla L(\theta) = \frac1M \sum_{m=1}^M \nabla \ell(f_\theta(x_m), y_m) + \beta \theta

    Parameters
    ----------
    model
        The model; measured in eval mode and found unchanged.
    objective
        Loss and data.
    names
        Qualified names of trainable parameters.

    Returns
    -------
    dict of str to Tensor
        In float32 at least; zero where the loss does not depend on the parameter.

    Raises
    ------
    NonFiniteCurvatureError
        If a component is NaN or infinite; it names the layer.
    ValueError
        If model, loss and data do not fit together, or the loss depends on no parameter.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> objective = Objective(nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1), l2=0.5)
    >>> objective_gradient(model, objective, ["weight"])["weight"]
    tensor([[1.5000, 1.5000]])
    """
    model = unwrapped(model)
    objective.check(model)
    with isolated(model):
        network = FunctionalModel(model)
        leaves = [network.trainable[name] for name in names]
        total = [at_least_float32(leaf.detach()) * objective.l2 for leaf in leaves]
        for inputs, targets in objective.batches():
            loss = objective.mean_loss(network(inputs), targets)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on any trainable parameter: loss(outputs, targets) must use "
                    "the outputs, and neither model nor loss may detach them or run under torch.no_grad"
                )
            parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            for held, part in zip(total, parts, strict=True):
                # weighted after the backward pass: half-precision gradients may be close to underflow
                held.add_(at_least_float32(part), alpha=len(targets) / len(objective))
    gradients = dict(zip(names, total, strict=True))
    finite = torch.stack([gradient.isfinite().all() for gradient in total]).tolist()
    for name, well in zip(names, finite, strict=True):
        if not well:
            raise NonFiniteCurvatureError(name, "the gradient")
    return gradients


def _array(parameter: Tensor, layout: VectorLayout) -> ArrayPlan:
    return ArrayPlan(
        variable="gradient",
        dims=layout.dims,
        shape=layout.shape,
        dtype=numpy_dtype(at_least_float32(parameter.detach().reshape(-1)[:0])),
        attrs=layout.attrs,
    )
