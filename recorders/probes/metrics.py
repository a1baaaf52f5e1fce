"""Probe of the training metrics: loss, accuracy, learning rate, and what the loop logs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from hild_xr.plan import OWN_NODE, ArrayPlan, NodePlan
from hild_xr.recorders.curvature.functional import FunctionalModel
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.schedule import Schedule

AccuracyRule = Callable[[torch.Tensor, torch.Tensor], float]
"""Maps outputs and targets of all samples to a fraction."""


class Metrics(Probe):
    """Record scalars into ``/metrics``.

    ``train_loss`` and ``accuracy`` are taken of the recorder's objective (fixed
    data, eval mode), ``test_loss`` and ``test_accuracy`` of ``test``, and
    ``learning_rate`` of the optimizer; what is not there is left out. Accuracy
    is recorded for classification: integer targets with a column of outputs a
    class, or torch's binary cross-entropy, of logits or of probabilities, with
    targets 0 and 1.

    Parameters
    ----------
    test
        Objective on held-out data.
    accuracy
        Rule that maps all outputs and targets to a fraction, where the above does not fit.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    ValueError
        When the recorder starts, if there is neither an objective nor an optimizer to look at.

    Examples
    --------
    >>> sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    >>> list(Metrics().plan(nn.Linear(1, 1), sgd, None)[""].arrays)
    ['learning_rate']
    """

    def __init__(
        self,
        *,
        test: Objective | None = None,
        accuracy: AccuracyRule | None = None,
        schedule: Schedule | None = None,
        group: str = "metrics",
    ) -> None:
        super().__init__(group, schedule)
        self.test = test
        self.accuracy = accuracy

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one float64 number a metric that applies."""
        self._rules = {
            name: self._rule(model, data)
            for name, data in (("", objective), ("test_", self.test))
            if data is not None
        }
        names = [_loss_name(prefix) for prefix in self._rules]
        names += [f"{prefix}accuracy" for prefix, rule in self._rules.items() if rule is not None]
        names += [] if optimizer is None else ["learning_rate"]
        if not names:
            raise ValueError("Metrics has nothing to record: give the recorder an objective or an optimizer")
        return {
            OWN_NODE: NodePlan(arrays={name: ArrayPlan(variable=name, dtype="float64") for name in names})
        }

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Evaluate the metrics."""
        values: dict[str, float] = {}
        for prefix, rule in self._rules.items():
            data = self._test_or(snapshot.objective, prefix)
            if rule is None:
                values[_loss_name(prefix)] = data.value(snapshot.model)
                continue
            outputs = data.outputs(snapshot.model)
            penalty = data.penalty(FunctionalModel(snapshot.model))
            values[_loss_name(prefix)] = float(data.mean_loss(outputs, data.targets)) + penalty
            finite = bool(outputs.isfinite().all())
            values[f"{prefix}accuracy"] = rule(outputs, data.targets) if finite else math.nan
        if snapshot.optimizer is not None:
            values["learning_rate"] = float(snapshot.optimizer.param_groups[0]["lr"])
        return {OWN_NODE: values}

    def _test_or(self, objective: Objective | None, prefix: str) -> Objective:
        data = self.test if prefix else objective
        if data is None:
            raise ValueError("the objective that was there at planning is gone")
        return data

    def _rule(self, model: nn.Module, data: Objective) -> AccuracyRule | None:
        data.check(model)
        if self.accuracy is not None:
            return self.accuracy
        try:
            outputs = data.outputs(model)
        except TypeError:
            return None  # the model returns something else than one tensor; the loss alone is recorded
        return _accuracy_rule(data, outputs)


def _loss_name(prefix: str) -> str:
    return f"{prefix or 'train_'}loss"


def _accuracy_rule(data: Objective, outputs: torch.Tensor) -> AccuracyRule | None:
    """Return the rule for classification, None where the data are of another kind."""
    targets = data.targets
    integer = not targets.is_floating_point() and not targets.is_complex()
    if integer and targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1:
        return lambda out, target: (out.argmax(1) == target).double().mean().item()
    boundary = _binary_boundary(data.loss)
    if (
        boundary is not None
        and outputs.shape == targets.shape
        and bool(((targets == 0) | (targets == 1)).all())
    ):
        return lambda out, target: ((out > boundary) == (target > 0.5)).double().mean().item()
    return None


def _binary_boundary(loss: object) -> float | None:
    """Output at which a binary loss changes its mind: 0 for logits, 1/2 for probabilities."""
    if isinstance(loss, functools.partial):
        loss = loss.func
    if loss is F.binary_cross_entropy_with_logits or isinstance(loss, nn.BCEWithLogitsLoss):
        return 0.0
    if loss is F.binary_cross_entropy or isinstance(loss, nn.BCELoss):
        return 0.5
    return None
