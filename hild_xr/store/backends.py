"""Where a store lives: a local folder, or any zarr store object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

StoreLike = str | os.PathLike[str] | Store
"""A path on the local file system, or a ``zarr.abc.store.Store``."""


@dataclass(frozen=True)
class Location:
    """A resolved target.

    Parameters
    ----------
    store
        The zarr store to read and write.
    path
        Its folder, or None if it is not a local folder.
    """

    store: Store
    path: Path | None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else str(self.store)


def locate(target: StoreLike, *, read_only: bool = False) -> Location:
    """Resolve a path or a zarr store.

    Local paths always go through zarr's LocalStore, which replaces files
    atomically; fsspec's ``file://`` writes in place and tears records.

    Parameters
    ----------
    target
        Path or zarr store.
    read_only
        Open for reading.

    Returns
    -------
    Location
        Store and, if local, its folder.

    Raises
    ------
    TypeError
        If the target is neither a path nor a zarr store.
    ValueError
        If it is a URL.

    Examples
    --------
    >>> locate("runs/digits.zarr").path.name
    'digits.zarr'
    """
    if isinstance(target, Store):
        path = Path(target.root) if isinstance(target, LocalStore) else None
        return Location(target, path)
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"expected a path or a zarr store; got {type(target).__name__}")
    text = os.fspath(target)
    if "://" in text:
        raise ValueError(
            f"{text!r} is a URL; pass a zarr store instead, e.g. zarr.storage.FsspecStore.from_url({text!r})"
        )
    # absolute: the process may change its folder while it records
    path = Path(text).expanduser().absolute()
    return Location(LocalStore(path, read_only=read_only), path)


def zarr_array(group: zarr.Group, path: str) -> zarr.Array[Any]:
    """Return the array at a path below a group.

    Raises
    ------
    KeyError
        If nothing is there.
    TypeError
        If a group is there.
    """
    found = group[path]
    if not isinstance(found, zarr.Array):
        raise TypeError(f"{group.path}/{path} is a group, not an array")
    return found


def zarr_group(group: zarr.Group, path: str) -> zarr.Group:
    """Return the group at a path below a group.

    Raises
    ------
    KeyError
        If nothing is there.
    TypeError
        If an array is there.
    """
    found = group[path]
    if not isinstance(found, zarr.Group):
        raise TypeError(f"{group.path}/{path} is an array, not a group")
    return found


def written_whole(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return the array such that chunks holding nothing but the fill value are written too.

    zarr leaves them out by default, and then a record of NaN could not be told from a chunk that was lost.
    """
    return array.with_config({"write_empty_chunks": True})
