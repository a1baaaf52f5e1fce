"""Say in a few numbers what a stored run holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from hild_xr.store.backends import StoreLike, locate, zarr_array
from hild_xr.store.create import stored_plan


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
    FileNotFoundError, NotAStoreError
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
    plan, location = stored_plan(target), locate(target, read_only=True)
    root = zarr.open_group(location.store, mode="r")
    probes = {}
    for name, probe in plan.probes.items():
        committed = np.asarray(zarr_array(root, f"{name}/committed")[:]) > 0
        probes[name] = {
            "planned": int(committed.size),
            "committed": int(committed.sum()),
            "steps": [probe.steps[0], probe.steps[-1]],
            "layers": [node for node in probe.nodes if node],
            "attrs": dict(probe.attrs),
        }
    return {
        "path": str(location),
        "schema_version": plan.schema_version,
        "seeds": list(plan.seeds),
        "config": dict(plan.config),
        "provenance": root.attrs.get("provenance"),
        "nbytes": plan.nbytes,
        "probes": probes,
    }
