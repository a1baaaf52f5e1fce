"""Helpers for tests of code that reads or writes runs."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import Record
from hild_xr.variables import DIM_EIG


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

    The numbers are sound: eigenvalues are sorted, eigenvectors orthonormal.

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

    Raises
    ------
    ValueError
        If more eigenvectors are planned than there are dimensions.

    Examples
    --------
    >>> plan = spectrum_plan()
    >>> random_record(plan, "metrics", seed=0, step=1)[""]["train_loss"].shape
    ()
    """
    rng = np.random.default_rng([seed, step, attempt])
    contents = plan.probes[probe]
    record: dict[str, dict[str, np.ndarray]] = {node: {} for node in contents.nodes}
    for node, name, array in contents.arrays():
        drawn = np.asarray(rng.integers(0, 100, size=array.shape) / 7)
        if array.variable == "eigenvalues":
            drawn = _sorted(drawn, array.dims.index(DIM_EIG), str(contents.attrs.get("which", "magnitude")))
        if array.variable == "eigenvectors":
            drawn = _orthonormal(rng, array)
        record[node][name] = drawn.astype(array.dtype)
    return record


def _sorted(values: NDArray[np.float64], axis: int, which: str) -> NDArray[np.float64]:
    """Sort numbers, none of them negative, as the group's attribute ``which`` says."""
    ascending = np.sort(values, axis=axis)
    falling = np.flip(ascending, axis=axis)
    if which == "both":  # the largest, the smallest, the second largest, and so on
        n = values.shape[axis]
        return falling.take([i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)], axis=axis)
    return ascending if which == "smallest" else falling


def _orthonormal(rng: np.random.Generator, array: ArrayPlan) -> NDArray[np.float64]:
    """Draw orthonormal vectors: signs on disjoint coordinates, all reflected at one random plane.

    Sums are of integers and so exact: every machine draws the same bits, which a
    library's QR does not promise.
    """
    axis = array.dims.index(DIM_EIG)
    batch, count, spanned = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    size = math.prod(spanned)
    if count > size:
        raise ValueError(f"{array.variable}: no {count} orthonormal vectors in {size} dimensions")
    drawn = np.empty((math.prod(batch), count, size))
    for vectors in drawn:
        owner, signs = rng.permutation(size) % count, rng.choice([-1, 1], size=size)
        whole = np.where(owner == np.arange(count)[:, None], signs, 0)
        normal = rng.integers(1, 10, size=size)
        reflected = whole - (2 * (whole @ normal) / (normal @ normal))[:, None] * normal
        vectors[:] = reflected / np.sqrt(np.count_nonzero(whole, axis=1))[:, None]
    return drawn.reshape(array.shape)
