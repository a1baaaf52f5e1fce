"""Where a store lives: a local folder, an object store or other URL, a zip file, or a zarr store."""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, ObjectStore, ZipStore

from hild_xr.store.errors import NotAStoreError
from hild_xr.store.icechunk_session import BranchStore, Repository, Session

OBJECT_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"})
"""Schemes of object stores: one put replaces an object whole, and may be conditional on its absence."""

_HTTP_SCHEMES = frozenset({"http", "https"})
_LOCAL_SCHEMES = frozenset({"file", "local"})


@dataclass(frozen=True)
class Location:
    """A resolved target.

    Parameters
    ----------
    store
        The zarr store to read and write.
    path
        Its folder, or None if it is not a local folder.
    name
        What to call it in messages, if it has no folder: a URL, or the path of a zip file.
    """

    store: Store
    path: Path | None
    name: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return self.name if self.name is not None else str(self.store)

    @property
    def is_transactional(self) -> bool:
        """Whether writes are visible only after :meth:`commit`, and one of two that conflict is refused."""
        return isinstance(self.store, BranchStore)

    def commit(self, message: str) -> None:
        """Make what was written since the last commit visible, all at once.

        Does nothing except on a branch of an Icechunk repository: elsewhere each
        write is visible at once, and the marker that is written last commits.

        Parameters
        ----------
        message
            What was written, for the history of the branch.

        Raises
        ------
        StoreWriteError
            If another writer committed the same chunks.

        Examples
        --------
        >>> locate("runs/digits.zarr").commit("nothing to do for a folder")
        """
        if isinstance(self.store, BranchStore):
            self.store.commit(message)

    def refresh(self) -> None:
        """Let readers see what was committed since.

        Does nothing except on a branch of an Icechunk repository, which is read
        from one snapshot until then.

        Examples
        --------
        >>> locate("runs/digits.zarr").refresh()
        """
        if isinstance(self.store, BranchStore) and self.store.read_only:
            self.store.renew()


StoreLike = str | os.PathLike[str] | Store | Repository | Session | Location
"""A path or URL, a ``zarr.abc.store.Store``, an ``icechunk.Repository`` or read-only session."""


def locate(target: StoreLike, *, read_only: bool = False) -> Location:
    """Resolve a path, a URL or a store.

    =======================  ====================================================
    path, ``file://``        zarr's LocalStore, which replaces files atomically
    path of a zip file       read only: a finished run that was packed
    ``s3://``                Amazon S3 and what speaks its protocol, by obstore
    ``gs://``, ``az://``     Google Cloud Storage, Azure, by obstore
    ``http://, https://``    read only, by obstore
    other URLs               whatever fsspec knows, e.g. ``memory://``
    zarr store               as it is
    Icechunk repository      its branch ``main``; one commit a flush
    Icechunk session         a read-only one: any snapshot, tag or branch
    =======================  ====================================================

    Local paths never go through fsspec's ``file://``, which writes in place and
    tears records. A zarr store that does so is replaced by a LocalStore.

    Credentials and endpoints of object stores come from the environment. For
    S3: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``,
    ``AWS_REGION``; ``AWS_ENDPOINT_URL`` for a server of one's own (MinIO, Ceph),
    with ``AWS_ALLOW_HTTP=true`` if it has no TLS; ``AWS_SKIP_SIGNATURE=true``
    for public buckets. For Google: ``GOOGLE_APPLICATION_CREDENTIALS``. For
    Azure: ``AZURE_STORAGE_ACCOUNT_NAME`` and ``AZURE_STORAGE_ACCOUNT_KEY``.
    Profiles in ``~/.aws`` are not read; for these and anything else pass
    ``zarr.storage.ObjectStore(obstore.store.S3Store(...))``.

    Parameters
    ----------
    target
        Path, URL, store, repository or session; a location comes back as it is.
    read_only
        Open for reading.

    Returns
    -------
    Location
        Store and, if local, its folder.

    Raises
    ------
    TypeError
        If the target is none of these, or a writable Icechunk session.
    ValueError
        If a zip file or a web address is to be written to, or the URL cannot
        be used.
    NotAStoreError
        If a file that is named like a zip file is none.
    ImportError
        If the package for a URL is missing; the extra that brings it is named.

    Examples
    --------
    >>> locate("runs/digits.zarr").path.name
    'digits.zarr'
    >>> locate("file:///data/digits.zarr").path
    PosixPath('/data/digits.zarr')
    """
    if isinstance(target, Location):
        return target
    if isinstance(target, Store):
        return _of_store(target, read_only=read_only)
    if isinstance(target, Repository):
        return _of_repository(target, read_only=read_only)
    if isinstance(target, Session):
        return _of_session(target, read_only=read_only)
    if not isinstance(target, str | os.PathLike):
        raise TypeError(
            "expected a path, a URL, a zarr store or an icechunk.Repository; "
            f"got {type(target).__module__}.{type(target).__qualname__}"
        )
    text = os.fspath(target)
    if "://" in text:
        return _of_url(text, read_only=read_only)
    # absolute: the process may change its folder while it records
    return _of_path(Path(text).expanduser().absolute(), read_only=read_only)


