"""What probes of chosen modules on a fixed probe set share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import OWN_NODE, ArrayPlan, NodePlan
from hild_xr.recorders.curvature.functional import Inputs
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.probe_set import ProbeSet, Side, module_values, select_modules
from hild_xr.recorders.schedule import Schedule


class ModuleProbe(Probe):
    """One array for each module, made of its activations of shape (samples, units).

    The parameters are described by :class:`~hild_xr.recorders.Features`.
    """

    quantity: str
    """Name of the array and of its variable."""

    default_group: str
    """Name of the group, unless another is given."""

    def __init__(
        self,
        inputs: Inputs | None = None,
        *,
        modules: Sequence[str] | None = None,
        side: Side = "output",
        labels: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
        schedule: Schedule | None = None,
        group: str | None = None,
    ) -> None:
        super().__init__(self.default_group if group is None else group, schedule)
        self.probe_set = ProbeSet(inputs, batch_size=batch_size, labels=labels)
        self.needs_objective = self.probe_set.needs_objective
        self.modules, self.side = modules, side

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one node a module, after a forward pass on a few samples."""
        del optimizer
        data = self.probe_set.data(model, objective)
        few = select_modules(model, data, self.modules, self.side)
        self._names = list(few)
        nodes = {
            name: NodePlan(arrays={self.quantity: self._array(rows, len(data))}) for name, rows in few.items()
        }
        # once for all modules, in the group itself
        coords = self.probe_set.coords()
        return {OWN_NODE: NodePlan(coords=coords), **nodes} if coords else nodes

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return which side of the modules was taken."""
        del objective
        return {"side": self.side}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Run the model on the probe set."""
        data = self.probe_set.data(snapshot.model, snapshot.objective)
        found = module_values(snapshot.model, data, self._names, self.side)
        return {name: {self.quantity: self._value(values)} for name, values in found.items()}

    @abstractmethod
    def _array(self, few: Tensor, n_samples: int) -> ArrayPlan:
        """Plan the array of a module that has these rows on the first few samples."""

    @abstractmethod
    def _value(self, activations: Tensor) -> Tensor:
        """Return what is recorded of a module's activations."""
