"""Read and write keys as bytes: at once where a store is remote, without zarr's threads where it is local.

Those threads end before Python does, and a run is flushed at the exit of the interpreter too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from hild_xr.store.durable import DurableStore

Parts = Iterable[bytes | bytearray | memoryview]
"""Bytes in several pieces, taken once and in order; nobody needs to join them to write them to a file."""


def read_keys(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """Return what lies at some keys, None where nothing does.

    Examples
    --------
    >>> from zarr.core.buffer import cpu
    >>> from zarr.storage import MemoryStore
    >>> read_keys(MemoryStore({"a": cpu.Buffer.from_bytes(b"1")}), ["a", "b"])
    [b'1', None]
    """
    if isinstance(store, LocalStore):
        return [_read_file(store, key) for key in keys]
    return sync(_read_all(store, keys))


def write_keys(store: Store, items: Iterable[tuple[str, Parts]]) -> None:
    """Write some keys, each atomically.

    Parameters
    ----------
    store
        Where.
    items
        Key and bytes, taken one after the other where the store is local: the
        memory of one may be that of the next.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> store = MemoryStore()
    >>> write_keys(store, [("a", [b"1", b"2"])])
    >>> read_keys(store, ["a"])
    [b'12']
    """
    if isinstance(store, DurableStore):
        for key, parts in items:
            store.put_parts(key, parts)
    elif type(store) is LocalStore:
        for key, parts in items:
            _write_file(store.root / key, parts)
    else:
        buffer = default_buffer_prototype().buffer
        sync(_write_all(store, [(key, buffer.from_bytes(b"".join(parts))) for key, parts in items]))


def exists(store: Store, key: str) -> bool:
    """Whether a key is there."""
    if isinstance(store, LocalStore):
        return (store.root / key).exists()
    return bool(sync(store.exists(key)))


def _read_file(store: LocalStore, key: str) -> bytes | None:
    try:
        return (store.root / key).read_bytes()
    except FileNotFoundError:
        return None


async def _read_all(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    found = await asyncio.gather(*(store.get(key, default_buffer_prototype()) for key in keys))
    return [None if value is None else value.to_bytes() for value in found]


def _write_file(path: Path, parts: Parts) -> None:
    """Write a file that is seen whole or not at all, as zarr's LocalStore does."""
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch.open("wb") as file:
            for part in parts:
                file.write(part)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


async def _write_all(store: Store, items: Sequence[tuple[str, Buffer]]) -> None:
    limit = asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def put(key: str, value: Buffer) -> None:
        async with limit:
            await store.set(key, value)

    await asyncio.gather(*(put(key, value) for key, value in items))
