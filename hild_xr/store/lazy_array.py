"""One array of a run as dask reads it: only what one attempt committed, and never damage as data.

A reader and a writer share no lock, so a chunk is read like this: **the data first, the marker after
them.** What is shown of a record is what both readings of the marker, the one at opening and the one
after the data, ascribe to the same attempt. This is why such a record is whole:

- The writer writes all data of a record before it sets the marker to its attempt (store contract,
  point 3). So the data were there when the tree was opened.
- The data change again only after a resume has withdrawn the record: it zeroes the marker in one
  write, and only then are blocks rewritten, with the next attempt number. Rewriting a block for its
  later steps leaves the bytes of committed ones as they are, and stores replace a chunk as a whole.
- An attempt number must never come back: that is the writer's part. Then, if the marker still names
  the attempt after the data were read, it named it all the time between, and nothing was rewritten.

A record whose attempt has changed reads as missing, with a :class:`RecordsWithdrawnWarning`. That
costs one small read a dask chunk. Reading the marker before the data would prove nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import StorePath

from hild_xr.store.errors import DamagedRecordError, RecordsWithdrawnWarning

Box = tuple[slice, ...]
"""A range without stride along each dim."""

MISSING: Mapping[str, Any] = {"f": np.nan, "i": -1, "u": 0, "b": False}
"""What stands where nothing was recorded, by kind of dtype."""


@dataclass(frozen=True)
class Source:
    """A stored array, opened when it is read first.

    It pickles as where the array lies and its metadata, so that workers open it for themselves.

    Parameters
    ----------
    store
        The zarr store.
    path
        Path of the array in it.
    metadata
        Its ``zarr.json``.
    run
        The run's name in messages.
    """

    store: Store
    path: str
    metadata: Mapping[str, Any]
    run: str

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def array(self) -> zarr.AsyncArray[Any]:
        """The array; no request is made."""
        metadata: Any = dict(self.metadata)  # zarr declares the type of each key
        return zarr.AsyncArray(metadata, StorePath(self.store, self.path))

    @property
    def shape(self) -> tuple[int, ...]:
        """Planned shape, all steps."""
        return tuple(self.metadata["shape"])

    @property
    def chunks(self) -> tuple[int, ...]:
        """Extent of a stored chunk."""
        return tuple(self.metadata["chunk_grid"]["configuration"]["chunk_shape"])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored values."""
        dtype: np.dtype[Any] = np.dtype(self.metadata["data_type"])
        return dtype

    def chunk_key(self, chunk: tuple[int, ...]) -> str:
        """Key of a chunk below the array's path."""
        key: str = self.array.metadata.encode_chunk_key(chunk)
        return key

    async def read(self, box: Box) -> NDArray[Any]:
        """Read a box; chunks that do not exist read as the fill value."""
        return np.asarray(await self.array.getitem(box))

    async def holds(self, chunk: tuple[int, ...]) -> bool:
        """Whether a chunk exists."""
        return await self.store.exists(f"{self.path}/{self.chunk_key(chunk)}")


