r"""Hessian and G-matrix of the Gaussian mixture in the limit of many samples.

Softmax regression :math:`L = -\sum_c y_c\, x^c \cdot Y + \log \sum_c e^{x^c \cdot Y} + (\beta/2)|x|^2`
on :math:`Y \sim \sum_b p_b N(\mu_b, I/\lambda)`, label b (arXiv:2310.03010). Both
matrices have diagonal blocks :math:`E[h\,YY^T]` with a weight h that depends on
Y through the logits :math:`s = xY` and on the class: :math:`\phi_c(1 - \phi_c)` for the Hessian,
:math:`(\phi_c - 1\{b = c\})^2` for the G-matrix. By Stein's lemma

.. math::

   E[h\,YY^T] = \sum_b p_b \Big\{ E_b[h]\,\mu_b\mu_b^T
   + \tfrac{1}{\lambda}\big(E_b[\nabla h]\,\mu_b^T + \mu_b\,E_b[\nabla h]^T\big)
   + \tfrac{1}{\lambda^2} E_b[\nabla^2 h] \Big\} + \tfrac{1}{\lambda} E[h]\, I,

a matrix of rank at most C + k plus a multiple of the identity. The noise
:math:`\sqrt\lambda (Y - \mu_b)` is split into its standard normal coordinates z
within the span of x, on which h depends, and the rest, on which it does not. So
:math:`E_b[\nabla h] / \sqrt\lambda` and :math:`E_b[\nabla^2 h] / \lambda` become
:math:`E_b[h z]` and :math:`E_b[h (zz^T - I)]`, and no derivative of h is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.polynomial.hermite_e import hermegauss

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from hild_xr.analysis.subspaces.bases import FloatArray

    Weight = Callable[[FloatArray, int], FloatArray]

MAX_NODES = 4_000_000
"""Largest number of nodes of the tensor quadrature: about 100 MB for each logit."""

MAX_NODES_EACH = 350
"""NumPy's Gauss-Hermite rule overflows from about 380 nodes on."""


@dataclass(frozen=True)
class LowRankPlusIdentity:
    """Symmetric d x d matrix ``basis @ core @ basis.T + bulk * I``.

    Parameters
    ----------
    basis
        Orthonormal columns of shape (d, q).
    core
        Symmetric array of shape (q, q).
    bulk
        The eigenvalue of the d - q directions orthogonal to the basis.

    Examples
    --------
    >>> matrix = LowRankPlusIdentity(np.eye(3)[:, :1], np.array([[2.0]]), 0.5)
    >>> matrix.eigenvalues()
    array([2.5, 0.5, 0.5])
    """

    basis: FloatArray
    core: FloatArray
    bulk: float

    def dense(self) -> FloatArray:
        """Return the matrix as an array of shape (d, d).

        Examples
        --------
        >>> LowRankPlusIdentity(np.eye(2)[:, :1], np.array([[2.0]]), 0.5).dense()
        array([[2.5, 0. ],
               [0. , 0.5]])
        """
        matrix: FloatArray = self.basis @ self.core @ self.basis.T + self.bulk * np.eye(len(self.basis))
        return matrix

    def eigenvalues(self) -> FloatArray:
        """Return all d eigenvalues in decreasing order.

        Examples
        --------
        >>> LowRankPlusIdentity(np.eye(2)[:, :1], np.array([[-1.0]]), 0.5).eigenvalues()
        array([ 0.5, -0.5])
        """
        d, q = self.basis.shape
        values = np.concatenate([np.linalg.eigvalsh(self.core), np.zeros(d - q)])
        return np.sort(values)[::-1] + self.bulk

    def eigenvectors(self) -> FloatArray:
        """Return the q eigenvectors within the basis, of shape (d, q), by decreasing eigenvalue.

        Examples
        --------
        >>> np.abs(LowRankPlusIdentity(np.eye(3)[:, :2], np.diag([1.0, 2.0]), 0.5).eigenvectors())
        array([[0., 1.],
               [1., 0.],
               [0., 0.]])
        """
        _, vectors = np.linalg.eigh(self.core)
        in_space: FloatArray = self.basis @ vectors[:, ::-1]
        return in_space

    def plus_identity(self, amount: float) -> LowRankPlusIdentity:
        """Return the matrix plus a multiple of the identity.

        Examples
        --------
        >>> LowRankPlusIdentity(np.eye(2)[:, :1], np.array([[2.0]]), 0.5).plus_identity(1.0).bulk
        1.5
        """
        return LowRankPlusIdentity(self.basis, self.core, self.bulk + amount)


