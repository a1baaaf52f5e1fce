"""Probe of the weights: every parameter tensor on its own dims."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hild_xr.plan import ArrayPlan, NodePlan
from hild_xr.recorders.layers import layer_dims, select_layers
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot, numpy_dtype, to_numpy
from hild_xr.recorders.schedule import Schedule


class Weights(Probe):
    """Record parameter tensors into ``/weights/<layer>/weight``.

    Parameters
    ----------
    layers
        Qualified names as ``named_parameters()`` gives them; None for all,
        frozen ones included.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    KeyError
        When the recorder starts, if a layer is unknown; the nearest name is suggested.

    Examples
    --------
    >>> Weights().plan(nn.Linear(3, 2), None, None)["weight"].arrays["weight"].dims
    ('out', 'in')
    """

    def __init__(
        self, *, layers: Sequence[str] | None = None, schedule: Schedule | None = None, group: str = "weights"
    ) -> None:
        super().__init__(group, schedule)
        self.layers = layers

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one node a layer."""
        del optimizer, objective
        self._names = select_layers(model, self.layers)
        dims, parameters = layer_dims(model), dict(model.named_parameters())
        return {name: _node(parameters[name], dims[name]) for name in self._names}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Copy the tensors."""
        parameters = dict(snapshot.model.named_parameters())
        return {name: {"weight": to_numpy(parameters[name])} for name in self._names}


def _node(parameter: torch.Tensor, dims: tuple[str, ...]) -> NodePlan:
    weight = ArrayPlan(
        variable="weight",
        dims=dims,
        shape=tuple(parameter.shape),
        dtype=numpy_dtype(parameter),
        attrs={"vector_dims": list(dims)},
    )
    return NodePlan(arrays={"weight": weight})