def _of_path(path: Path, *, read_only: bool) -> Location:
    if path.suffix.lower() == ".zip" and not path.is_dir():
        if not read_only:
            raise _no_writing_into(path)
        if path.is_file():
            return _of_store(ZipStore(path, mode="r"), read_only=True)
    return Location(LocalStore(path, read_only=read_only), path)


def _of_url(url: str, *, read_only: bool) -> Location:
    scheme = url.partition("://")[0].lower()
    if scheme in _LOCAL_SCHEMES:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{url!r} names the host {parts.netloc!r}; a local folder is file:///folder")
        return _of_path(Path(url2pathname(parts.path)).absolute(), read_only=read_only)
    if scheme in _HTTP_SCHEMES and not read_only:
        raise ValueError(f"{url!r} can be read only; record into a folder or an object store (s3://, gs://)")
    by_obstore = scheme in OBJECT_SCHEMES | _HTTP_SCHEMES
    store = _object_store(url, read_only=read_only) if by_obstore else _fsspec_store(url, read_only=read_only)
    if (path := _local_folder(store)) is not None:
        return Location(LocalStore(path, read_only=read_only), path)
    return Location(store, None, name=_without_password(url))


def _object_store(url: str, *, read_only: bool) -> Store:
    try:
        import obstore
    except ImportError as error:
        raise _missing("obstore", url) from error
    plain = url.lower().startswith("http://")
    options: Any = {"client_options": {"allow_http": True}} if plain else {}
    try:
        store = obstore.store.from_url(url, **options)
    except obstore.exceptions.BaseError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot use {_without_password(url)!r}: {reason}") from error
    return ObjectStore(store, read_only=read_only)


def _fsspec_store(url: str, *, read_only: bool) -> Store:
    if find_spec("fsspec") is None:
        raise _missing("fsspec", url)
    return FsspecStore.from_url(url, read_only=read_only)


def _of_store(store: Store, *, read_only: bool) -> Location:
    path = _local_folder(store)
    if path is not None and not isinstance(store, LocalStore):
        store = LocalStore(path, read_only=read_only or store.read_only)
    if isinstance(store, ZipStore):
        if not read_only:
            raise _no_writing_into(store.path)
        try:
            sync(store._ensure_open())  # its readers expect that
        except zipfile.BadZipFile as error:
            raise NotAStoreError(f"{store.path} is not a zip file, or is cut off: {error}") from error
        return Location(store, None, name=str(store.path))
    return Location(store, path)


def _local_folder(store: Store) -> Path | None:
    """Folder of a store that keeps plain files on this machine."""
    if isinstance(store, LocalStore):
        return store.root
    if isinstance(store, FsspecStore):
        protocol = store.fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        return Path(store.path) if protocols & _LOCAL_SCHEMES else None
    return None


def _of_repository(repository: Repository, *, read_only: bool) -> Location:
    return Location(BranchStore(repository, read_only=read_only), None)


def _of_session(session: Session, *, read_only: bool) -> Location:
    if not (read_only and session.read_only):
        raise TypeError(
            "a writable icechunk session ends with its first commit and cannot be recorded into; "
            "pass the icechunk.Repository itself, or hild_xr.store.BranchStore(repository, branch). "
            "To read, pass repository.readonly_session(...)"
        )
    return Location(session.store, None, name=f"snapshot {session.snapshot_id} of an Icechunk repository")


def _no_writing_into(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a zip file, which is read only: a write that is cut off would make all of it "
        "unreadable. Record into a folder, then zip what the folder holds, without compression: "
        f"cd RUN.zarr && zip -r -0 {path} ."
    )


def _missing(package: str, url: str) -> ImportError:
    return ImportError(
        f"{_without_password(url)!r} needs the package {package}: pip install 'hild-xr[cloud]'", name=package
    )


def _without_password(url: str) -> str:
    return re.sub(r"://([^/:@]*):[^/@]*@", r"://\1:***@", url)


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
