"""Probe of the features: what chosen modules give, or take, on a fixed probe set."""

from __future__ import annotations

import math

from torch import Tensor

from hild_xr.plan import ArrayPlan
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.probes.module_probe import ModuleProbe
from hild_xr.variables import DIM_SAMPLE, DIM_UNIT


class Features(ModuleProbe):
    """Record activations on fixed inputs into ``/features/<module>/activations``.

    Dims are ``(sample, unit)``. An activation of more dims, as that of a convolution, is
    flattened in C order, so that feature rank, neural collapse and kernels take every module
    alike; the attr ``unit_shape`` holds ``[channels, height, width]`` (or what the module has)
    to bring it back. The model is in eval mode and left as it is.

    Parameters
    ----------
    inputs
        What the model is called with: a tensor, a tuple or a dict of tensors, samples along
        the first dim; copied. None for the inputs of the recorder's objective. Give the same
        for all seeds whose records are to be compared.
    modules
        Qualified names as ``named_modules()`` gives them. None for all modules that hold
        parameters themselves, are called once and give a row of numbers for each sample.
    side
        ``"output"``: what the modules give. ``"input"``: what they are called with, by which
        activations that are no module (``F.relu``) can be had: those are the input of the
        next layer.
    labels
        Class of each sample, an integer, the same for all seeds; stored as ``label`` (sample) in
        the group.
    batch_size
        Samples evaluated at a time; None takes all at once. With the objective's inputs, its
        batch size counts.
    schedule
        Steps of this probe; None for the recorder's.
    group
        Name of the group in the store.

    Raises
    ------
    TypeError
        If the inputs are no tensors, or the labels no integers.
    ValueError
        If there is no sample, or ``batch_size`` is given without inputs. When the recorder
        starts: if a module does not fit, inputs lie on another device than the model, or there
        are not as many labels as samples.
    KeyError
        When the recorder starts, if a module is unknown; the nearest is suggested.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> probe = Features(torch.zeros(20, 1, 8, 8), modules=["1"])
    >>> array = probe.plan(model, None, None)["1"].arrays["activations"]
    >>> array.dims, array.shape, array.attrs["unit_shape"]
    (('sample', 'unit'), (20, 144), [4, 6, 6])
    """

    quantity, default_group = "activations", "features"

    def _array(self, few: Tensor, n_samples: int) -> ArrayPlan:
        shape = tuple(few.shape[1:])
        return ArrayPlan(
            variable=self.quantity,
            dims=(DIM_SAMPLE, DIM_UNIT),
            shape=(n_samples, math.prod(shape)),
            dtype=numpy_dtype(few),
            attrs={"side": self.side, "unit_shape": list(shape)},
        )

    def _value(self, activations: Tensor) -> Tensor:
        return activations
