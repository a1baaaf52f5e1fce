"""The block of steps that an array is being filled with, and the chunks that are written of it.

Chunks are put into the store as encoded bytes. Writing them through zarr's array
indexing gives the same files; it costs milliseconds of Python an array and
several thread changes, which a training loop in the same process feels.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.abc.store import Store, SupportsSetSync
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from hild_xr.plan import ArrayPlan
from hild_xr.store.errors import StoreError

CHECKSUM_BYTES = 4

Chunk = tuple[str, Buffer]
"""Key in the store and encoded bytes."""


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
        # the store's own chunk length: an older version may have chosen another
        self._length = int(array.chunks[1])
        self._index = -1
        nbytes = self._length * plan.record_nbytes
        # room for the checksum behind the values, so that a chunk is written from where it was filled
        self._memory = np.zeros(nbytes + CHECKSUM_BYTES, dtype=np.uint8)
        self._values = self._memory[:nbytes].view(self._dtype).reshape(self._length, *self._shape)

    def checked(self, place: str, value: ArrayLike) -> NDArray[np.generic]:
        """Return the value as an array; raise if its shape is not the planned one."""
        values = np.asarray(value)
        if values.shape != self._shape:
            raise ValueError(f"{place}: expected shape {self._shape}, got {values.shape}")
        return values

    def leaves(self, step_index: int) -> bool:
        """Whether a step lies outside the block that is being filled."""
        return self._index >= 0 and step_index // self._length != self._index

    def ends(self, step_index: int) -> bool:
        """Whether a step is the last of its block."""
        return (step_index + 1) % self._length == 0 or step_index + 1 == self._array.shape[1]

    def put(self, step_index: int, value: NDArray[np.generic]) -> None:
        """Copy one step's value into the block; the caller may change it afterwards."""
        if step_index // self._length != self._index:
            self._begin(step_index // self._length)
        self._values[step_index % self._length] = value

    def reload(self, keep: int) -> None:
        """Take the kept records of the part-filled block back, so that it is rewritten whole; tidy up."""
        self._index = -1
        sweep_partial(self._array, self._row)
        block, kept = divmod(keep, self._length)
        if kept:
            self._begin(block)
            start = block * self._length
            self._values[:kept] = self._array[self._row, start : start + kept]

    def chunks(self) -> Iterator[Chunk]:
        """Encode the block; what is returned is valid until the next :meth:`put`."""
        split = self._array.chunks[2:]
        counts = [range(-(-extent // length)) for extent, length in zip(self._shape, split, strict=True)]
        for place in itertools.product(*counts):
            key = chunk_key(self._array, (self._row, self._index, *place))
            whole = all(len(count) == 1 for count in counts)
            yield key, (_sealed(self._memory) if whole else encoded(self._part(place, split)))

    def _part(self, place: tuple[int, ...], split: tuple[int, ...]) -> NDArray[np.generic]:
        """One chunk of a split record, padded at the edges as zarr does."""
        cut = tuple(slice(i * length, (i + 1) * length) for i, length in zip(place, split, strict=True))
        values = self._values[(slice(None), *cut)]
        if values.shape[1:] == split:
            return values
        padded = np.full((self._length, *split), self._fill, dtype=self._dtype)
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


def encoded(values: NDArray[np.generic]) -> Buffer:
    """Encode a chunk: little-endian bytes in C order, then their crc32c checksum.

    Examples
    --------
    >>> encoded(np.zeros(2, dtype="uint16")).to_bytes().hex()
    '00000000c74b6748'
    """
    memory = np.empty(values.nbytes + CHECKSUM_BYTES, dtype=np.uint8)
    little = memory[: values.nbytes].view(values.dtype.newbyteorder("<")).reshape(values.shape)
    little[...] = values
    return _sealed(memory)


def put_chunks(store: Store, chunks: Iterable[Chunk]) -> None:
    """Put encoded chunks into a store, at once where it is remote.

    Parameters
    ----------
    store
        Where.
    chunks
        What; read one by one where the store writes synchronously.
    """
    if isinstance(store, LocalStore) and isinstance(store, SupportsSetSync):
        for key, value in chunks:
            store.set_sync(key, value)
    else:
        # other stores may keep the buffer itself, which is filled again
        copies = [(key, _copied(value)) for key, value in chunks]
        sync(_put_all(store, copies))


def exists(store: Store, key: str) -> bool:
    """Whether a key is there; asked of a local store without zarr's threads, which end before Python does."""
    if isinstance(store, LocalStore):
        return (store.root / key).exists()
    return bool(sync(store.exists(key)))


def sweep_partial(array: zarr.Array[Any], row: int) -> None:
    """Delete what a killed writer of this seed left half written; nothing reads it, but it takes room.

    For the holder of the seed's lease only: files of a living writer look the same.
    """
    if isinstance(array.store, LocalStore):
        folder = array.store.root / f"{array.store_path.path}/c/{row}"
        for path in folder.rglob("*.partial"):
            path.unlink(missing_ok=True)


async def _put_all(store: Store, chunks: list[Chunk]) -> None:
    limit = asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def put(key: str, value: Buffer) -> None:
        async with limit:
            await store.set(key, value)

    await asyncio.gather(*(put(key, value) for key, value in chunks))


def _sealed(memory: NDArray[np.uint8]) -> Buffer:
    """Write the checksum behind the bytes and hand the memory itself out."""
    checksum = google_crc32c.value(memory[:-CHECKSUM_BYTES])
    memory[-CHECKSUM_BYTES:] = np.frombuffer(checksum.to_bytes(CHECKSUM_BYTES, "little"), dtype=np.uint8)
    return default_buffer_prototype().buffer.from_array_like(memory)


def _copied(value: Buffer) -> Buffer:
    return type(value).from_bytes(value.to_bytes())
