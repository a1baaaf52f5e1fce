"""How many of the pairs found are surely the leading ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hild_xr.recorders.curvature.pairs import Which

CONFIDENCE = 0.99
"""Probability with which no eigenvalue larger than a certain pair's was missed."""


def certain_pairs(
    eigenvalues: Tensor,
    k: int,
    which: Which,
    scale: Tensor,
    size: int,
    steps: int,
    errors: Tensor | float = 0.0,
) -> Tensor:
    r"""Count the leading pairs that no missed eigenvalue exceeds, with a probability of 99 %.

    Residuals say that a pair is an eigenpair, not that it is the largest: a search can
    miss one. Evidence comes from a probe, s steps of Lanczos from a random unit vector of
    the space orthogonal to the found eigenvectors. Let all that was not looked for lie in an
    interval of half width c, and a missed eigenvalue at distance :math:`\mu > c` from its middle.
    The probe's Krylov space holds the vector :math:`T_{s-1}(A/c)\,w`, in which the missed
    eigenvector is :math:`T_{s-1}(\mu/c)` times as large as in w, all others at most as large as
    before; its Rayleigh quotient exceeds c, and the probe finds it, if

    .. math:: T_{s-1}(\mu/c)\,|\langle u, w\rangle| > \sqrt{2c/(\mu - c)}.

    The component of a random unit vector of p dimensions is below :math:`\delta\sqrt{\pi/2p}` with a
    probability of at most :math:`\delta`. The argument is that of Kuczynski and Wozniakowski (1992,
    "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start").

    So outliers a few times larger than the bulk are certain after 8 steps, members of a dense
    cluster are not.

    Parameters
    ----------
    eigenvalues
        Shape (n, m), in the order asked for: the k pairs and those found beyond, m >= k.
    k
        Pairs asked for.
    which
        Which were looked for.
    scale
        Shape (n,): largest absolute eigenvalue.
    size
        Dimension p.
    steps
        Steps s of a probe that changed nothing.
    errors
        Shape (n,): how far eigenvalues may be off, found ones and missed ones.

    Returns
    -------
    Tensor
        Shape (n,), int64, 0 to k.

    Examples
    --------
    >>> found = torch.tensor([[50.0, 40.0, 1.2, 1.1, 1.0]], dtype=torch.float64)
    >>> certain_pairs(found, 4, "magnitude", torch.tensor([50.0]), size=1000, steps=8)
    tensor([2])
    """
    middle, half = _not_looked_for(eigenvalues, which, scale)
    off = torch.as_tensor(errors, dtype=eigenvalues.dtype).expand_as(middle)[:, None]
    distance = ((eigenvalues[:, :k] - middle[:, None]).abs() - off).clamp(min=0)
    beyond = (distance - half[:, None]).clamp(min=0)
    angle = torch.arccosh((distance / half[:, None]).clamp(min=1))
    growth = (steps - 1) * angle + torch.log1p(torch.exp(-2 * (steps - 1) * angle)) - math.log(2)
    needed = 0.5 * torch.log(2 * half[:, None] / beyond) + 0.5 * math.log(2 * size / math.pi)
    certain = growth > needed - math.log1p(-CONFIDENCE)
    return certain.cumprod(dim=1).sum(1)


def _not_looked_for(eigenvalues: Tensor, which: Which, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return middle and half width of the interval beyond the last pairs found, each of shape (n,)."""
    last, before = eigenvalues[:, -1], eigenvalues[:, max(0, eigenvalues.shape[1] - 2)]
    if which == "magnitude":
        low, high = -last.abs(), last.abs()
    elif which == "largest":
        low, high = -scale, last
    elif which == "smallest":
        low, high = last, scale
    elif eigenvalues.shape[1] == 1:
        low, high = -scale, last
    else:  # from both ends in turn, the largest first
        low, high = (before, last) if eigenvalues.shape[1] % 2 else (last, before)
    return (low + high) / 2, (high - low) / 2
