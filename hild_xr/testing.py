"""Helpers for tests of code that reads or writes runs."""

from __future__ import annotations

import numpy as np
from pydantic import JsonValue

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import Record


def spectrum_plan(
    *,
    steps: tuple[int, ...] = (0, 1, 2, 5, 10),
    seeds: tuple[int, ...] = (0, 1),
    rows: int = 3,
    columns: int = 4,
) -> RunPlan:
    """Plan a small run with metrics, weights and a Hessian spectrum of one layer ``fc.weight``.

    Parameters
    ----------
    steps
        Steps of all probes.
    seeds
        Seeds of the run.
    rows, columns
        Shape of the layer; make them large for records of many bytes.

    Returns
    -------
    RunPlan
        The plan.

    Examples
    --------
    >>> list(spectrum_plan().probes)
    ['metrics', 'weights', 'hessian']
    """
    dims, shape = ("out", "in"), (rows, columns)
    vector: dict[str, JsonValue] = {"vector_dims": ["out", "in"]}
    weight = ArrayPlan(variable="weight", dims=dims, shape=shape, attrs=vector)
    numbers = {
        "eigenvalues": ArrayPlan(
            variable="eigenvalues", dims=("layer", "eig"), shape=(1, 2), dtype="float64"
        ),
        "converged": ArrayPlan(variable="converged", dims=("layer", "eig"), shape=(1, 2), dtype="bool"),
        "n_matvec": ArrayPlan(variable="n_matvec", dims=("layer",), shape=(1,), dtype="int32"),
    }
    coords = {
        "layer": CoordPlan(dim="layer", values=("fc.weight",)),
        "eig": CoordPlan(dim="eig", values=(0, 1)),
    }
    vectors = ArrayPlan(
        variable="eigenvectors", dims=("eig", *dims), shape=(2, *shape), attrs={**vector, "number_dim": "eig"}
    )
    loss = ArrayPlan(variable="train_loss", dtype="float64")
    nodes: dict[str, dict[str, NodePlan]] = {
        "metrics": {"": NodePlan(arrays={"train_loss": loss})},
        "weights": {"fc.weight": NodePlan(arrays={"weight": weight})},
        "hessian": {
            "": NodePlan(arrays=numbers, coords=coords),
            "fc.weight": NodePlan(arrays={"eigenvectors": vectors}),
        },
    }
    probes = {name: ProbePlan(steps=steps, nodes=contents) for name, contents in nodes.items()}
    return RunPlan(seeds=seeds, probes=probes, config={"learning_rate": 0.1})


def random_record(plan: RunPlan, probe: str, *, seed: int, step: int, attempt: int = 1) -> Record:
    """Draw a record whose numbers follow from its place, so that a reader can check them.

    Parameters
    ----------
    plan
        Plan of the run.
    probe
        Name of the probe.
    seed, step, attempt
        Whose record it is; equal arguments give equal numbers.

    Returns
    -------
    dict
        ``{node: {array: value}}``.

    Examples
    --------
    >>> plan = spectrum_plan()
    >>> random_record(plan, "metrics", seed=0, step=1)[""]["train_loss"].shape
    ()
    """
    rng = np.random.default_rng([seed, step, attempt])
    record: dict[str, dict[str, np.ndarray]] = {node: {} for node in plan.probes[probe].nodes}
    for node, name, array in plan.probes[probe].arrays():
        drawn = rng.integers(0, 100, size=array.shape) / 7
        record[node][name] = np.asarray(drawn).astype(array.dtype)
    return record
