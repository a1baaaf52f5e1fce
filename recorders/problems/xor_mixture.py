"""XOR-GMM: four Gaussians in XOR position and a two-layer ReLU network (arXiv 2206.04030, 2310.03010)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import Tensor, nn

from hild_xr.recorders.problems.checks import check_integer, check_number
from hild_xr.recorders.problems.layers import blank_linear
from hild_xr.recorders.problems.mixture import Mixture, read_only, unit_means
from hild_xr.recorders.problems.streams import Purpose, stream

CENTRES = ("+mu", "-mu", "+nu", "-nu")
"""Names of the four centres, in the order of :attr:`XorMixture.centres`."""

_SIGNS = np.array([1.0, 1.0, -1.0, -1.0])  # +1 where the label is 1
_PLANTING_ORDER = (0, 2, 3, 1)  # one centre of each label first


class TwoLayerNetwork(nn.Module):
    """``v . relu(W Y)`` without biases; ``first.weight`` is W (K, d), ``second.weight`` is v (1, K)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.first = blank_linear(inputs, hidden, bias=False)
        self.second = blank_linear(hidden, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of label 1, of shape (samples, 1)."""
        outputs: Tensor = self.second(F.relu(self.first(inputs)))
        return outputs


@dataclass(frozen=True, kw_only=True)
class XorMixture(Mixture):
    r"""The XOR-GMM: a two-layer ReLU network on four Gaussians, by online SGD (arXiv 2206.04030).

    Label 1 has centres :math:`\pm\mu`, label 0 has :math:`\pm\nu`, each of probability 1/4, with
    :math:`\mu, \nu` orthogonal unit vectors and noise :math:`N(0, I_d/\lambda)`. With
    :math:`s = v \cdot \mathrm{relu}(W Y)` the loss is

    .. math:: L = -y s + \log(1 + e^s) + \frac{\beta}{2} (|v|^2 + |W|^2).

    SGD sees one fresh sample a step, with learning rate :math:`c_\delta/d`. For beta < 1/8 and
    large lambda each neuron settles on one centre or dies: those with :math:`v_i > 0` on
    :math:`\pm\mu`, those with :math:`v_i < 0` on :math:`\pm\nu`, and all that settle on one centre
    have :math:`\sum v_i^2 = C_\beta` (:attr:`fixed_point_margin`). A centre on which none settles is
    not told from the other label: the classifier is sub-optimal.

    Parameters
    ----------
    dimension
        Dimension d of the samples.
    hidden
        Number of hidden neurons K.
    snr
        Signal-to-noise ratio lambda: the noise has variance 1/lambda in each coordinate.
    beta
        Regulariser.
    c_delta
        Learning rate times dimension.
    means_seed
        Seed of mu and nu: a property of the problem, shared by all runs.
    planted_centres
        None: the Gaussian start W_i ~ N(0, I/d), v_i ~ N(0, 1). A number from 1 to 4: the
        neurons start on that many centres (+mu, +nu, -nu, -mu in this order, in turn), so that
        it is known beforehand how many the run covers. Several numbers: run s has the
        (s mod length)-th.
    warm
        Overlap of each neuron with its own centre at a planted start; with the other
        direction it is 0. The rest of W_i stays Gaussian, and v_i is 1 or -1 by the label.

    Raises
    ------
    TypeError, ValueError
        If a hyperparameter is out of range.

    Examples
    --------
    >>> problem = XorMixture(dimension=50, snr=100.0, planted_centres=(4, 3))
    >>> models = [problem.model(seed) for seed in (0, 1)]
    >>> [int(problem.covered_centres(*(p.detach().numpy() for p in m.parameters()))) for m in models]
    [4, 3]
    """

    dimension: int = 250
    hidden: int = 4
    snr: float = 1000.0
    beta: float = 0.1
    c_delta: float = 1.0
    means_seed: int = 0
    planted_centres: int | tuple[int, ...] | None = None
    warm: float = 0.3

    def __post_init__(self) -> None:
        check_integer("dimension", self.dimension, minimum=2)
        check_integer("hidden", self.hidden, minimum=1)
        check_number("warm", self.warm, positive=True)
        self._check_mixture()
        if isinstance(self.planted_centres, Sequence):
            if not self.planted_centres:
                raise ValueError(
                    "planted_centres must hold a number, got (); for the Gaussian start give None"
                )
            object.__setattr__(self, "planted_centres", tuple(self.planted_centres))
        for number in self._planted_numbers:
            check_integer("planted_centres", number, minimum=1, maximum=min(4, self.hidden))

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Logistic loss of logits (samples, 1) with labels 0. or 1. (samples, 1), mean over the samples."""
        return F.binary_cross_entropy_with_logits

    def model(self, seed: int) -> TwoLayerNetwork:
        """Return the network at its start: ``first.weight`` is W (K, d), ``second.weight`` is v (1, K)."""
        model = TwoLayerNetwork(self.dimension, self.hidden)
        first, second = model.first.weight, model.second.weight
        generator = stream(Purpose.START, seed)
        nn.init.normal_(first, std=self.dimension**-0.5, generator=generator)
        nn.init.normal_(second, generator=generator)
        planted = self.planted(seed)
        if planted is not None:
            self._plant(first.detach(), second.detach(), planted)
        return model

    def planted(self, seed: int) -> int | None:
        """Return the number of centres on which this run is planted, or None for the Gaussian start."""
        numbers = self._planted_numbers
        return numbers[seed % len(numbers)] if numbers else None

    def predict(self, outputs: Tensor) -> Tensor:
        """Return label 1. where the logit is above 0, else 0., of shape (samples, 1)."""
        return (outputs > 0).to(outputs.dtype)

    @cached_property
    def centres(self) -> np.ndarray:
        """Centres +mu, -mu, +nu, -nu, of shape (4, dimension); read-only."""
        mu, nu = self.span
        return read_only(np.stack([mu, -mu, nu, -nu]))

    @cached_property
    def span(self) -> np.ndarray:
        """The orthonormal vectors mu and nu, of shape (2, dimension); read-only."""
        return unit_means(2, self.dimension, self.means_seed, orthonormal=True)

    @property
    def bayes_accuracy(self) -> float:
        r"""Accuracy of the best classifier: :math:`p^2 + (1-p)^2`, :math:`p = \Phi(\sqrt{\lambda/2})`.

        It says label 1 where |mu.Y| > |nu.Y|.
        """
        p = ndtr(math.sqrt(self.snr / 2))
        return float(p**2 + (1 - p) ** 2)

    @property
    def fixed_point_margin(self) -> float:
        r"""Size of a covered centre's logit for lambda = infinity: :math:`C_\beta = \log(1/(4\beta) - 1)`.

        It is also the sum of v_i^2 over the neurons on that centre. NaN unless 0 < beta < 1/8:
        above, the only fixed point is 0; without a regulariser there is none.
        """
        return math.log((1 - 4 * self.beta) / (4 * self.beta)) if 0 < self.beta < 1 / 8 else math.nan

    @property
    def covered_centres_probabilities(self) -> np.ndarray:
        """Probability that 0, 1, .. 4 centres are covered from the Gaussian start, of shape (5,).

        For large lambda the signs at the start decide, so that each of the K neurons picks one of
        the four centres at random. For K = 4 all four are covered with probability 3/32.
        """
        onto = [
            sum((-1) ** j * math.comb(r, j) * (r - j) ** self.hidden for j in range(r + 1)) for r in range(5)
        ]
        return np.array([math.comb(4, r) * onto[r] / 4**self.hidden for r in range(5)])

    def hidden_centres(self, first_weight: np.ndarray) -> np.ndarray:
        """Hidden layer's answer relu(W centre) to each centre: these span the second layer's outliers.

        Parameters
        ----------
        first_weight
            W, of shape (..., K, d).

        Returns
        -------
        numpy.ndarray
            Of shape (..., 4, K), in the order of :attr:`centres`.

        Raises
        ------
        ValueError
            If the shape is another.
        """
        first_weight = np.asarray(first_weight)
        self._check_shape("first_weight", first_weight, (self.hidden, self.dimension))
        overlaps = first_weight @ self.centres.T
        hidden: np.ndarray = np.maximum(np.swapaxes(overlaps, -1, -2), 0)
        return hidden

    def centre_margins(self, first_weight: np.ndarray, second_weight: np.ndarray) -> np.ndarray:
        """How strongly the neurons with the right sign answer each centre.

        For the centre c this is the sum of |v_i| relu(W_i . c) over the neurons whose v_i has
        the sign of c's label (+ for +-mu, - for +-nu). At the fixed points it is
        :attr:`fixed_point_margin` for a covered centre and 0 for the others.

        Parameters
        ----------
        first_weight
            W, of shape (..., K, d).
        second_weight
            v, of shape (..., 1, K).

        Returns
        -------
        numpy.ndarray
            Of shape (..., 4), in the order of :attr:`centres`.

        Raises
        ------
        ValueError
            If a shape is another.
        """
        second_weight = np.asarray(second_weight)
        self._check_shape("second_weight", second_weight, (1, self.hidden))
        answers = np.maximum(_SIGNS[:, None] * second_weight, 0)
        margins: np.ndarray = (answers * self.hidden_centres(first_weight)).sum(-1)
        return margins

    def covered_centres(
        self, first_weight: np.ndarray, second_weight: np.ndarray, *, threshold: float = 0.0
    ) -> np.ndarray:
        """Count the four centres that some neuron of the right sign responds to.

        It is the rank of the second layer's outlier eigenspace once the neurons have settled.

        Parameters
        ----------
        first_weight
            W, of shape (..., K, d).
        second_weight
            v, of shape (..., 1, K).
        threshold
            A centre is covered if its margin (:meth:`centre_margins`) exceeds this. The default 0
            counts every neuron by its signs alone, which at the start predicts how the run ends;
            late in training a small part of :attr:`fixed_point_margin`, say 0.03, leaves dead
            neurons out.

        Returns
        -------
        numpy.ndarray
            Integers from 0 to 4, of shape (...).

        Raises
        ------
        ValueError
            If a shape is another, or the threshold is negative or not finite.
        """
        check_number("threshold", threshold, positive=False)
        covered: np.ndarray = (self.centre_margins(first_weight, second_weight) > threshold).sum(-1)
        return covered

    @property
    def _planted_numbers(self) -> tuple[int, ...]:
        if self.planted_centres is None:
            return ()
        return self.planted_centres if isinstance(self.planted_centres, tuple) else (self.planted_centres,)

    def _plant(self, first: Tensor, second: Tensor, centres: int) -> None:
        """Put neuron i on the (i mod centres)-th centre of the planting order, in place."""
        cells = np.resize(_PLANTING_ORDER[:centres], self.hidden)
        span = torch.tensor(self.span, dtype=first.dtype)
        first -= first @ span.T @ span
        first += self.warm * self._centres32[cells]
        second.copy_(torch.tensor(_SIGNS[cells], dtype=second.dtype))

    def _check_shape(self, name: str, array: np.ndarray, shape: tuple[int, int]) -> None:
        if array.shape[-2:] != shape:
            raise ValueError(
                f"{name} must have shape (..., {shape[0]}, {shape[1]}), as stored, got {array.shape}"
            )

    @property
    def _centre_probabilities(self) -> np.ndarray:
        return np.full(4, 0.25)

    def _targets(self, centre: Tensor) -> Tensor:
        return (centre < 2).float().unsqueeze(1)
