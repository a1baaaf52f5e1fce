"""Write the records of one seed: buffered blocks first, the commit marker last."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.core.sync import sync

from hild_xr.plan import ArrayPlan, ProbePlan, RunPlan
from hild_xr.store.backends import Location, StoreLike, written_whole, zarr_array, zarr_group
from hild_xr.store.create import create
from hild_xr.store.errors import MissingRecordsWarning, RecordsExistError, StoreWriteError
from hild_xr.store.lease import Lease

Record = Mapping[str, Mapping[str, ArrayLike]]
"""Values of one record: ``{node: {array name: value}}``, each at its planned shape."""


class RunWriter:
    """The one writer of one seed of a run.

    A record is buffered; when a block of any array of its probe is full, all
    arrays of the probe are written and then the probe's marker row is replaced
    in one atomic write (store contract, point 3). What is committed is never
    lost and never half visible.

    Parameters
    ----------
    target
        Path or zarr store; created from the plan if it is not there.
    plan
        What the run holds.
    seed
        One of the plan's seeds.
    resume_at
        None for a new seed. A step s to go on from a training state at step s:
        records up to and including s stay, later ones are withdrawn.
    flush_seconds
        Flush a probe that was not flushed for this long, at its next record.
    root_attrs
        Further attributes of the root if the store is created, e.g. provenance.

    Raises
    ------
    ValueError
        If the seed is not one of the plan's.
    RecordsExistError
        If the seed has records and ``resume_at`` is None.
    WriterBusyError
        If a live process writes the same seed.
    PlanMismatchError, NotAStoreError
        As :func:`hild_xr.store.create.create`.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.plan import NodePlan
    >>> arrays = {"train_loss": ArrayPlan(variable="train_loss")}
    >>> metrics = ProbePlan(steps=(0, 5), nodes={"": NodePlan(arrays=arrays)})
    >>> plan = RunPlan(seeds=(0,), probes={"metrics": metrics})
    >>> store = MemoryStore()
    >>> with RunWriter(store, plan, seed=0) as writer:
    ...     writer.write("metrics", 0, {"": {"train_loss": 2.3}})
    ...     writer.write("metrics", 5, {"": {"train_loss": 1.9}})
    >>> import zarr
    >>> zarr.open_group(store)["metrics/train_loss"][0].tolist()
    [2.299..., 1.89...]
    """

    def __init__(
        self,
        target: StoreLike,
        plan: RunPlan,
        seed: int,
        *,
        resume_at: int | None = None,
        flush_seconds: float = 30.0,
        root_attrs: Mapping[str, object] | None = None,
    ) -> None:
        if seed not in plan.seeds:
            raise ValueError(
                f"seed {seed} is not one of the planned seeds {plan.seeds}; plan it with seeds=..."
            )
        self.location: Location = create(target, plan, root_attrs=root_attrs)
        self._lease = Lease(self.location.path, seed) if self.location.path is not None else None
        try:
            root = zarr.open_group(self.location.store, mode="r+", use_consolidated=True)
            row = plan.seeds.index(seed)
            self._probes = {
                name: _ProbeWriter(
                    zarr_group(root, name), name, probe, row, flush_seconds, str(self.location)
                )
                for name, probe in plan.probes.items()
            }
            self._start(seed, resume_at)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, probe: str, step: int, record: Record) -> None:
        """Take one record of one probe; steps of a probe come in increasing order.

        Parameters
        ----------
        probe
            Name of the probe's group.
        step
            A planned step of the probe.
        record
            ``{node: {array: value}}`` with every planned array.

        Raises
        ------
        ValueError
            If the step is not planned or comes out of order, or an array is
            missing, unplanned or of another shape. Nothing of the record is kept.
        StoreWriteError
            If a flush fails, e.g. because the disk is full. Everything
            committed before stays as it is.
        """
        self._probes[probe].write(step, record)

    def holds(self, probe: str, step: int) -> bool:
        """Whether a planned step of a probe is recorded, or passed by."""
        return self._probes[probe].holds(step)

    def flush(self) -> None:
        """Write and commit everything buffered; a probe that fails does not hold up the others."""
        failed: list[StoreWriteError] = []
        for probe in self._probes.values():
            try:
                probe.flush()
            except StoreWriteError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Flush and give the lease back; a second call does nothing."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the lease back without flushing."""
        if self._lease is not None:
            self._lease.release()

    def _start(self, seed: int, resume_at: int | None) -> None:
        last = max(probe.last_committed_step() for probe in self._probes.values())
        if resume_at is None and last >= 0:
            raise RecordsExistError(
                f"seed {seed} already has records up to step {last} in {self.location}; nothing was "
                "changed. Record into another path, or go on from a checkpoint with resume=True, "
                "start_step=<its step>."
            )
        attempt = 1 + max(probe.last_attempt() for probe in self._probes.values())
        for probe in self._probes.values():
            probe.start(attempt, -1 if resume_at is None else resume_at)


