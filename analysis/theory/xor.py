r"""The XOR Gaussian mixture at the fixed points of its two-layer network.

Limit :math:`\lambda \to \infty` of the model of arXiv:2206.04030 (G. Ben Arous,
R. Gheissari, A. Jagannath), with weight decay
:math:`\beta \in (0, 1/8)`: each neuron i sits on one of the four centres
:math:`\pm\mu, \pm\nu` with overlap :math:`|m_i| = |v_i|`, and the squares of the
neurons on one centre add up to

.. math:: C_\beta = \log\frac{1 - 4\beta}{4\beta}.

On a covered centre the logistic loss then has :math:`|\sigma - y| = 4\beta` and
:math:`\sigma' = 4\beta(1 - 4\beta)`; each centre has probability 1/4.
"""

from __future__ import annotations

import math
from typing import Literal

Matrix = Literal["hessian", "gmatrix"]

N_CENTRES = 4


def xor_fixed_point_norm(beta: float) -> float:
    r"""Sum of :math:`v_i^2` over the neurons of one centre, :math:`C_\beta = \log((1 - 4\beta) / 4\beta)`.

    Parameters
    ----------
    beta
        Weight decay, in (0, 1/8); for larger ones the network dies out.

    Returns
    -------
    float
        :math:`C_\beta`, positive.

    Raises
    ------
    ValueError
        If beta is not in (0, 1/8).

    Examples
    --------
    >>> round(xor_fixed_point_norm(0.1), 4)
    0.4055
    """
    if not 0 < beta < 1 / 8:
        raise ValueError(
            f"expected beta in (0, 1/8), came {beta}: from 1/8 on the only fixed point is zero, "
            f"and at 0 the weights grow without bound"
        )
    return math.log((1 - 4 * beta) / (4 * beta))


def xor_second_layer_outlier(beta: float, matrix: Matrix) -> float:
    r"""Outlier of the ``vv`` block that each covered centre contributes.

    :math:`\beta(1 - 4\beta) C_\beta` for the Hessian, :math:`4 \beta^2 C_\beta` for the G-matrix. The
    regulariser is left out: add :math:`\beta` for the whole Hessian. The
    eigenvector is :math:`g(W c) / |g(W c)|` for the centre c; the block has as
    many outliers as centres that some neuron responds to.

    Parameters
    ----------
    beta
        Weight decay, in (0, 1/8).
    matrix
        ``"hessian"`` or ``"gmatrix"``.

    Returns
    -------
    float
        The eigenvalue.

    Raises
    ------
    ValueError
        If beta is not in (0, 1/8) or the matrix is another one.

    Examples
    --------
    >>> round(xor_second_layer_outlier(0.1, "hessian"), 5), round(xor_second_layer_outlier(0.1, "gmatrix"), 5)
    (0.02433, 0.01622)
    """
    return xor_fixed_point_norm(beta) * _weight(beta, matrix)


def xor_first_layer_outlier(v: float, beta: float, matrix: Matrix) -> float:
    r"""Twofold outlier of the ``W_i W_i`` block of a neuron with outer weight v.

    :math:`v^2 \beta (1 - 4\beta)` for the Hessian, :math:`4 v^2 \beta^2` for the
    G-matrix, in the directions :math:`\mu` and :math:`\nu`: the neuron responds to
    its own centre always, and to each of the two centres orthogonal to it half
    of the time. All four centres are taken to be covered; the regulariser is left
    out.

    Parameters
    ----------
    v
        Outer weight of the neuron; :math:`\sqrt{C_\beta}` if it is alone on its
        centre.
    beta
        Weight decay, in (0, 1/8).
    matrix
        ``"hessian"`` or ``"gmatrix"``.

    Returns
    -------
    float
        The eigenvalue.

    Raises
    ------
    ValueError
        If beta is not in (0, 1/8) or the matrix is another one.

    Examples
    --------
    >>> round(xor_first_layer_outlier(0.6368, 0.1, "hessian"), 5)
    0.02433
    """
    xor_fixed_point_norm(beta)
    return v**2 * _weight(beta, matrix)


def _weight(beta: float, matrix: Matrix) -> float:
    """Probability of a centre times the loss's weight on it: sigma' for the Hessian, (sigma - y)^2 for G."""
    weights = {"hessian": 4 * beta * (1 - 4 * beta), "gmatrix": (4 * beta) ** 2}
    if matrix not in weights:
        raise ValueError(f"expected matrix 'hessian' or 'gmatrix', came {matrix!r}")
    return weights[matrix] / N_CENTRES


def covered_centres_probability(
    n_neurons: int, n_covered: int = N_CENTRES, n_centres: int = N_CENTRES
) -> float:
    r"""Probability that n neurons, each on a uniformly random centre, cover exactly so many centres.

    By inclusion and exclusion, for K neurons and r of c centres,

    .. math:: \binom{c}{r} \sum_{j=0}^{r} (-1)^j \binom{r}{j} \Big(\frac{r - j}{c}\Big)^K .

    In the XOR network from a Gaussian start the signs of :math:`v_i` and of the
    overlap decide which of the four centres neuron i goes to; covering all four
    means the Bayes-optimal classifier, and the number covered is the rank of the
    outlier space of the ``vv`` block.

    Parameters
    ----------
    n_neurons
        Width K of the hidden layer.
    n_covered
        Number of covered centres; by default all.
    n_centres
        Number of centres.

    Returns
    -------
    float
        The probability.

    Raises
    ------
    ValueError
        Unless n_neurons >= 1 and 0 <= n_covered <= n_centres.

    Examples
    --------
    >>> covered_centres_probability(4) == 3 / 32
    True
    """
    if n_neurons < 1 or not 0 <= n_covered <= n_centres:
        raise ValueError(
            f"expected n_neurons >= 1 and 0 <= n_covered <= n_centres, "
            f"came {n_neurons}, {n_covered} and {n_centres}"
        )
    # integers until the last division: the alternating sum would cancel
    ways = sum(
        (-1) ** j * math.comb(n_covered, j) * (n_covered - j) ** n_neurons for j in range(n_covered + 1)
    )
    probability: float = math.comb(n_centres, n_covered) * ways / n_centres**n_neurons
    return probability
