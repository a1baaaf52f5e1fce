"""Sharpness in a ball around the weights: by the step of SAM, and by projected ascent."""

from __future__ import annotations

import math

import torch
import xarray as xr
from torch import Tensor, nn

from hild_xr.recorders.landscape.loss_surface import LossSurface
from hild_xr.recorders.objective import Objective
from hild_xr.variables import attrs


def sharpness(
    model: nn.Module,
    objective: Objective,
    rho: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> xr.Dataset:
    r"""Rise of the loss within a ball of radius :math:`\rho` around the weights.

    .. math:: \max_{|\epsilon| \le \rho} L(\theta + \epsilon) - L(\theta)

    ``sam_sharpness`` is the rise at :math:`\epsilon = \rho\, g/|g|` with the gradient g, the
    estimate that sharpness-aware minimisation steps by (Foret et al., arXiv 2010.01412).
    ``ascent_sharpness`` goes on from there by projected ascent along the normalised gradient,
    with a step that doubles when the loss rises and halves when it does not, and also starts from
    random places on the sphere. It is the best that was found: a lower bound of the maximum, never
    below ``sam_sharpness``. For a quadratic loss with Hessian H it is the maximum once the ascent
    has converged: :math:`\rho^2 \lambda_{\max}(H)/2` at a minimum.

    Parameters
    ----------
    model
        The model, in eval mode and left as it is.
    objective
        Loss and data; the regulariser takes part.
    rho
        Radius, in the norm of all trainable parameters together.
    steps
        Steps of each ascent, a forward and a backward pass each.
    restarts
        Ascents from random places beside the one from the step of SAM. At a minimum, where there
        is no step of SAM, at least one is needed.
    seed
        Of the random places; the global generator is not touched.
    dtype
        Precision to compute in; None for the model's. For a small rho take float64: the rise is
        a difference of two losses.

    Returns
    -------
    xarray.Dataset
        ``sam_sharpness`` and ``ascent_sharpness``; NaN where the loss is not finite, or, for the
        step of SAM, the gradient vanishes; infinite where the loss overflows within the ball.

    Raises
    ------
    ValueError
        If rho is not positive, ``steps`` or ``restarts`` is negative, or model, loss and data do
        not fit together.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> objective = Objective(nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> found = sharpness(model, objective, rho=0.5)
    >>> round(float(found.ascent_sharpness), 4), float(found.sam_sharpness)
    (2.25, nan)
    """
    if not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho, the radius of the ball, must be positive and finite; got {rho}")
    if steps < 0 or restarts < 0:
        raise ValueError(f"steps and restarts cannot be negative; got {steps} and {restarts}")
    with LossSurface(model, objective, dtype) as surface:
        here, gradient = surface.gradient(surface.start)
        by_sam, by_ascent = math.nan, math.nan
        if math.isfinite(here):
            starts = [_random(surface.start, seed + i) for i in range(restarts)]
            if (direction := _unit(gradient)) is not None:
                by_sam = surface.loss(surface.start + rho * direction) - here
                starts.insert(0, direction)
            found = [_ascend(surface, rho, direction, steps) - here for direction in starts]
            by_ascent = max((rise for rise in found if not math.isnan(rise)), default=math.nan)
    values = {"sam_sharpness": by_sam, "ascent_sharpness": by_ascent}
    return xr.Dataset(
        {name: ((), value, attrs(name, rho=rho)) for name, value in values.items()},
        attrs={
            "rho": rho,
            "steps": steps,
            "restarts": restarts,
            "samples": len(objective),
            "regularizer": objective.l2,
        },
    )


def _ascend(surface: LossSurface, rho: float, direction: Tensor, steps: int) -> float:
    """Return the largest loss that an ascent within the ball meets; it never goes down."""
    offset, size = rho * direction, 1.0
    best, gradient = surface.gradient(surface.start + offset)
    for _ in range(steps):
        uphill = _unit(gradient)
        if uphill is None:
            break
        trial = _into_ball(offset + size * rho * uphill, rho)
        value, slope = surface.gradient(surface.start + trial)
        if value > best:
            offset, best, gradient, size = trial, value, slope, 2 * size
        else:
            size /= 2
    return best


def _unit(vector: Tensor) -> Tensor | None:
    """Return the direction of a vector; None if it has none."""
    norm: Tensor = torch.linalg.vector_norm(vector.double())
    if not bool(norm.isfinite()) or float(norm) == 0:
        return None
    unit: Tensor = (vector.double() / norm).to(vector.dtype)
    return unit


def _into_ball(offset: Tensor, rho: float) -> Tensor:
    norm = float(torch.linalg.vector_norm(offset.double()))
    return offset if norm <= rho else offset * (rho / norm)


def _random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.numel(), generator=generator, dtype=torch.float64)
    unit: Tensor = (drawn / torch.linalg.vector_norm(drawn)).to(like)
    return unit
