"""Create a store from a plan, all arrays at their final shape, atomically."""

from __future__ import annotations

import asyncio
import glob
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from hild_xr.plan import RunPlan
from hild_xr.store.backends import Location, StoreLike, locate
from hild_xr.store.durable import DurableStore, sync_tree
from hild_xr.store.errors import NotAStoreError, PlanMismatchError, StoreWriteError
from hild_xr.store.fingerprint import ROOT_KEY
from hild_xr.store.icechunk_session import BranchStore
from hild_xr.store.layout import Document, encoded_document, files, root_document
from hild_xr.store.root import CREATING, plan_of, read_root, stored_root

ABANDONED_SECONDS = 3600.0
"""A half-made folder this old is that of a creator that was killed: one that lives needs seconds."""


def create(target: StoreLike, plan: RunPlan, *, root_attrs: Mapping[str, Any] | None = None) -> Location:
    """Create the store of a run, or accept the one that is there if its plan is equal.

    Every array is created at its final shape with its true ``step`` and
    ``seed`` coordinates; chunks that were not written do not exist. Shapes never
    change, so the consolidated metadata written here is never stale.

    A store is seen only when it is complete, and creators that start together
    end with one. A folder is made under another name and renamed. In an object
    store the first to put the root wins, by a put on condition that it is not
    there; the root shows its plan only after everything else was put, and
    whoever comes meanwhile with an equal plan helps. If the creator dies, the
    next one completes the store. An Icechunk repository gets one commit.

    fsspec has no conditional put: two plans that are created at one URL of it
    within a fraction of a second may both seem to win, until the first record.

    Parameters
    ----------
    target
        Path of a folder that does not exist yet, a URL, or a store; see
        :func:`hild_xr.store.backends.locate`.
    plan
        What the run will hold.
    root_attrs
        Further attributes of the root, e.g. provenance. Not compared.

    Returns
    -------
    Location
        Where the store is.

    Raises
    ------
    PlanMismatchError
        If a store exists there whose plan differs; the differences are listed.
    NotAStoreError
        If something else exists there.
    TypeError, ValueError
        If ``root_attrs`` are not values of JSON, or the target cannot be
        written to.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
    >>> arrays = {"train_loss": ArrayPlan(variable="train_loss")}
    >>> metrics = ProbePlan(steps=(0, 1), nodes={"": NodePlan(arrays=arrays)})
    >>> plan = RunPlan(seeds=(0,), probes={"metrics": metrics})
    >>> store = MemoryStore()
    >>> location = create(store, plan)
    >>> stored_plan(store) == plan
    True
    """
    location = locate(target)
    if location.path is not None:
        _create_folder(location, location.path, plan, root_attrs or {})
    elif isinstance(location.store, BranchStore):
        _create_commit(location, location.store, plan, root_attrs or {})
    else:
        _create_objects(location, plan, root_attrs or {})
    return location


def stored_plan(target: StoreLike) -> RunPlan:
    """Read the plan of a store.

    Raises
    ------
    FileNotFoundError
        If nothing is there, or the store is being created.
    NotAStoreError
        If what is there was not written by hild-xr, or is damaged.
    StoreError
        If it was written by a newer hild-xr that stores runs in another way.
    """
    location = locate(target, read_only=True)
    return plan_of(read_root(location), location)


# Local folders: made under another name, then renamed


def _create_folder(location: Location, path: Path, plan: RunPlan, root_attrs: Mapping[str, Any]) -> None:
    _sweep(path)
    if not _is_taken(path):
        durable = isinstance(location.store, DurableStore)
        _make_beside_and_rename(path, files(root_document(plan, root_attrs)), durable=durable)
    _accept(location, read_root(location), plan)


def _is_taken(path: Path) -> bool:
    if path.is_file():
        raise NotAStoreError(f"{path} is a file; a run is recorded into a folder")
    return path.exists() and any(path.iterdir())


