"""Open a run: what is committed, as a lazy DataTree.

xarray's own ``open_datatree`` costs milliseconds a node, most of them spent on asking zarr for every
array. Here one request brings the plan and the metadata of all arrays, one a seed and probe the
markers, and the tree is put together from these; no other file is touched before data are read.

Coordinates are taken from the plan. They are what is stored: plan and coordinates are written
together, before the store gets its name, and never again (``hild-xr validate`` compares them). Read
from their files they would cost a request each.
"""

from __future__ import annotations

import gc
import itertools
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.array.core import getter, normalize_chunks, slices_from_chunks
from numpy.typing import NDArray

from hild_xr.plan import OWN_NODE, CoordPlan, NodePlan
from hild_xr.store.backends import StoreLike
from hild_xr.store.contents import MARKER, Contents, Markers, read_contents, read_markers, sound_metadata
from hild_xr.store.lazy_array import Marker, StoredArray
from hild_xr.variables import DIM_SEED, DIM_STEP

READ_BYTES = 16_000_000
"""Dask chunks hold about this many bytes: whole store chunks, joined along ``step``."""

# dask declares no types
_DaskArray: Any = da.Array
_normalize_chunks: Any = normalize_chunks
_slices_from_chunks: Any = slices_from_chunks

_HANDLE = "hild_run"
"""Key in the root's ``encoding``: xarray keeps an encoding through copies, pickles and selections."""


@dataclass(frozen=True, eq=False)
class _Opened:
    """What a tree remembers of its run."""

    contents: Contents
    seen: Markers

    def __deepcopy__(self, memo: object) -> _Opened:
        return self


