"""Hold the metadata of a stored run against its plan, its own second copy and its fingerprint.

Nothing here reads a chunk. What is compared is what the plan fixes, through
zarr's parsed metadata, and never whole JSON documents with newly written ones:
another version of zarr may spell the same metadata in another way. Chunk lengths
along ``step`` are a version's own choice and are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import zarr
from pydantic import JsonValue
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.storage import StorePath

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, ProbePlan, RunPlan, full_dims
from hild_xr.store.fingerprint import ROOT_KEY, canonical, fingerprint_holds
from hild_xr.store.validation.findings import Finding
from hild_xr.store.validation.number_checks import ORDERS, vector_layout
from hild_xr.variables import DIM_SEED, DIM_STEP, SCHEMA_VERSION

MARKER = "committed"

RESTORE = "restore it from a backup"
KNOWN_SCHEMAS = (SCHEMA_VERSION,)
"""Schema versions whose stores these checks understand."""

_MALFORMED = (KeyError, TypeError, ValueError)
"""What zarr raises for metadata that are JSON and not metadata: its own errors are ValueErrors."""


@dataclass(frozen=True)
class PlannedArray:
    """What the plan fixes of one stored array, coordinates and markers included.

    Parameters
    ----------
    role
        What the array is.
    dims, shape
        All dims, ``seed`` and ``step`` included.
    dtype
        NumPy dtype name, or ``"text"``.
    fill_value
        What unwritten chunks read as; None where it does not matter.
    attrs
        Attributes that the plan asks for.
    coord
        Plan of a coordinate.
    array
        Plan of a recorded array.
    """

    role: Literal["record", "marker", "coordinate"]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill_value: float | int | bool | None = None
    attrs: Mapping[str, JsonValue] = field(default_factory=dict)
    coord: CoordPlan | None = None
    array: ArrayPlan | None = None


@dataclass(frozen=True)
class NodeDocuments:
    """The ``zarr.json`` of one node: its own, and its copy in the root; what could not be read is a reason.

    Parameters
    ----------
    own
        Parsed document, or why there is none.
    copy
        Parsed document, or None if the root holds no copy.
    """

    own: dict[str, Any] | str
    copy: dict[str, Any] | None


def planned_arrays(plan: RunPlan) -> dict[str, PlannedArray]:
    """All arrays of a run by path, in planned order.

    Examples
    --------
    >>> from hild_xr.testing import spectrum_plan
    >>> list(planned_arrays(spectrum_plan()))[:4]
    ['metrics/seed', 'metrics/step', 'metrics/committed', 'metrics/train_loss']
    """
    found: dict[str, PlannedArray] = {}
    for name, probe in plan.probes.items():
        extent = (len(plan.seeds), len(probe.steps))
        found[f"{name}/{DIM_SEED}"] = _coordinate(CoordPlan(dim=DIM_SEED, values=plan.seeds))
        found[f"{name}/{DIM_STEP}"] = _coordinate(CoordPlan(dim=DIM_STEP, values=probe.steps))
        found[f"{name}/{MARKER}"] = PlannedArray("marker", (DIM_SEED, DIM_STEP), extent, "uint16", 0)
        for node, contents in probe.nodes.items():
            for label, coord in contents.coords.items():
                found[path_of(name, node, label)] = _coordinate(coord)
            for label, array in contents.arrays.items():
                found[path_of(name, node, label)] = PlannedArray(
                    "record",
                    full_dims(array),
                    (*extent, *array.shape),
                    array.dtype,
                    array.fill_value,
                    array.attrs,
                    array=array,
                )
    return found


def planned_groups(plan: RunPlan) -> dict[str, Mapping[str, JsonValue]]:
    """All groups below the root by path, with the attributes that the plan asks for."""
    found: dict[str, Mapping[str, JsonValue]] = {}
    for name, probe in plan.probes.items():
        found[name] = probe.attrs
        found.update({path_of(name, node): {} for node in probe.nodes if node != OWN_NODE})
    return found


def path_of(*parts: str) -> str:
    """Join the parts of a path; the probe's own node has no part.

    Examples
    --------
    >>> path_of("hessian", "", "eigenvalues")
    'hessian/eigenvalues'
    """
    return "/".join(part for part in parts if part)


def parsed(raw: bytes | None) -> dict[str, Any] | str:
    """Parse a ``zarr.json``, or say in words why that fails.

    Examples
    --------
    >>> parsed(b'{"node_type": "group"}'), parsed(None)
    ({'node_type': 'group'}, 'is missing')
    """
    if raw is None:
        return "is missing"
    try:
        document = json.loads(raw)
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        return f"cannot be read as JSON ({error})"
    return document if isinstance(document, dict) else "does not hold a JSON object"


# ---------------------------------------------------------------------------- the root


def plan_of(root: Mapping[str, Any]) -> RunPlan | Finding:
    """Read the plan from the root's document, or say what keeps it from being read."""
    version = str(root["attributes"].get("schema_version"))
    if version not in KNOWN_SCHEMAS:
        what = f"schema version {version} is not known; this hild-xr checks {', '.join(KNOWN_SCHEMAS)}"
        return Finding("error", ROOT_KEY, what, "use the version of hild-xr that wrote the run")
    try:
        return RunPlan.from_json(root["attributes"]["plan"])
    except ValueError as error:  # pydantic's ValidationError is one
        return Finding("error", ROOT_KEY, f"the plan in its attributes is damaged ({error})", RESTORE)


