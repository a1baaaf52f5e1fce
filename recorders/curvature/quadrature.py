r"""Quadrature of a spectral density: the Lanczos recurrence, and a positive rule made of it.

From a unit vector z, k Lanczos steps give a tridiagonal matrix whose eigenvalues and squared
first eigenvector components are a quadrature for :math:`\mu_z = \sum_i \langle u_i, z\rangle^2
\delta_{\lambda_i}` that is exact for polynomials up to degree 2k - 1 (Golub and Meurant 2010,
"Matrices, Moments and Quadrature with Applications"). Its k atoms are a coarse picture of a
density. The recursion method of solid-state physics (Haydock 1980, Solid State Physics 35,
p. 215; Lin, Saad and Yang 2016, arXiv 1308.5467) goes on with constant recurrence
coefficients, which keeps all those moments and spreads the mass that was not resolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Recurrence:
    """Lanczos coefficients of a batch of start vectors.

    Parameters
    ----------
    diagonal
        Shape (n, k), float64 on the CPU.
    off_diagonal
        Shape (n, k), float64 on the CPU; the last one couples to the step that was not taken.
    length
        Shape (n,), int64: steps taken; fewer than k where the Krylov space was exhausted.
    exhausted
        Shape (n,), bool: whether it was, so that the coefficients describe the matrix fully.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    length: Tensor
    exhausted: Tensor


def lanczos_recurrence(
    multiply: Callable[[Tensor, Tensor], Tensor], starts: Tensor, steps: int, name: str = "matrix"
) -> Recurrence:
    """Run Lanczos from several start vectors in lockstep, without reorthogonalisation.

    Three vectors are held for each start, whatever the number of steps. The copies of converged
    eigenvalues that rounding brings share their weight, so a quadrature needs no more. A space
    is exhausted once the next vector is shorter than rounding errors are.

    Parameters
    ----------
    multiply
        ``multiply(vectors, problems)`` returns the products of vectors (n, p) that belong to the
        start vectors of indices ``problems`` (n,).
    starts
        Unit vectors, shape (n, p).
    steps
        Number of steps k.
    name
        Name in error messages.

    Returns
    -------
    Recurrence
        Of n sequences.

    Raises
    ------
    NonFiniteCurvatureError
        If a product holds NaN or infinity.

    Examples
    --------
    >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
    >>> start = torch.ones(1, 2) / 2**0.5
    >>> found = lanczos_recurrence(lambda vectors, problems: vectors @ matrix, start, 5)
    >>> found.length, found.diagonal[0, :2].round(decimals=3)
    (tensor([2]), tensor([2., 2.], dtype=torch.float64))
    """
    n = len(starts)
    diagonal, off_diagonal = torch.zeros(2, n, steps, dtype=torch.float64)
    length, exhausted = torch.full((n,), steps), torch.zeros(n, dtype=torch.bool)
    active = torch.arange(n)
    scale = torch.zeros(n, dtype=torch.float64)
    negligible = torch.finfo(starts.dtype).eps ** 0.75
    vectors, before, coupling = starts, torch.zeros_like(starts), torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        following = multiply(vectors, active.to(vectors.device))
        if not bool(following.isfinite().all()):
            raise NonFiniteCurvatureError(name, "a product")
        following = following - coupling.to(following)[:, None] * before
        alpha = torch.linalg.vecdot(following, vectors)
        following = following - alpha[:, None] * vectors
        beta = torch.linalg.vector_norm(following, dim=1)
        diagonal[active, step], off_diagonal[active, step] = alpha.double().cpu(), beta.double().cpu()
        coupling = off_diagonal[active, step]
        scale[active] = torch.maximum(scale[active], diagonal[active, step].abs() + coupling)
        going = coupling > negligible * scale[active]
        length[active[~going]], exhausted[active[~going]] = step + 1, True
        if not bool(going.all()):
            mask = going.to(vectors.device)
            active, coupling = active[going], coupling[going]
            vectors, following, beta = vectors[mask], following[mask], beta[mask]
        if not len(active):
            break
        vectors, before = following / beta[:, None], vectors
    return Recurrence(diagonal, off_diagonal, length, exhausted)


