"""Checks of arguments: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import torch
from torch import nn


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """Return a whole number as an int.

    Parameters
    ----------
    name
        What it is, in messages.
    value
        An int, or one of NumPy's integers; a bool is none.
    least
        The smallest that will do; None where that is checked elsewhere.

    Raises
    ------
    TypeError
        If it is no whole number.
    ValueError
        If it is too small.

    Examples
    --------
    >>> whole_number("seed", 3, 0)
    3
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be a whole number, as an int; got {value!r} of type {type(value).__name__}"
        )
    if least is not None and value < least:
        raise ValueError(f"{name} must be {least} or more; got {value}")
    return int(value)


def real_number(name: str, value: object) -> float:
    """Return a real number as a float.

    Raises
    ------
    TypeError
        If it is no number.

    Examples
    --------
    >>> real_number("tol", 1)
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, as a float; got {value!r} of type {type(value).__name__}")
    return float(value)


def check_seconds(max_seconds: object) -> None:
    """Check a time limit.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is negative or NaN.

    Examples
    --------
    >>> check_seconds(math.inf)
    """
    seconds = real_number("max_seconds", max_seconds)
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(
            f"max_seconds must be 0 or more, or math.inf for no limit of time; got {max_seconds}"
        )


def check_dtype(dtype: object) -> None:
    """Check a precision to compute in; None keeps the model's.

    Raises
    ------
    TypeError
        If it is no floating dtype of torch.

    Examples
    --------
    >>> check_dtype(torch.float64)
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise TypeError(
        "dtype must be a floating torch.dtype, such as torch.float64, or None for the model's own; "
        f"got {dtype!r}"
    )


def check_problem(model: object, objective: object) -> None:
    """Check that there are a model and an objective.

    Raises
    ------
    TypeError
        If the one is no module, or the other no objective.

    Examples
    --------
    >>> from hild_xr.recorders.objective import Objective
    >>> data = torch.zeros(2, 1)
    >>> check_problem(nn.Linear(1, 1), Objective(nn.functional.mse_loss, data, data))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not callable(getattr(objective, "mean_loss", None)):  # the class itself imports this package
        raise TypeError(
            f"objective must be an Objective; got {type(objective).__name__}: make one of the loss function "
            "and the data, as Objective(loss, inputs, targets)"
        )


def check_groups(blocks: object) -> None:
    """Check the values of a mapping of labels to names; anything else is checked elsewhere.

    Raises
    ------
    TypeError
        If a value is neither a text nor a collection.

    Examples
    --------
    >>> check_groups({"head": ["fc.weight", "fc.bias"], "body": "layers.*"})
    """
    if not isinstance(blocks, Mapping):
        return
    for label, names in blocks.items():
        if not isinstance(names, Iterable):
            raise TypeError(
                f"block {label!r} holds names of parameters, or patterns, as one text or a list of them; "
                f"got {names!r} of type {type(names).__name__}"
            )


def check_start(start: object, labels: Iterable[str]) -> None:
    """Check vectors to start from: tensors, by labels that there are.

    Raises
    ------
    TypeError
        If it is no mapping to tensors.
    ValueError
        If a label is unknown.

    Examples
    --------
    >>> check_start({"fc.weight": torch.ones(1, 2, 3)}, ["fc.weight", "fc.bias"])
    """
    if start is None:
        return
    if not isinstance(start, Mapping):
        raise TypeError(
            "start must be a mapping of labels to tensors of eigenvectors, as {label: "
            f"found[label].eigenvectors}}; got {type(start).__name__}"
        )
    known = list(labels)
    for label, vectors in start.items():
        if label not in known:
            near = difflib.get_close_matches(str(label), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"start holds an unknown block {label!r}{hint} The blocks are {', '.join(known)}"
            )
        if not isinstance(vectors, torch.Tensor):
            raise TypeError(
                f"the start of block {label!r} must be a tensor of eigenvectors, as "
                f"found[{label!r}].eigenvectors; got {type(vectors).__name__}"
            )
