"""A callback that records Lightning training.

For the package ``lightning`` (``import lightning``); callbacks of the older
``pytorch_lightning`` are of other classes, and its Trainer does not take this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hild_xr.recorders.adapters.session import LateObjective, LateProbes, Session
from hild_xr.recorders.schedule import Schedule
from hild_xr.store import StoreLike

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ImportError(
        'hild_xr.recorders.adapters.lightning needs lightning: pip install "hild-xr[lightning]"'
    ) from error


class RecorderCallback(Callback):
    """Record a Lightning training run.

    Step 0 is recorded before the first update, then the steps of the schedule. A step
    is an update of the weights: with accumulated gradients several batches, and not
    counted where mixed precision skipped it. Where a run goes on from a checkpoint
    (``trainer.fit(ckpt_path=...)``) the records go on as well: the callback keeps its
    count in the checkpoint and commits its records with it. On several devices (DDP)
    the process of rank 0 records and the others wait, see
    :class:`~hild_xr.recorders.adapters.distributed.RankZeroRecorder`.

    Parameters
    ----------
    path
        The store.
    probes
        What to record, or a function of the LightningModule that says so.
    schedule
        When to record, in optimizer steps.
    objective
        Fixed data and loss for metrics and curvature, or a function of the
        LightningModule that makes them when training starts; from there
        ``module.trainer.datamodule`` is at hand. It is brought to the device of the
        model. The model is called as ``module(inputs)``, so ``forward`` must give
        what the loss takes.
    module
        The part of the LightningModule to record, e.g. ``lambda module: module.net``;
        names of layers then start inside it. By default all of it.
    optimizer
        Which of several optimizers counts the steps: position in the list that
        ``configure_optimizers`` returns, by default the last. Choose the one that an
        iteration updates last, or a record shows an iteration half done.
    start_step
        Updates behind the checkpoint, where it was made without this callback by a
        module with several optimizers (Lightning counts the updates of all together).
    **options
        The other options of :class:`~hild_xr.recorders.Recorder`: ``seed``, ``seeds``,
        ``config``, ``progress``, ...

    Raises
    ------
    ValueError
        When training starts, if there is no such optimizer, or the step of a checkpoint
        is not known.
    TypeError
        When training starts, if the strategy shards the model (FSDP, tensor parallel).

    Warnings
    --------
    Needs automatic or manual optimisation with torch optimizers; DeepSpeed, whose engine
    updates the weights by itself, is not supported.

    Examples
    --------
    >>> from hild_xr import recorders as rec
    >>> callback = RecorderCallback(
    ...     "run.zarr",
    ...     probes=[rec.Weights(), rec.Hessian(k=5)],
    ...     schedule=rec.log_then_linear(total_steps=1000, records=50),
    ...     objective=lambda module: rec.Objective(nn.functional.cross_entropy, *module.fixed_batch),
    ... )
    >>> # Trainer(max_steps=1000, callbacks=[callback]).fit(module, loader)
    """

    def __init__(
        self,
        path: StoreLike,
        *,
        probes: LateProbes[LightningModule],
        schedule: Schedule,
        objective: LateObjective[LightningModule] = None,
        module: Callable[[LightningModule], nn.Module] | None = None,
        optimizer: int = -1,
        start_step: int | None = None,
        **options: Any,
    ) -> None:
        self._session: Session[LightningModule] = Session(
            path, objective=objective, probes=probes, schedule=schedule, **options
        )
        self._path, self._module, self._optimizer = path, module, optimizer
        self._start_step = start_step
        self._restored: int | None = None

    @property
    def state_key(self) -> str:
        """Name of the count in a checkpoint; callbacks for several stores keep theirs apart."""
        return self._generate_state_key(path=str(self._path), optimizer=self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, for the checkpoint."""
        return {"current_step": self._session.count()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of updates from the checkpoint."""
        self._restored = int(state_dict["current_step"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create or join the store and record the present state."""
        recorded = pl_module if self._module is None else self._module(pl_module)
        self._session.start(
            recorded,
            self._counting_optimizer(trainer),
            context=pl_module,
            start_step=self._steps_behind(trainer) if trainer.global_step else None,
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Commit the records with the checkpoint, so that it can be gone on from."""
        self._session.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit everything and end."""
        self._session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit what is complete and end; Lightning raises the exception again."""
        self._session.close(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End, if nothing else has ended it."""
        self._session.close()

    def _counting_optimizer(self, trainer: Trainer) -> Any:
        try:
            return trainer.optimizers[self._optimizer]
        except IndexError:
            raise ValueError(
                f"optimizer={self._optimizer} is to count the steps, but configure_optimizers returned "
                f"{len(trainer.optimizers)} optimizers"
            ) from None

    def _steps_behind(self, trainer: Trainer) -> int:
        if self._start_step is not None:
            return self._start_step
        if self._restored is not None:
            return self._restored
        if len(trainer.optimizers) == 1:
            return int(trainer.global_step)
        raise ValueError(
            f"training goes on at global_step={trainer.global_step}, which counts the updates of "
            f"{len(trainer.optimizers)} optimizers together, and the checkpoint has no count of this "
            f"callback ({self.state_key}): give RecorderCallback(..., start_step=<updates of optimizer "
            f"{self._optimizer}>)"
        )
