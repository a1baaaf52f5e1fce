"""Writes that outlive a power failure: file and folder are on the disk before the next write begins."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import FsspecStore, LocalStore, ObjectStore, WrapperStore

from hild_xr.store.backends import Location

_KNOWN_FOLDERS = 10_000
_MEMORY = frozenset({"memory", "MemoryStore"})
_LOCAL = frozenset({"file", "local", "LocalStore"})


class DurableStore(LocalStore):
    """A local folder whose every write is on the disk when it returns.

    zarr's own LocalStore replaces files atomically, which is enough when a
    process dies. When the machine dies, what the operating system still held
    in memory is gone, and it may have written a later file before an earlier
    one. Here the bytes of a file are synced before it takes its name, and the
    folder after it, so the disk never holds a marker without its records.

    Only ``os.fsync`` is asked for. A disk that acknowledges a sync without
    doing it (macOS does so by default) keeps no promise.

    Parameters
    ----------
    root
        Folder of the store.
    read_only
        Open for reading.

    Examples
    --------
    >>> import zarr
    >>> array = zarr.create_array(DurableStore("run.zarr"), shape=3, dtype="float32")
    >>> array[:] = 1
    >>> zarr.open_array("run.zarr")[:].tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._on_disk: set[Path] = set()

    def put_parts(self, key: str, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write a key from several pieces and wait for the disk."""
        self._check_writable()
        self._put(self.root / key, parts)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a key and wait for the disk."""
        self.put_parts(key, [value.as_buffer_like()])

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key and wait for the disk."""
        self._check_writable()
        await asyncio.to_thread(self._put, self.root / key, [value.as_buffer_like()])

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key that is not there and wait for the disk; leave one that is there."""
        self._check_writable()
        await asyncio.to_thread(self._put, self.root / key, [value.as_buffer_like()], exclusive=True)

    def _put(
        self, path: Path, parts: Iterable[bytes | bytearray | memoryview], *, exclusive: bool = False
    ) -> None:
        self._make_folder(path.parent)
        scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with scratch.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if not exclusive:
                scratch.replace(path)
            elif not _took_free_name(scratch, path):
                return
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder with its parents; the entry of each is synced when this store first meets it.

        Also that of a folder which exists: another process may have made it a moment ago.
        """
        if folder in self._on_disk and folder.is_dir():
            return
        if folder == self.root:
            folder.mkdir(parents=True, exist_ok=True)
            sync_parents(folder)
        else:
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        if len(self._on_disk) >= _KNOWN_FOLDERS:
            self._on_disk.clear()
        self._on_disk.add(folder)


def durable_location(location: Location) -> Location:
    """Return the location such that what is written there survives a power failure.

    A local folder gets a :class:`DurableStore`. An object store answers a write
    only when it is durable, so such a location comes back as it is.

    Raises
    ------
    ValueError
        If the store only lives in memory, or is a local folder reached through
        fsspec or obstore, which never sync.

    Examples
    --------
    >>> from hild_xr.store.backends import locate
    >>> from zarr.storage import MemoryStore
    >>> type(durable_location(locate("run.zarr")).store).__name__
    'DurableStore'
    >>> durable_location(locate(MemoryStore()))
    Traceback (most recent call last):
        ...
    ValueError: durable=True: MemoryStore lives in memory and ends with the process; ...
    """
    if location.path is not None:
        return replace(location, store=DurableStore(location.path))
    kind = _behind(location.store)
    if kind in _MEMORY:
        raise ValueError(
            f"durable=True: {type(location.store).__name__} lives in memory and ends with the process; "
            "record into a folder or an object store, or leave durable=True out"
        )
    if kind in _LOCAL:
        raise ValueError(
            f"durable=True: {type(location.store).__name__} never syncs local files; "
            "pass the path of the folder"
        )
    return location


def sync_tree(folder: Path) -> None:
    """Sync all that lies in a folder, and the folder's own name, to the disk.

    Examples
    --------
    >>> Path("run.zarr").mkdir()
    >>> sync_tree(Path("run.zarr"))
    """
    for parent, _, files in os.walk(folder):
        for name in files:
            # A file that took its final name meanwhile is another writer's, who syncs it.
            with suppress(FileNotFoundError):
                sync_file(Path(parent) / name)
        sync_folder(Path(parent))
    sync_parents(folder)


def sync_file(path: Path) -> None:
    """Sync what a file holds."""
    with path.open("r+b") as file:  # some systems sync only what is open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder: which names are in it, not what they hold."""
    if os.name == "nt":
        return  # Windows opens no folder; NTFS keeps a journal of names
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_parents(folder: Path) -> None:
    """Sync the folders above, up to where the file system begins: any of them may be new."""
    for parent in folder.absolute().parents:
        try:
            sync_folder(parent)
        except PermissionError:
            return  # not a folder of ours, so none that recording has made
        if os.path.ismount(parent):
            return


def _took_free_name(scratch: Path, path: Path) -> bool:
    try:
        if os.name == "nt":
            scratch.rename(path)  # refuses a name that is taken
        else:
            os.link(scratch, path)  # so does a link, where a rename would replace
    except FileExistsError:
        return False
    return True


def _behind(store: Store) -> str:
    """Name what holds the bytes: a file system's protocol, or a store's type."""
    while isinstance(store, WrapperStore):
        store = store._store
    if isinstance(store, FsspecStore):
        protocol = store.fs.protocol
        return protocol if isinstance(protocol, str) else str(protocol[0])
    if isinstance(store, ObjectStore):
        return type(store.store).__name__
    return type(store).__name__
