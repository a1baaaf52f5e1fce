"""Copy what a probe measured to the host, before the optimizer can change it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Measured = Mapping[str, Mapping[str, "ArrayLike | torch.Tensor"]]
"""What a probe returns: ``{node: {array name: value}}``, tensors on any device or arrays."""


POOLED_BYTES = 65_536
"""Tensors from this size on are copied into memory that earlier copies have given back."""

_Pool = defaultdict[tuple[torch.dtype, int], "deque[torch.Tensor]"]


@dataclass(frozen=True)
class HostCopy:
    """Values on their way to the host.

    Parameters
    ----------
    values
        ``{node: {array name: array}}``. Those of a GPU are filled when the events have passed.
    events
        What to wait for.
    """

    values: Mapping[str, Mapping[str, NDArray[np.generic]]]
    events: tuple[torch.cuda.Event, ...]
    _lent: tuple[torch.Tensor, ...]
    _pool: _Pool

    @property
    def nbytes(self) -> int:
        """Bytes held on the host."""
        return sum(array.nbytes for arrays in self.values.values() for array in arrays.values())

    def wait(self) -> Mapping[str, Mapping[str, NDArray[np.generic]]]:
        """Return the values once they are there; called by the writer thread, so training goes on."""
        for event in self.events:
            event.synchronize()
        return self.values

    def release(self) -> None:
        """Give the memory back for later copies; the values must not be used any more."""
        for memory in self._lent:
            self._pool[memory.dtype, memory.numel()].append(memory)


class HostCopier:
    """Take copies: at once from the CPU, on a side stream into pinned memory from a GPU.

    The side stream waits for what the training stream has queued so far, and the
    training stream waits for the copies before it runs what comes later. So the
    copy holds the state of this step, and the CPU thread waits for nothing.

    Memory of large copies is used again: fresh memory costs several times the copy
    in page faults, and giving it back would unsettle the allocator under training.

    Examples
    --------
    >>> weight = torch.zeros(2)
    >>> copy = HostCopier().take({"fc.weight": {"weight": weight}})
    >>> weight.add_(1)
    tensor([1., 1.])
    >>> copy.wait()["fc.weight"]["weight"]
    array([0., 0.], dtype=float32)
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: _Pool = defaultdict(deque)

    def take(self, measured: Measured) -> HostCopy:
        """Copy all values; arrays too, since they may be views of live weights."""
        used = {
            value.device: self._stream(value.device)
            for arrays in measured.values()
            for value in arrays.values()
            if isinstance(value, torch.Tensor) and value.is_cuda
        }
        for device, stream in used.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        lent: list[torch.Tensor] = []
        values = {
            node: {name: self._copied(value, lent) for name, value in arrays.items()}
            for node, arrays in measured.items()
        }
        events = []
        for device, stream in used.items():
            events.append(stream.record_event())
            torch.cuda.current_stream(device).wait_event(events[-1])
        return HostCopy(values, tuple(events), tuple(lent), self._pool)

    def _copied(self, value: ArrayLike | torch.Tensor, lent: list[torch.Tensor]) -> NDArray[np.generic]:
        if not isinstance(value, torch.Tensor):
            return np.array(value)
        source = value.detach()
        if source.nbytes < POOLED_BYTES and not source.is_cuda:
            return to_numpy(source)
        memory = self._memory(source)
        lent.append(memory)
        host = memory.view(source.shape)
        if source.is_cuda:
            with torch.cuda.stream(self._streams[source.device]):
                host.copy_(source, non_blocking=True)
            # its memory must not go to another tensor of the training stream before the copy is made
            source.record_stream(self._streams[source.device])
        else:
            host.copy_(source)
        array: NDArray[np.generic] = host.numpy()
        return array

    def _memory(self, source: torch.Tensor) -> torch.Tensor:
        dtype = _host_dtype(source)
        try:
            return self._pool[dtype, source.numel()].pop()
        except IndexError:
            # What lies idle is of other sizes: it goes, so that all copies together stay within what the
            # queue holds.
            self._pool.clear()
            with torch.inference_mode(False):  # or it could only be filled in that mode
                return torch.empty(source.numel(), dtype=dtype, pin_memory=source.is_cuda)

    def clear(self) -> None:
        """Let go of the memory that is kept for later copies."""
        self._pool.clear()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def to_numpy(tensor: torch.Tensor) -> NDArray[np.generic]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32.

    Examples
    --------
    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype('float32')
    """
    # copy: .numpy() of a CPU tensor aliases the live weights, which change at the next step
    copied = tensor.detach().to("cpu", _host_dtype(tensor), copy=True)
    array: NDArray[np.generic] = copied.numpy()
    return array


def numpy_dtype(tensor: torch.Tensor) -> str:
    """Name of the dtype under which a tensor is copied to the host.

    Examples
    --------
    >>> numpy_dtype(torch.zeros(1))
    'float32'
    """
    return str(to_numpy(tensor.detach().reshape(-1)[:0]).dtype)


def _host_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
