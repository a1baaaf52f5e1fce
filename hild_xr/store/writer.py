"""Write the records of one seed: buffered blocks first, the commit marker last."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from hild_xr.plan import ProbePlan, RunPlan
from hild_xr.store.backends import Location, StoreLike, locate, zarr_array, zarr_group
from hild_xr.store.block import Block, check_codecs, chunk_key, encoded, put_chunks, sweep_partial
from hild_xr.store.create import create
from hild_xr.store.durable import durable_location, sync_tree
from hild_xr.store.errors import (
    DamagedRecordError,
    MissingRecordsWarning,
    RecordsExistError,
    StoreError,
    StoreWriteError,
    WriterBusyError,
)
from hild_xr.store.lease import Lease, lease_for
from hild_xr.store.raw import exists, read_keys, write_keys

MAX_ATTEMPT = int(np.iinfo(np.uint16).max)
"""Markers hold numbers up to this."""

Record = Mapping[str, Mapping[str, ArrayLike]]
"""Values of one record: ``{node: {array name: value}}``, each at its planned shape."""


class RunWriter:
    """The one writer of one seed of a run.

    A record is buffered; when a block of any array of its probe is full, all
    arrays of the probe are written and then the probe's marker row is replaced
    in one atomic write (store contract, point 3). What is committed is never
    lost and never half visible.

    One thread at a time uses a writer; it need not be the one that made it.

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
        Flush a probe that holds a record for this long, when the next record of any probe comes.
    root_attrs
        Further attributes of the root if the store is created, e.g. provenance.
    durable
        Outlive a power failure too: in a local folder every file and its folder
        are synced to the disk before the marker moves, and the marker likewise.
        Without it what is committed outlives the process, however that ends, but
        not the machine. An object store answers a write only when it is durable,
        so there the option changes nothing.

    Raises
    ------
    ValueError
        If the seed is not one of the plan's, or ``durable`` is asked of a store
        that cannot be, such as one in memory.
    RecordsExistError
        If the seed has records and ``resume_at`` is None.
    WriterBusyError
        If a live process writes the same seed. Where a file lock tells a dead
        process from a live one (a local folder), that is known at once; elsewhere
        it takes up to :data:`hild_xr.store.store_lease.TAKEOVER_SECONDS`.
    PlanMismatchError, NotAStoreError
        As :func:`hild_xr.store.create.create`.
    DamagedRecordError
        If a record that is to be kept shares a file with new ones and cannot be
        read. Nothing is changed then.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.plan import ArrayPlan, NodePlan
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
        durable: bool = False,
    ) -> None:
        if seed not in plan.seeds:
            raise ValueError(
                f"seed {seed} is not one of the planned seeds {plan.seeds}; plan it with seeds=..."
            )
        location = durable_location(locate(target)) if durable else locate(target)
        self.location: Location = create(location, plan, root_attrs=root_attrs)
        if durable and location.path is not None:
            sync_tree(location.path)  # also what an earlier writer left to the operating system
        self._seed, self._closed = seed, False
        self._lease: Lease | None = lease_for(self.location, plan, seed)
        try:
            root = zarr.open_group(self.location.store, mode="r+", use_consolidated=True)
            row = plan.seeds.index(seed)
            self._probes = {
                name: _ProbeWriter(
                    zarr_group(root, name),
                    name,
                    probe,
                    row,
                    flush_seconds=flush_seconds,
                    where=str(self.location),
                    check=self._check_lease,
                    commit=self._commit,
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
            If the probe or the step is not planned, the step comes out of order,
            an array is missing, unplanned or of another shape, or the writer is
            closed. Nothing of the record is kept.
        StoreWriteError
            If a flush fails, e.g. because the disk is full, or because another
            process took the seed over. Everything committed before stays as it
            is, and what is buffered stays buffered: a later flush writes it if
            the cause is gone. Whether this record is in the buffer says
            :meth:`holds`; if it is not, write it again.
        """
        if self._closed:
            raise ValueError(
                f"the writer of {self._what()} is closed; make a new RunWriter with resume_at=..."
            )
        self._probe(probe).write(step, record)
        for other in self._probes.values():
            if other.is_overdue():  # one that records rarely waits for no next record of its own
                other.flush()

    def holds(self, probe: str, step: int) -> bool:
        """Whether a planned step of a probe is recorded, or passed by.

        Raises
        ------
        ValueError
            If the probe or the step is not planned.
        """
        return self._probe(probe).holds(step)

    def flush(self) -> None:
        """Write and commit everything buffered; a probe that fails does not hold up the others.

        Raises
        ------
        StoreWriteError
            If a probe could not be written.
        ValueError
            If the writer was closed before everything was written.
        """
        if self._closed:
            if any(probe.is_pending() for probe in self._probes.values()):
                raise ValueError(f"the writer of {self._what()} was closed before everything was written")
            return
        failed: list[StoreWriteError] = []
        for probe in self._probes.values():
            try:
                probe.flush()
            except StoreWriteError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Flush and give the lease back, also if the flush fails; a second call does nothing.

        Raises
        ------
        StoreWriteError
            If a probe could not be written.
        """
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the lease back without flushing; nothing can be written afterwards."""
        self._closed = True
        if self._lease is not None:
            self._lease.release()

    def _what(self) -> str:
        return f"seed {self._seed} of {self.location}"

    def _probe(self, name: str) -> _ProbeWriter:
        if name not in self._probes:
            raise ValueError(f"no probe {name!r} is planned; the plan has {sorted(self._probes)}")
        return self._probes[name]

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _commit(self, done: str) -> None:
        self.location.commit(f"seed {self._seed}: {done}")

    def _start(self, seed: int, resume_at: int | None) -> None:
        last = max(probe.last_committed_step() for probe in self._probes.values())
        if resume_at is None and last >= 0:
            raise RecordsExistError(
                f"seed {seed} already has records up to step {last} in {self.location}; nothing was "
                "changed. Record into another path, or go on from a checkpoint with resume=True, "
                "start_step=<its step>."
            )
        seen = max(probe.last_attempt() for probe in self._probes.values())
        # Icechunk takes no lease: its readers see one snapshot, whatever number comes later
        attempt = 1 + seen if self._lease is None else self._lease.next_attempt(seen)
        if attempt > MAX_ATTEMPT:
            raise StoreError(
                f"seed {seed} of {self.location} was begun {MAX_ATTEMPT} times; use another store"
            )
        for probe in self._probes.values():
            probe.prepare(-1 if resume_at is None else resume_at)
        for probe in self._probes.values():
            probe.start(attempt)
        self._commit(f"attempt {attempt} begins")


class _ProbeWriter:
    """Blocks of one probe of one seed, and its marker row.

    ``check`` raises WriterBusyError once the seed is another's; ``commit`` takes a sentence on what was done.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        plan: ProbePlan,
        row: int,
        *,
        flush_seconds: float,
        where: str,
        check: Callable[[], None],
        commit: Callable[[str], None],
    ) -> None:
        self._check, self._commit = check, commit
        self._name, self._plan, self._row, self._where = name, plan, row, where
        self._index = {step: i for i, step in enumerate(plan.steps)}
        self._marker = zarr_array(group, "committed")
        check_codecs(self._marker)
        self._blocks = {
            (node, array): Block(zarr_array(group, _place((node, array))), planned, row)
            for node, array, planned in plan.arrays()
        }
        self._marker_key = chunk_key(self._marker, (row, 0))
        self._committed = self._stored_marker()
        self._own_markers: list[bytes] = []
        self._pending: list[int] = []
        self._flush_seconds = flush_seconds
        self._pending_since = math.inf

    def _stored_marker(self) -> NDArray[np.uint16]:
        store = self._marker.store
        try:
            committed: NDArray[np.uint16] = np.asarray(self._marker[self._row])
        except ValueError as error:
            raise DamagedRecordError(
                f"{self._marker_key} in {self._where}: {error}. Restore it from a backup"
            ) from error
        if not exists(store, self._marker_key) and any(
            exists(store, b.first_key()) for b in self._blocks.values()
        ):
            raise DamagedRecordError(
                f"{self._marker_key} in {self._where} is missing, though records were written. Restore it "
                "from a backup, or record this seed into another store"
            )
        return committed

    def last_committed_step(self) -> int:
        """Return the last step that is committed, -1 if there is none."""
        there = np.flatnonzero(self._committed)
        return self._plan.steps[there[-1]] if len(there) else -1

    def last_attempt(self) -> int:
        return int(self._committed.max(initial=0))

    def prepare(self, keep_until: int) -> None:
        """Reload the block that ``keep_until`` lies in; nothing is changed yet.

        Raises
        ------
        DamagedRecordError
            If a committed record of it cannot be read.
        """
        self._kept = int(np.searchsorted(self._plan.steps, keep_until, side="right"))
        keep = self._kept
        if keep and self._plan.steps[keep - 1] == keep_until and not self._committed[keep - 1]:
            keep -= 1  # the training state of this record is at hand again: it can be made now
        self._next = keep
        for block in self._blocks.values():
            try:
                block.reload(keep, self._committed > 0)
            except DamagedRecordError as error:
                raise DamagedRecordError(
                    f"cannot go on after step {keep_until} in {self._where}, nothing was changed: {error}. "
                    "Restore the file from a backup, or resume from an earlier checkpoint whose records do "
                    "not share a file with the damaged ones; hild-xr validate lists all damage"
                ) from error

    def start(self, attempt: int) -> None:
        """Withdraw in one write what comes after the step that was prepared for."""
        self._attempt = attempt
        self._committed[self._kept :] = 0
        # Also for a new seed: from here on a marker that is missing was lost, not never written.
        self._mark(self._committed)
        sweep_partial(self._marker, self._row)
        for block in self._blocks.values():
            block.sweep()
        lost = int((self._committed[: self._next] == 0).sum())
        if lost:
            warnings.warn(
                f"probe {self._name!r}: {lost} of the {self._next} records planned before the checkpoint are "
                f"not in {self._where} and stay missing; call recorder.flush() with each checkpoint",
                MissingRecordsWarning,
                stacklevel=2,
            )

    def holds(self, step: int) -> bool:
        return self._planned(step) < self._next

    def is_overdue(self) -> bool:
        """Whether something is buffered for longer than it should be."""
        return self.is_pending() and time.monotonic() - self._pending_since > self._flush_seconds

    def is_pending(self) -> bool:
        """Whether something is buffered that is not committed."""
        return bool(self._pending)

    def write(self, step: int, record: Record) -> None:
        index = self._planned(step)
        if index < self._next:
            raise ValueError(
                f"probe {self._name!r}: step {step} comes after step {self._plan.steps[self._next - 1]}"
            )
        values = self._checked(record)
        if any(block.leaves(index) for block in self._blocks.values()):
            self.flush()
        for key, block in self._blocks.items():
            block.put(index, values[key])
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(index)
        self._next = index + 1
        if any(block.ends(index) for block in self._blocks.values()):
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        first, last = (self._plan.steps[i] for i in (self._pending[0], self._pending[-1]))
        records = f"the records of probe {self._name!r} at steps {first} to {last}"
        try:
            self._check()
            if not exists(self._marker.store, f"{self._marker.path}/zarr.json"):
                # zarr would write chunks into nowhere, which nothing could read
                raise FileNotFoundError("the store is gone: it was deleted or moved while it was written")
            put_chunks(self._marker.store, (c for block in self._blocks.values() for c in block.chunks()))
            marked = self._replace_marker()
            self._commit(f"{self._name}, steps {first} to {last}")
        except WriterBusyError as error:
            raise StoreWriteError(
                f"{records} were not written into {self._where}: {error}. "
                "Stop this training, or record it into another store."
            ) from error
        except Exception as error:
            for block in self._blocks.values():
                block.keep()
            safe = self.last_committed_step()
            kept = "Nothing was committed before."
            if safe >= 0:
                kept = f"Everything committed before (up to step {safe}) is safe."
            raise StoreWriteError(
                f"could not write {records} into {self._where}: {error}. {kept} Mend the cause, then go on "
                "from a checkpoint with resume=True, start_step=<its step>."
            ) from error
        self._committed = marked
        self._pending.clear()

    def _replace_marker(self) -> NDArray[np.uint16]:
        # Again, for the blocks may have taken long. The row itself tells of a writer that no lease held off.
        self._check()
        (stored,) = read_keys(self._marker.store, [self._marker_key])
        if stored not in self._own_markers:
            raise WriterBusyError("another process has written this seed meanwhile: its marker has changed")
        marked = self._committed.copy()
        marked[self._pending] = self._attempt
        self._mark(marked)
        return marked

    def _planned(self, step: int) -> int:
        if step not in self._index:
            raise ValueError(f"probe {self._name!r} has no record planned at step {step}")
        return self._index[step]

    def _mark(self, committed: NDArray[np.uint16]) -> None:
        """Replace the marker row in one atomic write."""
        row = b"".join(encoded(committed.astype("<u2")))
        self._own_markers.append(row)  # before: a write that fails may have arrived all the same
        write_keys(self._marker.store, [(self._marker_key, [row])])
        del self._own_markers[:-1]

    def _checked(self, record: Record) -> dict[tuple[str, str], NDArray[np.generic]]:
        given = {(node, array): value for node, arrays in record.items() for array, value in arrays.items()}
        if given.keys() != self._blocks.keys():
            missing = sorted(_place(key) for key in self._blocks.keys() - given.keys())
            surplus = sorted(_place(key) for key in given.keys() - self._blocks.keys())
            raise ValueError(
                f"record of probe {self._name!r}: missing arrays {missing}, unplanned arrays {surplus}"
            )
        return {key: self._blocks[key].checked(_place(key), value) for key, value in given.items()}


def _place(key: tuple[str, str]) -> str:
    return "/".join(part for part in key if part)