class Marker:
    """The marker of a probe as one tree saw it at opening, and as it is now.

    Parameters
    ----------
    source
        The stored marker.
    seen
        What stood there at opening, ``(seed, step)``.
    seeds, steps
        Labels of its rows and columns, for messages.
    told
        Shared by the markers of a tree: what has been warned of. The first to write into it warns.
    """

    def __init__(
        self,
        source: Source,
        seen: NDArray[np.uint16],
        seeds: tuple[int, ...],
        steps: tuple[int, ...],
        told: dict[str, object],
    ) -> None:
        self.source, self.seen, self.seeds, self.steps = source, seen, seeds, steps
        self._told = told

    async def unchanged(self, rows: slice, columns: slice) -> NDArray[np.bool_]:
        """Whether each record is there, and still is of the attempt that was seen at opening."""
        seen = self.seen[rows, columns]
        now = await read_marker(self.source, self.seeds, rows, columns)
        lost = (seen > 0).any(axis=1) & ~(now > 0).any(axis=1)
        for row in np.flatnonzero(lost) + rows.start:
            if not await self.source.holds((int(row), 0)):
                raise DamagedRecordError(
                    f"{self.source.path}, seed {self.seeds[row]}: the marker of what is committed is gone; "
                    f"{self.source.run} was moved or deleted while it was open, or is damaged"
                )
        withdrawn = (seen > 0) & (now != seen)
        if withdrawn.any():
            self._warn(withdrawn, rows, columns)
        unchanged: NDArray[np.bool_] = (seen > 0) & ~withdrawn
        return unchanged

    def _warn(self, withdrawn: NDArray[np.bool_], rows: slice, columns: slice) -> None:
        mine = object()
        if self._told.setdefault("withdrawn", mine) is not mine:
            return
        row = int(np.flatnonzero(withdrawn.any(axis=1))[0])
        at = np.flatnonzero(withdrawn[row]) + columns.start
        try:
            warnings.warn(
                f"{self.source.run}: training was resumed after this tree was opened, and withdrew records "
                f"that the tree still lists: {self.source.path.rpartition('/')[0]}, "
                f"seed {self.seeds[rows.start + row]}, from step {self.steps[at[0]]} on, and maybe others. "
                "They read as missing here (NaN, -1 or False); run.hild.refresh() shows what is there now",
                RecordsWithdrawnWarning,
                stacklevel=2,
            )
        except RecordsWithdrawnWarning:
            self._told.clear()  # whoever turns the warning into an error gets it at every reading
            raise


class StoredArray:
    """An array of a run up to the last step that is committed, read as it is indexed.

    Parameters
    ----------
    source
        The stored array, dims ``(seed, step, ...)``.
    marker
        Marker of its probe.
    steps
        Number of steps to show.

    Raises
    ------
    DamagedRecordError
        On indexing, if a chunk of a committed record is missing or its checksum differs.
    """

    def __init__(self, source: Source, marker: Marker, steps: int) -> None:
        self._source, self._marker = source, marker
        self.shape = (source.shape[0], steps, *source.shape[2:])
        self.dtype, self.ndim = source.dtype, len(source.shape)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        box, within = _bounds(key, self.shape)
        return self._box(box)[within]

    def _box(self, box: Box) -> NDArray[Any]:
        rows, columns = box[:2]
        there = self._marker.seen[rows, columns] > 0
        committed = np.flatnonzero(there.any(axis=0))
        extent = tuple(part.stop - part.start for part in box)
        if not len(committed) or 0 in extent:
            return self._missing(extent)
        first, stop = int(committed[0]), int(committed[-1]) + 1
        inner = (rows, slice(columns.start + first, columns.start + stop), *box[2:])
        values = sync(self._committed(inner, there[:, first:stop]))
        if stop - first == extent[1]:
            return values
        whole = self._missing(extent)
        whole[:, first:stop] = values
        return whole

    async def _committed(self, box: Box, there: NDArray[np.bool_]) -> NDArray[Any]:
        """Read a box: first the data, then the marker (see the module on why in this order)."""
        try:
            values = await self._source.read(box)
        except ValueError:  # a checksum differs, somewhere
            values = await self._chunk_by_chunk(box, there)
        unchanged = await self._marker.unchanged(*box[:2])
        await self._refuse_lost_chunks(box, values, unchanged)
        if not unchanged.all():
            values[~unchanged] = MISSING[self.dtype.kind]
        return values

    def _missing(self, extent: tuple[int, ...]) -> NDArray[Any]:
        return np.full(extent, MISSING[self.dtype.kind], dtype=self.dtype)

    async def _chunk_by_chunk(self, box: Box, there: NDArray[np.bool_]) -> NDArray[Any]:
        """Read the chunks that hold records one by one, to name the one that is damaged."""
        values = self._missing(tuple(part.stop - part.start for part in box))
        for chunk, inside in _chunks_within(box, self._source.chunks):
            local = tuple(
                slice(part.start - whole.start, part.stop - whole.start)
                for part, whole in zip(inside, box, strict=True)
            )
            if not there[local[:2]].any():
                continue
            try:
                values[local] = await self._source.read(inside)
            except ValueError as error:
                raise self._damaged("checksum of {} differs: the file is damaged", chunk) from error
        return values

    async def _refuse_lost_chunks(self, box: Box, values: NDArray[Any], unchanged: NDArray[np.bool_]) -> None:
        """Raise if a chunk of a committed record does not exist.

        zarr reads the fill value then, without a word. A chunk whose first record does not begin with the
        fill value exists, so the store is asked only about the few that do.
        """
        fill = self._source.array.metadata.fill_value
        asked = []
        for row in range(len(unchanged)):
            at = np.flatnonzero(unchanged[row])
            blocks = (at + box[1].start) // self._source.chunks[1]
            blocks, first = np.unique(blocks, return_index=True)
            corners = [
                _corners(part, length) for part, length in zip(box[2:], self._source.chunks[2:], strict=True)
            ]
            sample = values[row][np.ix_(at[first], *(inside for _, inside in corners))]
            filled = np.isnan(sample) if self.dtype.kind == "f" and np.isnan(fill) else sample == fill
            for block, *place in np.argwhere(filled):
                rest = (int(numbers[i]) for (numbers, _), i in zip(corners, place, strict=True))
                seed = (box[0].start + row) // self._source.chunks[0]
                asked.append((seed, int(blocks[block]), *rest))
        there = await asyncio.gather(*map(self._source.holds, asked))
        for chunk, holds in zip(asked, there, strict=True):
            if not holds:
                raise self._damaged("{} is missing although its records are committed", chunk)

    def _damaged(self, what: str, chunk: tuple[int, ...]) -> DamagedRecordError:
        seed_length, length = self._source.chunks[:2]
        seeds = self._marker.seeds[chunk[0] * seed_length : (chunk[0] + 1) * seed_length]
        steps = self._marker.steps[chunk[1] * length : (chunk[1] + 1) * length]
        return DamagedRecordError(
            f"{self._source.path}, seed {', '.join(map(str, seeds))}, steps {steps[0]} to {steps[-1]}: "
            + what.format(f"chunk {self._source.chunk_key(chunk)}")
            + f"; hild-xr validate {self._source.run} lists all damage"
        )


