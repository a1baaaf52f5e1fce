"""Whether a loss is a mean over samples that do not see each other: tested on a few of them.

Weighting batches by their size, and the G-matrix itself, presume it. The loss of the samples
together is compared with the mean of their single losses: at the model's own outputs, which shows
what the model does, and at random ones, which show what the loss does. The model's own outputs do not
suffice for the second: at a head of zeros all samples have the same loss, and a weighted mean of equal
numbers is their mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs

MeanLoss: TypeAlias = Callable[[Any, Tensor], Tensor]
Samples: TypeAlias = tuple[Inputs, Tensor]

_MOST_TRIALS, _FEWEST_TRIALS = 8, 2
_NUMBERS = 2**27
"""Random numbers that the trials may draw together, as far as that allows the fewest trials."""


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a model's outputs.

    Parameters
    ----------
    foreign_rows
        Size of the first dim of a single output tensor if that is not the dim of samples (a
        sequence, say); None otherwise.
    """

    foreign_rows: int | None = None


@dataclass(frozen=True)
class _Leaf:
    """A tensor of the outputs.

    Parameters
    ----------
    values
        All samples together, with a dim of its own for them.
    axis
        Number of that dim.
    shape
        Shape as the model returns it.
    """

    values: Tensor
    axis: int
    shape: torch.Size

    def together(self) -> Tensor:
        return self.values.reshape(self.shape).clone()  # a loss may change it in place

    def apart(self) -> tuple[Tensor, ...]:
        return self.values.unbind(self.axis)

    def per_sample(self, numbers: Tensor) -> Tensor:
        """Shape numbers (n,) so that they broadcast over what else a sample has."""
        return numbers.reshape(-1, *[1] * (self.values.ndim - 1 - self.axis))


def check_mean(
    network: FunctionalModel, loss: MeanLoss, batch: Samples, singles: Sequence[Samples]
) -> Layout | None:
    """Check that the loss of a batch is the mean of the losses of its samples.

    Parameters
    ----------
    network
        The model.
    loss
        ``loss(outputs, targets)``.
    batch
        A few samples.
    singles
        The same ones, each by itself.

    Returns
    -------
    Layout or None
        None if the loss of the batch is not finite, which tells nothing.

    Raises
    ------
    ValueError
        If the model couples the samples or is random, its output loses the dim of samples, or the
        loss is no mean.

    Examples
    --------
    >>> network = FunctionalModel(torch.nn.Linear(2, 3))
    >>> x, y = torch.ones(2, 2), torch.tensor([0, 1])
    >>> check_mean(network, torch.nn.functional.cross_entropy, (x, y), [(x[:1], y[:1]), (x[1:], y[1:])])
    Layout(foreign_rows=None)
    """
    (inputs, targets), n = batch, len(singles)
    outputs = network(inputs)
    with _of_single_samples():
        parts = [network(single) for single, _ in singles]
    _require_samples_kept(outputs, parts)
    tolerance = _tolerance(outputs)
    # before the loss is called, which may change outputs in place
    leaves = _located(outputs, parts, tolerance) if n > 1 else []
    layout = _layout(outputs, parts[0], n)
    if n == 1 and not _repeats(outputs, parts[0], tolerance):
        raise ValueError(
            "two passes of the same sample through the model differ in eval mode: the model is random "
            "there, so it has no curvature. Turn sampling and noise off in eval mode"
        )
    together = loss(outputs, targets)
    if not bool(together.isfinite()):
        return None
    if n == 1:
        return layout
    tolerance = max(tolerance, _tolerance(together))
    with _of_single_samples():
        losses = [loss(part, target) for part, (_, target) in zip(parts, singles, strict=True)]
    _require_mean(together, torch.stack(losses), tolerance)
    for tried, each in _trials(loss, outputs, parts, leaves, targets, [t for _, t in singles]):
        # no network took part, so the loss alone says how exact they are
        _require_mean(tried, each, _tolerance(tried), " at outputs drawn at random")
    return layout