def root_findings(root: Mapping[str, Any], plan: RunPlan, *, consolidated: bool) -> Iterator[Finding]:
    """Check the root: fingerprint, versions, config, consolidated metadata.

    Parameters
    ----------
    root
        Parsed ``zarr.json`` of the root.
    plan
        The plan in it.
    consolidated
        Whether the store is of a kind that holds consolidated metadata.
    """
    holds = fingerprint_holds(root)
    if holds is False:
        yield Finding(
            "error",
            ROOT_KEY,
            "its SHA-256 is not the one stored at creation: the root's attributes or the consolidated "
            "metadata were changed or damaged",
            f"{RESTORE}, or, if you changed them on purpose, seal it anew with "
            "hild_xr.store.fingerprint.seal_store",
        )
    if holds is None:
        yield Finding(
            "note",
            ROOT_KEY,
            "carries no fingerprint (written by an earlier version), so damage to the root's attributes "
            "may go unseen",
            "nothing needs to be done",
        )
    attributes = root["attributes"]
    if plan.schema_version != attributes["schema_version"]:
        yield Finding("error", ROOT_KEY, "the plan names another schema version than the root", RESTORE)
    if canonical(attributes.get("config")) != canonical(plan.to_json()["config"]):
        yield Finding("error", ROOT_KEY, "the attribute config differs from the plan's", RESTORE)
    if consolidated and copies_in(root) is None:
        yield Finding("error", ROOT_KEY, "holds no consolidated metadata", "call zarr.consolidate_metadata")