def weighted_second_moment(
    weight: Weight,
    x: ArrayLike,
    means: ArrayLike,
    *,
    snr: float,
    priors: ArrayLike | None = None,
    n_nodes: int = 32,
) -> LowRankPlusIdentity:
    r"""Compute :math:`E[h\,YY^T]` for a weight h of the logits :math:`xY` and the class of Y.

    Tensor Gauss-Hermite quadrature over as many dimensions as x has rank. Its
    error falls exponentially with `n_nodes` for smooth weights, the slower the
    larger :math:`|x| / \sqrt\lambda`; it is slow for weights with jumps.

    Parameters
    ----------
    weight
        Function of logits of shape (n, C) and the class index b that returns h,
        of shape (n,).
    x
        Weights of shape (C, d): one row for each logit.
    means
        Class means of shape (k, d).
    snr
        The :math:`\lambda` of the noise covariance :math:`I / \lambda`.
    priors
        Class probabilities of shape (k,), uniform by default.
    n_nodes
        Nodes in each dimension.

    Returns
    -------
    LowRankPlusIdentity
        The matrix; rank at most C + k beside the multiple of the identity.

    Raises
    ------
    ValueError
        If shapes do not fit, snr is not positive, the priors are no
        probabilities, n_nodes is not from 1 to 350, or the tensor would have
        more than :data:`MAX_NODES` nodes.

    Examples
    --------
    >>> one = weighted_second_moment(lambda s, b: np.ones(len(s)), np.eye(3)[:2], np.eye(3)[:1], snr=4.0)
    >>> one.eigenvalues().round(12)
    array([1.25, 0.25, 0.25])
    """
    x, means, p = _checked(x, means, snr, priors)
    # x = (left * singular) @ along: the noise of the logits is left * singular @ z / sqrt(snr)
    left, singular, along = np.linalg.svd(x, full_matrices=False)
    r = int((singular > np.finfo(np.float64).eps * max(x.shape) * singular.max(initial=0.0)).sum())
    z, w = _tensor_nodes(n_nodes, r)
    spread = z @ (left[:, :r] * singular[:r]).T / np.sqrt(snr)
    directions = np.concatenate([along[:r], means])
    core = np.zeros((r + len(p), r + len(p)))
    total = 0.0
    for b, prior in enumerate(p):
        h = w * weight(x @ means[b] + spread, b)
        mass, first = h.sum(), h @ z / np.sqrt(snr)
        total += prior * mass
        core[:r, :r] += prior * ((z.T * h) @ z - mass * np.eye(r)) / snr
        core[:r, r + b] += prior * first
        core[r + b, :r] += prior * first
        core[r + b, r + b] += prior * mass
    basis, triangle = np.linalg.qr(directions.T)
    return LowRankPlusIdentity(basis, triangle @ core @ triangle.T, float(total / snr))