class _ProbeWriter:
    """Buffers of one probe of one seed, and its marker row."""

    def __init__(
        self, group: zarr.Group, name: str, plan: ProbePlan, row: int, flush_seconds: float, where: str
    ) -> None:
        self._name, self._plan, self._row, self._where = name, plan, row, where
        self._index = {step: i for i, step in enumerate(plan.steps)}
        self._marker = written_whole(zarr_array(group, "committed"))
        self._committed: NDArray[np.uint16] = np.asarray(self._marker[row])
        self._buffers = {
            (node, array): _Buffer(written_whole(zarr_array(group, _place((node, array)))), planned, row)
            for node, array, planned in plan.arrays()
        }
        self._pending: list[int] = []
        self._flush_seconds = flush_seconds
        self._flushed_at = time.monotonic()

    def last_committed_step(self) -> int:
        """Return the last step that is committed, -1 if there is none."""
        there = np.flatnonzero(self._committed)
        return self._plan.steps[there[-1]] if len(there) else -1

    def last_attempt(self) -> int:
        return int(self._committed.max(initial=0))

    def start(self, attempt: int, keep_until: int) -> None:
        """Withdraw the records after ``keep_until`` in one write and reload the block it lies in."""
        self._attempt = attempt
        keep = int(np.searchsorted(self._plan.steps, keep_until, side="right"))
        self._committed[keep:] = 0
        # Also for a new seed: from here on a marker that is missing was lost, not never written.
        self._marker[self._row] = self._committed
        if keep and self._plan.steps[keep - 1] == keep_until and not self._committed[keep - 1]:
            keep -= 1  # the training state of this record is at hand again: it can be made now
        lost = int((self._committed[:keep] == 0).sum())
        if lost:
            warnings.warn(
                f"probe {self._name!r}: {lost} of the {keep} records planned before the checkpoint are not "
                f"in {self._where} and stay missing; call recorder.flush() with each checkpoint",
                MissingRecordsWarning,
                stacklevel=2,
            )
        self._next = keep
        for buffer in self._buffers.values():
            buffer.reload(keep)

    def holds(self, step: int) -> bool:
        return self._index[step] < self._next

    def write(self, step: int, record: Record) -> None:
        index = self._index.get(step)
        if index is None:
            raise ValueError(f"probe {self._name!r} has no record planned at step {step}")
        if index < self._next:
            raise ValueError(
                f"probe {self._name!r}: step {step} comes after step {self._plan.steps[self._next - 1]}"
            )
        values = self._checked(record)
        if self._pending and (
            self._is_overdue() or any(b.leaves_block(index) for b in self._buffers.values())
        ):
            self.flush()
        for key, buffer in self._buffers.items():
            buffer.put(index, values[key])
        self._pending.append(index)
        self._next = index + 1
        if any(buffer.ends_block(index) for buffer in self._buffers.values()):
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        try:
            if not sync(self._marker.store.exists(f"{self._marker.path}/zarr.json")):
                # zarr would write chunks into nowhere, which nothing could read
                raise FileNotFoundError("the store is gone: it was deleted or moved while it was written")
            for buffer in self._buffers.values():
                buffer.flush()
            marked = self._committed.copy()
            marked[self._pending] = self._attempt
            self._marker[self._row] = marked
        except Exception as error:
            first, last = (self._plan.steps[i] for i in (self._pending[0], self._pending[-1]))
            safe = self.last_committed_step()
            kept = "Nothing was committed before."
            if safe >= 0:
                kept = f"Everything committed before (up to step {safe}) is safe."
            raise StoreWriteError(
                f"could not write the records of probe {self._name!r} at steps {first} to {last} into "
                f"{self._where}: {error}. {kept} Mend the cause, then go on from a checkpoint with "
                "resume=True, start_step=<its step>."
            ) from error
        self._committed = marked
        self._pending.clear()
        self._flushed_at = time.monotonic()

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._flushed_at > self._flush_seconds

    def _checked(self, record: Record) -> dict[tuple[str, str], NDArray[np.generic]]:
        given = {(node, array): value for node, arrays in record.items() for array, value in arrays.items()}
        if given.keys() != self._buffers.keys():
            missing = sorted(_place(key) for key in self._buffers.keys() - given.keys())
            surplus = sorted(_place(key) for key in given.keys() - self._buffers.keys())
            raise ValueError(
                f"record of probe {self._name!r}: missing arrays {missing}, unplanned arrays {surplus}"
            )
        return {key: self._buffers[key].checked(_place(key), value) for key, value in given.items()}


class _Buffer:
    """The chunk-to-be of one array: all steps of the block that is being filled."""

    def __init__(self, array: zarr.Array[Any], plan: ArrayPlan, row: int) -> None:
        self._array, self._row = array, row
        self._shape, self._dtype, self._fill = plan.shape, np.dtype(plan.dtype), plan.fill_value
        # the store's own chunk length: an older version may have chosen another
        self._length = int(array.chunks[1])
        self._block = -1
        self._values: NDArray[np.generic] = np.empty(0)

    def checked(self, place: str, value: ArrayLike) -> NDArray[np.generic]:
        values = np.asarray(value)
        if values.shape != self._shape:
            raise ValueError(f"{place}: expected shape {self._shape}, got {values.shape}")
        return values.astype(self._dtype, copy=False)

    def leaves_block(self, index: int) -> bool:
        return self._block >= 0 and index // self._length != self._block

    def ends_block(self, index: int) -> bool:
        return (index + 1) % self._length == 0 or index + 1 == self._array.shape[1]

    def put(self, index: int, value: NDArray[np.generic]) -> None:
        """Copy one step's value into the block; the caller may change it afterwards."""
        if index // self._length != self._block:
            self._begin(index // self._length)
        self._values[index % self._length] = value

    def reload(self, keep: int) -> None:
        """Take the kept records of the part-filled block back, so that it is rewritten whole."""
        self._block = -1
        block, kept = divmod(keep, self._length)
        if kept:
            self._begin(block)
            start = block * self._length
            self._values[:kept] = self._array[self._row, start : start + kept]

    def flush(self) -> None:
        start = self._block * self._length
        stop = min(start + self._length, self._array.shape[1])
        self._array[self._row, start:stop] = self._values[: stop - start]

    def _begin(self, block: int) -> None:
        self._block = block
        self._values = np.full((self._length, *self._shape), self._fill, dtype=self._dtype)


def _place(key: tuple[str, str]) -> str:
    return "/".join(part for part in key if part)
