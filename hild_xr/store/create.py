"""Create a store from a plan, all arrays at their final shape, atomically."""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan, full_dims
from hild_xr.store.backends import Location, StoreLike, locate, written_whole
from hild_xr.store.errors import NotAStoreError, PlanMismatchError
from hild_xr.variables import DIM_SEED, DIM_STEP, DIMS, attrs

MAX_CHUNK_BYTES = 8_000_000
"""A record larger than this is split along its own dims: zarr writes such chunks fastest."""


def create(target: StoreLike, plan: RunPlan, *, root_attrs: Mapping[str, Any] | None = None) -> Location:
    """Create the store of a run, or accept the one that is there if its plan is equal.

    Every array is created at its final shape with its true ``step`` and
    ``seed`` coordinates; chunks that were not written do not exist. Shapes never
    change, so the consolidated metadata written here is never stale. A folder
    appears at its name only when it is complete: processes that start together
    end with one store.

    Parameters
    ----------
    target
        Path of a folder that does not exist yet, or a zarr store.
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
    if not _accept_existing(location, plan):
        if location.path is None:
            _build(location.store, plan, root_attrs or {})
        else:
            _build_beside_and_rename(location.path, plan, root_attrs or {})
            _accept_existing(location, plan)
    return location


def stored_plan(target: StoreLike) -> RunPlan:
    """Read the plan of a store.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    NotAStoreError
        If what is there was not written by hild-xr.
    """
    location = locate(target, read_only=True)
    if location.path is not None and not location.path.exists():
        raise FileNotFoundError(f"no run at {location}")
    try:
        root = zarr.open_group(location.store, mode="r")
    except (FileNotFoundError, zarr.errors.NodeTypeValidationError) as error:
        raise NotAStoreError(f"{location} is not a Zarr group") from error
    if "plan" not in root.attrs:
        raise NotAStoreError(
            f"{location} is a Zarr group that was not written by hild-xr (its attributes hold no plan); "
            'read it with xarray.open_datatree(path, engine="zarr")'
        )
    return RunPlan.from_json(root.attrs["plan"])


def _accept_existing(location: Location, plan: RunPlan) -> bool:
    """Whether a store with this plan is there; raise if something else is."""
    if not _occupied(location):
        return False
    differences = plan.differences(stored_plan(location.store))
    if differences:
        raise PlanMismatchError(str(location), differences)
    return True


def _occupied(location: Location) -> bool:
    if location.path is None:
        return bool(zarr.core.sync.sync(location.store.exists("zarr.json")))
    if location.path.is_file():
        raise NotAStoreError(f"{location} is a file; a run is recorded into a folder")
    return location.path.exists() and any(location.path.iterdir())


def _build_beside_and_rename(path: Path, plan: RunPlan, root_attrs: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.creating")
    try:
        _build(LocalStore(scratch), plan, root_attrs)
        try:
            scratch.rename(path)
        except OSError:
            # Another process was first (a rename onto a folder with contents fails); its plan is
            # compared by the caller. Anything else, such as a read-only parent, must be seen.
            if not (path.is_dir() and any(path.iterdir())):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(store: Store, plan: RunPlan, root_attrs: Mapping[str, Any]) -> None:
    root = zarr.create_group(
        store,
        attributes={
            "schema_version": plan.schema_version,
            "config": plan.config,
            "plan": plan.to_json(),
            **root_attrs,
        },
    )
    for name, probe in plan.probes.items():
        _build_probe(root.create_group(name, attributes=dict(probe.attrs)), plan.seeds, probe)
    with warnings.catch_warnings():
        # Consolidated metadata is an extension that zarr and xarray both read; without it opening a
        # store costs one request a node.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)


def _build_probe(group: zarr.Group, seeds: tuple[int, ...], probe: ProbePlan) -> None:
    extent = (len(seeds), len(probe.steps))
    _write_coord(group, CoordPlan(dim=DIM_SEED, values=seeds))
    _write_coord(group, CoordPlan(dim=DIM_STEP, values=probe.steps, attrs={"units": "1"}))
    group.create_array(
        "committed",
        shape=extent,
        chunks=(1, extent[1]),
        dtype="uint16",
        fill_value=0,
        compressors=[Crc32cCodec()],
        dimension_names=(DIM_SEED, DIM_STEP),
        attributes=_json(attrs("committed")),
    )
    for name, node in probe.nodes.items():
        _build_node(group if name == OWN_NODE else group.create_group(name), extent, node)


def _build_node(group: zarr.Group, extent: tuple[int, int], node: NodePlan) -> None:
    for name, coord in node.coords.items():
        _write_coord(group, coord, name)
    for name, array in node.arrays.items():
        group.create_array(
            name,
            shape=(*extent, *array.shape),
            chunks=(1, min(array.block_steps, extent[1]), *record_chunks(array)),
            dtype=array.dtype,
            fill_value=array.fill_value,
            compressors=[Crc32cCodec()],
            dimension_names=full_dims(array),
            attributes=_json(attrs(array.variable, **array.attrs)),
        )


def record_chunks(array: ArrayPlan) -> tuple[int, ...]:
    """Chunk extents of one record: whole, or split along its leading dims above :data:`MAX_CHUNK_BYTES`.

    Examples
    --------
    >>> record_chunks(ArrayPlan(variable="weight", dims=("out", "in"), shape=(4000, 1000), dtype="float32"))
    (2000, 1000)
    """
    chunks = list(array.shape)
    for axis in range(len(chunks)):
        nbytes = int(np.prod(chunks)) * np.dtype(array.dtype).itemsize
        if nbytes <= MAX_CHUNK_BYTES:
            break
        chunks[axis] = max(1, chunks[axis] * MAX_CHUNK_BYTES // nbytes)
    return tuple(max(1, extent) for extent in chunks)


def _write_coord(group: zarr.Group, coord: CoordPlan, name: str | None = None) -> None:
    text = bool(coord.values) and isinstance(coord.values[0], str)
    values = np.asarray(coord.values, dtype=object if text else np.int64)
    described = {"long_name": coord.dim, "description": DIMS.get(coord.dim, coord.dim), **coord.attrs}
    array = group.create_array(
        name or coord.dim,
        shape=values.shape,
        chunks=(max(1, len(values)),),
        dtype=str if text else np.int64,
        compressors=[Crc32cCodec()],
        dimension_names=(coord.dim,),
        attributes=_json(described),
    )
    written_whole(array)[:] = values


def _json(attributes: Mapping[str, object]) -> dict[str, Any]:
    """Attributes under the type that zarr declares for them."""
    return dict(attributes)
