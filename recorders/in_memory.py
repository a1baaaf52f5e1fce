"""One record, labelled as the store would hold it: written to a store in memory and opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr
from zarr.storage import MemoryStore

from hild_xr.plan import ProbePlan, RunPlan
from hild_xr.recorders.host_copy import HostCopier
from hild_xr.store import RunWriter, open_run
from hild_xr.variables import DIM_SEED, DIM_STEP

if TYPE_CHECKING:
    from hild_xr.recorders.host_copy import Measured


def as_stored(group: str, plan: ProbePlan, values: Measured) -> xr.DataTree:
    """Return what a store shows of one record, without the dims ``seed`` and ``step``.

    It does pass through a store, so that labels, dtypes and attributes are made in one place
    only and cannot differ.

    Parameters
    ----------
    group
        Name of the tree.
    plan
        Plan of the group, of one step.
    values
        Every planned array of every node.

    Returns
    -------
    xarray.DataTree
        The group, with a child for each node; in memory.

    Examples
    --------
    >>> from hild_xr.plan import ArrayPlan, NodePlan
    >>> loss = NodePlan(arrays={"train_loss": ArrayPlan(variable="train_loss")})
    >>> found = as_stored("metrics", ProbePlan(steps=(0,), nodes={"": loss}), {"": {"train_loss": 2.5}})
    >>> found["train_loss"].dims, float(found["train_loss"]), found["train_loss"].attrs["long_name"]
    ((), 2.5, 'training loss')
    """
    (step,) = plan.steps
    store = MemoryStore()
    with RunWriter(store, RunPlan(seeds=(0,), probes={group: plan}), seed=0) as writer:
        writer.write(group, step, HostCopier().take(values).wait())
    stored = open_run(store)[group]
    nodes = {name: _one_record(node) for name, node in [("/", stored), *stored.children.items()]}
    return xr.DataTree.from_dict(nodes, name=group).load()


def _one_record(node: xr.DataTree) -> xr.Dataset:
    records = node.to_dataset(inherit=False).drop_vars("committed", errors="ignore")
    return records.isel({DIM_SEED: 0, DIM_STEP: 0}, drop=True, missing_dims="ignore")
