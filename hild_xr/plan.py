"""The plan of a run: what it will hold, known before training starts.

A :class:`RunPlan` lists seeds, probes, steps, nodes and arrays with their final
shapes. The store is created from it in one go (store contract, point 1), two
processes that start together compare plans, and the size is known before the
first record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from hild_xr.variables import DIM_SEED, DIM_STEP, SCHEMA_VERSION, variable

OWN_NODE = ""
"""Name of the node that is the probe's group itself."""

BLOCK_BYTES = 1_000_000
"""Records are collected until a chunk holds about this many bytes ..."""

MAX_BLOCK_STEPS = 64
"""... or this many steps."""


DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool")
"""Dtypes that are stored."""

MAX_NAME_BYTES = 200
"""File systems take names of 255 bytes; the store appends to them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArrayPlan(_Frozen):
    """One array of the store.

    Parameters
    ----------
    variable
        Name in the registry :mod:`hild_xr.variables`.
    dims
        Dims after ``(seed, step)``.
    shape
        Extent of each of those dims.
    dtype
        NumPy dtype name.
    attrs
        Attributes beyond those of the registry, e.g. ``vector_dims``.

    Raises
    ------
    ValueError
        If the variable is not in the registry, dims and shape differ in
        length, or the dtype is not of the registered kind.

    Examples
    --------
    >>> array = ArrayPlan(variable="weight", dims=("out", "in"), shape=(10, 64), dtype="float32")
    >>> array.record_nbytes, array.block_steps
    (2560, 64)
    """

    variable: str
    dims: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    attrs: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("dtype", mode="before")
    @classmethod
    def _is_storable(cls, dtype: Any) -> str:
        try:
            name: str = np.dtype(dtype).name
        except TypeError as error:
            raise ValueError(f"{dtype!r} is no dtype: {error}") from None
        if name not in DTYPES:
            raise ValueError(f"arrays are stored as one of {', '.join(DTYPES)}; got dtype {dtype!r}")
        return name

    @model_validator(mode="after")
    def _is_consistent(self) -> ArrayPlan:
        try:
            declared = variable(self.variable)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        if len(self.dims) != len(self.shape):
            raise ValueError(f"{self.variable}: dims {self.dims} and shape {self.shape} differ in length")
        kind = np.dtype(self.dtype).kind
        if kind != declared.kind:
            raise ValueError(f"{self.variable} is of kind {declared.kind!r}; got dtype {self.dtype!r}")
        return self

    @property
    def record_nbytes(self) -> int:
        """Bytes of one record of one seed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def block_steps(self) -> int:
        """Steps in one chunk: a power of two, so that the blocks of a group end together."""
        fitting = BLOCK_BYTES // max(1, self.record_nbytes)
        clamped = min(max(1, fitting), MAX_BLOCK_STEPS)
        return 1 << (clamped.bit_length() - 1)

    @property
    def fill_value(self) -> float | int | bool:
        """What stands where nothing was recorded: NaN, -1 or False."""
        return {"f": math.nan, "i": -1, "b": False}[variable(self.variable).kind]

    def missing(self) -> NDArray[np.generic]:
        """Return the record of something that is not defined: the fill value throughout."""
        return np.full(self.shape, self.fill_value, dtype=self.dtype)


class CoordPlan(_Frozen):
    """A one-dimensional coordinate of a node: its dim, its values, its meaning."""

    dim: str
    values: tuple[Annotated[int, Field(strict=True)], ...] | tuple[str, ...]
    attrs: dict[str, JsonValue] = Field(default_factory=dict)


class NodePlan(_Frozen):
    """Arrays and coordinates of one node of a probe's group."""

    arrays: dict[str, ArrayPlan] = Field(default_factory=dict)
    coords: dict[str, CoordPlan] = Field(default_factory=dict)


class ProbePlan(_Frozen):
    """One probe: its steps, and its nodes by name (:data:`OWN_NODE` is the group itself).

    Raises
    ------
    ValueError
        If the steps do not increase, or a node name holds a slash or is that of
        an array of the group.
    """

    steps: tuple[int, ...]
    nodes: dict[str, NodePlan]
    attrs: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> ProbePlan:
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError("the steps of a probe must be given, increase strictly and not repeat")
        broken = [name for name in self.nodes if name != OWN_NODE and not _is_folder_name(name)]
        if broken:
            raise ValueError(
                f"a layer name becomes a folder: without '/', not '.' or '..', of at most {MAX_NAME_BYTES} "
                f"bytes; got {broken[0]!r}"
            )
        folded: dict[str, str] = {}
        for name in self.nodes:
            if folded.setdefault(name.casefold(), name) != name:
                raise ValueError(
                    f"layers {folded[name.casefold()]!r} and {name!r} differ only in upper and lower case, "
                    "and not every file system keeps them apart: record them by two probes, with "
                    "layers=[...] and group=..."
                )
        own = self.nodes.get(OWN_NODE, NodePlan())
        taken = (self.nodes.keys() - {OWN_NODE}) & {*own.arrays, *own.coords, "committed", DIM_SEED, DIM_STEP}
        if taken:
            raise ValueError(f"a layer cannot be named like an array of its probe's group: {sorted(taken)}")
        return self

    def arrays(self) -> Iterator[tuple[str, str, ArrayPlan]]:
        """Iterate over ``(node, name, array)``."""
        for node, contents in self.nodes.items():
            for name, array in contents.arrays.items():
                yield node, name, array

    @property
    def record_nbytes(self) -> int:
        """Bytes of one record of one seed."""
        return sum(array.record_nbytes for _, _, array in self.arrays())


