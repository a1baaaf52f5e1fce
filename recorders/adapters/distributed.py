"""Recorders for models that train on several processes: DDP, and FSDP2 by ``fully_shard``.

One process writes, the one of rank 0; the recorder is made on *every* rank, because all
of them wait for each record. Where a record takes longer than the timeout of the training's
process group (10 minutes with NCCL), ranks that went on alone would sit in their next
collective until it is torn down. So at every scheduled step the ranks meet in a Gloo group
of the recorder's own, with a timeout of its own. Between the scheduled steps nothing is
sent.

An error on rank 0 (a full disk, a plan that does not fit) is raised on all ranks, so that
they stop together.

With DDP::

    from hild_xr.recorders.adapters.distributed import RankZeroRecorder

    model = DistributedDataParallel(net)
    with RankZeroRecorder("run.zarr", model, optimizer, probes=[...], schedule=...):
        train(model, optimizer)

With FSDP2::

    from hild_xr.recorders.adapters.distributed import FullyShardedRecorder

    fully_shard(model)
    with FullyShardedRecorder("run.zarr", model, optimizer, replica=Net, probes=[...], schedule=...):
        train(model, optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.probes.base import Probe
from hild_xr.recorders.recorder import Recorder
from hild_xr.recorders.schedule import Schedule
from hild_xr.recorders.wrappers import check_whole, is_sharded, unwrapped_optimizer
from hild_xr.store import StoreLike

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

TIMEOUT = timedelta(hours=2)
"""How long the other ranks wait for one record, by default."""


class RankZeroRecorder:
    """Record a data-parallel model from rank 0; make it on every rank.

    Every rank of DistributedDataParallel holds the whole model after each update, so
    the record of rank 0 is that of all. Curvature is taken by rank 0 alone, of the
    objective that it was given: with the full data there, the numbers are those of a
    single process. In a script that runs without ``torch.distributed``, or with one
    process, this is a plain :class:`~hild_xr.recorders.Recorder`.

    Parameters
    ----------
    path, model, optimizer
        As for :class:`~hild_xr.recorders.Recorder`; ``model`` may be the DDP wrapper.
    probes, schedule, start_step
        As for :class:`~hild_xr.recorders.Recorder`; the same on all ranks, so that
        each knows when to wait.
    timeout
        How long the other ranks wait for one record.
    **options
        The other options of :class:`~hild_xr.recorders.Recorder`. Those of rank 0 count:
        objective and store need not exist elsewhere.

    Raises
    ------
    TypeError
        On entry, if the model is sharded: use :class:`FullyShardedRecorder`.
    RuntimeError
        On the other ranks, when rank 0 could not record; its message is repeated.
    Exception
        On rank 0, what :class:`~hild_xr.recorders.Recorder` raises.

    Warnings
    --------
    Buffers are those of rank 0 (BatchNorm statistics differ between ranks unless DDP
    broadcasts them). The end of the block waits for nobody: a rank that fails is not
    waited for, and the others may leave before the last record is on the disk.

    Examples
    --------
    >>> import tempfile
    >>> from hild_xr import recorders as rec
    >>> model = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> path = tempfile.mkdtemp() + "/run.zarr"
    >>> with RankZeroRecorder(path, model, sgd, probes=[rec.Weights()], schedule=rec.at([0, 1])) as recorder:
    ...     sgd.step()
    >>> recorder.current_step
    1
    """

    def __init__(
        self,
        path: StoreLike,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        probes: Sequence[Probe],
        schedule: Schedule,
        start_step: int | None = None,
        timeout: timedelta = TIMEOUT,
        **options: Any,
    ) -> None:
        self._model, self._optimizers = unwrapped(model), _as_tuple(optimizer)
        self._schedules = [schedule if probe.schedule is None else probe.schedule for probe in probes]
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._hook: Any = None
        self._step = start_step or 0
        self._recorder = _Led(
            self._together,
            path,
            self._recorded(),
            self._optimizers or None,
            probes=probes,
            schedule=schedule,
            start_step=start_step,
            **options,
        )

    @property
    def current_step(self) -> int:
        """Number of optimizer steps taken, on every rank."""
        return self._recorder.current_step if _leads() else self._step

    def start(self) -> Self:
        """Begin on every rank and record the present state if it is scheduled; ``with`` calls it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        with self._told():
            self._check()
        if self._is_due(self.current_step):
            self._gather()
        with self._told():
            if _leads():
                self._recorder.start()
        if not _leads() and self._optimizers:
            self._hook = self._optimizers[-1].register_step_post_hook(lambda *_: self.step())
        return self

    def close(self) -> None:
        """Commit everything recorded and end; ``with`` calls it, a second call does nothing."""
        self._detach()
        if _leads():
            self._recorder.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        if _leads():
            self._recorder.__exit__(kind, error, trace)

    def step(self) -> None:
        """Count one update and record if it is scheduled; called by the optimizer's hook, on every rank."""
        if _leads():
            self._recorder.step()
            return
        self._step += 1
        with self._together(self._step):
            pass

    def flush(self) -> None:
        """Commit everything recorded so far; only rank 0 has something to do, and nobody waits."""
        if _leads():
            self._recorder.flush()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _recorded(self) -> nn.Module:
        """Return the module that rank 0 records."""
        return self._model

    def _check(self) -> None:
        """Raise on rank 0 for a model that cannot be recorded."""
        if _leads():
            check_whole(self._model)

    def _gather(self) -> None:
        """Bring to rank 0 what it needs for a record; called on all ranks."""

    def _is_due(self, step: int) -> bool:
        return any(step in schedule for schedule in self._schedules)

    @contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """Wait for each other around a scheduled record."""
        if not self._is_due(step):
            yield
            return
        self._gather()
        with self._told():
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let all ranks know whether this went well on rank 0."""
        try:
            yield
        except Exception as error:
            if _leads():
                self._tell(f"{type(error).__name__}: {error}")
            raise
        failure = self._tell(None)
        if failure is not None:
            raise RuntimeError(f"recording failed on rank 0, so all ranks stop. {failure}")

    def _tell(self, failure: str | None) -> str | None:
        """Send the message of rank 0 to all ranks; doubles as the wait for its record."""
        if self._group is None:
            return None
        message = [failure]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return None if _leads() else message[0]


class FullyShardedRecorder(RankZeroRecorder):
    """Record a model sharded by FSDP2 (``fully_shard``) or tensor parallelism; make it on every rank.

    No rank holds the whole model, and products with the Hessian cannot be taken of
    parameters that are gathered and freed layer by layer. So at each scheduled step all
    ranks gather the parameters, one at a time, and rank 0 copies them into ``replica``:
    a plain module of the same architecture. Weights, metrics and curvature are recorded
    of the replica, with the numbers that a single process would find.

    Parameters
    ----------
    path, optimizer
        As for :class:`~hild_xr.recorders.Recorder`.
    model
        The sharded model.
    replica
        A module with the same parameters, not sharded, on the device where rank 0 is to
        take curvature; or a function that makes one, which is called on rank 0 only. It
        needs memory for the whole model, and for its curvature if that is recorded;
        with weights alone keep it on the CPU.
    **options
        As for :class:`RankZeroRecorder`.

    Raises
    ------
    ValueError
        On entry, on rank 0, if the parameters of the replica differ in name, shape or
        dtype; the first differences are listed.
    TypeError
        On entry, on rank 0, if the replica is sharded itself, or the model uses FSDP1.
    RuntimeError
        On the other ranks, as for :class:`RankZeroRecorder`.

    Warnings
    --------
    The replica has no gradients: a probe of one's own that reads ``.grad`` finds None.
    Buffers are those of rank 0.

    Examples
    --------
    Without ``torch.distributed`` the model is copied, and nothing else differs.

    >>> import tempfile
    >>> from hild_xr import recorders as rec
    >>> model = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with FullyShardedRecorder(
    ...     tempfile.mkdtemp() + "/run.zarr", model, sgd, replica=lambda: nn.Linear(2, 1),
    ...     probes=[rec.Weights()], schedule=rec.at([0, 1]),
    ... ) as recorder:
    ...     sgd.step()
    >>> recorder.current_step
    1
    """

    def __init__(
        self,
        path: StoreLike,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        replica: nn.Module | Callable[[], nn.Module],
        **options: Any,
    ) -> None:
        self._replica = unwrapped(_made(replica)) if _leads() else None
        super().__init__(path, model, optimizer, **options)

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _recorded(self) -> nn.Module:
        # the other ranks have no replica; their inner recorder is never started
        return self._model if self._replica is None else self._replica

    def _check(self) -> None:
        if self._replica is not None:
            check_whole(self._replica)
            _check_same_parameters(self._model, self._replica)
            self._copy_flags(self._replica)  # probes plan for the trainable layers

    @torch.no_grad()
    def _gather(self) -> None:
        copies = {} if self._replica is None else dict(self._replica.named_parameters())
        for name, parameter in self._model.named_parameters():
            # a collective where the parameter is sharded: every rank takes part, in the same order
            whole = _full_tensor(parameter)
            if self._replica is not None:
                copies[name].copy_(whole)
        if self._replica is not None:
            self._copy_flags(self._replica)
            self._copy_buffers(self._replica)

    def _copy_flags(self, replica: nn.Module) -> None:
        copies = dict(replica.named_parameters())
        for name, parameter in self._model.named_parameters():
            copies[name].requires_grad_(parameter.requires_grad)

    def _copy_buffers(self, replica: nn.Module) -> None:
        copies = dict(replica.named_buffers())
        for name, buffer in self._model.named_buffers():
            if name in copies:
                copies[name].copy_(buffer)


class _Led(Recorder):
    """The recorder of rank 0: the other ranks wait for its steps."""

    def __init__(
        self, together: Callable[[int], AbstractContextManager[None]], *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._together = together

    def step(self) -> None:
        with self._together(self.current_step + 1):
            super().step()


def _leads() -> bool:
    """Whether this process is the one that records."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _as_tuple(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        return ()
    several = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    return tuple(map(unwrapped_optimizer, several))


def _made(replica: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Make the replica; initial weights are drawn from random numbers that training never misses."""
    if isinstance(replica, nn.Module):
        return replica
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        return replica()


def _full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    if not is_sharded(parameter):
        return parameter
    device = parameter.device_mesh.device_type
    if parameter.device.type == device:
        return parameter.full_tensor()
    # shards offloaded to the CPU: the group of a GPU mesh cannot gather them there
    moved = parameter.to(device)
    return moved.full_tensor() if is_sharded(moved) else moved


def _check_same_parameters(model: nn.Module, replica: nn.Module) -> None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        check_whole(model)
    expected, found = (
        {name: (tuple(p.shape), p.dtype) for name, p in module.named_parameters()}
        for module in (model, replica)
    )
    names = [*expected, *(name for name in found if name not in expected)]
    different = [
        f"{name}: model {expected.get(name)}, replica {found.get(name)}"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    if different:
        raise ValueError(
            "the replica is not of the model's architecture; make it as the model was made, before "
            f"fully_shard. Parameters that differ: {'; '.join(different[:5])}"
            + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        )
