r"""The distribution of targets whose negative log-likelihood a loss is, read off the loss itself.

The Fisher information averages over targets drawn from the model's own prediction
:math:`p(y|x) = e^{-\ell(f(x), y)}`. Whether :math:`e^{-\ell}` is a distribution over targets
is a property that can be tested: over a finite set of targets it must sum to one, and
for a squared error it must be a Gaussian of one width. So no table of loss functions is
needed, and a loss that is none (label smoothing, class weights, a hinge) is refused.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    MeanLoss = Callable[[Tensor, Tensor], Tensor]

_MOST_CLASSES = 1024  # tried out one by one where the outputs are no logits
_STEPS = (0.1, 1.0, 10.0, 1000.0)  # a Huber loss is a square near zero only


@dataclass(frozen=True)
class Categorical:
    """A choice among a few targets, the same for all samples.

    Parameters
    ----------
    candidates
        The targets, shape (C, *target).
    log_p
        Their log-probabilities, shape (n, C).
    """

    candidates: Tensor
    log_p: Tensor

    def columns(self, loss: MeanLoss, outputs: Tensor) -> Tensor:
        r"""Return :math:`\sqrt{p_c}\, \partial\ell(f, c)/\partial f`, shape (n, C, *output)."""
        stacked = self._all_slopes(loss, outputs)
        weights = self.log_p.exp().sqrt().to(stacked.dtype)
        columns: Tensor = stacked * weights.reshape(*weights.shape, *[1] * (outputs.ndim - 1))
        return columns

    def drawn_columns(self, loss: MeanLoss, outputs: Tensor, noise: Noise) -> Tensor:
        r"""Return :math:`\partial\ell(f, y)/\partial f` for drawn y, over the root of their number."""
        cumulative = self.log_p.to(torch.float64).exp().cumsum(1)
        uniform = noise.uniform(outputs).to(cumulative.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(self.candidates) - 1)
        if noise.draws < len(self.candidates):
            found = [_slopes(loss, outputs, self.candidates[chosen[:, s]]) for s in range(noise.draws)]
            drawn = torch.stack(found, dim=1)
        else:
            samples = torch.arange(len(outputs), device=outputs.device)[:, None]
            drawn = self._all_slopes(loss, outputs)[samples, chosen]
        columns: Tensor = drawn / noise.draws**0.5
        return columns

    def _all_slopes(self, loss: MeanLoss, outputs: Tensor) -> Tensor:
        found = [_slopes(loss, outputs, c.expand(len(outputs), *c.shape)) for c in self.candidates]
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Gaussian:
    r"""Targets around the outputs, with the precision of the loss :math:`\frac\tau2|f - y|^2` + const.

    Parameters
    ----------
    precision
        :math:`\tau`; 2/D for the mean squared error of D outputs.
    """

    precision: float

    def columns(self, loss: MeanLoss, outputs: Tensor) -> Tensor:  # noqa: ARG002 (the loss is known)
        r"""Return :math:`\sqrt\tau\, e_d` for each component d of the output, shape (n, D, *output)."""
        return unit_columns(outputs, float(self.precision**0.5))

    def drawn_columns(self, loss: MeanLoss, outputs: Tensor, noise: Noise) -> Tensor:  # noqa: ARG002
        r"""Return :math:`\partial\ell(f, y)/\partial f` for drawn y, over the root of their number."""
        scale: float = (self.precision / noise.draws) ** 0.5
        return noise.normal(outputs).to(outputs) * scale


@dataclass(frozen=True)
class Noise:
    """Random numbers of a batch that do not depend on how the samples are cut into batches.

    Parameters
    ----------
    draws
        Targets drawn for each sample.
    seed
        Seed; the global generator is neither read nor moved.
    n_samples
        Number of samples of the objective.
    first
        Number of the batch's first sample.
    """

    draws: int
    seed: int
    n_samples: int
    first: int

    def uniform(self, outputs: Tensor) -> Tensor:
        """Return numbers in [0, 1), float64, shape (n, draws)."""
        shape = (self.n_samples, self.draws)
        return torch.rand(shape, generator=self._generator(), dtype=torch.float64)[self._batch(outputs)]

    def normal(self, outputs: Tensor) -> Tensor:
        """Return standard normal numbers, float64, shape (n, draws, *output)."""
        shape = (self.n_samples, self.draws, *outputs.shape[1:])
        return torch.randn(shape, generator=self._generator(), dtype=torch.float64)[self._batch(outputs)]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _batch(self, outputs: Tensor) -> slice:
        return slice(self.first, self.first + len(outputs))


def predictive(loss: MeanLoss, outputs: Tensor, targets: Tensor) -> Categorical | Gaussian:
    r"""Return the distribution of targets given outputs whose negative log-likelihood the loss is.

    Tried are, one target for each sample: class numbers (as of ``cross_entropy`` and
    ``nll_loss``), labels 0 and 1 (``binary_cross_entropy``, with logits or without), and
    real targets of the outputs' shape (``mse_loss`` and its multiples; the constant that
    normalises a Gaussian does not matter).

    Parameters
    ----------
    loss
        ``loss(outputs, targets)``, a mean over samples.
    outputs
        Shape (n, ...), detached.
    targets
        Shape (n, ...).

    Returns
    -------
    Categorical or Gaussian
        The distribution at each sample.

    Raises
    ------
    ValueError
        If the loss is no negative log-likelihood of these.

    Examples
    --------
    >>> import torch.nn.functional as F
    >>> predictive(F.cross_entropy, torch.zeros(2, 4), torch.tensor([0, 1])).log_p.exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    >>> predictive(F.mse_loss, torch.zeros(2, 4), torch.zeros(2, 4))
    Gaussian(precision=0.5)
    """
    n = len(targets)
    if outputs.ndim and len(outputs) == n:
        if targets.numel() == n:
            found = _classes(loss, outputs, targets)
            if found is not None:
                return found
        if targets.is_floating_point() and outputs.shape == targets.shape:
            precision = _precision(loss, outputs)
            if precision is not None:
                return Gaussian(precision)
    raise ValueError(
        "the Fisher matrix needs a loss that is the negative log-likelihood of one target for each sample: "
        "exp(-loss) summed over all targets must be 1 (cross_entropy, nll_loss, binary_cross_entropy for one "
        "label), or the loss a multiple of the squared error. This one is neither, for outputs of shape "
        f"{tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} and {targets.dtype}: label "
        "smoothing, class weights, several targets for a sample and hinges are not. Take matrix='ggn', which "
        "needs no likelihood (and equals the Fisher matrix for the losses above that are given logits), or "
        "'gmatrix'"
    )


def _classes(loss: MeanLoss, outputs: Tensor, targets: Tensor) -> Categorical | None:
    several = outputs.ndim == 2 and outputs.shape[1] > 1
    if targets.is_floating_point() or targets.dtype == torch.bool or not several:
        labels = torch.tensor([0, 1], device=targets.device)
    else:
        labels = torch.arange(outputs.shape[1], device=targets.device)
        guess = _logits(loss, outputs, targets)
        if guess is not None:
            return Categorical(_as_targets(labels, targets), guess)
    if len(labels) > _MOST_CLASSES:
        return None
    candidates = _as_targets(labels, targets)
    try:
        losses = [_losses(loss, outputs, c.expand(len(outputs), *c.shape)) for c in candidates]
    except (RuntimeError, ValueError, IndexError):
        return None  # a loss that does not take such targets is no likelihood of them
    log_p = -torch.stack(losses, dim=1)
    total = log_p.logsumexp(1)
    return Categorical(candidates, log_p) if bool((total.abs() <= _tolerance(outputs)).all()) else None


def _as_targets(labels: Tensor, targets: Tensor) -> Tensor:
    return labels.to(targets.dtype).reshape(len(labels), *targets.shape[1:])


def _logits(loss: MeanLoss, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Return log-probabilities if the loss picks its target's out of the outputs, which saves C trials."""
    generator = torch.Generator().manual_seed(0)
    tried = torch.randint(outputs.shape[1], (3, len(outputs)), generator=generator).to(targets.device)
    try:
        losses = [_losses(loss, outputs, c.to(targets.dtype).reshape(targets.shape)) for c in tried]
    except (RuntimeError, ValueError, IndexError):
        return None
    for log_p in (outputs.log_softmax(1), outputs):
        expected = [-log_p.gather(1, classes[:, None])[:, 0] for classes in tried]
        normalised = bool((log_p.logsumexp(1).abs() <= _tolerance(outputs)).all())
        if normalised and all(_close(a, b, outputs) for a, b in zip(losses, expected, strict=True)):
            return log_p
    return None