async def read_marker(
    source: Source, seeds: tuple[int, ...], rows: slice, columns: slice
) -> NDArray[np.uint16]:
    """Read rows of a marker.

    Raises
    ------
    DamagedRecordError
        If the checksum of a row differs.
    """
    try:
        return await source.read((rows, columns))
    except ValueError as error:
        raise DamagedRecordError(
            f"{source.path}, seeds {seeds[rows]}: the checksum of the marker of what is committed differs: "
            f"the file is damaged; hild-xr validate {source.run} lists all damage"
        ) from error


def _bounds(key: Any, shape: tuple[int, ...]) -> tuple[Box, tuple[int | slice, ...]]:
    """Split a basic index into the box around it and the index within the box.

    Examples
    --------
    >>> _bounds((1, slice(None, None, -2)), (3, 6))
    ((slice(1, 2, None), slice(1, 6, None)), (0, slice(None, None, -2)))
    """
    keys = key if isinstance(key, tuple) else (key,)
    keys += (slice(None),) * (len(shape) - len(keys))
    box: list[slice] = []
    within: list[int | slice] = []
    for part, extent in zip(keys, shape, strict=True):
        if not isinstance(part, slice):
            place = range(extent)[int(part)]
            box.append(slice(place, place + 1))
            within.append(0)
            continue
        at = range(extent)[part]
        low, high = (min(at[0], at[-1]), max(at[0], at[-1]) + 1) if at else (0, 0)
        box.append(slice(low, high))
        within.append(slice(None, None, at.step if at else None))
    return tuple(box), tuple(within)


def _corners(part: slice, length: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Numbers of the chunks that a range meets, and where in the range each begins.

    Examples
    --------
    >>> _corners(slice(3, 9), 4)
    (array([0, 1, 2]), array([0, 1, 5]))
    """
    numbers = np.arange(part.start // length, -(-part.stop // length))
    return numbers, np.maximum(numbers * length - part.start, 0)


def _chunks_within(box: Box, chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Iterate over the chunks that a box meets: number along each dim, and the part inside the box."""
    met = [
        [
            (number, slice(max(part.start, number * length), min(part.stop, (number + 1) * length)))
            for number in range(part.start // length, -(-part.stop // length))
        ]
        for part, length in zip(box, chunks, strict=True)
    ]
    for place in itertools.product(*met):
        yield tuple(number for number, _ in place), tuple(inside for _, inside in place)