def copies_in(root: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the copies of all nodes' documents in the consolidated metadata; None if there are none."""
    held = root.get("consolidated_metadata")
    copies = held.get("metadata") if isinstance(held, dict) else None
    return copies if isinstance(copies, dict) else None


# ---------------------------------------------------------------------------- the nodes


def copy_findings(path: str, documents: NodeDocuments, *, copies: bool, sound: bool) -> Iterator[Finding]:
    """Compare a node's own document with its copy in the root.

    Parameters
    ----------
    path
        The node.
    documents
        Both documents.
    copies
        Whether the root holds consolidated metadata at all.
    sound
        Whether the fingerprint says that the copies are as they were created.
    """
    place = f"{path}/zarr.json"
    write_back = f"write its copy from the consolidated metadata in the root's {ROOT_KEY} back to it"
    if isinstance(documents.own, str):
        mend = write_back if documents.copy is not None else RESTORE
        yield Finding("error", place, documents.own, mend)
    if copies and documents.copy is None:
        yield Finding("error", place, "has no copy in the consolidated metadata", RESTORE)
    if isinstance(documents.own, str) or documents.copy is None:
        return
    if canonical(_as_own(documents.copy)) != canonical(documents.own):
        mend = write_back if sound else f"one of the two is damaged: {RESTORE}"
        yield Finding("error", place, "differs from its copy in the consolidated metadata", mend)


def group_findings(
    path: str, document: Mapping[str, Any], asked: Mapping[str, JsonValue]
) -> Iterator[Finding]:
    """Compare a group with the plan."""
    if document.get("node_type") != "group":
        yield Finding("error", path, "is not a group", RESTORE)
        return
    yield from _attribute_findings(path, document, asked)


def array_from(store: Store, path: str, document: Mapping[str, Any]) -> zarr.Array[Any] | Finding:
    """Return the array that a document describes, without reading anything."""
    try:
        described: Any = dict(document)
        array: zarr.Array[Any] = zarr.Array(zarr.AsyncArray(described, StorePath(store, path)))
    except _MALFORMED as error:
        return Finding("error", path, f"its metadata do not describe an array: {_in_words(error)}", RESTORE)
    return array


def array_findings(
    path: str, array: zarr.Array[Any], document: Mapping[str, Any], planned: PlannedArray
) -> Iterator[Finding]:
    """Compare an array with what the plan fixes, and with the store contract."""
    dims = _dims(array)
    stored = {"shape": tuple(array.shape), "dims": dims, "dtype": _dtype_name(array)}
    asked = {"shape": planned.shape, "dims": planned.dims, "dtype": planned.dtype}
    for what, value in stored.items():
        if value != asked[what]:
            yield Finding("error", path, f"{what} is {value}; planned is {asked[what]}", RESTORE)
    if planned.fill_value is not None and not _same_number(array.fill_value, planned.fill_value):
        yield Finding(
            "error", path, f"fill value is {array.fill_value}; planned is {planned.fill_value}", RESTORE
        )
    if planned.role != "coordinate" and dims == planned.dims and array.chunks[0] != 1:
        yield Finding(
            "error",
            path,
            f"a chunk spans {array.chunks[0]} seeds, so that seeds which write in parallel lose records",
            "copy the run into a newly created store",
        )
    if planned.role == "marker" and dims == planned.dims and array.chunks[1] < array.shape[1]:
        yield Finding(
            "error",
            path,
            "the marker of a seed lies in several chunks, so that it is not replaced in one write",
            "copy the run into a newly created store",
        )
    if not any(isinstance(codec, Crc32cCodec) for codec in getattr(array.metadata, "codecs", ())):
        yield Finding(
            "note",
            path,
            "its chunks carry no checksum, so damage to them may go unseen",
            "keep hashes of the files",
        )
    yield from _attribute_findings(path, document, planned.attrs)


def readable(array: zarr.Array[Any], planned: PlannedArray) -> bool:
    """Whether chunks of the array can be found and understood: they are as planned, and of one seed each."""
    first_key = "/".join(["c", *["0"] * array.ndim])
    return (
        tuple(array.shape) == planned.shape
        and _dims(array) == planned.dims
        and _dtype_name(array) == planned.dtype
        and all(length > 0 for length in array.chunks)
        and (planned.role == "coordinate" or array.chunks[0] == 1)
        and array.metadata.encode_chunk_key((0,) * array.ndim) == first_key
    )


def unchecked_findings(plan: RunPlan) -> Iterator[Finding]:
    """Say which numbers cannot be judged, because the plan does not describe them well enough."""
    for name, probe in plan.probes.items():
        if order_of(probe) not in ORDERS:
            yield Finding(
                "note",
                name,
                f"which={order_of(probe)!r} is not one of {', '.join(ORDERS)}: the order of its eigenvalues "
                "is not checked",
                "nothing needs to be done",
            )
        for node, label, array in probe.arrays():
            if array.variable == "eigenvectors" and vector_layout(array) is None:
                yield Finding(
                    "note",
                    path_of(name, node, label),
                    "its attributes number_dim and vector_dims do not fit its dims: it is not checked to be "
                    "orthonormal",
                    "nothing needs to be done",
                )


def order_of(probe: ProbePlan) -> str:
    """Order of a probe's eigenvalues: its attribute ``which``, by default ``"magnitude"``."""
    return str(probe.attrs.get("which", "magnitude"))


def _coordinate(coord: CoordPlan) -> PlannedArray:
    text = bool(coord.values) and isinstance(coord.values[0], str)
    return PlannedArray(
        "coordinate",
        (coord.dim,),
        (len(coord.values),),
        "text" if text else "int64",
        attrs=coord.attrs,
        coord=coord,
    )


def _attribute_findings(
    path: str, document: Mapping[str, Any], asked: Mapping[str, JsonValue]
) -> Iterator[Finding]:
    held = document.get("attributes")
    stored = held if isinstance(held, dict) else {}
    for name, value in asked.items():
        if name not in stored or canonical(stored[name]) != canonical(value):
            yield Finding(
                "error",
                path,
                f"attribute {name!r} is {stored.get(name, 'missing')!r}; planned is {value!r}",
                RESTORE,
            )


def _as_own(copy: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what the copy of a group says beside its own document: that nothing is consolidated below."""
    if copy.get("node_type") != "group":
        return dict(copy)
    return {key: value for key, value in copy.items() if key != "consolidated_metadata"}


def _dims(array: zarr.Array[Any]) -> tuple[str | None, ...]:
    return tuple(getattr(array.metadata, "dimension_names", None) or ())


def _dtype_name(array: zarr.Array[Any]) -> str:
    return "text" if array.dtype.kind in "OTU" else str(array.dtype)


def _same_number(stored: Any, planned: float | int | bool) -> bool:
    return bool(np.array_equal(np.asarray(stored), np.asarray(planned), equal_nan=True))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
