"""Where a store lives: a local folder, an object store or other URL, a zip file, or a zarr store."""

from __future__ import annotations

import copy
import os
import re
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, LoggingStore, ObjectStore, WrapperStore, ZipStore

from hild_xr.store.errors import NotAStoreError, StoreError
from hild_xr.store.icechunk_session import BranchStore, Repository, Session

OBJECT_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"})
"""Schemes of object stores: one put replaces an object whole, and may be conditional on its absence."""

_HTTP_SCHEMES = frozenset({"http", "https"})
_LOCAL_SCHEMES = frozenset({"file", "local"})
_CACHING = frozenset({"simplecache", "filecache", "blockcache", "cached"})
_TRANSPARENT = (WrapperStore, LoggingStore)
"""Wrappers that change neither keys nor values. Of one from elsewhere, nobody knows."""

_ONE_SLASH = re.compile(r"([A-Za-z0-9]+):/(?!/)")

_UNREADABLE_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    UnicodeDecodeError,
)
"""What zipfile raises where the bytes of a zip file are damaged: a flipped bit may also say that an entry
is encrypted (RuntimeError) or packed in a way nobody knows (NotImplementedError)."""

_TRANSPORT_ERRORS = {
    "obstore.exceptions": "BaseError",
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
}
"""Base of what the packages behind URLs raise, where it is no OSError."""


class UnusableTargetError(StoreError, ValueError):
    """The path, URL or store cannot be used for what is asked, whatever lies there."""


def transport_errors() -> tuple[type[Exception], ...]:
    """Return what a server that cannot be reached, or refuses, raises besides an ``OSError``.

    Only packages that are imported are asked: others can have raised nothing.

    Examples
    --------
    >>> any(issubclass(kind, OSError) for kind in transport_errors())
    False
    """
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in _TRANSPORT_ERRORS.items()
        if module in sys.modules
    )


def damage_errors(store: Store) -> tuple[type[Exception], ...]:
    """Return what reading from a store raises where its own bytes are damaged: of a zip file, much.

    Examples
    --------
    >>> damage_errors(LocalStore("run.zarr"))
    ()
    """
    return _UNREADABLE_ZIP if isinstance(store, ZipStore) else ()


def in_one_line(error: BaseException) -> str:
    r"""Say what an error says, without the dump of its source that obstore adds.

    Examples
    --------
    >>> in_one_line(ValueError("no route\n\nDebug source: ..."))
    'no route'
    """
    return str(error).partition("\n")[0]


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

    def latest(self) -> Location:
        """Return where readers see what was committed since.

        That is this location, except for a branch of an Icechunk repository to
        which something was committed: a location is read from one snapshot, and
        stays on it.

        Examples
        --------
        >>> location = locate("runs/digits.zarr")
        >>> location.latest() is location
        True
        """
        if isinstance(self.store, BranchStore) and self.store.read_only:
            store = self.store.latest()
            return self if store.snapshot_id == self.store.snapshot_id else replace(self, store=store)
        return self


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
    tears records. A store of fsspec or obstore that keeps a local folder is
    replaced by a LocalStore, so that two writers meet at the lease beside it.

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
    UnusableTargetError
        A ValueError. If a zip file, a web address, or a local folder behind
        a wrapper store from elsewhere is to be written to, or the URL cannot be
        used.
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
    text = _with_both_slashes(text)
    if "://" in text:
        return _of_url(text, read_only=read_only)
    # absolute: the process may change its folder while it records
    return _of_path(Path(text).expanduser().absolute(), read_only=read_only)


