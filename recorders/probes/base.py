"""What a probe is: it plans a group of the store and fills it record by record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import nn

from hild_xr.plan import NodePlan
from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.host_copy import Measured
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.schedule import Schedule

NodeValues = Measured
"""Values of one record: ``{node: {array name: value}}``; the recorder copies them to the host."""


@dataclass
class Snapshot:
    """The training state that the probes of one record look at.

    Used as a context manager by the recorder; the curvature graph that the
    probes share is built on first use and freed at the end of the record.

    Parameters
    ----------
    model
        The model in training; probes leave it as it is.
    optimizer
        The optimizer, or None where the loop calls ``recorder.step()``.
    objective
        Fixed data and loss, or None if no probe needs it.
    step
        Number of optimizer steps taken.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    objective: Objective | None
    step: int
    _curvature: Curvature | None = field(default=None, repr=False)

    @property
    def curvature(self) -> Curvature:
        """Curvature of the objective here, one forward and backward for all probes of the record."""
        if self._curvature is None:
            if self.objective is None:
                raise ValueError(
                    "curvature needs an objective: Recorder(..., objective=Objective(loss, x, y))"
                )
            self._curvature = Curvature(self.model, self.objective).__enter__()
        return self._curvature

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._curvature is not None:
            self._curvature.__exit__(kind, error, trace)


class Probe(ABC):
    """One quantity recorded along training; it owns one group of the store.

    Parameters
    ----------
    group
        Name of the group; two probes of a recorder must differ in it.
    schedule
        Steps of this probe, or None for the recorder's schedule.
    """

    needs_objective: bool = False
    """Whether the probe evaluates the recorder's objective."""

    def __init__(self, group: str, schedule: Schedule | None) -> None:
        self.group = group
        self.schedule = schedule

    @abstractmethod
    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes of the group; raise on settings that do not fit the model."""

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return settings that a reader of the group needs, for its attributes."""
        del objective
        return {}

    def resume(self, n_records: int, last: Callable[[str, str], NDArray[np.generic] | None]) -> None:
        """Take up what this probe remembers from record to record, before a resumed run goes on.

        Parameters
        ----------
        n_records
            Records that the schedule has up to here.
        last
            ``last(node, array)`` reads what the last of them holds; None if it is not stored.
        """
        del n_records, last

    @abstractmethod
    def record(self, snapshot: Snapshot) -> NodeValues:
        """Measure one record: every planned array of every node.

        Values may be tensors on any device or arrays, also live ones: the recorder
        copies them before training goes on.
        """