def _make_beside_and_rename(path: Path, contents: Mapping[str, bytes], *, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.creating")
    try:
        for key, content in contents.items():
            file = scratch / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if durable:  # else the name could outlive a power failure and its contents not
            sync_tree(scratch)
        try:
            scratch.rename(path)
        except OSError:
            # Another process was first (a rename onto a folder with contents fails); its plan is
            # compared by the caller. Anything else, such as a read-only parent, must be seen.
            if not (path.is_dir() and any(path.iterdir())):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Delete what creators of this path left that were killed a good while ago."""
    if not path.parent.is_dir():
        return
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):
        try:
            age = time.time() - scratch.stat().st_mtime
        except FileNotFoundError:
            continue  # its creator has just finished
        if age > ABANDONED_SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


# Icechunk: everything in one commit


def _create_commit(
    location: Location, branch: BranchStore, plan: RunPlan, root_attrs: Mapping[str, Any]
) -> None:
    if stored_root(location) is None:
        _refuse_other_keys(location)
        _put(location, files(root_document(plan, root_attrs)))
        try:
            branch.commit(f"create a run of {len(plan.seeds)} seeds and the probes {', '.join(plan.probes)}")
        except StoreWriteError:
            branch.renew()  # another creator was first; if nobody was, the next line says so
    _accept(location, read_root(location), plan)


# Other stores: the root is put on condition that it is not there, and shows its plan last


def _create_objects(location: Location, plan: RunPlan, root_attrs: Mapping[str, Any]) -> None:
    root = stored_root(location)
    if root is None:
        _refuse_other_keys(location)
        document = root_document(plan, root_attrs)
        claim = {"attributes": {CREATING: document}, "zarr_format": 3, "node_type": "group"}
        _put(location, {ROOT_KEY: encoded_document(claim)})
        root = stored_root(location)
    claimed = {} if root is None else root.get("attributes", {}).get(CREATING)
    if not claimed:
        _accept(location, read_root(location), plan)
        return
    _accept(location, claimed, plan)
    _complete(location, claimed)


def _complete(location: Location, document: Document) -> None:
    """Put all files of a run that was begun; several creators may do so at once."""
    contents = files(document)
    final = contents.pop(ROOT_KEY)
    _put(location, contents)
    root = stored_root(location)
    if root is not None and CREATING in root["attributes"]:
        sync(location.store.set(ROOT_KEY, default_buffer_prototype().buffer.from_bytes(final)))


def _put(location: Location, contents: Mapping[str, bytes]) -> None:
    """Put the files that are not there yet, many at once; Icechunk takes no chunk before its array."""
    metadata = {key: content for key, content in contents.items() if key.endswith(ROOT_KEY)}
    sync(_put_all(location, metadata))
    sync(_put_all(location, {key: content for key, content in contents.items() if key not in metadata}))


async def _put_all(location: Location, contents: Mapping[str, bytes]) -> None:
    limit = asyncio.Semaphore(zarr.config.get("async.concurrency"))
    buffer = default_buffer_prototype().buffer

    async def put(key: str, content: bytes) -> None:
        async with limit:
            await location.store.set_if_not_exists(key, buffer.from_bytes(content))

    await asyncio.gather(*(put(key, content) for key, content in contents.items()))


def _refuse_other_keys(location: Location) -> None:
    """Refuse a place that holds something but no root: a run begins with its root, and ends with it."""
    other = sync(_first_key(location))
    if other is not None and stored_root(location) is None:
        raise NotAStoreError(
            f"{location} holds no run but something else, such as {other!r}; nothing was written. Delete "
            "what is left of an older run there, or choose another place"
        )


async def _first_key(location: Location) -> str | None:
    async for key in location.store.list():
        return key
    return None


def _accept(location: Location, root: Document, plan: RunPlan) -> None:
    """Raise unless the plan that is stored is equal."""
    differences = plan.differences(plan_of(root, location))
    if differences:
        raise PlanMismatchError(str(location), differences)
