"""Probe of the weights: every parameter tensor on its own dims, rounded or sketched on request."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pydantic import JsonValue
from torch import nn

from hild_xr.plan import ArrayPlan, NodePlan
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.layers import layer_dims, select_layers
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.sketching import SketchOption, VectorLayout, as_family, vectors_of_layer
from hild_xr.recorders.schedule import Schedule

Rounded = Literal["float16", "float32", "float64"]
"""Precisions that weights can be stored in."""


class OutOfRangeWarning(UserWarning):
    """A finite number does not fit the dtype that it is to be stored in; it is stored as NaN."""


class Weights(Probe):
    r"""Record parameter tensors into ``/weights/<layer>/weight``.

    Two options make records smaller; both are written into the attrs of the arrays.
    ``dtype="float16"`` rounds: a stored number w errs by at most
    :math:`\max(2^{-11} |w|, 2^{-25})`, and the attr ``lossy`` holds these two bounds.
    Numbers beyond the range (65504) are stored as NaN, with one warning. Differences
    between close steps lose more: 0.8 % of the change over ten steps was measured.
    ``sketch=m`` keeps inner products (see :mod:`hild_xr.sketch`): a tensor of more
    than m numbers becomes m numbers on the dim ``sketch``, smaller ones stay whole.

    Parameters
    ----------
    layers
        Qualified names as ``named_parameters()`` gives them; None for all,
        frozen ones included.
    dtype
        ``"float16"``, ``"float32"`` or ``"float64"``; None for the parameter's own
        (bfloat16 becomes float32, without loss).
    sketch
        Numbers m that stand for a tensor, or a
        :class:`~hild_xr.sketch.JohnsonLindenstrauss` with a seed. Give the same to all
        probes whose records are to be compared.
    sketch_rows
        Sketch each row of a weight by itself, all with one matrix over the columns, as
        spectra with ``blocks="rows"`` do; by default each tensor as one vector.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    ValueError
        For a dtype that cannot be stored, m that is no multiple of the nonzeros, or
        ``sketch_rows`` without ``sketch``.
        When the recorder starts, for a tensor of integers or complex numbers.
    KeyError
        When the recorder starts, if a layer is unknown; the nearest name is suggested.

    Warns
    -----
    OutOfRangeWarning
        Once, when a weight is beyond the range of ``dtype``.

    Examples
    --------
    >>> Weights().plan(nn.Linear(3, 2), None, None)["weight"].arrays["weight"].dims
    ('out', 'in')
    >>> small = Weights(sketch=64, dtype="float16").plan(nn.Linear(300, 10), None, None)
    >>> small["weight"].arrays["weight"].record_nbytes, small["bias"].arrays["weight"].record_nbytes
    (128, 20)
    """

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        dtype: Rounded | None = None,
        sketch: SketchOption = None,
        sketch_rows: bool = False,
        schedule: Schedule | None = None,
        group: str = "weights",
    ) -> None:
        super().__init__(group, schedule)
        if dtype is not None and dtype not in get_args(Rounded):
            why = ": zarr and xarray have no bfloat16" if str(dtype) == "bfloat16" else ""
            known = ", ".join(map(repr, get_args(Rounded)))
            raise ValueError(f"weights are stored as one of {known}, or None; got {dtype!r}{why}")
        if sketch_rows and sketch is None:
            raise ValueError("sketch_rows=True needs sketch=m, the numbers that stand for a row")
        self.layers, self.dtype = layers, dtype
        self.sketch, self.sketch_rows = as_family(sketch), sketch_rows
        self._warned = False

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one node a layer."""
        del optimizer, objective
        names = select_layers(model, self.layers)
        dims, parameters = layer_dims(model), dict(model.named_parameters())
        self._layouts: dict[str, VectorLayout] = {
            name: vectors_of_layer(
                self.sketch, name, dims[name], parameters[name].shape, rows=self.sketch_rows
            )
            for name in names
        }
        return {name: self._node(name, parameters[name]) for name in names}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Take the tensors; the recorder copies them."""
        parameters = dict(snapshot.model.named_parameters())
        tensors = {name: layout(parameters[name].detach()) for name, layout in self._layouts.items()}
        if self.dtype is not None:
            tensors = self._rounded(tensors, getattr(torch, self.dtype), snapshot.step)
        return {name: {"weight": tensor} for name, tensor in tensors.items()}

    def _node(self, name: str, parameter: torch.Tensor) -> NodePlan:
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name!r} holds {parameter.dtype}, and weights are recorded as real floating-point numbers: "
                "leave it out with layers=[...]"
            )
        layout = self._layouts[name]
        own = layout.dtype(numpy_dtype(parameter))
        stored = own if self.dtype is None else self.dtype
        weight = ArrayPlan(
            variable="weight",
            dims=layout.dims,
            shape=layout.shape,
            dtype=stored,
            attrs=layout.attrs | _loss(own, stored),
        )
        return NodePlan(arrays={"weight": weight})

    def _rounded(
        self, tensors: dict[str, torch.Tensor], dtype: torch.dtype, step: int
    ) -> dict[str, torch.Tensor]:
        rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        beyond = {name: rounded[name].isinf() & tensor.isfinite() for name, tensor in tensors.items()}
        if not self._warned:
            self._warn({name: int(flags.sum()) for name, flags in beyond.items() if flags.any()}, dtype, step)
        return {name: tensor.masked_fill(beyond[name], torch.nan) for name, tensor in rounded.items()}

    def _warn(self, counts: dict[str, int], dtype: torch.dtype, step: int) -> None:
        if counts:
            self._warned = True
            warnings.warn(
                f"step {step}: numbers beyond the range of {self.dtype} (+-{torch.finfo(dtype).max:g}) are "
                f"stored as NaN, here {counts}; training goes on. Store them with a wider dtype",
                OutOfRangeWarning,
                stacklevel=2,
            )


def _loss(own: str, stored: str) -> dict[str, JsonValue]:
    """Attributes of an array that is stored in less precision than it has."""
    coarse = torch.finfo(getattr(torch, stored))
    if coarse.eps <= torch.finfo(getattr(torch, own)).eps:
        return {}
    lossy: dict[str, JsonValue] = {
        "from": own,
        "to": stored,
        "relative_error": coarse.eps / 2,
        "absolute_error": coarse.smallest_normal * coarse.eps / 2,
    }
    return {"lossy": lossy}
