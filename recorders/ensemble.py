"""Record many seeds that are trained as one by ``torch.func.vmap``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import Probe
from hild_xr.recorders.recorder import QUEUE_BYTES, Recorder
from hild_xr.recorders.schedule import Schedule
from hild_xr.recorders.wrappers import unwrapped_optimizer
from hild_xr.store import StoreError, StoreLike

Stacked = Mapping[str, torch.Tensor]
"""Tensors by qualified name, members along the first axis: what ``torch.func.stack_module_state`` gives."""


class EnsembleRecorder:
    """Record the members of a vmapped ensemble, each as a seed of one store.

    The store is the one that as many processes with a :class:`Recorder` each
    would write. At a scheduled step every member's slice is copied into one
    replica of the model, of which the probes record.

    Parameters
    ----------
    path
        As for :class:`Recorder`.
    model
        One module of the architecture, on any device including ``meta``; it is copied.
    parameters, buffers
        Stacked tensors, updated in place by the training; if the training replaces
        them, hand the new ones to :meth:`step`.
    optimizer
        The optimizer of the stacked parameters; its updates are counted. Without
        one, call :meth:`step` after each update.
    objective
        Fixed data and loss: one for all members, or one a member.
    probes, schedule, config, progress, check_space, durable
        As for :class:`Recorder`.
    seeds
        The seed of each member, in the order of the stack.
    resume, start_step
        As for :class:`Recorder`, for all members at once.
    queue_bytes
        Bound on the memory of records that wait for the disk, all members together.

    Raises
    ------
    ValueError
        If the stacks, the seeds and the objectives differ in length, or the stack
        lacks a parameter of the model.
    PlanMismatchError, RecordsExistError, WriterBusyError, NotEnoughSpaceError, StoreWriteError
        As for :class:`Recorder`.

    Examples
    --------
    >>> import tempfile
    >>> from hild_xr import recorders as rec
    >>> models = [nn.Linear(2, 1) for _ in range(3)]
    >>> parameters, buffers = torch.func.stack_module_state(models)
    >>> sgd = torch.optim.SGD(parameters.values(), lr=0.1)
    >>> def loss(p, b):
    ...     return torch.func.functional_call(models[0], (p, b), (torch.ones(4, 2),)).square().mean()
    >>> path = tempfile.mkdtemp() + "/run.zarr"
    >>> with EnsembleRecorder(
    ...     path, models[0], parameters, buffers, sgd,
    ...     probes=[rec.Weights()], schedule=rec.every(1, total_steps=5), seeds=range(3),
    ... ):
    ...     for _ in range(5):
    ...         sgd.zero_grad()
    ...         torch.vmap(loss)(parameters, buffers).sum().backward()
    ...         none = sgd.step()
    >>> import hild_xr as hx
    >>> dict(hx.open(path)["weights/weight"].weight.sizes)
    {'seed': 3, 'step': 6, 'out': 1, 'in': 2}
    """

    def __init__(
        self,
        path: StoreLike,
        model: nn.Module,
        parameters: Stacked,
        buffers: Stacked | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        objective: Objective | Sequence[Objective] | None = None,
        probes: Sequence[Probe],
        schedule: Schedule,
        seeds: Iterable[int],
        config: Mapping[str, JsonValue] | None = None,
        resume: bool = False,
        start_step: int | None = None,
        progress: bool | None = None,
        queue_bytes: int = QUEUE_BYTES,
        check_space: bool = True,
        durable: bool = False,
    ) -> None:
        self._seeds = tuple(seeds)
        if not self._seeds:
            raise ValueError("an ensemble needs a seed for each member; seeds is empty")
        self._parameters, self._buffers = parameters, buffers or {}
        self._optimizer = optimizer
        self._replica = self._make_replica(model)
        objectives = objective if isinstance(objective, Sequence) else [objective] * len(self._seeds)
        if len(objectives) != len(self._seeds):
            raise ValueError(
                f"expected one objective a member: {len(objectives)} for {len(self._seeds)} seeds"
            )
        self._members = [
            _Member(
                path,
                self._replica,
                optimizer,
                objective=own,
                probes=probes,
                schedule=schedule,
                seed=seed,
                seeds=self._seeds,
                config=config,
                resume=resume,
                start_step=start_step,
                progress=progress if i == 0 else False,
                queue_bytes=queue_bytes // len(self._seeds),
                check_space=check_space and i == 0,
                durable=durable,
            )
            for i, (seed, own) in enumerate(zip(self._seeds, objectives, strict=True))
        ]
        self._hook: Any = None

    @property
    def current_step(self) -> int:
        """Number of optimizer steps taken."""
        return self._members[0].current_step

    def start(self) -> EnsembleRecorder:
        """Create or join the store and record the present state if it is scheduled; ``with`` calls it."""
        with ExitStack() as started:
            for i, member in enumerate(self._members):
                self._load(i)
                member.start()
                started.callback(member.abandon)
            if self._optimizer is not None:
                optimizer = unwrapped_optimizer(self._optimizer)
                self._hook = optimizer.register_step_post_hook(lambda *_: self.step())
            started.pop_all()
        return self

    def step(self, parameters: Stacked | None = None, buffers: Stacked | None = None) -> None:
        """Count one update of the ensemble and record if it is scheduled.

        Parameters
        ----------
        parameters, buffers
            New stacks, where the training does not update in place.

        Raises
        ------
        StoreWriteError
            If an earlier record could not be written.
        """
        if parameters is not None:
            self._parameters = parameters
        if buffers is not None:
            self._buffers = buffers
        # All are counted before any is measured: whatever happens to one, no label of another is wrong.
        for member in self._members:
            member.count()
        if not self._members[0].is_scheduled(self.current_step):
            return
        with ExitStack() as recording:  # an error of one member keeps no other from its record
            for i in reversed(range(len(self._members))):
                recording.callback(self._record, i)

    def flush(self) -> None:
        """Commit everything recorded so far; call it with each checkpoint that you may resume from."""
        for member in self._members:
            member.flush()

    def close(self) -> None:
        """Commit everything recorded and end; every member is closed, also if another one fails."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        with ExitStack() as closing:
            for member in self._members:
                closing.callback(member.close)

    def __enter__(self) -> EnsembleRecorder:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failed:
            if failed is not error:
                raise

    def _make_replica(self, model: nn.Module) -> nn.Module:
        self._check_stack("parameter", dict(model.named_parameters()), self._parameters)
        self._check_stack("buffer", dict(model.named_buffers()), self._buffers)
        replica = copy.deepcopy(model)
        if any(tensor.is_meta for tensor in replica.parameters()):
            replica = replica.to_empty(device=next(iter(self._parameters.values())).device)
        for name, parameter in replica.named_parameters():
            parameter.requires_grad_(self._parameters[name].requires_grad)
        return replica

    def _check_stack(self, kind: str, own: Stacked, stacks: Stacked) -> None:
        wanted = {name: (len(self._seeds), *tensor.shape) for name, tensor in own.items()}
        given = {name: tuple(stack.shape) for name, stack in stacks.items()}
        different = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{kind} {name!r} of {len(self._seeds)} stacked members: expected shape {wanted.get(name)}, "
                f"got {given.get(name)}; make the stacks with torch.func.stack_module_state(models)"
            )

    def _record(self, member: int) -> None:
        self._load(member)
        self._members[member].record()

    @torch.no_grad()
    def _load(self, member: int) -> None:
        """Copy one member's slice into the replica."""
        for stacks, own in (
            (self._parameters, self._replica.named_parameters()),
            (self._buffers, self._replica.named_buffers()),
        ):
            for name, tensor in own:
                tensor.copy_(stacks[name][member])


class _Member(Recorder):
    """One seed; the ensemble says when to count and when to record."""

    def count(self) -> None:
        self._live_writer()
        self.current_step += 1

    def record(self) -> None:
        self._record_scheduled()

    def _attach(self) -> None:
        pass
