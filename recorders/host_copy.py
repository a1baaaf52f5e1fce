"""Copy what a probe measured to the host, before the optimizer can change it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Measured = Mapping[str, Mapping[str, "ArrayLike | torch.Tensor"]]
"""What a probe returns: ``{node: {array name: value}}``, tensors on any device or arrays."""


_Pool = defaultdict[tuple[np.dtype[Any], int], "deque[NDArray[Any]]"]


@dataclass(slots=True)
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
    events: Sequence[torch.cuda.Event]
    _lent: Sequence[NDArray[Any]]
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
            self._pool[memory.dtype, memory.size].append(memory)


class HostCopier:
    """Take copies: at once from the CPU, on a side stream into pinned memory from a GPU.

    The side stream waits for what the training stream has queued so far, and the
    training stream waits for the copies before it runs what comes later. So the
    copy holds the state of this step, and the CPU thread waits for nothing.

    Memory of copies is used again: fresh memory costs several times the copy in page
    faults, and small pieces held between the tensors of training unsettle its allocator.

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
        lent: list[NDArray[Any]] = []
        used: dict[torch.device, torch.cuda.Stream] = {}
        values = {
            node: {name: self._copied(value, lent, used) for name, value in arrays.items()}
            for node, arrays in measured.items()
        }
        events = []
        for device, stream in used.items():
            events.append(stream.record_event())
            torch.cuda.current_stream(device).wait_event(events[-1])
        return HostCopy(values, events, lent, self._pool)

    def _copied(
        self,
        value: ArrayLike | torch.Tensor,
        lent: list[NDArray[Any]],
        used: dict[torch.device, torch.cuda.Stream],
    ) -> NDArray[np.generic]:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return self._from_gpu(value, lent, used)
        source = _as_array(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        host = self._memory(source.dtype, source.size, pinned=False)
        lent.append(host)
        copied = host.reshape(source.shape)
        # by NumPy: torch's dispatch of a copy takes longer than all the rest of a small record
        np.copyto(copied, source)
        return copied

    def _from_gpu(
        self, value: torch.Tensor, lent: list[NDArray[Any]], used: dict[torch.device, torch.cuda.Stream]
    ) -> NDArray[np.generic]:
        host = self._memory(np.dtype(numpy_dtype(value)), value.numel(), pinned=True)
        lent.append(host)
        copied = host.reshape(value.shape)
        stream = self._stream(value.device, used)
        with torch.cuda.stream(stream):
            torch.from_numpy(copied).copy_(value.detach(), non_blocking=True)
        # its memory must not go to another tensor of the training stream before the copy is made
        value.record_stream(stream)
        return copied

    def _memory(self, dtype: np.dtype[Any], size: int, *, pinned: bool) -> NDArray[Any]:
        try:
            return self._pool[dtype, size].pop()
        except IndexError:
            # What lies idle is of other sizes: it goes, so that all copies together stay within what the
            # queue holds.
            self._pool.clear()
        if not pinned:
            return np.empty(size, dtype)
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        with torch.inference_mode(False):  # or it could only be filled in that mode
            memory: NDArray[Any] = torch.empty(size, dtype=torch_dtype, pin_memory=True).numpy()
        return memory

    def clear(self) -> None:
        """Let go of the memory that is kept for later copies."""
        self._pool.clear()

    def _stream(self, device: torch.device, used: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
        """Side stream of a device; at its first use for a record it waits for what training has queued."""
        if device not in used:
            used[device] = self._streams.setdefault(device, torch.cuda.Stream(device))
            used[device].wait_stream(torch.cuda.current_stream(device))
        return used[device]


def to_numpy(tensor: torch.Tensor) -> NDArray[np.generic]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32.

    Examples
    --------
    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype('float32')
    """
    # copy: .numpy() of a CPU tensor aliases the live weights, which change at the next step
    return np.array(_as_array(tensor))


def numpy_dtype(tensor: torch.Tensor) -> str:
    """Name of the dtype under which a tensor is copied to the host.

    Examples
    --------
    >>> numpy_dtype(torch.zeros(1))
    'float32'
    """
    return str(_as_array(tensor.detach().reshape(-1)[:0]).dtype)


def _as_array(tensor: torch.Tensor) -> NDArray[np.generic]:
    """Make an array that may share the tensor's memory."""
    array: NDArray[np.generic]
    try:
        array = tensor.numpy()  # takes a fifth of the time that force=True takes
    except (RuntimeError, TypeError):  # part of a graph, a lazy conjugate, or a dtype that NumPy lacks
        known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        array = known.numpy(force=True)
    return array
