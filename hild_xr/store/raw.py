"""Read keys as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore


def read_keys(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """Return what lies at some keys, None where nothing does; at once where the store is remote.

    A local store is read without zarr's threads, which are gone when Python exits.

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


def _read_file(store: LocalStore, key: str) -> bytes | None:
    try:
        return (store.root / key).read_bytes()
    except FileNotFoundError:
        return None


async def _read_all(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    found = await asyncio.gather(*(store.get(key, default_buffer_prototype()) for key in keys))
    return [None if value is None else value.to_bytes() for value in found]