@contextmanager
def _of_single_samples() -> Iterator[None]:
    """Say of errors inside that it is a single sample at which model or loss fail."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the model or the loss fails on a single sample ({error}), so the loss is no mean over "
            "samples that do not see each other: use layers that treat samples apart (GroupNorm, "
            "BatchNorm with running statistics)"
        ) from error


def _require_samples_kept(outputs: Any, parts: Sequence[Any]) -> None:
    """Raise for an output of one sample that lacks a dim which that of several has."""
    if not isinstance(outputs, Tensor) or not isinstance(parts[0], Tensor):
        return
    if parts[0].ndim < outputs.ndim and parts[0].numel() * len(parts) == outputs.numel():
        raise ValueError(
            f"the model's output has shape {tuple(outputs.shape)} for {len(parts)} samples but "
            f"{tuple(parts[0].shape)} for one, which lost its dim of samples: .squeeze() drops every dim of "
            "size 1, that one too. Name the dim to drop, as in .squeeze(-1)"
        )


def _located(outputs: Any, parts: Sequence[Any], tolerance: float) -> list[_Leaf | None]:
    """Find the samples in each tensor of the outputs; None for what is not made of them."""
    flat, apart = tree_flatten(outputs)[0], [tree_flatten(part)[0] for part in parts]
    if any(len(leaves) != len(flat) for leaves in apart):
        return [None] * len(flat)
    found = []
    for i, tensor in enumerate(flat):
        candidates = list(_candidates(tensor, [leaves[i] for leaves in apart]))
        own = [torch.stack([leaves[i] for leaves in apart], leaf.axis) for leaf in candidates]
        fitting = [
            leaf
            for leaf, values in zip(candidates, own, strict=True)
            if _same(leaf.values, values, tolerance)
        ]
        if isinstance(outputs, Tensor) and candidates and not fitting:
            raise ValueError(
                "the model's output for a sample changes with the other samples of its batch (or is random) "
                "in eval mode, so the loss is no mean over samples: sampling, statistics of the "
                "batch and attention across the batch do that; use a layer that treats samples apart "
                "(GroupNorm, BatchNorm with running statistics)"
            )
        # equal rows (a head of zeros) may fit both ways: then it is not known which
        found.append(fitting[0] if len(fitting) == 1 else None)
    return found


def _candidates(tensor: Any, parts: Sequence[Any]) -> Iterator[_Leaf]:
    """Yield the ways in which single outputs may lie in the joint one, told by the shapes alone.

    That is along one dim, which may hold other things as well: ``(n * time, classes)``, sample by
    sample or time by time.
    """
    if not isinstance(tensor, Tensor) or not all(isinstance(part, Tensor) for part in parts):
        return
    n, shape = len(parts), parts[0].shape
    if any(part.shape != shape for part in parts) or len(shape) != tensor.ndim:
        return
    differing = [d for d in range(tensor.ndim) if tensor.shape[d] != shape[d]]
    if len(differing) != 1 or tensor.shape[differing[0]] != n * shape[differing[0]]:
        return
    (d,) = differing
    yield _Leaf(tensor.unflatten(d, (n, shape[d])), d, tensor.shape)
    if shape[d] > 1:
        yield _Leaf(tensor.unflatten(d, (shape[d], n)), d + 1, tensor.shape)


def _trials(
    loss: MeanLoss,
    outputs: Any,
    parts: Sequence[Any],
    leaves: Sequence[_Leaf | None],
    targets: Tensor,
    single_targets: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loss of all samples and the single losses at outputs drawn at random.

    What the loss is defined for is not known, so kinds of outputs are tried until it takes one.
    """
    flat, spec = tree_flatten(outputs)
    apart = [tree_flatten(part) for part in parts]
    drawable = [leaf for leaf in leaves if leaf is not None and leaf.values.is_floating_point()]
    if not drawable:
        return
    devices = {leaf.values.device for leaf in drawable}
    generators = {device: torch.Generator(device).manual_seed(0) for device in devices}
    numbers = sum(leaf.values.numel() for leaf in drawable)

    def trial(draw: Callable[[_Leaf, torch.Generator], _Leaf], rounded: bool) -> tuple[Tensor, Tensor]:
        drawn = [
            _rounded(draw(leaf, generators[leaf.values.device]), leaf.values.dtype, rounded)
            if leaf is not None and leaf.values.is_floating_point()
            else None
            for leaf in leaves
        ]
        joint = [own if leaf is None else leaf.together() for own, leaf in zip(flat, drawn, strict=True)]
        split = [None if leaf is None else leaf.apart() for leaf in drawn]
        together, losses = loss(tree_unflatten(joint, spec), targets), []
        for i, ((own, own_spec), target) in enumerate(zip(apart, single_targets, strict=True)):
            mixed = [o if s is None else s[i] for o, s in zip(own, split, strict=True)]
            losses.append(loss(tree_unflatten(mixed, own_spec), target))
        return together, torch.stack(losses)

    for _ in range(max(_FEWEST_TRIALS, min(_MOST_TRIALS, _NUMBERS // max(1, numbers)))):
        # a loss of half precision shows little, so it is asked for more if it takes that
        for draw, rounded in product((_normal, _fractions, _mixed), (False, True)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of outputs that are not the user's
                    together, each = trial(draw, rounded)
            except Exception:  # noqa: BLE001, S112 (it took the model's own outputs: it is not defined for these)
                continue
            if bool(together.isfinite() & each.isfinite().all()):
                yield together, each
                break


def _normal(leaf: _Leaf, generator: torch.Generator) -> _Leaf:
    """Draw normal numbers, each sample at a scale of its own, so that their losses differ much."""
    own = leaf.values
    if own.device.type != "cpu" and bool(((own >= 0) & (own <= 1)).all()):
        # Perhaps probabilities. Outside of [0, 1] kernels of binary_cross_entropy stop the whole GPU.
        return _fractions(leaf, generator)
    numbers = torch.randn(own.shape, generator=generator, dtype=_working(own), device=own.device)
    return replace(leaf, values=(leaf.per_sample(_scales(leaf, generator)) * numbers))


def _fractions(leaf: _Leaf, generator: torch.Generator) -> _Leaf:
    """Draw numbers in (0, 1), as probabilities are, and rates and variances may be."""
    own = leaf.values
    numbers = torch.rand(own.shape, generator=generator, dtype=_working(own), device=own.device)
    return replace(leaf, values=(numbers ** leaf.per_sample(_scales(leaf, generator)).sqrt()))


def _mixed(leaf: _Leaf, generator: torch.Generator) -> _Leaf:
    """Draw points between the model's own outputs of two samples: as valid as these, if that is convex."""
    own, n = leaf.values, leaf.values.shape[leaf.axis]
    other = own.index_select(leaf.axis, torch.randperm(n, generator=generator, device=own.device))
    share = torch.rand(n, generator=generator, dtype=_working(own), device=own.device)
    return replace(leaf, values=own + leaf.per_sample(share) * (other - own))


def _rounded(leaf: _Leaf, dtype: torch.dtype, rounded: bool) -> _Leaf:
    return replace(leaf, values=leaf.values.to(dtype)) if rounded else leaf


def _scales(leaf: _Leaf, generator: torch.Generator) -> Tensor:
    """Draw a number of 0.1 to 10 for each sample."""
    own, n = leaf.values, leaf.values.shape[leaf.axis]
    numbers: Tensor = torch.rand(n, generator=generator, dtype=_working(own), device=own.device)
    return 10 ** (2 * numbers - 1)


def _working(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _require_mean(together: Tensor, apart: Tensor, tolerance: float, where: str = "") -> None:
    if bool((together - apart.mean()).abs() <= tolerance * apart.abs().mean()):
        return
    raise ValueError(
        f"the loss of {len(apart)} samples is {float(together):.6g}, but the mean of their "
        f"single losses is {float(apart.mean()):.6g}{where}: loss(outputs, targets) must be a mean over "
        "samples. Use reduction='mean'; with class weights or ignored targets divide by the number "
        "of samples, not by the sum of the weights"
    )


def _layout(outputs: Any, single: Any, n: int) -> Layout:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or not isinstance(single, Tensor):
        return Layout()
    if len(outputs) == n and len(single) == 1:
        return Layout()
    # a first dim that grows with the samples (n * time) is never as long as they are many
    return Layout(len(outputs) if len(outputs) == len(single) else None)


def _repeats(once: Any, again: Any, tolerance: float) -> bool:
    pairs = zip(tree_flatten(once)[0], tree_flatten(again)[0], strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and _same(a, b, tolerance) for a, b in tensors)


def _same(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not values.is_floating_point():
        return torch.equal(values, expected)
    finite = values.isfinite() & expected.isfinite()  # masked logits may be infinite
    difference, scale = (values - expected)[finite].abs(), values[finite].abs()
    return not finite.any() or bool(difference.max() <= tolerance * scale.max())


def _tolerance(outputs: Any) -> float:
    # Kernels chosen for another batch size, and TF32 products on a GPU, round
    # differently: about 2e-3 in float32 and 5e-7 in float64. What is looked for is of order 1.
    tensors = [tensor for tensor in tree_flatten(outputs)[0] if isinstance(tensor, Tensor)]
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return math.pow(max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0), 0.4)