def _precision(loss: MeanLoss, outputs: Tensor) -> float | None:
    generator = torch.Generator().manual_seed(0)
    base = _losses(loss, outputs, outputs)
    if not _close(base, base[:1].expand_as(base), outputs):
        return None
    scale = 1 + float(outputs.abs().max())
    found = []
    for step in _STEPS:
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        targets = outputs + step * scale * noise.to(outputs)
        squares = (targets - outputs).reshape(len(outputs), -1).square().sum(1)
        found.append(2 * (_losses(loss, outputs, targets) - base) / squares)
    precision = torch.cat(found).median()
    alike = bool(((torch.cat(found) - precision).abs() <= 10 * _tolerance(outputs) * precision).all())
    return float(precision) if alike and bool(precision > 0) else None


def _losses(loss: MeanLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each sample by itself, shape (n,)."""

    def single(output: Tensor, target: Tensor) -> Tensor:
        return loss(output[None], target[None])

    with warnings.catch_warnings():
        # of losses without a batching rule, which torch then takes one by one
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        try:
            vectorised: Tensor = torch.func.vmap(single)(outputs, targets)
        except (RuntimeError, ValueError):  # control flow that depends on values
            return torch.stack([single(o, t) for o, t in zip(outputs, targets, strict=True)])
    return vectorised


def _slopes(loss: MeanLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of each sample's loss by its output, shaped as the outputs."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_(True)
        value = loss(leaf, targets)
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
    return slope * len(outputs)


def _close(values: Tensor, expected: Tensor, outputs: Tensor) -> bool:
    scale = 1 + expected.abs()
    return bool(((values - expected).abs() <= _tolerance(outputs) * scale).all())


def _tolerance(outputs: Tensor) -> float:
    return float(4 * torch.finfo(outputs.dtype).eps ** 0.5)


def unit_columns(outputs: Tensor, length: float = 1.0) -> Tensor:
    """Return vectors along each component of the outputs, shape (n, D, *output), the same for all samples.

    Examples
    --------
    >>> unit_columns(torch.zeros(1, 2), length=3.0)
    tensor([[[3., 0.],
             [0., 3.]]])
    """
    size = outputs[0].numel()
    identity = torch.eye(size, dtype=outputs.dtype, device=outputs.device) * length
    columns = identity.reshape(1, size, *outputs.shape[1:])
    return columns.expand(len(outputs), *columns.shape[1:])


def check_draws(draws: int, seed: int) -> None:
    """Check the options of Monte Carlo draws.

    Raises
    ------
    ValueError
        If ``draws`` is no integer of at least 1, or ``seed`` is negative.

    Examples
    --------
    >>> check_draws(1, 0)
    """
    whole: Sequence[object] = [v for v in (draws, seed) if isinstance(v, int) and not isinstance(v, bool)]
    if len(whole) < 2 or draws < 1 or seed < 0:
        raise ValueError(
            f"draws must be an integer of at least 1 and seed one of at least 0; got {draws!r}, {seed!r}"
        )