def open_run(target: StoreLike) -> xr.DataTree:
    """Open a stored run.

    Every probe has a group with its own ``step`` coordinate. Steps after the
    last committed one are trimmed; a record that some seed lacks is NaN (-1 for
    integers, False for flags), and ``committed`` says which. Arrays are lazy and
    dask-backed; opening reads metadata and the markers only. The order of nodes
    is the planned order.

    The tree shows one state: what was committed at this moment, each record as
    one attempt wrote it, however long training goes on beside it. If training is
    resumed at an earlier step in the meantime, records that this withdraws read
    as missing, with a :class:`~hild_xr.store.RecordsWithdrawnWarning`.
    ``run.hild.refresh()`` gives the present state without opening anew.

    Parameters
    ----------
    target
        Path of a run, or a zarr store.

    Returns
    -------
    xarray.DataTree
        One child a probe. Reading its data raises
        :class:`~hild_xr.store.DamagedRecordError` where a committed record is
        damaged, with its place.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    NotAStoreError
        If what is there was not written by hild-xr, is being created, or has
        damaged metadata; plain ``xarray.open_datatree(path, engine="zarr")`` may
        read the first.
    DamagedRecordError
        If a marker is damaged.
    StoreError
        If the store cannot be reached.

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
    contents = read_contents(target)
    return _tree(contents, read_markers(contents))


def refresh_run(tree: xr.DataTree) -> xr.DataTree:
    """Show what is committed now, with plan and metadata of the tree that is open.

    Only the markers are read, so this is cheap enough to poll. Selections made
    on the tree, and variables added to it, are not repeated. The tree that is
    given stays as it is; on a branch of an Icechunk repository, on its snapshot.

    Parameters
    ----------
    tree
        A tree from :func:`open_run`, or one of its nodes.

    Returns
    -------
    xarray.DataTree
        The same object if no marker has changed (with Icechunk: if nothing was
        committed), else a new tree; of a node, the same node of the new tree.

    Raises
    ------
    ValueError
        If the tree does not come from :func:`open_run`.
    FileNotFoundError
        If the run is gone.
    DamagedRecordError
        If a marker is damaged.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.store import RunWriter
    >>> from hild_xr.testing import random_record, spectrum_plan
    >>> store, plan = MemoryStore(), spectrum_plan()
    >>> with RunWriter(store, plan, seed=0) as writer:
    ...     run = open_run(store)
    ...     writer.write("metrics", 0, random_record(plan, "metrics", seed=0, step=0))
    >>> run["metrics"].sizes["step"], refresh_run(run)["metrics"].sizes["step"]
    (0, 1)
    """
    opened = tree.root.encoding.get(_HANDLE)
    if not isinstance(opened, _Opened):
        raise ValueError(
            "this tree does not know its run: it was not opened by hx.open, or was put together from parts "
            "of one that was. Open the run again with hx.open(path)"
        )
    contents = opened.contents.latest()
    now = read_markers(contents)
    same = all(np.array_equal(now[name], seen) for name, seen in opened.seen.items())
    # A branch may be set back, and its attempts counted anew: one snapshot is one state, markers are not.
    if same and contents is opened.contents:
        return tree
    node = _tree(contents, now)[tree.path]
    if not isinstance(node, xr.DataTree):
        raise ValueError(f"{tree.path} is no node of the run; refresh the tree that hx.open returned")
    return node


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
        contents = read_contents(target)
    except FileNotFoundError:
        return set()
    markers = read_markers(contents)
    finished = np.logical_and.reduce([(marker > 0).all(axis=1) for marker in markers.values()])
    return {seed for seed, complete in zip(contents.plan.seeds, finished, strict=True) if complete}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through a tree that is being built: a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_no_collection()
def _tree(contents: Contents, seen: Markers) -> xr.DataTree:
    with sound_metadata(contents.location):
        return _built(contents, seen)


def _built(contents: Contents, seen: Markers) -> xr.DataTree:
    root = xr.Dataset(attrs=contents.attributes(""))
    root.encoding = {"source": str(contents.location), _HANDLE: _Opened(contents, seen)}
    told: dict[str, object] = {}
    probes = [_Probe(contents, name, seen[name], told) for name in contents.plan.probes]
    tree = xr.DataTree(root)
    # Top down, by the setter of `children`: it takes nodes as they are, where from_dict copies each of
    # them, and a node that is attached is aligned with its parents once, not once a level.
    tree.children = {probe.name: xr.DataTree(probe.own()) for probe in probes}
    for probe in probes:
        tree.children[probe.name].children = {name: xr.DataTree(node) for name, node in probe.layers()}
    return tree


class _Probe:
    """The datasets of one probe: its own group, and a node for each layer."""

    def __init__(
        self, contents: Contents, name: str, seen: NDArray[np.uint16], told: dict[str, object]
    ) -> None:
        self.name, self._contents, self._plan = name, contents, contents.plan.probes[name]
        recorded = np.flatnonzero((seen > 0).any(axis=0))
        self._steps = int(recorded[-1]) + 1 if len(recorded) else 0
        self._seen = seen[:, : self._steps]
        self._marker = Marker(
            contents.source(f"{name}/{MARKER}"), self._seen, contents.plan.seeds, self._plan.steps, told
        )
        # One a tree, so that no two trees, and no two states of a run, share a key in a dask cluster.
        self._kinds: dict[str, xr.Dataset] = {}
        self._token = uuid.uuid4().hex

    def own(self) -> xr.Dataset:
        """Dataset of the group itself, with the coordinates of seeds and steps."""
        steps = self._plan.steps[: self._steps]
        coords = {
            DIM_SEED: self._coord(
                self.name, DIM_SEED, CoordPlan(dim=DIM_SEED, values=self._contents.plan.seeds)
            ),
            DIM_STEP: self._coord(self.name, DIM_STEP, CoordPlan(dim=DIM_STEP, values=steps)),
        }
        path = f"{self.name}/{MARKER}"
        marker = xr.Variable((DIM_SEED, DIM_STEP), self._seen.copy(), self._contents.attributes(path))
        node = self._plan.nodes.get(OWN_NODE, NodePlan())
        return self._dataset(self.name, node, {MARKER: marker, **coords})

    def layers(self) -> Iterator[tuple[str, xr.Dataset]]:
        """Iterate over the nodes below, in the planned order."""
        for name, node in self._plan.nodes.items():
            if name != OWN_NODE:
                yield name, self._layer(f"{self.name}/{name}", node)

    def _dataset(self, path: str, node: NodePlan, variables: Mapping[str, xr.Variable]) -> xr.Dataset:
        return xr.Dataset(
            {
                **variables,
                **{name: self._coord(path, name, coord) for name, coord in node.coords.items()},
                **{name: self._array(f"{path}/{name}") for name in node.arrays},
            },
            attrs=self._contents.attributes(path),
        )

    def _layer(self, path: str, node: NodePlan) -> xr.Dataset:
        """Dataset of a layer: the first of its kind is built, the others are copies with other data.

        Networks repeat their layers, and building a Dataset costs six times a copy.
        """
        metadata = {name: self._contents.nodes[f"{path}/{name}"] for name in (*node.coords, *node.arrays)}
        metadata[""] = self._contents.nodes[path]
        kind = repr(metadata)
        if node.coords:  # whose values the metadata do not show
            return self._dataset(path, node, {})
        if kind not in self._kinds:
            return self._kinds.setdefault(kind, self._dataset(path, node, {}))
        return self._kinds[kind].copy(data={name: self._lazy(f"{path}/{name}") for name in node.arrays})

    def _coord(self, path: str, name: str, coord: CoordPlan) -> xr.Variable:
        text = bool(coord.values) and isinstance(coord.values[0], str)
        # object, not StringDType: pandas indexes do not look that up
        values = np.asarray(coord.values, dtype=object if text else np.int64)
        return xr.Variable((coord.dim,), values, self._contents.attributes(f"{path}/{name}"))

    def _array(self, path: str) -> xr.Variable:
        dims = self._contents.nodes[path]["dimension_names"]
        return xr.Variable(dims, self._lazy(path), self._contents.attributes(path))

    def _lazy(self, path: str) -> Any:
        source = self._contents.source(path)
        stored = StoredArray(source, self._marker, self._steps)
        chunks, cuts = _read_chunks(source.chunks, stored.shape, stored.dtype.itemsize)
        name = f"{path}-{self._token}"
        # What da.from_array makes, in a quarter of its time. dask merges indexing with its own `getter`,
        # so that one step of a large chunk does not read the whole of it.
        original = f"original-{name}"
        graph: dict[object, object] = {(name, *place): (getter, original, cut) for place, cut in cuts}
        graph[original] = stored
        return _DaskArray(graph, name, chunks, meta=_meta(stored.dtype, stored.ndim))


Cuts = tuple[tuple[tuple[int, ...], tuple[slice, ...]], ...]
"""Number of each dask chunk along each dim, and its range."""


@lru_cache(maxsize=256)
def _read_chunks(
    stored: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[tuple[tuple[int, ...], ...], Cuts]:
    """Store chunks, joined along ``step`` up to :data:`READ_BYTES`; one seed each.

    Examples
    --------
    >>> chunks, cuts = _read_chunks((1, 64, 1000), (2, 150, 1000), 4)
    >>> chunks
    ((1, 1), (150,), (1000,))
    >>> cuts[1]
    ((1, 0, 0), (slice(1, 2, None), slice(0, 150, None), slice(0, 1000, None)))
    """
    nbytes = int(np.prod(stored)) * itemsize
    blocks = max(1, READ_BYTES // max(1, nbytes))
    lengths = (stored[0], stored[1] * blocks, *stored[2:])
    chunks: tuple[tuple[int, ...], ...] = _normalize_chunks(lengths, shape)
    places = itertools.product(*(range(len(along)) for along in chunks))
    return chunks, tuple(zip(places, _slices_from_chunks(chunks), strict=True))


@lru_cache(maxsize=256)
def _meta(dtype: np.dtype[Any], ndim: int) -> NDArray[Any]:
    return np.empty((0,) * ndim, dtype=dtype)
