"""k-GMM: a mixture of k Gaussians classified by softmax regression, one layer (arXiv 2310.03010)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.special import ndtr
from torch import Tensor, nn

from hild_xr.recorders.problems.checks import check_choice, check_integer, check_number
from hild_xr.recorders.problems.layers import blank_linear
from hild_xr.recorders.problems.mixture import Mixture, read_only, unit_means
from hild_xr.recorders.problems.streams import Purpose, stream


class SoftmaxRegression(nn.Module):
    """One linear layer without bias: logits ``x^c . Y``, where x^c is row c of ``linear.weight``."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = blank_linear(inputs, classes, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, of shape (samples, classes)."""
        outputs: Tensor = self.linear(inputs)
        return outputs


@dataclass(frozen=True, kw_only=True)
class GaussianMixture(Mixture):
    r"""The k-GMM: softmax regression on k Gaussian classes, by online SGD (arXiv 2310.03010).

    A sample of class b is :math:`Y \sim N(\mu_b, I_d/\lambda)`; the network is one linear layer
    without bias with rows :math:`x^1..x^k \in R^d`; the loss is

    .. math:: L = -x^b \cdot Y + \log \sum_c e^{x^c \cdot Y} + \frac{\beta}{2} |x|^2,

    with gradient :math:`(\phi_c - y_c) Y + \beta x^c` in :math:`x^c`, where
    :math:`\phi = \mathrm{softmax}(x \cdot Y)`.
    SGD sees one fresh sample a step, with learning rate :math:`c_\delta/d`.

    Parameters
    ----------
    dimension
        Dimension d of the samples.
    classes
        Number of classes k.
    snr
        Signal-to-noise ratio lambda: the noise has variance 1/lambda in each coordinate.
    beta
        Regulariser.
    c_delta
        Learning rate times dimension.
    probabilities
        Probability of each class; None means equal ones.
    means
        ``"orthonormal"``, or ``"general"`` for independent unit vectors.
    means_seed
        Seed of the means: a property of the problem, shared by all runs.
    start
        ``"gaussian"``: x^c ~ N(0, I/d) independent. ``"zero"``: x = 0, where the population
        spectra have closed forms. ``"planted"``: Gaussian, but with overlap ``warm`` of x^c with
        its own mean and 0 with the rest of the means' span.
    warm
        Overlap of each x^c with its own mean at a planted start.

    Raises
    ------
    TypeError, ValueError
        If a hyperparameter is out of range.

    Examples
    --------
    >>> problem = GaussianMixture(dimension=50, classes=3, snr=50.0)
    >>> model = problem.model(seed=0)
    >>> problem.train(model, problem.optimizer(model), steps=500, seed=0)
    >>> test = problem.objective(1000, seed=0)
    >>> problem.accuracy(model, test.inputs, test.targets) > 0.99
    True
    """

    dimension: int = 500
    classes: int = 4
    snr: float = 100.0
    beta: float = 0.01
    c_delta: float = 1.0
    probabilities: tuple[float, ...] | None = None
    means: Literal["orthonormal", "general"] = "orthonormal"
    means_seed: int = 0
    start: Literal["gaussian", "zero", "planted"] = "gaussian"
    warm: float = 0.3

    def __post_init__(self) -> None:
        check_integer("classes", self.classes, minimum=2)
        check_integer("dimension", self.dimension, minimum=self.classes)
        check_choice("means", self.means, ("orthonormal", "general"))
        check_choice("start", self.start, ("gaussian", "zero", "planted"))
        check_number("warm", self.warm, positive=True)
        self._check_mixture()
        if self.probabilities is not None:
            object.__setattr__(self, "probabilities", tuple(map(float, self.probabilities)))
            _check_probabilities(self.probabilities, self.classes)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy of logits (samples, classes) with class numbers (samples,), mean over the samples."""
        return F.cross_entropy

    def model(self, seed: int) -> SoftmaxRegression:
        """Return the network at its start; its one parameter is ``linear.weight``, of shape (k, d)."""
        model = SoftmaxRegression(self.dimension, self.classes)
        weight = model.linear.weight
        if self.start == "zero":
            nn.init.zeros_(weight)
            return model
        nn.init.normal_(weight, std=self.dimension**-0.5, generator=stream(Purpose.START, seed))
        if self.start == "planted":
            self._plant(weight.detach())
        return model

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class of the largest logit, of shape (samples,)."""
        return outputs.argmax(-1)

    @cached_property
    def centres(self) -> np.ndarray:
        """Class means mu_1..mu_k, of shape (classes, dimension); read-only."""
        return unit_means(
            self.classes, self.dimension, self.means_seed, orthonormal=self.means == "orthonormal"
        )

    @cached_property
    def span(self) -> np.ndarray:
        """Orthonormal basis of the class means' span, of shape (classes, dimension); read-only."""
        return read_only(np.linalg.qr(self.centres.T)[0].T)

    @property
    def bayes_accuracy(self) -> float:
        r"""Accuracy of the best classifier, for orthonormal means and equal probabilities.

        The class is that of the largest :math:`\mu_c \cdot Y`, so it is
        :math:`\int \varphi(z) \Phi(z + \sqrt{\lambda})^{k-1} dz`.

        Raises
        ------
        NotImplementedError
            For other means or unequal probabilities, where there is no such formula.
        """
        if self.means != "orthonormal" or len(set(self._centre_probabilities)) > 1:
            raise NotImplementedError(
                "bayes_accuracy has a formula only for orthonormal means and equal probabilities, got "
                f"means={self.means!r} and probabilities={self.probabilities!r}; classify samples of "
                "known means instead"
            )
        shift = self.snr**0.5

        def density(z: float) -> float:
            return float(np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * ndtr(z + shift) ** (self.classes - 1))

        return float(quad(density, -np.inf, np.inf)[0])

    def _plant(self, weight: Tensor) -> None:
        """Replace each row's part in the span of the means by ``warm`` times its own mean, in place."""
        span = torch.tensor(self.span, dtype=weight.dtype)
        weight -= weight @ span.T @ span
        weight += self.warm * self._centres32

    @property
    def _centre_probabilities(self) -> np.ndarray:
        if self.probabilities is None:
            return np.full(self.classes, 1 / self.classes)
        return np.array(self.probabilities)

    def _targets(self, centre: Tensor) -> Tensor:
        return centre


def _check_probabilities(probabilities: tuple[float, ...], classes: int) -> None:
    if len(probabilities) != classes or min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-9:
        raise ValueError(
            f"probabilities must be {classes} positive numbers that sum to 1, got {probabilities!r}"
        )
