"""The block of steps that an array is being filled with, and the chunks that are written of it.

Chunks are put into the store as encoded bytes. Writing them through zarr's array
indexing gives the same files; it costs milliseconds of Python an array and
several thread changes, which a training loop in the same process feels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from hild_xr.plan import ArrayPlan
from hild_xr.store.errors import DamagedRecordError, StoreError
from hild_xr.store.raw import exists, write_keys

PIECE_BYTES = 262_144
"""Bytes that are checked at a time: the checksum holds the interpreter, writing gives it to training."""

Chunk = tuple[str, NDArray[np.generic]]
"""Key in the store and values, contiguous and little-endian."""


class Block:
    """All steps of one chunk length of one array of one seed.

    Parameters
    ----------
    array
        The stored array, with dims ``(seed, step, ...)``.
    plan
        Its plan.
    row
        Index of the seed.

    Raises
    ------
    StoreError
        If the array is not stored as plain bytes with a crc32c checksum.
    """

    def __init__(self, array: zarr.Array[Any], plan: ArrayPlan, row: int) -> None:
        check_codecs(array)
        self._array, self._row = array, row
        self._shape, self._fill = plan.shape, plan.fill_value
        self._dtype = np.dtype(plan.dtype).newbyteorder("<")
        # the store's own chunk lengths: an older version may have chosen others
        self._length, *split = (int(length) for length in array.chunks[1:])
        self._index, self._split = -1, tuple(split)
        # A record that is a block by itself is flushed as soon as it is put, and so need not be copied.
        self._borrows = self._length == 1
        self._values = np.zeros((0 if self._borrows else self._length, *self._shape), dtype=self._dtype)

    def checked(self, place: str, value: ArrayLike) -> NDArray[np.generic]:
        """Return the value in the stored dtype; raise if it does not fit, or is not of the planned shape."""
        values = np.asarray(value)
        if values.dtype == self._dtype and values.shape == self._shape:
            return values
        if values.shape != self._shape:
            raise ValueError(f"{place}: expected shape {self._shape}, got {values.shape}")
        if not np.can_cast(values.dtype, self._dtype, casting="same_kind"):
            raise ValueError(f"{place}: expected values of dtype {self._dtype.name}, got {values.dtype.name}")
        stored = values.astype(self._dtype, copy=False)
        if self._dtype.kind == "i" and stored is not values and (stored != values).any():
            raise ValueError(
                f"{place}: values from {values.min()} to {values.max()} exceed {self._dtype.name}"
            )
        return stored

    def leaves(self, step_index: int) -> bool:
        """Whether a step lies outside the block that is being filled."""
        return self._index >= 0 and step_index // self._length != self._index

    def ends(self, step_index: int) -> bool:
        """Whether a step is the last of its block."""
        return (step_index + 1) % self._length == 0 or step_index + 1 == self._array.shape[1]

    def put(self, step_index: int, value: NDArray[np.generic]) -> None:
        """Take one step's value; the caller may change it after the next :meth:`chunks` or :meth:`keep`."""
        if step_index // self._length != self._index:
            self._begin(step_index // self._length)
        if self._borrows:
            self._values = value[np.newaxis]
        else:
            self._values[step_index % self._length] = value

    def keep(self) -> None:
        """Copy what is only borrowed, for a flush that comes later."""
        if self._borrows:
            self._values = self._values.copy()

    def reload(self, keep: int, committed: NDArray[np.bool_]) -> None:
        """Take the kept records of the part-filled block back, so that it is rewritten whole.

        Raises
        ------
        DamagedRecordError
            If a committed record of that block cannot be read. Written over, it would look sound.
        """
        self._index = -1
        block, kept = divmod(keep, self._length)
        if not kept:
            return
        self._begin(block)
        there = slice(block * self._length, keep)
        if committed[there].any():
            self._check_chunks()
        try:
            self._values[:kept] = self._array[self._row, there]
        except ValueError as error:
            raise DamagedRecordError(f"{self._array.path}: {error}") from error

    def _check_chunks(self) -> None:
        store = self._array.store
        missing = [key for key in self._keys() if not exists(store, key)]
        if missing:
            raise DamagedRecordError(f"{missing[0]} is missing, though records in it are committed")

    def sweep(self) -> None:
        """Delete half-written files of this seed."""
        sweep_partial(self._array, self._row)

    def chunks(self) -> Iterator[Chunk]:
        """Cut the block into the chunks of the store."""
        for place, key in zip(self._places(), self._keys(), strict=True):
            cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, self._split, strict=True))
            yield key, self._padded(self._values[(slice(None), *cut)])

    def first_key(self) -> str:
        """Key of the first chunk of this seed."""
        return chunk_key(self._array, (self._row, *(0,) * (self._array.ndim - 1)))

    def _keys(self) -> Iterator[str]:
        return (chunk_key(self._array, (self._row, self._index, *place)) for place in self._places())

    def _places(self) -> Iterator[tuple[int, ...]]:
        """Iterate over the indices of the chunks of one record."""
        counts = (range(-(-n // length)) for n, length in zip(self._shape, self._split, strict=True))
        return itertools.product(*counts)

    def _padded(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Fill a chunk up at the edges of the array, as zarr does."""
        if values.shape[1:] == self._split:
            return np.ascontiguousarray(values)
        padded = np.full((self._length, *self._split), self._fill, dtype=self._dtype)
        padded[tuple(slice(extent) for extent in values.shape)] = values
        return padded

    def _begin(self, block: int) -> None:
        self._index = block
        if self._length > 1:
            self._values[...] = self._fill


def check_codecs(array: zarr.Array[Any]) -> None:
    """Raise unless the array is stored as it is created here: little-endian bytes and a checksum."""
    codecs = array.metadata.codecs  # type: ignore[union-attr]  # format 3 throughout
    match list(codecs):
        case [BytesCodec(), Crc32cCodec()]:
            return
    raise StoreError(
        f"array {array.path} is stored with the codecs {[type(c).__name__ for c in codecs]}; records are "
        "written as bytes with a crc32c checksum. Record into a new store."
    )


def chunk_key(array: zarr.Array[Any], place: tuple[int, ...]) -> str:
    """Key of a chunk in the store.

    Examples
    --------
    >>> array = zarr.create_array({}, name="a/b", shape=(2, 4), chunks=(1, 2), dtype="f4")
    >>> chunk_key(array, (1, 0))
    'a/b/c/1/0'
    """
    return f"{array.store_path.path}/{array.metadata.encode_chunk_key(place)}"


def encoded(values: NDArray[np.generic]) -> Iterator[memoryview | bytes]:
    """Encode a chunk piece by piece: its bytes, which are not copied, and then their crc32c checksum.

    Examples
    --------
    >>> b"".join(encoded(np.zeros(2, dtype="<u2"))).hex()
    '00000000c74b6748'
    """
    data, checksum = values.reshape(-1).view(np.uint8), 0
    for start in range(0, data.size, PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        checksum = google_crc32c.extend(checksum, piece)
        yield piece.data
    yield checksum.to_bytes(4, "little")


def put_chunks(store: Store, chunks: Iterable[Chunk]) -> None:
    """Encode chunks and put them into a store."""
    write_keys(store, ((key, encoded(values)) for key, values in chunks))


def sweep_partial(array: zarr.Array[Any], row: int) -> None:
    """Delete what a killed writer of this seed left half written; nothing reads it, but it takes room.

    For the holder of the seed's lease only: files of a living writer look the same.
    """
    if isinstance(array.store, LocalStore):
        folder = array.store.root / f"{array.store_path.path}/c/{row}"
        for path in folder.rglob("*.partial"):
            path.unlink(missing_ok=True)