def population_hessian(
    x: ArrayLike,
    means: ArrayLike,
    c: int,
    *,
    snr: float,
    beta: float = 0.0,
    priors: ArrayLike | None = None,
    n_nodes: int = 64,
) -> LowRankPlusIdentity:
    r"""Compute the population Hessian block of class c, :math:`E[\phi_c(1 - \phi_c) YY^T] + \beta I`.

    With the default 64 nodes the absolute error was at most 1e-14 where the
    standard deviation of the differences of logits, the largest
    :math:`|x^a - x^b| / \sqrt\lambda`, is at most 1, 1e-8 up to 2.5 and 1e-4 up
    to 5. Softmax depends on differences only, so k logits cost k - 1 dimensions:
    four classes take 0.2 s; for five pass ``n_nodes=40``.

    Parameters
    ----------
    x, means, snr, priors, n_nodes
        As in :func:`weighted_second_moment`; x of shape (k, d), one row a class.
    c
        Class of the block.
    beta
        Regulariser.

    Returns
    -------
    LowRankPlusIdentity
        The d x d block.

    Raises
    ------
    ValueError
        As :func:`weighted_second_moment`, and if c is no class.

    Examples
    --------
    >>> block = population_hessian(np.zeros((2, 3)), np.eye(3)[:2], 0, snr=10.0)
    >>> block.eigenvalues().round(12)
    array([0.15 , 0.15 , 0.025])
    """

    def weight(s: FloatArray, _b: int) -> FloatArray:
        phi = _softmax(s)[:, c]
        return phi * (1 - phi)

    return _softmax_block(weight, x, means, c, snr, priors, n_nodes).plus_identity(beta)


def population_gmatrix(
    x: ArrayLike,
    means: ArrayLike,
    c: int,
    *,
    snr: float,
    priors: ArrayLike | None = None,
    n_nodes: int = 64,
) -> LowRankPlusIdentity:
    r"""Compute the population G-matrix block of class c, :math:`E[(\phi_c - y_c)^2 YY^T]`, unregularised.

    Accuracy and cost as for :func:`population_hessian`.

    Parameters
    ----------
    x, means, c, snr, priors, n_nodes
        As in :func:`population_hessian`.

    Returns
    -------
    LowRankPlusIdentity
        The d x d block.

    Raises
    ------
    ValueError
        As :func:`population_hessian`.

    Examples
    --------
    >>> block = population_gmatrix(np.zeros((2, 3)), np.eye(3)[:2], 0, snr=10.0)
    >>> block.eigenvalues().round(12)
    array([0.15 , 0.15 , 0.025])
    """

    def weight(s: FloatArray, b: int) -> FloatArray:
        residual: FloatArray = _softmax(s)[:, c] - float(b == c)
        return np.square(residual)

    return _softmax_block(weight, x, means, c, snr, priors, n_nodes)


class SpectrumAtZero(NamedTuple):
    """Eigenvalues of a block at x = 0: the k outliers in decreasing order, and the bulk."""

    outliers: FloatArray
    bulk: float


def hessian_at_zero(k: int, *, snr: float, beta: float = 0.0) -> SpectrumAtZero:
    r"""Eigenvalues of the population Hessian block at x = 0, for orthonormal means and equal priors.

    k outliers :math:`\frac{k-1}{k^2}(\frac1k + \frac1\lambda) + \beta` above the
    bulk :math:`\frac{k-1}{k^2 \lambda} + \beta`.

    Parameters
    ----------
    k
        Number of classes.
    snr
        The :math:`\lambda` of the noise covariance :math:`I / \lambda`.
    beta
        Regulariser.

    Returns
    -------
    SpectrumAtZero
        ``outliers`` of shape (k,) and ``bulk``.

    Raises
    ------
    ValueError
        Unless k >= 2 and snr > 0.

    Examples
    --------
    >>> hessian_at_zero(2, snr=10.0)
    SpectrumAtZero(outliers=array([0.15, 0.15]), bulk=0.025)
    """
    bulk = _bulk_at_zero(k, snr) + beta
    return SpectrumAtZero(np.full(k, (k - 1) / k**3 + bulk), bulk)


