"""Backward error analysis: the modified loss of gradient descent, and how far a step is from a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from hild_xr.recorders.landscape.loss_surface import LossSurface
from hild_xr.recorders.objective import Objective
from hild_xr.variables import attrs


def modified_loss(
    model: nn.Module,
    objective: Objective,
    learning_rate: float,
    *,
    batches: Sequence[Objective] | None = None,
    dtype: torch.dtype | None = None,
) -> xr.DataArray:
    r"""Loss whose gradient flow gradient descent follows to second order in its learning rate.

    .. math:: \tilde L(\theta) = L(\theta) + \frac\eta4 |\nabla L(\theta)|^2

    (Barrett and Dherin, "Implicit gradient regularization", arXiv 2009.11162). With ``batches``
    the mean of :math:`|\nabla L_k|^2` over them stands in place of :math:`|\nabla L|^2`: what SGD
    over an epoch of these batches in random order follows on average (Smith et al.,
    arXiv 2101.12176).

    Parameters
    ----------
    model
        The model, in eval mode and left as it is.
    objective
        Loss and data; the regulariser takes part.
    learning_rate
        :math:`\eta`.
    batches
        The objectives of the batches that SGD steps by.
    dtype
        Precision to compute in; None for the model's.

    Returns
    -------
    xarray.DataArray
        A number.

    Raises
    ------
    ValueError
        If the learning rate is not positive, ``batches`` is empty, or model, loss and data do not
        fit together.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> objective = Objective(nn.functional.mse_loss, torch.ones(1, 1), torch.zeros(1, 1))
    >>> float(modified_loss(model, objective, learning_rate=0.1))  # L = w^2
    1.1
    """
    _check(learning_rate, batches)
    with LossSurface(model, objective, dtype) as surface:
        loss, gradient = surface.gradient(surface.start)
    squares = [_square(gradient)] if batches is None else [_square_at(model, b, dtype) for b in batches]
    value = loss + 0.25 * learning_rate * math.fsum(squares) / len(squares)
    described = attrs(
        "modified_loss",
        learning_rate=learning_rate,
        batches=0 if batches is None else len(batches),
        samples=len(objective),
        regularizer=objective.l2,
    )
    return xr.DataArray(value, name="modified_loss", attrs=described)


def discretization_error(
    model: nn.Module,
    objectives: Objective | Sequence[Objective],
    learning_rate: float,
    *,
    corrected: bool = False,
    rtol: float = 1e-9,
) -> xr.DataArray:
    r"""Distance between steps of gradient descent and the flow of the same time.

    n steps :math:`\theta \leftarrow \theta - \eta \nabla L_k(\theta)`, one for each objective in
    the order given, against the solution at time :math:`n\eta` of

    .. math:: \dot\theta = -\frac1n \sum_k \nabla L_k
              + [\text{corrected}]\; \frac\eta n \sum_k H_k \Big(\sum_{j<k} \nabla L_j
              - \frac12 \sum_j \nabla L_j\Big)

    The error is of order :math:`\eta^2`, and with the correction, which for one objective is
    :math:`-\frac\eta2 H \nabla L = -\frac\eta4 \nabla |\nabla L|^2`, the flow on
    :func:`modified_loss`, of order :math:`\eta^3` (Barrett and Dherin, arXiv 2009.11162). For
    several it knows their order.

    Computed in float64, in which the error of a small learning rate can be seen; the flow by
    scipy's DOP853.

    Parameters
    ----------
    model
        The model, in eval mode and left as it is: the start of both.
    objectives
        What the steps descend on: one for full-batch gradient descent, several for the actual
        batches of SGD.
    learning_rate
        :math:`\eta`.
    corrected
        Whether the flow has the second-order correction.
    rtol
        Relative tolerance of the solver, which must stay well below the error looked for.

    Returns
    -------
    xarray.DataArray
        :math:`|\theta_n - \theta(n\eta)|`; NaN where the steps or the flow leave the finite numbers.

    Raises
    ------
    ValueError
        If the learning rate or ``rtol`` is not positive, there is no objective, or model, loss and
        data do not fit together.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> objective = Objective(nn.functional.mse_loss, torch.ones(1, 1), torch.zeros(1, 1))
    >>> error = float(discretization_error(model, objective, learning_rate=0.1))  # L = w^2
    >>> abs(error - (math.exp(-0.2) - 0.8)) < 1e-9
    True
    """
    given = [objectives] if isinstance(objectives, Objective) else list(objectives)
    _check(learning_rate, given)
    if not rtol > 0:
        raise ValueError(f"rtol, the tolerance of the solver, must be positive; got {rtol}")
    with ExitStack() as stack:
        surfaces = [stack.enter_context(LossSurface(model, o, torch.float64)) for o in given]
        stepped = surfaces[0].start
        for surface in surfaces:
            stepped = stepped - learning_rate * surface.gradient(stepped)[1]
        flowed = _flow(surfaces, learning_rate, corrected, rtol)
    error = math.nan if flowed is None else float(torch.linalg.vector_norm(stepped - flowed))
    described = attrs(
        "discretization_error",
        learning_rate=learning_rate,
        corrected=int(corrected),
        n_steps=len(given),
        samples=sum(map(len, given)),
    )
    return xr.DataArray(
        error if math.isfinite(error) else math.nan, name="discretization_error", attrs=described
    )


def _flow(
    surfaces: Sequence[LossSurface], learning_rate: float, corrected: bool, rtol: float
) -> Tensor | None:
    """Solve the flow over the time of all steps; None where it cannot be followed."""
    from scipy.integrate import solve_ivp  # 0.1 s to import

    start = surfaces[0].start
    if not bool(start.isfinite().all()):
        return None

    def velocity(_time: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
        theta = torch.from_numpy(values.copy()).to(start)
        found: NDArray[np.float64] = _velocity(surfaces, theta, learning_rate, corrected).cpu().numpy()
        return found

    scale = float(start.abs().max())
    with np.errstate(all="ignore"):
        solution = solve_ivp(
            velocity,
            (0.0, len(surfaces) * learning_rate),
            start.cpu().numpy(),
            method="DOP853",
            rtol=rtol,
            atol=rtol * max(scale, 1e-3) * 1e-3,
        )
    end = solution.y[:, -1]
    return torch.from_numpy(end.copy()).to(start) if solution.success and np.isfinite(end).all() else None


def _velocity(
    surfaces: Sequence[LossSurface], theta: Tensor, learning_rate: float, corrected: bool
) -> Tensor:
    gradients = [surface.gradient(theta)[1] for surface in surfaces]
    total = torch.stack(gradients).sum(0)
    velocity = -total / len(surfaces)
    if not corrected:
        return velocity
    before = torch.zeros_like(theta)
    for surface, gradient in zip(surfaces, gradients, strict=True):
        product = surface.hessian_product(theta, before - 0.5 * total)
        velocity = velocity + learning_rate / len(surfaces) * product
        before = before + gradient
    return velocity


def _check(learning_rate: float, objectives: Sequence[Objective] | None) -> None:
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"the learning rate must be positive and finite; got {learning_rate}")
    if objectives is not None and not objectives:
        raise ValueError("no objective: give at least one batch")


def _square(gradient: Tensor) -> float:
    return float(gradient.double().square().sum())


def _square_at(model: nn.Module, objective: Objective, dtype: torch.dtype | None) -> float:
    with LossSurface(model, objective, dtype) as surface:
        return _square(surface.gradient(surface.start)[1])
