"""Probes of kernels on a fixed probe set: conjugate kernels of modules, and the tangent kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.plan import OWN_NODE, ArrayPlan, NodePlan
from hild_xr.recorders.curvature import resolve_blocks, tangent_kernel
from hild_xr.recorders.curvature.blocks import trainable_shapes
from hild_xr.recorders.curvature.functional import Inputs, at_least_float32
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import NodeValues, Probe, Snapshot
from hild_xr.recorders.probes.module_probe import ModuleProbe
from hild_xr.recorders.probes.probe_set import ProbeSet, few_samples, raw_outputs
from hild_xr.recorders.schedule import Schedule
from hild_xr.variables import DIM_SAMPLE

_DIMS = (DIM_SAMPLE, "sample_")


class ConjugateKernel(ModuleProbe):
    r"""Record conjugate kernels into ``/conjugate_kernel/<module>/conjugate_kernel``.

    With the activations :math:`a(x)` of a module, flattened to h numbers,

    .. math:: K(x, x') = \frac1h\, a(x) \cdot a(x')

    (Wang et al., arXiv 2211.06506), as
    :func:`~hild_xr.recorders.curvature.conjugate_kernel`, for all modules in one forward pass.
    An M x M kernel in place of M x h activations: fewer numbers where h is above M. Dims are
    ``(sample, sample_)``.

    Parameters
    ----------
    inputs, modules, side, labels, batch_size, schedule
        As for :class:`~hild_xr.recorders.Features`.
    group
        Name of the group in the store.

    Raises
    ------
    TypeError, ValueError, KeyError
        As for :class:`~hild_xr.recorders.Features`.

    Examples
    --------
    >>> probe = ConjugateKernel(torch.zeros(20, 3))
    >>> model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1))
    >>> {name: node.arrays["conjugate_kernel"].shape for name, node in probe.plan(model, None, None).items()}
    {'0': (20, 20), '2': (20, 20)}
    """

    quantity = default_group = "conjugate_kernel"

    def _array(self, few: Tensor, n_samples: int) -> ArrayPlan:
        return _kernel(self.quantity, few, n_samples, {"side": self.side})

    def _value(self, activations: Tensor) -> Tensor:
        features = at_least_float32(activations)
        return features @ features.T / features.shape[1]


class TangentKernel(Probe):
    r"""Record the empirical neural tangent kernel into ``/tangent_kernel/tangent_kernel``.

    With the derivative :math:`J_c(x)` of output c by the parameters,

    .. math:: K(x, x') = \sum_c J_c(x) \cdot J_c(x')

    or that of a single output (see :func:`~hild_xr.recorders.curvature.tangent_kernel`, also
    for how it is computed). Dims are ``(sample, sample_)``.

    Parameters
    ----------
    inputs, labels, batch_size, schedule
        As for :class:`~hild_xr.recorders.Features`.
    output
        Number of the output; None for the sum over outputs.
    layers
        Qualified names of the parameters that take part; None for all that are trainable at
        the step.
    group
        Name of the group in the store.

    Raises
    ------
    TypeError
        If the inputs are no tensors, or the labels no integers, or ``output`` no integer.
    ValueError
        As for :class:`~hild_xr.recorders.Features`; and when the recorder starts, if there is no
        such output, a layer is unknown or frozen, or the model does not return one tensor with
        a row for each sample, which does not see the other samples.

    Examples
    --------
    >>> plan = TangentKernel(torch.zeros(20, 3)).plan(nn.Linear(3, 2), None, None)
    >>> array = plan[""].arrays["tangent_kernel"]
    >>> array.dims, array.shape
    (('sample', 'sample_'), (20, 20))
    """

    def __init__(
        self,
        inputs: Inputs | None = None,
        *,
        output: int | None = None,
        layers: Sequence[str] | None = None,
        labels: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
        schedule: Schedule | None = None,
        group: str = "tangent_kernel",
    ) -> None:
        super().__init__(group, schedule)
        if output is not None and (not isinstance(output, int) or isinstance(output, bool)):
            raise TypeError(f"output is the number of an output, or None for their sum; got {output!r}")
        self.probe_set = ProbeSet(inputs, batch_size=batch_size, labels=labels)
        self.needs_objective = self.probe_set.needs_objective
        self.output, self.layers = output, layers

    def attrs(self, objective: Objective | None) -> dict[str, JsonValue]:
        """Return whose kernel it is: of which output, by which parameters."""
        del objective
        return {
            "output": "sum" if self.output is None else self.output,
            "layers": None if self.layers is None else list(self.layers),
        }

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan one array; the kernel of a few samples shows whether model and settings fit."""
        del optimizer
        data = self.probe_set.data(model, objective)
        resolve_blocks(model, "layer", self.layers)
        few = few_samples(data)
        outputs = raw_outputs(model, few)
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != (len(few),):
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"a tangent kernel needs a model that returns one tensor with a row for each sample, got "
                f"{got}: wrap the model in a module that returns that"
            )
        n_outputs = outputs[0].numel()
        if self.output is not None and not 0 <= self.output < n_outputs:
            raise ValueError(f"the model has {n_outputs} outputs, numbered from 0; there is no {self.output}")
        self._array = _kernel("tangent_kernel", outputs, len(data), self.attrs(objective))
        arrays = {"tangent_kernel": self._array}
        return {OWN_NODE: NodePlan(arrays=arrays, coords=self.probe_set.coords())}

    def record(self, snapshot: Snapshot) -> NodeValues:
        """Compute the kernel; one of layers that were frozen since planning is missing."""
        data = self.probe_set.data(snapshot.model, snapshot.objective)
        trainable = trainable_shapes(unwrapped(snapshot.model))
        if not trainable or not set(self.layers or ()) <= trainable.keys():
            return {OWN_NODE: {"tangent_kernel": self._array.missing()}}
        kernel = tangent_kernel(
            snapshot.model,
            data.inputs,
            outputs="sum" if self.output is None else self.output,
            layers=self.layers,
            batch_size=data.batch_size,
        )
        return {OWN_NODE: {"tangent_kernel": kernel}}


def _kernel(name: str, like: Tensor, n_samples: int, attrs: dict[str, JsonValue]) -> ArrayPlan:
    return ArrayPlan(
        variable=name,
        dims=_DIMS,
        shape=(n_samples, n_samples),
        dtype=numpy_dtype(at_least_float32(like.detach().reshape(-1)[:0])),
        attrs={"vector_dims": list(_DIMS), **attrs},
    )