def quadrature(recurrence: Recurrence, n_nodes: int, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the recurrence, continued by the means of its second half.

    The rule is exact for polynomials up to degree 2k - 1, as the Gauss rule of k nodes is. Mass
    that Lanczos has resolved (outliers, a kernel apart) stays where it is; the rest is spread like
    a density that is smooth at the scale of its support / k. On spectra of networks, with 20 to
    50 steps, that had 0.4 to 0.8 of the Wasserstein error of the Gauss rule. Nodes may lie outside
    of the spectrum by about that scale.

    Parameters
    ----------
    recurrence
        Lanczos coefficients.
    n_nodes
        Number of nodes, at least the number of steps; that number gives the Gauss rule.
        Unused ones have weight 0.
    steps
        Use the first so many steps only; ``None`` uses all.

    Returns
    -------
    nodes, weights
        Each of shape (n, n_nodes), float64 on the CPU; nodes increase, weights are not negative
        and sum to 1.

    Examples
    --------
    >>> flat = torch.full((1, 3), 0.5, dtype=torch.float64)
    >>> recurrence = Recurrence(0 * flat, flat, torch.tensor([3]), torch.tensor([False]))
    >>> nodes, weights = quadrature(recurrence, 3)  # the semicircle on (-1, 1)
    >>> nodes[0, 2].round(decimals=4), weights.sum().round(decimals=6)
    (tensor(0.7071, dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    steps = recurrence.diagonal.shape[1] if steps is None else steps
    n, index = len(recurrence.length), torch.arange(n_nodes)
    diagonal, off_diagonal = torch.zeros(2, n, n_nodes, dtype=torch.float64)
    diagonal[:, :steps] = recurrence.diagonal[:, :steps]
    off_diagonal[:, :steps] = recurrence.off_diagonal[:, :steps]
    half = slice(steps // 2, steps)
    diagonal[:, steps:] = recurrence.diagonal[:, half].mean(1, keepdim=True)
    off_diagonal[:, steps:] = recurrence.off_diagonal[:, half].mean(1, keepdim=True)
    # What lies past an exhausted space is decoupled from the first row and so has weight 0; the
    # mean stands there, a point inside the spectrum.
    ended = recurrence.exhausted & (recurrence.length <= steps)
    used = torch.where(ended, recurrence.length, n_nodes)[:, None]
    diagonal = torch.where(index < used, diagonal, recurrence.diagonal[:, :1])
    off_diagonal = torch.where(index < used - 1, off_diagonal, 0.0)
    matrix = torch.diag_embed(diagonal)
    matrix += torch.diag_embed(off_diagonal[:, :-1], 1) + torch.diag_embed(off_diagonal[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    weights = vectors[:, 0].square()
    return nodes, weights / weights.sum(1, keepdim=True)


def wasserstein(nodes: Tensor, weights: Tensor, others: Tensor, other_weights: Tensor) -> Tensor:
    r"""Return the Wasserstein-1 distance :math:`\int |F(x) - G(x)| dx` of pairs of discrete measures.

    Parameters
    ----------
    nodes, weights
        Shape (*batch, a); weights sum to 1.
    others, other_weights
        Shape (*batch, b).

    Returns
    -------
    Tensor
        Shape (*batch,).

    Examples
    --------
    >>> one = torch.ones(1)
    >>> wasserstein(torch.tensor([0.0]), one, torch.tensor([2.0]), one)
    tensor(2.)
    """
    points, order = torch.cat([nodes, others], -1).sort(-1)
    difference = torch.cat([weights, -other_weights], -1).gather(-1, order).cumsum(-1)
    return (difference[..., :-1].abs() * points.diff(dim=-1)).sum(-1)