def gmatrix_at_zero(k: int, *, snr: float) -> SpectrumAtZero:
    r"""Eigenvalues of the population G-matrix block at x = 0, for orthonormal means and equal priors.

    One outlier :math:`\frac{(k-1)^2}{k^3}`, along the mean of the block's own
    class, and k - 1 outliers :math:`\frac{1}{k^3}`, all plus the bulk
    :math:`\frac{k-1}{k^2\lambda}`.

    Parameters
    ----------
    k
        Number of classes.
    snr
        The :math:`\lambda` of the noise covariance :math:`I / \lambda`.

    Returns
    -------
    SpectrumAtZero
        ``outliers`` of shape (k,) and ``bulk``.

    Raises
    ------
    ValueError
        Unless k >= 2 and snr > 0.

    Examples
    --------
    >>> gmatrix_at_zero(2, snr=10.0)
    SpectrumAtZero(outliers=array([0.15, 0.15]), bulk=0.025)
    """
    bulk = _bulk_at_zero(k, snr)
    return SpectrumAtZero(np.array([(k - 1) ** 2, *[1] * (k - 1)]) / k**3 + bulk, bulk)


def _bulk_at_zero(k: int, snr: float) -> float:
    if k < 2 or snr <= 0:
        raise ValueError(f"expected k >= 2 classes and snr > 0, came k={k} and snr={snr}")
    return (k - 1) / (k**2 * snr)


def _softmax_block(
    weight: Weight,
    x: ArrayLike,
    means: ArrayLike,
    c: int,
    snr: float,
    priors: ArrayLike | None,
    n_nodes: int,
) -> LowRankPlusIdentity:
    x, means = np.asarray(x, dtype=np.float64), np.asarray(means, dtype=np.float64)
    if x.shape != means.shape or not 0 <= c < len(x):
        raise ValueError(
            f"expected x and means of one shape (k, d) and a class 0 <= c < k, "
            f"came {x.shape}, {means.shape} and c={c}"
        )
    return weighted_second_moment(weight, x - x.mean(axis=0), means, snr=snr, priors=priors, n_nodes=n_nodes)


def _softmax(s: FloatArray) -> FloatArray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    phi: FloatArray = e / e.sum(axis=-1, keepdims=True)
    return phi


def _tensor_nodes(n_nodes: int, dims: int) -> tuple[FloatArray, FloatArray]:
    """Nodes of shape (n, dims) and weights of shape (n,) for the standard normal distribution."""
    if not 1 <= n_nodes <= MAX_NODES_EACH or n_nodes**dims > MAX_NODES:
        raise ValueError(
            f"expected 1 <= n_nodes <= {MAX_NODES_EACH} and n_nodes ** {dims} <= {MAX_NODES}, "
            f"came n_nodes={n_nodes}; pass fewer nodes: x has rank {dims}"
        )
    nodes, weights = hermegauss(n_nodes)
    weights = weights / weights.sum()
    grids = np.meshgrid(*[np.arange(n_nodes)] * dims, indexing="ij")
    index = np.stack([grid.ravel() for grid in grids], axis=-1) if dims else np.zeros((1, 0), dtype=int)
    return nodes[index], weights[index].prod(axis=-1)


def _checked(
    x: ArrayLike, means: ArrayLike, snr: float, priors: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    x, means = np.asarray(x, dtype=np.float64), np.asarray(means, dtype=np.float64)
    if x.ndim != 2 or means.ndim != 2 or x.shape[1] != means.shape[1]:
        raise ValueError(
            f"expected x of shape (C, d) and means of shape (k, d), came {x.shape} and {means.shape}"
        )
    k = len(means)
    p = np.full(k, 1 / k) if priors is None else np.asarray(priors, dtype=np.float64)
    if p.shape != (k,) or (p < 0).any() or abs(p.sum() - 1) > 1e-9:
        raise ValueError(f"expected {k} priors that are probabilities with sum 1, came {p.tolist()}")
    if not snr > 0:
        raise ValueError(f"expected snr > 0, came {snr}")
    return x, means, p
