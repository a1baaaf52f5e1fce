"""A callback that records training by the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from types import TracebackType
from typing import Any, cast

from torch import nn

from hild_xr.recorders.adapters.session import LateObjective, LateProbes, Session
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.schedule import Schedule
from hild_xr.store import StoreLike

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        'hild_xr.recorders.adapters.transformers needs transformers: pip install "hild-xr[transformers]"'
    ) from error

_STATE = "hild_xr.RecorderCallback"


class RecorderCallback(TrainerCallback):
    """Record a training run of the Hugging Face Trainer.

    Step 0 is recorded before the first update, then the steps of the schedule. A step
    is an update of the weights: with accumulated gradients several batches, and not
    counted where mixed precision skipped it (``state.global_step`` counts it). After
    ``trainer.train(resume_from_checkpoint=...)`` the records go on as well: the callback
    keeps its count in ``trainer_state.json`` and commits its records with each
    checkpoint. On several devices (DDP) the process of rank 0 records and the others
    wait, see :class:`~hild_xr.recorders.adapters.distributed.RankZeroRecorder`.

    The Trainer tells callbacks nothing when training fails. Use the callback as a
    context manager around ``trainer.train()``, or call :meth:`close`; without, what is
    complete is committed when the interpreter ends.

    Parameters
    ----------
    path
        The store.
    probes
        What to record, or a function of the model that says so.
    schedule
        When to record, in optimizer steps.
    objective
        Fixed data and loss for metrics and curvature, or a function of the model that
        makes them when training starts. It is brought to the device of the model. The
        model is called with the inputs as keywords and returns a ModelOutput, so the
        loss picks the logits out of it, as below.
    **options
        The other options of :class:`~hild_xr.recorders.Recorder`: ``seed``, ``seeds``,
        ``config``, ``progress``, ...

    Raises
    ------
    TypeError
        When training starts, if the model is sharded (FSDP).

    Warnings
    --------
    Curvature needs second derivatives, which fused attention lacks. The model's ``sdpa``
    attention is brought to the math kernel for the measurement; build a model for
    ``flash_attention_2`` with ``attn_implementation="sdpa"`` or ``"eager"`` instead.
    DeepSpeed, whose engine updates the weights by itself, is not supported.

    Examples
    --------
    A classifier. ``inputs`` are keywords of the model; dropout is off for the record.

    >>> import torch
    >>> from torch.nn import functional as F
    >>> from hild_xr import recorders as rec
    >>> ids, labels = torch.randint(100, (8, 12)), torch.randint(2, (8,))
    >>> objective = rec.Objective(
    ...     lambda output, target: F.cross_entropy(output.logits, target),
    ...     {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    ...     labels,
    ... )
    >>> callback = RecorderCallback(
    ...     "run.zarr",
    ...     probes=[rec.Weights(), rec.Hessian(k=5, layers=["classifier.weight"])],
    ...     schedule=rec.every(100, total_steps=1000),
    ...     objective=objective,
    ... )
    >>> # with callback: Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    A language model: the targets are the inputs, shifted. Sequences of one length make
    the mean over tokens a mean over samples, as an objective must be.

    >>> def next_token_loss(output, ids):
    ...     return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    >>> language = rec.Objective(next_token_loss, {"input_ids": ids}, ids)
    """

    def __init__(
        self,
        path: StoreLike,
        *,
        probes: LateProbes[nn.Module],
        schedule: Schedule,
        objective: LateObjective[nn.Module] = None,
        **options: Any,
    ) -> None:
        self._session: Session[nn.Module] = Session(
            path, objective=objective, probes=probes, schedule=schedule, **options
        )

    def __enter__(self) -> RecorderCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close(error)

    def close(self) -> None:
        """Commit what is complete and end; a second call does nothing."""
        self._session.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create or join the store and record the present state."""
        model: nn.Module = unwrapped(kwargs["model"])
        start_step = self._steps_behind(state) if state.global_step else None
        self._session.start(model, kwargs["optimizer"], context=model, start_step=start_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the count where the checkpoint finds it, and commit the records before it is written."""
        _kept(state)[_STATE] = {"args": {}, "attributes": {"current_step": self._session.count()}}
        if control.should_save:
            self._session.flush()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit the records with a checkpoint made at the end of an epoch or after an evaluation."""
        self._session.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit everything and end."""
        self._session.close()

    def _steps_behind(self, state: TrainerState) -> int:
        kept = _kept(state).get(_STATE)
        return int(state.global_step if kept is None else kept["attributes"]["current_step"])


def _kept(state: TrainerState) -> dict[str, Any]:
    # The Trainer writes this dict into trainer_state.json and reads it back. (Its interface for it,
    # ExportableState, would make a new callback out of JSON, which has no probes.)
    return cast("dict[str, Any]", state.stateful_callbacks)
