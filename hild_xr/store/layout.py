"""From a plan to the files of an empty run: the metadata of every group and array, and the coordinates.

One document says everything: the root's ``zarr.json`` with the plan and the
consolidated metadata. All other files follow from it, so whoever finds a store
that was begun can complete it with the same bytes, whatever version began it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan, full_dims
from hild_xr.store.backends import written_whole
from hild_xr.store.fingerprint import ROOT_KEY, sealed
from hild_xr.variables import DIM_SEED, DIM_STEP, DIMS, attrs

MAX_CHUNK_BYTES = 8_000_000
"""A record larger than this is split along its own dims: zarr writes such chunks fastest."""

Document = dict[str, Any]
"""A parsed ``zarr.json``."""


def root_document(plan: RunPlan, root_attrs: Mapping[str, Any]) -> Document:
    """Build the root's ``zarr.json``: attributes, and the metadata of all groups and arrays.

    Parameters
    ----------
    plan
        What the run will hold.
    root_attrs
        Further attributes of the root, e.g. provenance.

    Returns
    -------
    dict
        The document, with its fingerprint.

    Raises
    ------
    TypeError, ValueError
        If an attribute is not a value of JSON; NaN and infinity are not.

    Examples
    --------
    >>> from hild_xr.testing import spectrum_plan
    >>> document = root_document(spectrum_plan(), {"licence": "CC-BY-4.0"})
    >>> document["attributes"]["licence"]
    'CC-BY-4.0'
    >>> list(document["consolidated_metadata"]["metadata"])[:4]
    ['hessian', 'metrics', 'weights', 'hessian/committed']
    """
    attributes = {
        "schema_version": plan.schema_version,
        "config": plan.config,
        "plan": plan.to_json(),
        **root_attrs,
    }
    try:
        json.dumps(attributes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"attributes of a run are values of JSON (text, finite numbers, lists, dicts): {error}"
        ) from error
    nodes = {
        path: node for name, probe in plan.probes.items() for path, node in _probe(name, plan.seeds, probe)
    }
    # by depth, as zarr orders them: it rebuilds the tree from neighbours
    ordered = {path: nodes[path] for path in sorted(nodes, key=lambda path: (path.count("/"), path))}
    return sealed({**_group(attributes), "consolidated_metadata": _consolidated(ordered)})


def files(root: Document) -> dict[str, bytes]:
    """Return all files of the run that a root document describes, by key.

    Parameters
    ----------
    root
        From :func:`root_document`.

    Returns
    -------
    dict
        ``zarr.json`` of every node, the root's among them, and the chunks of the coordinates.

    Examples
    --------
    >>> from hild_xr.testing import spectrum_plan
    >>> contents = files(root_document(spectrum_plan(), {}))
    >>> [key for key in contents if key.startswith("metrics/s")]
    ['metrics/seed/zarr.json', 'metrics/step/zarr.json', 'metrics/seed/c/0', 'metrics/step/c/0']
    """
    nodes: dict[str, Document] = root["consolidated_metadata"]["metadata"]
    contents = {ROOT_KEY: encoded_document(root)}
    for path, node in nodes.items():
        own = {key: value for key, value in node.items() if key != "consolidated_metadata"}
        contents[f"{path}/{ROOT_KEY}"] = encoded_document(own)
    plan = RunPlan.from_json(root["attributes"]["plan"])
    for path, coord in _coords(plan):
        contents[f"{path}/c/0"] = _coordinate_chunk(json.dumps(nodes[path]), coord.values)
    return contents


def encoded_document(document: Document) -> bytes:
    """Return a ``zarr.json`` as it is stored: indented, so that people can read it."""
    return json.dumps(document, indent=2, allow_nan=False).encode()


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


def _probe(name: str, seeds: tuple[int, ...], probe: ProbePlan) -> Iterator[tuple[str, Document]]:
    extent = (len(seeds), len(probe.steps))
    yield name, _in_consolidated(_group(dict(probe.attrs)))
    marker = {"shape": extent, "chunks": (1, extent[1]), "dtype": "uint16", "fill_value": 0}
    yield f"{name}/committed", _array(marker, (DIM_SEED, DIM_STEP), attrs("committed"))
    for coord_name, coord in _own_coords(seeds, probe):
        yield f"{name}/{coord_name}", _coordinate(coord)
    for node_name, node in probe.nodes.items():
        path = name if node_name == OWN_NODE else f"{name}/{node_name}"
        if node_name != OWN_NODE:
            yield path, _in_consolidated(_group({}))
        yield from _node(path, extent, node)


def _node(path: str, extent: tuple[int, int], node: NodePlan) -> Iterator[tuple[str, Document]]:
    for name, coord in node.coords.items():
        yield f"{path}/{name}", _coordinate(coord)
    for name, array in node.arrays.items():
        shape = {
            "shape": (*extent, *array.shape),
            "chunks": (1, min(array.block_steps, extent[1]), *record_chunks(array)),
            "dtype": array.dtype,
            "fill_value": array.fill_value,
        }
        yield f"{path}/{name}", _array(shape, full_dims(array), attrs(array.variable, **array.attrs))


def _own_coords(seeds: tuple[int, ...], probe: ProbePlan) -> Iterator[tuple[str, CoordPlan]]:
    yield DIM_SEED, CoordPlan(dim=DIM_SEED, values=seeds)
    yield DIM_STEP, CoordPlan(dim=DIM_STEP, values=probe.steps, attrs={"units": "1"})


def _coords(plan: RunPlan) -> Iterator[tuple[str, CoordPlan]]:
    """All coordinates of a run by path."""
    for probe_name, probe in plan.probes.items():
        for name, coord in _own_coords(plan.seeds, probe):
            yield f"{probe_name}/{name}", coord
        for node_name, node in probe.nodes.items():
            path = probe_name if node_name == OWN_NODE else f"{probe_name}/{node_name}"
            for name, coord in node.coords.items():
                yield f"{path}/{name}", coord


def _coordinate(coord: CoordPlan) -> Document:
    values = _values(coord.values)
    described = {"long_name": coord.dim, "description": DIMS.get(coord.dim, coord.dim), **coord.attrs}
    dtype = "str" if values.dtype == object else "int64"
    shape = {"shape": values.shape, "chunks": (max(1, len(values)),), "dtype": dtype, "fill_value": None}
    return _array(shape, (coord.dim,), described)


def _values(values: tuple[int, ...] | tuple[str, ...]) -> NDArray[Any]:
    text = bool(values) and isinstance(values[0], str)
    return np.asarray(values, dtype=object if text else np.int64)


def _array(shape: Mapping[str, Any], dims: tuple[str, ...], attributes: Mapping[str, object]) -> Document:
    bare: Document = json.loads(_bare_array(dims=dims, **shape))
    return {**bare, "attributes": dict(attributes)}


@lru_cache(maxsize=1024)
def _bare_array(
    *, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill_value: object, dims: tuple[str, ...]
) -> bytes:
    """Let zarr write the metadata of an array; the layers of a network have few different ones."""
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=shape,
        chunks=chunks,
        dtype=str if dtype == "str" else dtype,
        fill_value=fill_value,
        compressors=[Crc32cCodec()],
        dimension_names=dims,
    )
    return store._store_dict[ROOT_KEY].to_bytes()


@lru_cache(maxsize=1024)
def _coordinate_chunk(document: str, values: tuple[int, ...] | tuple[str, ...]) -> bytes:
    """Let zarr encode a coordinate, whose one chunk is all of it, as its metadata say."""
    prototype = zarr.core.buffer.default_buffer_prototype()
    store = MemoryStore({ROOT_KEY: prototype.buffer.from_bytes(document.encode())})
    written_whole(zarr.open_array(store, mode="r+"))[:] = _values(values)
    return store._store_dict["c/0"].to_bytes()


def _group(attributes: Mapping[str, object]) -> Document:
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def _in_consolidated(group: Document) -> Document:
    return {**group, "consolidated_metadata": _consolidated({})}


def _consolidated(nodes: Mapping[str, Document]) -> Document:
    # An extension that zarr and xarray both read; without it opening a store costs one request a node.
    return {"kind": "inline", "must_understand": False, "metadata": dict(nodes)}
