"""Probe of the outputs: what the model says of a fixed probe set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import OWN_NODE, ArrayPlan, NodePlan
from hild_xr.recorders.curvature import isolated
from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.probe_set import ProbeSet, few_samples, raw_outputs
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_CLASS, DIM_SAMPLE

Transform = Callable[[Any], Tensor]
"""Maps what the model returns for a batch to one number, or a row of numbers, for each sample."""


class Outputs(Probe):
    """Record the model's outputs on fixed inputs into ``/outputs/outputs``.

    Dims are ``(sample, class_)``, or ``(sample)`` where the model gives one number for each
    sample. They are what the model gives (logits, for a classifier trained with cross-entropy)
    unless ``transform`` makes something else of it. The model is in eval mode and left as it is.

    Parameters
    ----------
    inputs, labels, batch_size
        As for :class:`~hild_xr.recorders.Features`.
    transform
        Maps what the model returns to one tensor with a row for each sample: ``lambda out:
        out.logits`` for models that return a structure, ``torch.nn.Softmax(1)`` for
        probabilities. Its name is stored in the attrs.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    TypeError
        If the inputs are no tensors, or the labels no integers. When the recorder starts, if
        the model returns something else than one tensor of floating-point numbers.
    ValueError
        As for :class:`~hild_xr.recorders.Features`; and when the recorder starts, if the output
        has no row for each sample, or more than two dims.

    Examples
    --------
    >>> probe = Outputs(torch.zeros(20, 3), transform=nn.Softmax(1))
    >>> array = probe.plan(nn.Linear(3, 10), None, None)[""].arrays["outputs"]
    >>> array.dims, array.shape, array.attrs
    (('sample', 'class_'), (20, 10), {'transform': 'Softmax'})
    """

    def __init__(
        self,
        inputs: Inputs | None = None,
        *,
        transform: Transform | None = None,
        labels: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
        schedule: Schedule | None = None,
        group: str = "outputs",
    ) -> None:
        super().__init__(group, schedule)
        self.probe_set = ProbeSet(inputs, batch_size=batch_size, labels=labels)
        self.needs_objective = self.probe_set.needs_objective
        self.transform = transform

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one array, after a forward pass on a few samples."""
        del optimizer
        data = self.probe_set.data(model, objective)
        few = few_samples(data)
        rows = self._transformed(raw_outputs(model, few), len(few))
        attrs: dict[str, JsonValue] = {"transform": _name(self.transform)}
        array = ArrayPlan(
            variable="outputs",
            dims=(DIM_SAMPLE, DIM_CLASS)[: rows.ndim],
            shape=(len(data), *rows.shape[1:]),
            dtype=numpy_dtype(rows),
            attrs=attrs,
        )
        return {OWN_NODE: NodePlan(arrays={"outputs": array}, coords=self.probe_set.coords())}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Run the model on the probe set."""
        data = self.probe_set.data(snapshot.model, snapshot.objective)
        with isolated(snapshot.model), torch.no_grad():
            network = FunctionalModel(snapshot.model)
            rows = [self._transformed(network(inputs), len(targets)) for inputs, targets in data.batches()]
        return {OWN_NODE: {"outputs": torch.cat(rows)}}

    def _transformed(self, outputs: Any, n_samples: int) -> Tensor:
        """Return the outputs of a batch, checked."""
        rows = outputs if self.transform is None else self.transform(outputs)
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(
                f"outputs are recorded as one tensor of floating-point numbers, got {got}: give "
                "transform=..., which makes such a tensor of what the model returns"
            )
        if rows.shape[:1] != (n_samples,) or rows.ndim > 2:
            raise ValueError(
                f"outputs are recorded as one number, or one row of numbers, for each of the {n_samples} "
                f"samples; got a tensor of shape {tuple(rows.shape)}: give transform=..., for instance "
                "lambda out: out.flatten(1)"
            )
        return rows


def _name(transform: Transform | None) -> str | None:
    if transform is None:
        return None
    return str(getattr(transform, "__name__", type(transform).__name__))
