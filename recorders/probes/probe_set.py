"""The fixed inputs that a probe looks at, and what the modules of a model take and give on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hild_xr.plan import CoordPlan
from hild_xr.recorders.curvature import isolated
from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.objective import Objective
from hild_xr.variables import DIM_SAMPLE

Side = Literal["output", "input"]
"""Whether a module's output is meant or what it is called with."""

_DRY_SAMPLES = 3
"""Samples that show the shapes: several, so that a row for each is no chance."""


class ProbeSet:
    """Fixed inputs: a probe's own, or those of the recorder's objective.

    Parameters
    ----------
    inputs
        What the model is called with, samples along the first dim; copied, so that they stay
        as they are. None for the inputs of the objective.
    batch_size
        Samples evaluated at a time; None takes all at once. Only with inputs of one's own.
    labels
        Class of each sample, for readers; integers.

    Raises
    ------
    TypeError
        If the inputs are no tensors, or the labels no integers.
    ValueError
        If there is no sample, the tensors differ in length or device, there are not as many
        labels, or ``batch_size`` is out of range or given without inputs.

    Examples
    --------
    >>> probe_set = ProbeSet(torch.zeros(5, 2), batch_size=3)
    >>> len(probe_set.data(nn.Linear(2, 1), None))
    5
    """

    def __init__(
        self,
        inputs: Inputs | None,
        *,
        batch_size: int | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        if inputs is None and batch_size is not None:
            raise ValueError("batch_size is for inputs of the probe's own: the objective says its own")
        self._own = None if inputs is None else _as_objective(inputs, batch_size)
        self._labels = None if labels is None else _labels(labels)

    @property
    def needs_objective(self) -> bool:
        """Whether the inputs are those of the recorder's objective."""
        return self._own is None

    def data(self, model: nn.Module, objective: Objective | None) -> Objective:
        """Return the inputs, as an objective that cuts them into batches.

        Raises
        ------
        ValueError
            If they lie on another device than the model, there is neither an objective nor
            inputs, or there are not as many labels as samples.
        """
        data = objective if self._own is None else self._own
        if data is None:
            raise ValueError(
                "no inputs: give the probe inputs=..., or the recorder an objective whose inputs it takes"
            )
        devices = {parameter.device for parameter in unwrapped(model).parameters()}
        if devices and data.device not in devices:
            raise ValueError(
                f"the probe's inputs lie on {data.device} but the model on {sorted(map(str, devices))[0]}: "
                "bring them to the model's device before they are given"
            )
        if self._labels is not None and len(self._labels) != len(data):
            raise ValueError(f"one label for each sample: {len(self._labels)} for {len(data)} samples")
        return data

    def coords(self) -> dict[str, CoordPlan]:
        """Plan ``label`` (sample), where labels were given."""
        if self._labels is None:
            return {}
        meaning: dict[str, JsonValue] = {"long_name": "label", "description": "class of the sample"}
        return {"label": CoordPlan(dim=DIM_SAMPLE, values=self._labels, attrs=meaning)}


def few_samples(data: Objective) -> Objective:
    """Return the first few samples, for a dry run that shows shapes.

    Examples
    --------
    >>> len(few_samples(_as_objective(torch.zeros(5, 2), None)))
    3
    """
    return Objective(data.loss, *data.samples(slice(0, _DRY_SAMPLES)))


def raw_outputs(model: nn.Module, data: Objective) -> Any:
    """Return what the model gives for all inputs at once, whatever it is, in eval mode.

    Examples
    --------
    >>> raw_outputs(nn.Linear(2, 1), _as_objective(torch.zeros(5, 2), None)).shape
    torch.Size([5, 1])
    """
    with isolated(model), torch.no_grad():
        return FunctionalModel(model)(data.inputs)


def select_modules(
    model: nn.Module, data: Objective, modules: Sequence[str] | None, side: Side
) -> dict[str, Tensor]:
    """Check names of modules, or find all that can be recorded, by a forward pass on a few samples.

    Parameters
    ----------
    model, data
        The model and its inputs.
    modules
        Qualified names as ``named_modules()`` gives them. None for all modules that hold
        parameters themselves, are called once and have a row of floating-point numbers for
        each sample.
    side
        Which end of the modules is meant.

    Returns
    -------
    dict of str to Tensor
        What the modules give or take on the few samples, a row each, in the order given or
        the model's.

    Raises
    ------
    KeyError
        If a name is unknown; the nearest is suggested.
    ValueError
        If a name repeats or is that of the model itself, if a module does not fit, if none
        is left, or if ``side`` is unknown.
    TypeError
        If ``modules`` is a text.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> data = _as_objective(torch.zeros(5, 2), None)
    >>> {name: tuple(rows.shape) for name, rows in select_modules(model, data, None, "input").items()}
    {'0': (3, 2), '2': (3, 4)}
    """
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {', '.join(map(repr, get_args(Side)))}; got {side!r}")
    model = unwrapped(model)
    known = {name: module for name, module in model.named_modules() if name}
    names = _checked_names(known, modules)
    few = few_samples(data)
    with captured(model, names, side) as seen:
        raw_outputs(model, few)
    if modules is None:
        names = [name for name in names if _is_row_each(seen[name], len(few))]
        if not names:
            raise ValueError(
                "no module with parameters is called once with a row of floating-point numbers for each "
                "sample: name modules with modules=[...]"
            )
    return {name: _rows(seen[name], len(few), name, side) for name in names}


def module_values(model: nn.Module, data: Objective, modules: Sequence[str], side: Side) -> dict[str, Tensor]:
    """Return what modules give or take on all inputs: shape (samples, units), detached, in eval mode.

    Raises
    ------
    ValueError
        If a module is not called once with a row of floating-point numbers for each sample.

    Examples
    --------
    >>> model = nn.Sequential(nn.Identity(), nn.Flatten())
    >>> model.add_module("head", nn.Linear(4, 1))
    >>> data = _as_objective(torch.ones(5, 2, 2), None)
    >>> module_values(model, data, ["0"], "output")["0"].shape
    torch.Size([5, 4])
    """
    model = unwrapped(model)
    parts: dict[str, list[Tensor]] = {name: [] for name in modules}
    with isolated(model), torch.no_grad(), captured(model, modules, side) as seen:
        network = FunctionalModel(model)
        for inputs, targets in data.batches():
            for values in seen.values():
                values.clear()
            network(inputs)
            for name in modules:
                parts[name].append(_rows(seen[name], len(targets), name, side).flatten(1))
    return {name: torch.cat(rows) for name, rows in parts.items()}


@contextmanager
def captured(model: nn.Module, modules: Sequence[str], side: Side) -> Iterator[Mapping[str, list[Any]]]:
    """Collect what modules give or take at each call, as copies: what follows may work in place.

    Examples
    --------
    >>> model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    >>> with captured(model, ["0"], "output") as seen:
    ...     outputs = model(torch.tensor([-1.0]))
    >>> seen["0"]
    [tensor([-1.])]
    """
    seen: dict[str, list[Any]] = {name: [] for name in modules}

    def keep(name: str, value: Any) -> None:
        seen[name].append(value.detach().clone() if isinstance(value, Tensor) else value)

    handles = []
    for name in modules:
        module = model.get_submodule(name)
        if side == "output":
            handles.append(
                module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
            )
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _module, args, kwargs, name=name: keep(name, _first(args, kwargs)),
                    with_kwargs=True,
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def nearest(kind: str, name: str, known: Sequence[str]) -> str:
    """Return the message that something is unknown, with the nearest of the names that are known.

    Examples
    --------
    >>> nearest("module", "fc3", ["fc1", "norm"])
    "no module 'fc3' in the model; did you mean 'fc1'? It has: fc1, norm"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"no {kind} {name!r} in the model{hint} It has: {shown}"


def _as_objective(inputs: Inputs, batch_size: int | None) -> Objective:
    """Return the inputs as an objective whose loss is the mean output: all that is asked are its batches."""
    first = pytree.tree_leaves(inputs)[0]
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise TypeError(
            f"inputs must be torch tensors with samples along the first dim, got {type(first).__name__}: "
            "convert with torch.as_tensor"
        )
    return Objective(
        _mean_output, inputs, torch.zeros(len(first), device=first.device), batch_size=batch_size
    )


def _mean_output(outputs: Any, targets: Tensor) -> Tensor:
    flat = outputs.reshape(len(targets), -1)
    mean: Tensor = flat.mean(1).mean()
    return mean


def _labels(labels: Tensor | Sequence[int]) -> tuple[int, ...]:
    tensor = torch.as_tensor(labels)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(
            f"labels are one integer for each sample; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tuple(tensor.tolist())


def _checked_names(known: Mapping[str, nn.Module], modules: Sequence[str] | None) -> list[str]:
    if modules is None:
        return [name for name, module in known.items() if any(True for _ in module.parameters(recurse=False))]
    if isinstance(modules, str):
        raise TypeError(f"modules is a sequence of names; got the text {modules!r}: write [{modules!r}]")
    names = list(modules)
    for name in names:
        if name == "":
            raise ValueError("'' is the model itself, whose output the probe Outputs records")
        if name not in known:
            raise KeyError(nearest("module", name, list(known)))
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"modules must name at least one module and none twice; got {names}")
    return names


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_row_each(values: Sequence[Any], n_samples: int) -> bool:
    return (
        len(values) == 1
        and isinstance(values[0], Tensor)
        and values[0].shape[:1] == (n_samples,)
        and values[0].is_floating_point()
    )


def _rows(values: Sequence[Any], n_samples: int, module: str, side: Side) -> Tensor:
    if not _is_row_each(values, n_samples):
        got = [f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in values]
        raise ValueError(
            f"module {module!r} must be called once, its {side} one tensor of floating-point numbers with a "
            f"row for each of the {n_samples} samples; in one forward pass there came {got or 'no call'}: "
            "name a module for which that holds"
        )
    tensor: Tensor = values[0]
    return tensor
