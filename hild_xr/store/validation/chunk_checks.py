"""Which chunks of a stored run exist, what the markers say, and whether coordinates are as planned."""

from __future__ import annotations

import asyncio
import re
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from hild_xr.plan import RunPlan
from hild_xr.store.fingerprint import ROOT_KEY
from hild_xr.store.validation.findings import Finding
from hild_xr.store.validation.metadata_checks import MARKER, RESTORE, PlannedArray, planned_groups

UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged object raises.

A wrong checksum, a truncated chunk and broken text are ValueErrors. Disks raise
OSErrors, and zip files whose own bytes are damaged the rest: a RuntimeError, for
one, where a flipped bit says that an entry is encrypted.
"""

REQUESTS = 64
"""Small objects asked for at a time, so that a distant store answers them together."""

_LEFT_BEHIND = re.compile(r"\.[0-9a-f]{32}\.partial$")
_LEASE = f"/{MARKER}/writers/"


def in_words(error: Exception) -> str:
    """Say why something cannot be read.

    Examples
    --------
    >>> in_words(OSError(5, "Input/output error"))
    'cannot be read: [Errno 5] Input/output error'
    """
    return f"cannot be read: {str(error).rstrip('.')}"


async def get_all(store: Store, keys: Sequence[str]) -> list[bytes | str | None]:
    """Read small objects: bytes, None for a missing one, the reason in words for an unreadable one."""
    prototype = default_buffer_prototype()
    found: list[bytes | str | None] = []
    for start in range(0, len(keys), REQUESTS):
        asked = (store.get(key, prototype) for key in keys[start : start + REQUESTS])
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, UNREADABLE):
                found.append(in_words(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(None if answer is None else answer.to_bytes())
    return found


@dataclass
class StoredRun:
    """A run as it lies in its store, as far as its metadata can be trusted.

    Parameters
    ----------
    store, plan
        The store, and the plan in its root.
    planned
        What the plan fixes, by path.
    arrays
        Those that are as planned, by path.
    existing
        Which of their chunks exist, by path, on the grid of chunks.
    attempts
        Marker rows by probe and row, as they were before the chunks were listed.
    """

    store: Store
    plan: RunPlan
    planned: dict[str, PlannedArray]
    arrays: dict[str, zarr.Array[Any]] = field(default_factory=dict)
    existing: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    attempts: dict[tuple[str, int], NDArray[np.uint16]] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """Number of existing chunks."""
        return sum(int(held.sum()) for held in self.existing.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the existing chunks."""
        return sum(self._nbytes(path) for path in self.existing)

    @property
    def record_nbytes(self) -> int:
        """Bytes of those that hold records."""
        return sum(self._nbytes(path) for path in self.existing if self.planned[path].role == "record")

    def _nbytes(self, path: str) -> int:
        return int(self.existing[path].sum()) * chunk_nbytes(self.arrays[path])

    def is_started(self, row: int) -> bool:
        """Whether any record of a seed was written, of whatever probe."""
        records = (held for path, held in self.existing.items() if self.planned[path].role == "record")
        return any(bool(held[row].any()) for held in records)


def chunk_nbytes(array: zarr.Array[Any]) -> int:
    """Bytes of one chunk; zarr stores those at the edge whole.

    Text has no fixed size and counts as its references.
    """
    return int(np.prod(array.chunks)) * array.dtype.itemsize


def chunk_key(path: str, *place: int) -> str:
    """Key of a chunk.

    Examples
    --------
    >>> chunk_key("metrics/train_loss", 0, 3)
    'metrics/train_loss/c/0/3'
    """
    return "/".join([path, "c", *map(str, place)])


# ---------------------------------------------------------------------------- what exists


