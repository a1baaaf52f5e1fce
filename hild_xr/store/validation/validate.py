"""Check a stored run: metadata against the plan, every chunk's checksum, and what the numbers must obey."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from tqdm import tqdm
from zarr.abc.store import Store
from zarr.core.sync import sync

from hild_xr.store.backends import Location, StoreLike, locate
from hild_xr.store.errors import NotAStoreError, StoreError
from hild_xr.store.fingerprint import ROOT_KEY, fingerprint_holds
from hild_xr.store.root import CREATING, read_root
from hild_xr.store.validation.chunk_checks import (
    StoredRun,
    coordinate_findings,
    get_all,
    list_chunks,
    marker_findings,
    read_markers,
)
from hild_xr.store.validation.findings import Finding, ValidationReport
from hild_xr.store.validation.metadata_checks import (
    MARKER,
    RESTORE,
    NodeDocuments,
    array_findings,
    array_from,
    copies_in,
    copy_findings,
    group_findings,
    parsed,
    plan_of,
    planned_arrays,
    planned_groups,
    readable,
    root_findings,
    unchecked_findings,
)
from hild_xr.store.validation.record_checks import RecordCheck


def validate(target: StoreLike, *, progress: bool | None = None) -> ValidationReport:
    """Check a stored run, every byte of it.

    **Metadata.** Schema version, arrays, shapes, dims, dtypes, fill values,
    coordinates and planned attributes are held against the plan; every node's
    ``zarr.json`` against its copy in the consolidated metadata; the root against
    the SHA-256 that was stored in it at creation. A flipped bit that leaves the
    parsed JSON equal (``1e-05`` to ``1E-05``) changes nothing and is not found.

    **Chunks.** Every chunk that exists is read and its checksum verified, whether
    committed or not. A chunk that is missing under the marker is told from one
    that holds NaN.

    **Numbers** of committed records. A pair that is flagged converged is finite;
    nothing of a spectrum is infinite; eigenvalues are sorted as the group's
    attribute ``which`` says; eigenvectors are orthonormal up to
    :data:`~hild_xr.store.validation.number_checks.ORTHONORMAL_WITHIN`. Records that are NaN
    because training diverged or a block was marked missing are no error, and are
    counted in a note.

    **What it cannot find.** A checksum says that a chunk is whole, not that it lies
    where it was written: chunks that were exchanged for others of their size, an
    older copy of a chunk or of a marker, and a seed that was deleted with its
    markers pass, unless the numbers betray them. Compare hashes of the files
    where stores are copied by hand.

    Memory holds one block of one array at a time. A run may be validated while it
    is written: what was committed when validation started is judged.

    Parameters
    ----------
    target
        Path or URL of a run, or a zarr store.
    progress
        Show a progress bar; by default if stderr is a terminal.

    Returns
    -------
    ValidationReport
        Errors and notes, each with its place and what to do; ``report.ok`` is the verdict.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    NotAStoreError
        If what is there was not written by hild-xr.
    StoreError
        If the store cannot list its keys.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.store import create
    >>> from hild_xr.testing import spectrum_plan
    >>> store = MemoryStore()
    >>> location = create(store, spectrum_plan())
    >>> validate(store).ok
    True
    """
    location = locate(target, read_only=True)
    store, path = location.store, str(location)
    if location.path is not None and not location.path.exists():
        raise FileNotFoundError(f"no run at {path}")
    if not store.supports_listing:
        raise StoreError(
            f"{path} cannot list its keys, so lost chunks cannot be told from unwritten ones; "
            "copy the run into a folder and validate that"
        )
    root = _root_document(location, sync(get_all(store, [ROOT_KEY]))[0])
    if isinstance(root, Finding):
        return ValidationReport(path, (root,), 0, 0, 0)
    plan = plan_of(root)
    if isinstance(plan, Finding):
        return ValidationReport(path, (plan,), 0, 0, 0)
    run = StoredRun(store, plan, planned_arrays(plan))
    show = sys.stderr.isatty() if progress is None else progress
    found = [*_metadata_findings(run, root), *_content_findings(run, show)]
    errors_first = sorted(found, key=lambda finding: finding.severity != "error")
    return ValidationReport(path, tuple(errors_first), len(run.arrays), run.chunks, run.nbytes)


def _root_document(location: Location, raw: bytes | str | None) -> dict[str, Any] | Finding:
    """Return the root's document, or a finding if a run's is damaged; raise if this is no run at all."""
    if isinstance(raw, str):
        return Finding("error", ROOT_KEY, raw, RESTORE)
    # the attributes of every array name the schema version, and the root holds copies of them
    if raw is None or b"schema_version" not in raw:
        if sync(_has_a_marker(location.store)):
            return Finding("error", ROOT_KEY, "is missing" if raw is None else "is damaged", RESTORE)
        read_root(location)  # raises, and says what is there instead
        raise NotAStoreError(f"{location} was not written by hild-xr")
    root = parsed(raw)
    if isinstance(root, str):
        return Finding("error", ROOT_KEY, root, RESTORE)
    if root.get("node_type") == "array":
        read_root(location)  # raises: this is a part of a run
    attributes = root.get("attributes")
    if isinstance(attributes, dict) and "plan" in attributes:
        return root
    if isinstance(attributes, dict) and CREATING in attributes:
        advice = "wait a moment; if its creator died, create it again from the same plan, which completes it"
        return Finding("error", ROOT_KEY, "the run is still being created", advice)
    return Finding("error", ROOT_KEY, "its attributes hold no plan", RESTORE)


async def _has_a_marker(store: Store) -> bool:
    """Whether this is a run that lost its root: one of its folders is a probe's."""
    async for name in store.list_dir(""):
        if await store.exists(f"{name.rstrip('/')}/{MARKER}/zarr.json"):
            return True
    return False


