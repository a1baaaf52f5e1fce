"""Open a run: what is committed, as a lazy DataTree."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from hild_xr.plan import OWN_NODE, RunPlan
from hild_xr.store.backends import StoreLike, locate, zarr_array
from hild_xr.store.create import stored_plan
from hild_xr.variables import DIM_LAYER, DIM_SEED, DIM_STEP

READ_BYTES = 16_000_000
"""Dask chunks hold about this many bytes: whole store chunks, joined along ``step``."""

_MISSING = {"f": np.nan, "i": -1, "u": 0, "b": False}


def open_run(target: StoreLike) -> xr.DataTree:
    """Open a stored run.

    Every probe has a group with its own ``step`` coordinate. Steps after the
    last committed one are trimmed; a record that some seed lacks is NaN (-1 for
    integers, False for flags), and ``committed`` says which. Arrays are lazy and
    dask-backed; opening reads metadata and the markers only. The order of nodes
    is the planned order.

    Parameters
    ----------
    target
        Path of a run, or a zarr store.

    Returns
    -------
    xarray.DataTree
        One child a probe.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    NotAStoreError
        If what is there was not written by hild-xr; plain
        ``xarray.open_datatree(path, engine="zarr")`` may read it.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
    >>> from hild_xr.store.writer import RunWriter
    >>> arrays = {"train_loss": ArrayPlan(variable="train_loss")}
    >>> metrics = ProbePlan(steps=(0, 5), nodes={"": NodePlan(arrays=arrays)})
    >>> plan = RunPlan(seeds=(0,), probes={"metrics": metrics})
    >>> store = MemoryStore()
    >>> with RunWriter(store, plan, seed=0) as writer:
    ...     writer.write("metrics", 0, {"": {"train_loss": 2.5}})
    >>> run = open_run(store)
    >>> run["metrics/train_loss"].values
    array([[2.5]], dtype=float32)
    """
    plan = stored_plan(target)
    # chunks=None: dask graphs of the planned size are never built, only those of the committed part
    store: Any = locate(target, read_only=True).store  # xarray takes zarr stores, its annotation does not
    tree = xr.open_datatree(store, engine="zarr", chunks=None, consolidated=True)
    nodes: dict[str, xr.Dataset] = {"/": tree.to_dataset(inherit=False)}
    for name in plan.probes:
        nodes.update(_committed_part(tree.children[name], name, plan))
    return xr.DataTree.from_dict(nodes)


def recorded_seeds(target: StoreLike) -> set[int]:
    """Seeds whose planned records are all committed; empty if there is no store yet.

    Parameters
    ----------
    target
        Path of a run, or a zarr store.

    Returns
    -------
    set of int
        The finished seeds.

    Raises
    ------
    NotAStoreError
        If what is there was not written by hild-xr.

    Examples
    --------
    >>> recorded_seeds("absent.zarr")
    set()
    """
    try:
        plan = stored_plan(target)
    except FileNotFoundError:
        return set()
    root = zarr.open_group(locate(target, read_only=True).store, mode="r")
    markers = [np.asarray(zarr_array(root, f"{name}/committed")[:]) > 0 for name in plan.probes]
    finished = np.logical_and.reduce([marker.all(axis=1) for marker in markers])
    return {seed for seed, complete in zip(plan.seeds, finished, strict=True) if complete}


def _committed_part(group: xr.DataTree, name: str, plan: RunPlan) -> dict[str, xr.Dataset]:
    """Datasets of a probe's group and its nodes, trimmed and masked by the marker."""
    own = group.to_dataset(inherit=False)
    committed: NDArray[np.bool_] = np.asarray(own["committed"].values) > 0
    recorded = np.flatnonzero(committed.any(axis=0))
    steps = int(recorded[-1]) + 1 if len(recorded) else 0
    there = xr.DataArray(committed[:, :steps], dims=(DIM_SEED, DIM_STEP))
    nodes = {name: own}
    for child in plan.probes[name].nodes:
        if child != OWN_NODE:
            nodes[f"{name}/{child}"] = group.children[child].to_dataset(inherit=False)
    return {path: _trim(dataset, steps, there) for path, dataset in nodes.items()}


def _trim(dataset: xr.Dataset, steps: int, there: xr.DataArray) -> xr.Dataset:
    trimmed = dataset.isel({DIM_STEP: slice(steps)}, missing_dims="ignore")
    variables: dict[Hashable, xr.DataArray] = {}
    for name, array in trimmed.data_vars.items():
        if name == "committed" or DIM_STEP not in array.dims:
            variables[name] = array
            continue
        lazy = array.chunk(_read_chunks(array))
        if not there.values.all():
            fill = np.asarray(_MISSING[array.dtype.kind], dtype=array.dtype)[()]
            lazy = lazy.where(there, fill).assign_attrs(array.attrs)
        variables[name] = lazy.transpose(*array.dims)
    opened = trimmed.assign(variables)
    if DIM_LAYER in opened.indexes:
        # zarr's variable-length strings arrive as StringDType, which pandas indexes do not look up
        opened = opened.assign_coords({DIM_LAYER: opened[DIM_LAYER].astype(object)})
    return opened


def _read_chunks(array: xr.DataArray) -> dict[Hashable, int]:
    """Store chunks, joined along ``step`` up to :data:`READ_BYTES`; one seed each."""
    stored: tuple[int, ...] = array.encoding["chunks"]
    chunks: dict[Hashable, int] = dict(zip(array.dims, stored, strict=True))
    nbytes = int(np.prod(stored)) * array.dtype.itemsize
    blocks = max(1, READ_BYTES // max(1, nbytes))
    chunks[DIM_STEP] = min(chunks[DIM_STEP] * blocks, max(1, array.sizes[DIM_STEP]))
    return {dim: min(length, max(1, array.sizes[dim])) for dim, length in chunks.items()}
