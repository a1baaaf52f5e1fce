"""What the root of a store says about all of it, read in one request, and the markers beside it.

Plan and consolidated metadata never change while a run is written, so they are read once and
kept; only the markers change, and they are all that a live reader asks for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from hild_xr.plan import RunPlan
from hild_xr.store.backends import Location, StoreLike, damage_errors, locate
from hild_xr.store.errors import DamagedRecordError, NotAStoreError, StoreError
from hild_xr.store.lazy_array import Source, read_marker
from hild_xr.store.root import plan_of, reaching, read_root

Markers = Mapping[str, NDArray[np.uint16]]
"""Attempt that wrote each record, ``(seed, step)``, by probe; 0 where there is none."""

MARKER = "committed"
"""Name of the marker in a probe's group."""

_ROOT = "zarr.json"

_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What looking into a document raises that lacks a key, or holds another kind of value there."""


@contextmanager
def sound_metadata(location: Location) -> Iterator[None]:
    """Say that metadata are damaged where what they hold cannot be used.

    Raises
    ------
    NotAStoreError
        Instead of what looking into a malformed document raises.

    Examples
    --------
    >>> with sound_metadata(locate("run.zarr")):
    ...     {"shape": [3]}["data_type"]
    Traceback (most recent call last):
        ...
    hild_xr.store.errors.NotAStoreError: ... metadata are damaged: KeyError: 'data_type'; hild-xr validate ...
    """
    try:
        yield
    except StoreError:
        raise  # some are ValueErrors, and all say what is wrong
    except _MALFORMED as error:
        raise NotAStoreError(
            f"{location}: its metadata are damaged: {type(error).__name__}: {error}; "
            f"hild-xr validate {location} says where"
        ) from error


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything about a stored run that does not change while it is written.

    Parameters
    ----------
    location
        Where the store is.
    plan
        What the run will hold.
    nodes
        The stored metadata (``zarr.json``) of every group and array by path; ``""`` is the root.
    """

    location: Location
    plan: RunPlan
    nodes: Mapping[str, Mapping[str, Any]]

    def __deepcopy__(self, memo: object) -> Contents:
        # xarray copies what a tree carries; a copy of a store in memory would be another store
        return self

    def attributes(self, path: str) -> dict[str, Any]:
        """Attributes of a group or an array."""
        return dict(self.nodes[path].get("attributes", {}))

    def latest(self) -> Contents:
        """Return the same where readers see what was committed since: itself, except with Icechunk."""
        location = self.location.latest()
        return self if location is self.location else replace(self, location=location)

    def source(self, path: str) -> Source:
        """Return the array at a path, to be opened when it is read."""
        return Source(self.location.store, path, self.nodes[path], str(self.location))


def read_contents(target: StoreLike) -> Contents:
    """Read plan and metadata of a run.

    The root's ``zarr.json`` holds both, so this is one request. A store that keeps no
    consolidated metadata (Icechunk needs none) is listed instead.

    Parameters
    ----------
    target
        Path of a run, or a zarr store.

    Returns
    -------
    Contents
        What was read.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    NotAStoreError
        If what is there was not written by hild-xr, is not complete yet, or is damaged.
    StoreError
        If the store cannot be reached.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.store import create
    >>> from hild_xr.testing import spectrum_plan
    >>> store = MemoryStore()
    >>> location = create(store, spectrum_plan())
    >>> read_contents(store).nodes["hessian/eigenvalues"]["dimension_names"]
    ['seed', 'step', 'layer', 'eig']
    """
    location = locate(target, read_only=True)
    with sound_metadata(location), reaching(location):
        root = read_root(location)
        attributes = root["attributes"]
        plan = plan_of(root, location)
        consolidated = root.get("consolidated_metadata")
        nodes = consolidated["metadata"] if consolidated else _listed(location)
        contents = Contents(location, plan, {"": {"attributes": attributes}, **nodes})
        _refuse_incomplete(contents)
    return contents


def read_markers(contents: Contents) -> Markers:
    """Read the markers of all probes, all at once.

    Raises
    ------
    FileNotFoundError
        If the run is gone.
    DamagedRecordError
        If a marker cannot be read.
    NotAStoreError
        If the metadata of a marker are damaged.
    StoreError
        If the store cannot be reached.
    """
    with sound_metadata(contents.location), reaching(contents.location):
        try:
            return sync(_markers(contents))
        except damage_errors(contents.location.store) as error:
            raise DamagedRecordError(
                f"{contents.location}: a marker of what is committed cannot be read: {error}; the file is "
                f"damaged. hild-xr validate {contents.location} lists all damage"
            ) from error


async def _markers(contents: Contents) -> Markers:
    store, names = contents.location.store, list(contents.plan.probes)
    # A marker that is not there reads as "nothing committed", so ask for the run as well.
    there, rows = await asyncio.gather(
        store.exists(_ROOT), asyncio.gather(*(_marker(contents, name) for name in names))
    )
    if not there:
        raise FileNotFoundError(f"no run at {contents.location}: it was moved or deleted after it was opened")
    return dict(zip(names, rows, strict=True))


async def _marker(contents: Contents, name: str) -> NDArray[np.uint16]:
    source = contents.source(f"{name}/{MARKER}")
    return await read_marker(
        source, contents.plan.seeds, slice(0, source.shape[0]), slice(0, source.shape[1])
    )


def _listed(location: Location) -> dict[str, dict[str, Any]]:
    root = zarr.open_group(location.store, mode="r", use_consolidated=False)
    return {path: node.metadata.to_dict() for path, node in root.members(max_depth=None)}


def _refuse_incomplete(contents: Contents) -> None:
    planned = {
        "/".join(part for part in (name, node, array) if part)
        for name, probe in contents.plan.probes.items()
        for node, array, _ in probe.arrays()
    } | {f"{name}/{MARKER}" for name in contents.plan.probes}
    missing = sorted(planned - contents.nodes.keys())
    if missing:
        raise NotAStoreError(
            f"{contents.location} lacks {len(missing)} of its {len(planned)} planned arrays, first "
            f"{missing[0]!r}: it is being created, or is damaged. Open it again in a moment"
        )