def _with_both_slashes(text: str) -> str:
    """Complete ``file:/folder``, which means the same as ``file:///folder``; refuse what pathlib broke.

    Examples
    --------
    >>> _with_both_slashes("file:/data/run.zarr")
    'file:///data/run.zarr'
    """
    found = _ONE_SLASH.match(text)
    scheme = found[1].lower() if found else ""
    if found and scheme in _LOCAL_SCHEMES:
        return f"{scheme}://{text[found.end() - 1 :]}"
    if found and scheme in OBJECT_SCHEMES | _HTTP_SCHEMES:
        raise UnusableTargetError(
            f"{text!r} looks like a URL that went through pathlib.Path, which takes a slash away; "
            f"pass the text {scheme + '://' + text[found.end() :]!r}"
        )
    return text


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
            raise UnusableTargetError(
                f"{url!r} names the host {parts.netloc!r}; a local folder is file:///folder"
            )
        return _of_path(Path(url2pathname(parts.path)).absolute(), read_only=read_only)
    if scheme in _HTTP_SCHEMES and not read_only:
        raise UnusableTargetError(
            f"{url!r} can be read only; record into a folder or an object store (s3://, gs://)"
        )
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
        raise _unusable(url, error) from error
    return ObjectStore(store, read_only=read_only)


def _fsspec_store(url: str, *, read_only: bool) -> Store:
    if find_spec("fsspec") is None:
        raise _missing("fsspec", url)
    try:
        return FsspecStore.from_url(url, read_only=read_only)
    except ValueError as error:
        raise _unusable(url, error) from error


def _unusable(url: str, error: Exception) -> UnusableTargetError:
    return UnusableTargetError(f"cannot use {_without_password(url)!r}: {in_one_line(error)}")


def _of_store(store: Store, *, read_only: bool) -> Location:
    if isinstance(store, ZipStore):
        return _of_zip(store, read_only=read_only)
    if isinstance(store, BranchStore):
        # one of the reader's own: whoever holds the other may renew it, or commit to it
        return Location(store.latest() if read_only else store, None)
    inner, transparent = _unwrapped(store)
    path = _local_folder(inner)
    if path is None:
        return Location(store, None)
    if not transparent:
        if read_only:
            return Location(store, None)
        raise UnusableTargetError(
            f"{type(store).__qualname__} wraps the local folder {path}: what it does to keys and values is "
            "not known, so its writers cannot share a lease with those of the folder; pass the path"
        )
    if isinstance(inner, LocalStore) and inner.root.is_absolute():
        return Location(store, path)
    if isinstance(store, LocalStore):
        store = copy.copy(store)  # the caller's own stays as it is
        store.root = path
        return Location(store, path)
    return Location(LocalStore(path, read_only=read_only or store.read_only), path)


def _of_zip(store: ZipStore, *, read_only: bool) -> Location:
    if not read_only:
        raise _no_writing_into(store.path)
    try:
        sync(store._ensure_open())  # its readers expect that
    except _UNREADABLE_ZIP as error:
        raise NotAStoreError(f"{store.path} is not a zip file, or is cut off: {error}") from error
    return Location(store, None, name=str(store.path))


def _unwrapped(store: Store) -> tuple[Store, bool]:
    """Return what all wrappers are around, and whether they change neither keys nor values."""
    transparent = True
    while isinstance(store, WrapperStore):
        transparent &= type(store) in _TRANSPARENT
        store = store._store
    return store, transparent


def _local_folder(store: Store) -> Path | None:
    """Folder of a store that keeps plain files on this machine, absolute."""
    if isinstance(store, LocalStore):
        return store.root.absolute()
    if isinstance(store, FsspecStore):
        return _fsspec_folder(store.fs, store.path)
    if isinstance(store, ObjectStore) and type(store.store).__name__ == "LocalStore":
        return Path(store.store.prefix or "/").absolute()
    return None


def _fsspec_folder(fs: Any, path: str) -> Path | None:
    """Folder that a path means, if a local file system is behind those that only pass it on."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & _LOCAL_SCHEMES:
        return Path(path).absolute()
    if (synchronous := getattr(fs, "sync_fs", None)) is not None:
        return _fsspec_folder(synchronous, path)
    if "dir" in protocols:
        return _fsspec_folder(fs.fs, f"{fs.path}/{path}")
    if protocols & _CACHING:
        return _fsspec_folder(fs.fs, path)
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


def _no_writing_into(path: Path) -> UnusableTargetError:
    return UnusableTargetError(
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