async def list_chunks(run: StoredRun) -> list[Finding]:
    """Note in ``run.existing`` which chunks exist; return notes on keys that the plan does not know."""
    for path, array in run.arrays.items():
        counts = (-(-extent // length) for extent, length in zip(array.shape, array.chunks, strict=True))
        run.existing[path] = np.zeros(tuple(counts), dtype=bool)
    nodes = {ROOT_KEY, *(f"{path}/zarr.json" for path in (*run.planned, *planned_groups(run.plan)))}
    left: list[str] = []
    strange: list[str] = []
    async for key in _keys(run.store):
        if key not in nodes and _LEASE not in key and not _note_chunk(run, key):
            (left if _LEFT_BEHIND.search(key) else strange).append(key)
    return [
        *_stray(left, "is the unfinished file of a writer that was killed", "delete it once no writer runs"),
        *_stray(
            strange, "is not part of the plan", "no reader of the run looks at it; see what put it there"
        ),
    ]


async def _keys(store: Store) -> AsyncIterator[str]:
    async for key in store.list():
        if not key.endswith("/"):  # archives list their folders too
            yield key


def _note_chunk(run: StoredRun, key: str) -> bool:
    """Note the chunk that a key belongs to; False if it belongs to none."""
    path, _, rest = key.rpartition("/c/")
    if path not in run.planned:
        return False
    held, parts = run.existing.get(path), rest.split("/")
    if held is None:
        return True  # its metadata are damaged, which is a finding by itself
    if not all(part.isdecimal() and str(int(part)) == part for part in parts) or len(parts) != held.ndim:
        return False
    place = tuple(map(int, parts))
    if any(index >= extent for index, extent in zip(place, held.shape, strict=True)):
        return False
    held[place] = True
    return True


def _stray(keys: list[str], what: str, advice: str) -> Iterator[Finding]:
    if keys:
        others = f", and {len(keys) - 1} more keys with it" if len(keys) > 1 else ""
        yield Finding("note", min(keys), f"{what}{others}", advice)


# ---------------------------------------------------------------------------- coordinates and markers


def read_markers(run: StoredRun) -> Iterator[Finding]:
    """Read ``run.attempts``; a marker that cannot be read is a finding, and counts as zero."""
    for name, probe in run.plan.probes.items():
        path = f"{name}/{MARKER}"
        for row, seed in enumerate(run.plan.seeds):
            run.attempts[name, row] = np.zeros(len(probe.steps), dtype=np.uint16)
            if path not in run.arrays:
                continue
            try:
                run.attempts[name, row] = np.asarray(run.arrays[path][row])
            except UNREADABLE as error:
                yield Finding("error", chunk_key(path, row, 0), in_words(error), RESTORE, seed)


def coordinate_findings(run: StoredRun) -> Iterator[Finding]:
    """Compare all coordinates with the plan."""
    for path, planned in run.planned.items():
        if planned.coord is None or path not in run.arrays:
            continue
        if not run.existing[path].all():
            yield Finding("error", chunk_key(path, 0), "the coordinate is missing", RESTORE)
            continue
        try:
            values = np.asarray(run.arrays[path][...])
        except UNREADABLE as error:
            yield Finding("error", chunk_key(path, 0), in_words(error), RESTORE)
            continue
        if [str(value) for value in values.tolist()] != [str(value) for value in planned.coord.values]:
            yield Finding("error", chunk_key(path, 0), "the coordinate differs from the plan", RESTORE)


def marker_findings(run: StoredRun, name: str, row: int) -> Iterator[Finding]:
    """Check the marker row of one probe and seed: there, attempts in order, no gaps."""
    path, seed, steps = f"{name}/{MARKER}", run.plan.seeds[row], run.plan.probes[name].steps
    if path not in run.arrays:
        return
    key = chunk_key(path, row, 0)
    if not run.existing[path][row].any():
        if run.is_started(row):
            what = (
                "the marker is missing though records of the seed were written; nothing says which are whole"
            )
            yield Finding("error", key, what, f"{RESTORE}, or record the seed again", seed)
        return
    attempts = run.attempts[name, row].astype(np.int64)
    there = np.flatnonzero(attempts)
    falls = np.flatnonzero(np.diff(attempts[there]) < 0)
    if len(falls):
        before, after = (int(there[falls[0] + shift]) for shift in (0, 1))
        what = (
            f"attempt {attempts[after]} follows attempt {attempts[before]}; "
            "a resume keeps earlier attempts before its own and never after"
        )
        yield Finding("error", key, what, "record the seed again", seed, (steps[before], steps[after]))
    gap = np.flatnonzero(attempts[: there[-1]] == 0) if len(there) else there
    if len(gap):
        what = f"{len(gap)} records before the last one are missing: they were lost before a resume"
        span = (steps[gap[0]], steps[gap[-1]])
        yield Finding("note", key, what, "they read as NaN; nothing needs to be done", seed, span)
