"""Say in a few numbers what a stored run holds."""

from __future__ import annotations

from typing import Any

from hild_xr.store.backends import StoreLike
from hild_xr.store.contents import read_contents, read_markers


def summarise(target: StoreLike) -> dict[str, Any]:
    """Summarise a run from its plan and its markers; no data are read.

    Parameters
    ----------
    target
        Path of a run, or a zarr store.

    Returns
    -------
    dict
        JSON values: ``path``, ``schema_version``, ``seeds``, ``config``,
        ``provenance``, planned ``nbytes``, and for each probe ``planned`` and
        ``committed`` records, ``layers``, ``steps`` and ``attrs``.

    Raises
    ------
    FileNotFoundError, NotAStoreError, DamagedRecordError
        As :func:`hild_xr.store.open_run`.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.store import create
    >>> from hild_xr.testing import spectrum_plan
    >>> store = MemoryStore()
    >>> location = create(store, spectrum_plan())
    >>> summarise(store)["probes"]["hessian"]["committed"]
    0
    """
    contents = read_contents(target)
    plan, markers = contents.plan, read_markers(contents)
    probes = {}
    for name, probe in plan.probes.items():
        committed = markers[name] > 0
        probes[name] = {
            "planned": int(committed.size),
            "committed": int(committed.sum()),
            "steps": [probe.steps[0], probe.steps[-1]],
            "layers": [node for node in probe.nodes if node],
            "attrs": dict(probe.attrs),
        }
    return {
        "path": str(contents.location),
        "schema_version": plan.schema_version,
        "seeds": list(plan.seeds),
        "config": dict(plan.config),
        "provenance": contents.attributes("").get("provenance"),
        "nbytes": plan.nbytes,
        "probes": probes,
    }
