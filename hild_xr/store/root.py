"""The root's ``zarr.json``: what is there, whose it is, and whether it is complete."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ZipStore

from hild_xr.plan import RunPlan
from hild_xr.store.backends import Location, damage_errors, in_one_line, transport_errors
from hild_xr.store.errors import NotAStoreError, StoreError
from hild_xr.store.fingerprint import ROOT_KEY
from hild_xr.variables import SCHEMA_VERSION

CREATING = "hild_xr_creating"
"""The only attribute of the root while the other files are put: the root document to be.

Neither its plan nor its consolidated metadata are where a reader looks for them, so no reader
takes the store for a complete one.
"""


@contextmanager
def reaching(location: Location) -> Iterator[None]:
    """Say which store it was that could not be reached, or refused.

    Raises
    ------
    StoreError
        Instead of what obstore, or a file system of fsspec, raises on its own.

    Examples
    --------
    >>> from hild_xr.store.backends import locate
    >>> with reaching(locate("run.zarr")):
    ...     pass  # ask the store for something
    """
    try:
        yield
    except transport_errors() as error:
        raise StoreError(f"{location} cannot be read: {in_one_line(error)}") from error


def stored_root(location: Location) -> dict[str, Any] | None:
    """Read the root's ``zarr.json`` as it is, complete or not; None if there is none.

    Raises
    ------
    NotAStoreError
        If it is torn, or is not that of a group.
    StoreError
        If the store cannot be reached.
    """
    try:
        with reaching(location):
            stored = sync(location.store.get(ROOT_KEY, default_buffer_prototype()))
    except damage_errors(location.store) as error:
        raise NotAStoreError(
            f"{location}: its metadata are damaged: {ROOT_KEY} cannot be read ({type(error).__name__}: "
            f"{error}); hild-xr validate {location} says where"
        ) from error
    if stored is None:
        return None
    try:
        root = json.loads(stored.to_bytes())
    except ValueError as error:
        raise NotAStoreError(
            f"{ROOT_KEY} of {location} is not valid JSON ({error}): the file is damaged, or was written by "
            "something else. Bring it back from a copy; the records beside it are untouched"
        ) from error
    if not isinstance(root, dict) or root.get("node_type") != "group":
        raise NotAStoreError(f"{location} is not a Zarr group: its {ROOT_KEY} describes something else")
    return root


def read_root(location: Location) -> dict[str, Any]:
    """Read the root of a complete run: plan, attributes and consolidated metadata in one request.

    Raises
    ------
    FileNotFoundError
        If nothing is there, or the store is being created.
    NotAStoreError
        If what is there was not written by hild-xr, or is damaged.
    StoreError
        If it was written by a newer hild-xr that stores runs in another way.
    """
    if location.path is not None and not location.path.exists():
        raise FileNotFoundError(f"no run at {location}")
    root = stored_root(location)
    if root is None and isinstance(location.store, ZipStore):
        _refuse_folder_in_zip(location.store)
    if root is None and location.path is None:
        raise FileNotFoundError(f"no run at {location}: it holds no {ROOT_KEY}")
    if root is None:
        raise NotAStoreError(f"{location} is not a Zarr group: it holds no {ROOT_KEY}")
    attributes = root.get("attributes", {})
    if not isinstance(attributes, dict):
        raise NotAStoreError(
            f"{location}: its metadata are damaged: the attributes in {ROOT_KEY} are a "
            f"{type(attributes).__name__}; hild-xr validate {location} says where"
        )
    if CREATING in attributes:
        raise FileNotFoundError(
            f"no run at {location} yet: it is being created; try again in a moment. If its creator died, "
            "create it again from the same plan, which completes it"
        )
    if "plan" not in attributes:
        raise NotAStoreError(
            f"{location} is a Zarr group that was not written by hild-xr (its attributes hold no plan); "
            'read it with xarray.open_datatree(path, engine="zarr")'
        )
    return root


def plan_of(root: dict[str, Any], where: object) -> RunPlan:
    """Read the plan out of a root document.

    Stores of the same major schema version open. A plan of a newer minor version
    opens if it holds nothing that this version does not know.

    Parameters
    ----------
    root
        The parsed ``zarr.json``, with a plan.
    where
        Name of the store, for messages.

    Raises
    ------
    StoreError
        If the schema is newer than this version of hild-xr can read.
    NotAStoreError
        If the plan is damaged.
    """
    attributes = root["attributes"]
    version = str(attributes.get("schema_version", SCHEMA_VERSION))
    try:
        stored, known = _numbers(version), _numbers(SCHEMA_VERSION)
    except ValueError:
        raise NotAStoreError(f"{where} states the schema version {version!r}, which is none") from None
    newer = StoreError(
        f"{where} was written by a newer hild-xr (schema {version}; this one reads {SCHEMA_VERSION}): "
        "upgrade it, pip install --upgrade hild-xr"
    )
    if stored[0] > known[0]:
        raise newer
    try:
        return RunPlan.from_json(attributes["plan"])
    except ValidationError as error:
        if stored > known:
            raise newer from error
        raise NotAStoreError(f"the plan in {ROOT_KEY} of {where} is damaged: {error}") from error


def _refuse_folder_in_zip(store: ZipStore) -> None:
    """Refuse a zip file that was made of the folder instead of what the folder holds."""
    with zipfile.ZipFile(store.path) as packed:
        names = packed.namelist()
    roots = [name for name in names if name.endswith(f"/{ROOT_KEY}")]
    if roots:
        folder = min(roots, key=len).removesuffix(f"/{ROOT_KEY}")
        raise NotAStoreError(
            f"{store.path} holds the run in the folder {folder!r}; zip what the folder holds: "
            f"cd {folder} && zip -r -0 {store.path} ."
        )


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
