"""What the callbacks share: a recorder whose model, optimizer and objective come late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from hild_xr.recorders.adapters.distributed import RankZeroRecorder
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import Probe
from hild_xr.store import StoreLike

Context = TypeVar("Context")
"""What a callable for late parts is given: the LightningModule, or the Trainer's model."""

LateObjective = Objective | Callable[[Context], Objective] | None
LateProbes = Sequence[Probe] | Callable[[Context], Sequence[Probe]]


class Session(Generic[Context]):
    """Settings of a callback, and the recorder of the training that is under way.

    Parameters
    ----------
    path
        The store.
    objective, probes
        As for :class:`~hild_xr.recorders.Recorder`, or functions that make them when
        training starts and data and device are known.
    **options
        The other options of :class:`~hild_xr.recorders.Recorder`.

    Examples
    --------
    >>> import tempfile
    >>> from hild_xr import recorders as rec
    >>> session = Session(
    ...     tempfile.mkdtemp() + "/run.zarr", objective=None, probes=[rec.Weights()], schedule=rec.at([0])
    ... )
    >>> model = nn.Linear(2, 1)
    >>> session.start(model, torch.optim.SGD(model.parameters(), lr=0.1), context=model)
    >>> session.close()
    >>> session.current_step
    0
    """

    def __init__(
        self,
        path: StoreLike,
        *,
        objective: LateObjective[Context],
        probes: LateProbes[Context],
        **options: Any,
    ) -> None:
        for name in ("resume", "start_step"):
            if name in options:
                raise TypeError(f"{name} is not an option here: the callback goes on from the checkpoint")
        self._path, self._objective, self._probes, self._options = path, objective, probes, options
        self._recorder: RankZeroRecorder | None = None
        self.current_step = 0

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        context: Context,
        start_step: int | None = None,
    ) -> None:
        """Begin to record, with ``start_step`` after a checkpoint; what was under way is closed."""
        self.close()
        probes = self._probes(context) if callable(self._probes) else self._probes
        recorder = RankZeroRecorder(
            self._path,
            model,
            optimizer,
            objective=self._placed_objective(model, context),
            probes=probes,
            resume=start_step is not None,
            start_step=start_step,
            **self._options,
        )
        self.current_step = start_step or 0
        recorder.start()
        self._recorder = recorder

    def count(self) -> int:
        """Return the number of updates, also after the end."""
        if self._recorder is not None:
            self.current_step = self._recorder.current_step
        return self.current_step

    def flush(self) -> None:
        """Commit what is recorded, if training is under way."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self, error: BaseException | None = None) -> None:
        """End, perhaps because of an error in training; a second call does nothing."""
        self.count()
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None if error is None else type(error), error, None)

    def _placed_objective(self, model: nn.Module, context: Context) -> Objective | None:
        objective = self._objective(context) if callable(self._objective) else self._objective
        if objective is None:
            return None
        device = next(model.parameters()).device
        return objective if objective.device == device else objective.to(device)
