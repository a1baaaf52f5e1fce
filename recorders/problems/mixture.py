"""Gaussian mixtures with isotropic noise: fresh samples for online SGD at the critical step size."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hild_xr.recorders.objective import Objective
from hild_xr.recorders.problems.checks import check_choice, check_integer, check_number
from hild_xr.recorders.problems.problem import Problem
from hild_xr.recorders.problems.streams import Purpose, stream

BLOCK_STEPS = 1024
"""Training samples drawn at once; drawing then takes 4 % of a step at dimension 500."""


class Mixture(Problem):
    """Samples ``Y ~ sum_j p_j N(centre_j, I/snr)``, one a step, learning rate ``c_delta / dimension``."""

    dimension: int
    snr: float
    beta: float
    c_delta: float
    means_seed: int

    def _check_mixture(self) -> None:
        check_number("snr", self.snr, positive=True)
        check_number("beta", self.beta, positive=False)
        check_number("c_delta", self.c_delta, positive=True)
        check_integer("means_seed", self.means_seed, minimum=0)

    @property
    @abstractmethod
    def centres(self) -> np.ndarray:
        """Centres of the Gaussians, of shape (centres, dimension); read-only."""

    @property
    @abstractmethod
    def span(self) -> np.ndarray:
        """Orthonormal basis of the centres' span, of shape (rank, dimension); read-only."""

    @property
    @abstractmethod
    def bayes_accuracy(self) -> float:
        """Accuracy of the best classifier that knows the centres."""

    @property
    @abstractmethod
    def _centre_probabilities(self) -> np.ndarray:
        """Probability of each centre."""

    @abstractmethod
    def _targets(self, centre: Tensor) -> Tensor:
        """Targets of samples that come from the centres of these numbers."""

    @property
    def learning_rate(self) -> float:
        """Step size delta = c_delta / dimension, the critical scale of online SGD (arXiv 2206.04030)."""
        return self.c_delta / self.dimension

    def time(self, steps: int) -> float:
        """Return the time t = delta * steps in which the limiting dynamics runs."""
        return self.learning_rate * steps

    def steps(self, time: float) -> int:
        """Return the number of steps nearest to the time t = delta * steps."""
        return round(time / self.learning_rate)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` fresh samples.

        Parameters
        ----------
        n
            Number of samples.
        generator
            CPU generator to draw from; the global random state is not touched.

        Returns
        -------
        inputs : Tensor
            float32, of shape (n, dimension).
        targets : Tensor
            As the loss wants them.

        Raises
        ------
        TypeError, ValueError
            If ``n`` is no integer or is below 1.
        """
        check_integer("n", n, minimum=1)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        centre = torch.searchsorted(self._cumulative, uniform, right=True)
        inputs = torch.randn(n, self.dimension, generator=generator)
        inputs.mul_(self.snr**-0.5).add_(self._centres32[centre])
        return inputs, self._targets(centre)

    def objective(self, samples: int, seed: int, *, data: Literal["test", "train"] = "test") -> Objective:
        """Return what Hessian and G-matrix are taken of: the mean loss over fixed samples.

        The theory asks for ``samples`` of some multiple of ``dimension``.

        Parameters
        ----------
        samples
            Number of samples M.
        seed
            Seed of the run: every run has samples of its own.
        data
            ``"test"``: samples independent of training. ``"train"``: the first
            ``samples`` samples that SGD sees.

        Returns
        -------
        Objective
            With regulariser ``(beta/2) |theta|^2``.

        Raises
        ------
        TypeError, ValueError
            If an argument is out of range.
        """
        check_choice("data", data, ("test", "train"))
        check_integer("samples", samples, minimum=1)
        if data == "test":
            inputs, targets = self.sample(samples, stream(Purpose.TEST, seed))
        else:
            blocks = [self._block(seed, index) for index in range(-(-samples // BLOCK_STEPS))]
            inputs, targets = (torch.cat(parts)[:samples] for parts in zip(*blocks, strict=True))
        return Objective(self.loss, inputs, targets, l2=self.beta)

    @property
    def _block_batches(self) -> int:
        return BLOCK_STEPS

    def _block(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        return self.sample(BLOCK_STEPS, stream(Purpose.TRAIN, seed, index))

    @cached_property
    def _centres32(self) -> Tensor:
        return torch.tensor(self.centres, dtype=torch.float32)

    @cached_property
    def _cumulative(self) -> Tensor:
        # the last bound is left out, so that rounding cannot give a number beyond the last centre
        return torch.tensor(np.cumsum(self._centre_probabilities)[:-1])


def unit_means(n: int, dimension: int, seed: int, *, orthonormal: bool) -> np.ndarray:
    """Draw ``n`` unit vectors, uniform on the sphere, independent or made orthonormal.

    Parameters
    ----------
    n, dimension
        Number of vectors and of their components.
    seed
        The same seed gives the same vectors.
    orthonormal
        Whether the vectors are made orthonormal (a uniform frame).

    Returns
    -------
    numpy.ndarray
        float64, of shape (n, dimension); read-only.

    Examples
    --------
    >>> means = unit_means(3, 50, seed=0, orthonormal=True)
    >>> bool(np.allclose(means @ means.T, np.eye(3)))
    True
    """
    gauss = np.random.default_rng(seed).standard_normal((n, dimension))
    if orthonormal:
        q, r = np.linalg.qr(gauss.T)
        vectors = (q * np.sign(np.diag(r))).T
    else:
        vectors = gauss / np.linalg.norm(gauss, axis=1, keepdims=True)
    return read_only(vectors)


def read_only(array: np.ndarray) -> np.ndarray:
    """Return the array, closed to writing, since every user of the problem shares it."""
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
