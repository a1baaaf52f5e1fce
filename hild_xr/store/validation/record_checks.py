"""Read the records of one probe and seed block by block: lost chunks, checksums, impossible numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from hild_xr.plan import OWN_NODE, ArrayPlan, ProbePlan
from hild_xr.store.validation.chunk_checks import UNREADABLE, StoredRun, chunk_key, chunk_nbytes, in_words
from hild_xr.store.validation.findings import Finding, Severity
from hild_xr.store.validation.metadata_checks import MARKER, order_of, path_of
from hild_xr.store.validation.number_checks import ORDERS, FaultKind, faults
from hild_xr.variables import DIM_LAYER

_LOST, _DAMAGED = "lost", "damaged"
_RESTORE_CHUNK = "restore it from a backup, or record the seed again"
_DISTRUST = "do not use these records; record the seed again"
_ADVICE = {
    FaultKind.claimed: _DISTRUST,
    FaultKind.infinite: _DISTRUST,
    FaultKind.skewed: _DISTRUST,
    FaultKind.unsorted: "sort the pairs before use; what wrote them ignores the group's attribute 'which'",
    FaultKind.skewed_unconverged: "leave out pairs that are not flagged converged",
    FaultKind.missing: "training diverged there, or the record was marked missing; nothing needs to be done",
}
_NOTES = (FaultKind.skewed_unconverged, FaultKind.missing)


@dataclass
class _Tally:
    """How often something is wrong with one array of one seed; the first place and reason stand for all."""

    place: str
    reason: str
    records: NDArray[np.bool_]
    chunks: int = 0
    worst: float = 0.0
    arrays: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Array:
    """One array of the probe: where, what is planned, what is stored."""

    path: str
    node: str
    plan: ArrayPlan
    stored: zarr.Array[Any]
    existing: NDArray[np.bool_]

    @property
    def length(self) -> int:
        """Steps in a chunk."""
        return int(self.stored.chunks[1])


class RecordCheck:
    """The check of one probe and one seed.

    Memory holds one block of one array at a time, beside the flags of converged
    pairs for the steps at hand.

    Parameters
    ----------
    run
        The run; its chunks are listed and its markers read.
    name
        Probe.
    row
        Index of the seed.
    seen
        Called with the number of bytes of each block that was read.
    """

    def __init__(self, run: StoredRun, name: str, row: int, seen: Callable[[int], object]) -> None:
        self._run, self._name, self._row, self._seen = run, name, row, seen
        self._probe: ProbePlan = run.plan.probes[name]
        self._committed = run.attempts[name, row] > 0
        self._arrays = [
            _Array(path, node, plan, run.arrays[path], run.existing[path][row])
            for node, label, plan in self._probe.arrays()
            if (path := path_of(name, node, label)) in run.arrays
        ]
        self._flags = _ConvergedFlags(run, name, row)
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def findings(self) -> Iterator[Finding]:
        """Read everything and say what was found."""
        steps = len(self._committed)
        # windows of whole blocks of the small arrays: their flags are read once for all large arrays
        window = max((array.length for array in self._arrays), default=steps)
        for start in range(0, steps, window):
            self._flags.forget()
            for array in self._arrays:
                first, stop = (-(-index // array.length) for index in (start, min(start + window, steps)))
                for block in range(first, stop):
                    self._check(array, block)
        if self._was_withdrawn():
            place, seed = chunk_key(f"{self._name}/{MARKER}", self._row, 0), self._run.plan.seeds[self._row]
            yield Finding(
                "note", place, "the seed was resumed while it was validated", "validate again", seed
            )
            return
        for (kind, _), tally in self._tallies.items():
            yield self._worded(kind, tally)

    # ------------------------------------------------------------------------ one block

    def _check(self, array: _Array, block: int) -> None:
        start = block * array.length
        stop = min(start + array.length, len(self._committed))
        there, held = self._committed[start:stop], np.atleast_1d(array.existing[block])
        lost = int(held.size - held.sum()) if there.any() else 0
        if lost:
            self._tally(_LOST, array, start, there, place=_first_key(array, self._row, block), chunks=lost)
        if not held.any():
            return
        try:
            values = np.asarray(array.stored[self._row, start:stop])
        except UNREADABLE:
            self._find_damage(array, block)
        else:
            if there.any() and not lost:
                self._judge(array, start, there, values)
        self._seen(int(held.sum()) * chunk_nbytes(array.stored))

    def _judge(self, array: _Array, start: int, there: NDArray[np.bool_], values: NDArray[Any]) -> None:
        which = order_of(self._probe)
        found = faults(
            array.plan,
            values if there.all() else values[there],
            converged=self._flags.at(array.node, start, there),
            which=which if which in ORDERS else None,
        )
        for fault in found:
            records = np.zeros(len(there), dtype=bool)
            records[there] = fault.records
            # one note for all arrays of a probe: where training diverged it is in all of them
            place = self._name if fault.kind is FaultKind.missing else array.path
            self._tally(fault.kind, array, start, records, place=place, worst=fault.worst)

    def _find_damage(self, array: _Array, block: int) -> None:
        """Read a block that holds damage chunk by chunk."""
        for rest in np.argwhere(np.atleast_1d(array.existing[block])):
            place = (self._row, block, *rest.tolist())[: array.stored.ndim]
            region = tuple(
                slice(i * length, (i + 1) * length)
                for i, length in zip(place, array.stored.chunks, strict=True)
            )
            try:
                array.stored[region]
            except UNREADABLE as error:
                start = region[1].start
                records = np.ones(min(array.length, len(self._committed) - start), dtype=bool)
                key = chunk_key(array.path, *place)
                self._tally(_DAMAGED, array, start, records, place=key, reason=in_words(error), chunks=1)

    # ------------------------------------------------------------------------ counting

    def _tally(
        self,
        kind: str,
        array: _Array,
        start: int,
        records: NDArray[np.bool_],
        *,
        place: str,
        reason: str = "",
        chunks: int = 0,
        worst: float = 0.0,
    ) -> None:
        key = (kind, self._name if kind == FaultKind.missing else array.path)
        if key not in self._tallies:
            self._tallies[key] = _Tally(place, reason, np.zeros(len(self._committed), dtype=bool))
        tally = self._tallies[key]
        tally.records[start : start + len(records)] |= records
        tally.chunks += chunks
        tally.worst = max(tally.worst, worst)
        tally.arrays.add(array.path)

    def _worded(self, kind: str, tally: _Tally) -> Finding:
        indices = np.flatnonzero(tally.records)
        steps = (self._probe.steps[indices[0]], self._probe.steps[indices[-1]])
        seed = self._run.plan.seeds[self._row]
        if kind in (_LOST, _DAMAGED):
            more = tally.chunks - 1
            others = f", and {more} more chunks of this array and seed" if more else ""
            what = "is missing though its records are committed" if kind == _LOST else tally.reason
            return Finding("error", tally.place, f"{what}{others}", _RESTORE_CHUNK, seed, steps)
        fault = FaultKind(kind)
        what = f"{fault.value} in {len(indices)} of {int(self._committed.sum())} records"
        if tally.worst:
            what += f": V V^T differs from the identity by {tally.worst:.2g}"
        if fault is FaultKind.missing:
            what += (
                f", in {len(tally.arrays)} arrays" if len(tally.arrays) > 1 else f" of {min(tally.arrays)}"
            )
        severity: Severity = "note" if fault in _NOTES else "error"
        return Finding(severity, tally.place, what, _ADVICE[fault], seed, steps)

    def _was_withdrawn(self) -> bool:
        """Whether records that were committed at the start are gone, or of another attempt, by now."""
        before, path = self._run.attempts[self._name, self._row], f"{self._name}/{MARKER}"
        if path not in self._run.arrays or not before.any():
            return False
        try:
            now = np.asarray(self._run.arrays[path][self._row])
        except UNREADABLE:
            return False  # it could be read at the start: the next validation names the damage
        return bool((now[before > 0] != before[before > 0]).any())


class _ConvergedFlags:
    """Flags of converged pairs, for the eigenpairs of each node."""

    def __init__(self, run: StoredRun, name: str, row: int) -> None:
        self._run, self._name, self._row = run, name, row
        self._read: dict[tuple[str, int], NDArray[np.bool_]] = {}
        own = run.plan.probes[name].nodes.get(OWN_NODE)
        layers = own.coords.get(DIM_LAYER) if own is not None else None
        self._layers = {} if layers is None else {str(label): i for i, label in enumerate(layers.values)}

    def forget(self) -> None:
        """Drop what was read: the next window has other steps."""
        self._read.clear()

    def at(self, node: str, start: int, there: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Return the flags of the records that are there, shape (records, *batch, pairs), or None."""
        own, shared = (path_of(self._name, part, "converged") for part in (node, OWN_NODE))
        if own in self._run.planned:
            return self._block(own, start, len(there))[there]
        plan = self._run.planned.get(shared)
        if plan is None or plan.dims[2:3] != (DIM_LAYER,) or node not in self._layers:
            return None
        return self._block(shared, start, len(there))[there][:, self._layers[node]]

    def _block(self, path: str, start: int, count: int) -> NDArray[np.bool_]:
        """Return the flags of all steps of a block; what cannot be read claims nothing."""
        shape = self._run.planned[path].shape
        array = self._run.arrays.get(path)
        if array is None:
            return np.zeros((count, *shape[2:]), dtype=bool)
        length = int(array.chunks[1])
        blocks = range(start // length, -(-(start + count) // length))
        joined = np.concatenate([self._chunk(array, path, block * length, length) for block in blocks])
        return joined[start - blocks.start * length :][:count]

    def _chunk(self, array: zarr.Array[Any], path: str, start: int, length: int) -> NDArray[np.bool_]:
        if (path, start) not in self._read:
            stop = min(start + length, array.shape[1])
            try:
                self._read[path, start] = np.asarray(array[self._row, start:stop])
            except UNREADABLE:
                self._read[path, start] = np.zeros((stop - start, *array.shape[2:]), dtype=bool)
        return self._read[path, start]


def _first_key(array: _Array, row: int, block: int) -> str:
    """Key of the first chunk of a block that is missing."""
    rest = np.argwhere(~np.atleast_1d(array.existing[block]))[0].tolist()
    return chunk_key(array.path, *(row, block, *rest)[: array.stored.ndim])