class RunPlan(_Frozen):
    """What a run will hold.

    Parameters
    ----------
    seeds
        Seeds of the run; one process trains one or several of them.
    probes
        Plan of each probe by the name of its group.
    config
        Hyperparameters and anything else that identifies the run, as JSON.
    schema_version
        Version of :mod:`hild_xr.variables` the names follow.

    Raises
    ------
    ValueError
        If there is no seed, a seed repeats, or there is no probe; if the config
        or an attribute is no value of JSON, or holds NaN or infinity.

    Examples
    --------
    >>> loss = ArrayPlan(variable="train_loss", dtype="float64")
    >>> metrics = ProbePlan(steps=(0, 10, 20), nodes={"": NodePlan(arrays={"train_loss": loss})})
    >>> plan = RunPlan(seeds=(0, 1), probes={"metrics": metrics})
    >>> plan.nbytes
    48
    >>> plan.differences(plan)
    []
    """

    seeds: tuple[Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)], ...]
    probes: dict[str, ProbePlan]
    config: dict[str, JsonValue] = Field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION

    @model_validator(mode="after")
    def _is_consistent(self) -> RunPlan:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"a run needs at least one seed and no seed twice; got {self.seeds}")
        if not self.probes:
            raise ValueError("a run needs at least one probe")
        broken = [name for name in self.probes if not _is_folder_name(name)]
        if broken:
            raise ValueError(
                f"a probe's name becomes a folder and cannot be empty or hold '/': {broken[0]!r}"
            )
        return self

    @model_validator(mode="after")
    def _is_json(self) -> RunPlan:
        # NaN differs from itself, so no plan that holds one would match its own store
        for place, number in _numbers("", self.model_dump()):
            if not math.isfinite(number):
                raise ValueError(
                    f"{place} is {number}, which is no value of JSON: give None, or the text {str(number)!r}"
                )
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the finished run, before compression and without metadata."""
        per_seed = sum(len(probe.steps) * probe.record_nbytes for probe in self.probes.values())
        return len(self.seeds) * per_seed

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, for the attributes of the store."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, stored: object) -> RunPlan:
        """Read a plan back from the attributes of a store.

        Raises
        ------
        pydantic.ValidationError
            If the value is not a plan of this schema.
        """
        return cls.model_validate(stored)

    def differences(self, other: RunPlan) -> list[str]:
        """List in words where two plans differ; empty if they are equal.

        Parameters
        ----------
        other
            The plan in the store; ``self`` is the one asked for.

        Returns
        -------
        list of str
            One line a difference: where, what is asked for, what is stored.
        """
        return list(_differences("", self.model_dump(), other.model_dump()))


def _is_folder_name(name: str) -> bool:
    """Whether a name can be that of a folder on every file system, beside zarr's own files."""
    taken = name in ("", ".", "..", "zarr.json")
    return not taken and not set(name) & set("/\\\0") and len(name.encode()) <= MAX_NAME_BYTES


def _differences(where: str, asked: object, stored: object) -> Iterator[str]:
    if isinstance(asked, dict) and isinstance(stored, dict):
        for key in sorted(asked.keys() | stored.keys()):
            place = f"{where}/{key}" if where else str(key)
            if key not in stored:
                yield f"{place}: asked for, not in the store"
            elif key not in asked:
                yield f"{place}: in the store, not asked for"
            else:
                yield from _differences(place, asked[key], stored[key])
    elif asked != stored and not (asked is None and stored is None):
        yield f"{where}: {_in_words(asked)} asked for, {_in_words(stored)} in the store"


def _numbers(where: str, value: object) -> Iterator[tuple[str, float]]:
    """All floating-point numbers of nested values, with their places."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{where}/{key}" if where else str(key), item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _numbers(f"{where}/{i}", item)


def _in_words(value: object) -> str:
    if isinstance(value, tuple | list) and len(value) > 6:
        return f"{len(value)} values from {value[0]} to {value[-1]}"
    return repr(value)


def full_dims(array: ArrayPlan) -> tuple[str, ...]:
    """All dims of the stored array.

    Examples
    --------
    >>> full_dims(ArrayPlan(variable="weight", dims=("out",), shape=(3,)))
    ('seed', 'step', 'out')
    """
    return (DIM_SEED, DIM_STEP, *array.dims)
