"""Names and dims of a model's parameter tensors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from hild_xr.variables import DIM_IN, DIM_OUT

_KERNEL_DIMS: tuple[tuple[str, ...], ...] = ((), ("kw",), ("kh", "kw"), ("kd", "kh", "kw"))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_dims(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Dims of every parameter tensor by its qualified name.

    A vector (bias, gain) lies on ``out``, a matrix on ``(out, in)``, a
    convolution on ``(out, in, kh, kw)`` and its one- and three-dimensional
    forms; transposed convolutions store ``in`` first. A scalar has no dims. An
    embedding is a matrix: ``out`` numbers the tokens.

    Parameters
    ----------
    model
        Any module; tied weights appear once.

    Returns
    -------
    dict
        Qualified name to dims, in the order of ``named_parameters()``.

    Raises
    ------
    ValueError
        If a tensor has more than five dims.

    Examples
    --------
    >>> layer_dims(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2)))["0.weight"]
    ('out', 'in', 'kh', 'kw')
    """
    transposed = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _TRANSPOSED)
    }
    return {
        name: _dims(name, parameter.ndim, transposed=name in transposed)
        for name, parameter in model.named_parameters()
    }


def _dims(name: str, ndim: int, *, transposed: bool) -> tuple[str, ...]:
    if ndim < 2:
        return (DIM_OUT,) * ndim
    if ndim - 2 >= len(_KERNEL_DIMS):
        raise ValueError(f"{name} has {ndim} dims; hild-xr names at most 5 (out, in, kd, kh, kw)")
    leading = (DIM_IN, DIM_OUT) if transposed else (DIM_OUT, DIM_IN)
    return (*leading, *_KERNEL_DIMS[ndim - 2])


def select_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Check names of parameter tensors, or list them all.

    Parameters
    ----------
    model
        The model.
    layers
        Qualified names; None for all, frozen ones included.

    Returns
    -------
    list of str
        The names in the order given, or in the model's.

    Raises
    ------
    KeyError
        If a name is unknown; the nearest is suggested.
    ValueError
        If a name repeats, or if there is no parameter.

    Examples
    --------
    >>> select_layers(nn.Linear(2, 2), ["wieght"])
    Traceback (most recent call last):
        ...
    KeyError: "no parameter 'wieght' in the model; did you mean 'weight'? It has: weight, bias"
    """
    parameters = dict(model.named_parameters())
    if layers is None:
        if not parameters:
            raise ValueError("the model has no parameter; nothing to record")
        return list(parameters)
    if isinstance(layers, str):
        raise TypeError(f"layers is a sequence of names; got the text {layers!r}: write [{layers!r}]")
    names = list(layers)
    for name in names:
        if name not in parameters:
            raise KeyError(_unknown(name, list(parameters)))
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"layers must name at least one parameter and none twice; got {names}")
    return names


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"no parameter {name!r} in the model{hint} It has: {shown}"