def _metadata_findings(run: StoredRun, root: dict[str, Any]) -> Iterator[Finding]:
    """Check all metadata, and put the arrays that can be read into the run."""
    yield from root_findings(root, run.plan, consolidated=run.store.supports_consolidated_metadata)
    yield from unchecked_findings(run.plan)
    groups, copies = planned_groups(run.plan), copies_in(root)
    # with a sound fingerprint the copies are right, and they are what readers of a run go by
    sound = copies is not None and fingerprint_holds(root) is True
    paths = [*groups, *run.planned]
    for path, raw in zip(paths, sync(get_all(run.store, [f"{p}/zarr.json" for p in paths])), strict=True):
        held = None if copies is None else copies.get(path)
        documents = NodeDocuments(
            raw if isinstance(raw, str) else parsed(raw), held if isinstance(held, dict) else None
        )
        yield from copy_findings(path, documents, copies=copies is not None, sound=sound)
        document = documents.copy if sound or isinstance(documents.own, str) else documents.own
        if not isinstance(document, dict):
            continue
        if path in groups:
            yield from group_findings(path, document, groups[path])
        else:
            yield from _array_findings(run, path, document)
    for path in sorted((copies or {}).keys() - set(paths)):
        what = "is in the consolidated metadata and not in the plan"
        yield Finding("note", path, what, "no reader of the run looks at it; see what put it there")


def _array_findings(run: StoredRun, path: str, document: dict[str, Any]) -> Iterator[Finding]:
    array = array_from(run.store, path, document)
    if isinstance(array, Finding):
        yield array
        return
    yield from array_findings(path, array, document, run.planned[path])
    if readable(array, run.planned[path]):
        run.arrays[path] = array


def _content_findings(run: StoredRun, show: bool) -> Iterator[Finding]:
    # Markers before chunks are listed: what is committed now has its chunks, also while a writer goes on.
    yield from read_markers(run)
    yield from sync(list_chunks(run))
    yield from coordinate_findings(run)
    bar: tqdm[NoReturn]
    with tqdm(total=run.record_nbytes, unit="B", unit_scale=True, desc="validating", disable=not show) as bar:
        for name in run.plan.probes:
            for row in range(len(run.plan.seeds)):
                yield from marker_findings(run, name, row)
                yield from RecordCheck(run, name, row, bar.update).findings()
