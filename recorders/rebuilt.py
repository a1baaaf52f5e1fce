"""Models rebuilt from stored weights, and what can be measured of them record by record."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from torch import nn

from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.layers import layer_dims
from hild_xr.store import StoreLike, open_run
from hild_xr.variables import DIM_SEED, DIM_STEP

ModelT = TypeVar("ModelT", bound=nn.Module)

_VALUE = "value"


def load_weights(
    model: ModelT,
    run: xr.DataTree | StoreLike,
    step: int,
    seed: int | None = None,
    *,
    group: str = "weights",
    keep_buffers: bool = False,
) -> ModelT:
    """Copy the weights of one record into a model of the same architecture.

    Parameters
    ----------
    model
        Overwritten in place: its parameters, whatever they hold. Give a fresh one, not the one
        in training.
    run
        From ``hx.open``, or the path of a run.
    step
        Step of the record.
    seed
        Seed of the record; None where the run has one only.
    group
        Group of the probe :class:`~hild_xr.recorders.Weights`.
    keep_buffers
        Buffers (running statistics of BatchNorm) are not stored. True says that those in the
        model are the right ones.

    Returns
    -------
    nn.Module
        The model given.

    Raises
    ------
    KeyError
        If the run has no such group, or lacks a parameter of the model.
    ValueError
        If there is no record of that step and seed, the weights were sketched or are of another
        shape, the run has parameters that the model lacks, or the model has buffers and
        ``keep_buffers`` is False.

    Examples
    --------
    >>> from hild_xr import recorders as rec
    >>> model = nn.Linear(2, 1)
    >>> with rec.Recorder("run.zarr", model, probes=[rec.Weights()], schedule=rec.at([0])):
    ...     pass
    >>> rebuilt = load_weights(nn.Linear(2, 1), "run.zarr", step=0)
    >>> bool((rebuilt.weight == model.weight).all())
    True
    """
    tree = run if isinstance(run, xr.DataTree) else open_run(run)
    stored = _group(tree, group)
    chosen = _seed(stored, seed)
    _check_recorded(stored, step, chosen)
    own = unwrapped(model)
    parameters = dict(own.named_parameters())
    _check_names(stored, parameters)
    if not keep_buffers:
        _check_buffers(own)
    dims = layer_dims(own)
    for name, parameter in parameters.items():
        weight = stored.children[name].to_dataset()["weight"].sel({DIM_SEED: chosen, DIM_STEP: step})
        _load(parameter, weight, dims[name], name)
    return model


def over_records(
    run: xr.DataTree | StoreLike,
    model: nn.Module,
    measure: Callable[[nn.Module], xr.Dataset | xr.DataArray | float],
    *,
    steps: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    group: str = "weights",
    keep_buffers: bool = False,
) -> xr.Dataset | xr.DataArray:
    """Measure the models of many records.

    Parameters
    ----------
    run
        From ``hx.open``, or the path of a run.
    model
        A model of the architecture; it is copied.
    measure
        Called with the model of each record, one after the other in the same copy; returns a
        number or labelled numbers. The functions of :mod:`hild_xr.recorders.landscape` do.
    steps, seeds
        Of which records; None for all that were recorded.
    group, keep_buffers
        As for :func:`load_weights`.

    Returns
    -------
    xarray.Dataset or xarray.DataArray
        What ``measure`` returns, with the dims ``seed`` and ``step`` before its own; NaN where a
        seed has no record of a step that another one has.

    Raises
    ------
    ValueError
        If no record is asked for.
    KeyError, ValueError
        As for :func:`load_weights`.

    Examples
    --------
    >>> from hild_xr import recorders as rec
    >>> model = nn.Linear(2, 1)
    >>> with rec.Recorder("run.zarr", model, probes=[rec.Weights()], schedule=rec.at([0])):
    ...     pass
    >>> found = over_records("run.zarr", nn.Linear(2, 1), lambda rebuilt: float(rebuilt.bias.detach()))
    >>> found.dims, float(found[0, 0]) == float(model.bias.detach())
    (('seed', 'step'), True)
    """
    tree = run if isinstance(run, xr.DataTree) else open_run(run)
    stored = _group(tree, group)
    chosen_seeds = _labels(stored, DIM_SEED) if seeds is None else list(seeds)
    replica = copy.deepcopy(unwrapped(model))
    of_seeds: list[xr.Dataset] = []
    for seed in chosen_seeds:
        records = _recorded_steps(stored, seed) if steps is None else list(steps)
        measured = []
        for step in records:
            load_weights(replica, tree, step, seed, group=group, keep_buffers=keep_buffers)
            value = measure(replica)
            measured.append(_as_dataset(value).expand_dims({DIM_SEED: [seed], DIM_STEP: [step]}))
        if measured:
            of_seeds.append(xr.concat(measured, DIM_STEP, data_vars="all", join="exact"))
    if not of_seeds:
        raise ValueError(
            "no record to measure: the run holds none of the steps and seeds that were asked for"
        )
    # a seed that was stopped early lacks steps that others have
    found = xr.concat(of_seeds, DIM_SEED, data_vars="all", join="outer")
    if isinstance(value, xr.Dataset):
        return found
    return found[_VALUE].rename(value.name if isinstance(value, xr.DataArray) else None)


def _as_dataset(value: xr.Dataset | xr.DataArray | float) -> xr.Dataset:
    if isinstance(value, xr.Dataset):
        return value
    array = value if isinstance(value, xr.DataArray) else xr.DataArray(value)
    return array.to_dataset(name=_VALUE)


def _group(tree: xr.DataTree, group: str) -> xr.DataTree:
    if group not in tree.children:
        raise KeyError(
            f"the run has no group {group!r}, only {sorted(tree.children)}: weights are there if the "
            "recorder was given the probe Weights()"
        )
    return tree.children[group]


def _labels(stored: xr.DataTree, dim: str) -> list[int]:
    labels: list[int] = stored.to_dataset()[dim].to_numpy().tolist()
    return labels


def _seed(stored: xr.DataTree, seed: int | None) -> int:
    seeds = _labels(stored, DIM_SEED)
    if seed is None and len(seeds) == 1:
        return seeds[0]
    if seed is None or seed not in seeds:
        raise ValueError(f"seed={seed}: give one of the seeds of the run, {seeds}")
    return seed


def _recorded_steps(stored: xr.DataTree, seed: int) -> list[int]:
    """Return the steps that a seed has records of; a tree that was made by hand has all of its own."""
    steps = _labels(stored, DIM_STEP)
    if "committed" not in stored.data_vars:
        return steps
    committed = stored.data_vars["committed"].sel({DIM_SEED: seed}).to_numpy()
    return [step for step, attempt in zip(steps, committed, strict=True) if attempt > 0]


def _check_recorded(stored: xr.DataTree, step: int, seed: int) -> None:
    steps = _recorded_steps(stored, seed)
    if step in steps:
        return
    near = sorted(sorted(steps, key=lambda s: abs(s - step))[:6])
    raise ValueError(
        f"seed {seed} has no record of step {step}; of its {len(steps)} records the nearest: {near}"
    )


def _check_names(stored: xr.DataTree, parameters: dict[str, nn.Parameter]) -> None:
    missing = [name for name in parameters if name not in stored.children]
    if missing:
        raise KeyError(
            f"the run lacks {len(missing)} of the model's {len(parameters)} parameters, first "
            f"{missing[0]!r}; it has {list(stored.children)[:8]}: give a model of the architecture that was "
            "recorded, by Weights() of all layers"
        )
    unknown = [name for name in stored.children if name not in parameters]
    if unknown:
        raise ValueError(
            f"the run has {len(unknown)} parameters that the model lacks, first {unknown[0]!r}: give a model "
            "of the architecture that was recorded"
        )


def _check_buffers(model: nn.Module) -> None:
    kept = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    if kept:
        raise ValueError(
            f"the model has buffers that are not stored with the weights ({', '.join(kept[:4])}), and in "
            "eval mode they count: bring them to what they should be, by a checkpoint's state_dict() or by "
            "a pass over data in train mode, and say keep_buffers=True"
        )


@torch.no_grad()
def _load(parameter: nn.Parameter, weight: xr.DataArray, dims: tuple[str, ...], name: str) -> None:
    if "sketch" in weight.attrs:
        raise ValueError(f"{name!r} was recorded as a sketch, from which the weights cannot be had back")
    if set(weight.dims) != set(dims):
        raise ValueError(f"{name!r} has dims {dims} in the model but {weight.dims} in the run")
    values = weight.transpose(*dims).to_numpy()
    if values.shape != tuple(parameter.shape):
        raise ValueError(
            f"{name!r} has shape {tuple(parameter.shape)} in the model but {values.shape} in the run"
        )
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
