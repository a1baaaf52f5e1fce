"""Loss along paths between two models: linear and layerwise mode connectivity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from hild_xr.recorders.curvature import BlockChoice, resolve_blocks
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.gradients import objective_gradient
from hild_xr.variables import DIM_ALPHA, DIM_LAYER, DIMS, attrs

Prepare = Callable[[nn.Module], object]
"""Called with the model at each place of a path before its loss is taken."""

Weights = Mapping[str, Tensor]


def linear_connectivity(
    first: nn.Module,
    second: nn.Module,
    objective: Objective,
    *,
    alphas: int | Sequence[float] = 11,
    blocks: BlockChoice = "model",
    layers: Sequence[str] | None = None,
    cumulative: bool = False,
    prepare: Prepare | None = None,
) -> xr.Dataset:
    r"""Loss on straight lines between two models: as a whole, layer by layer, or layers added up.

    On the line of a set S of parameters, those in S are
    :math:`\alpha \theta_1 + (1 - \alpha) \theta_2`, all others those of the first model. With the
    loss :math:`L(\alpha)` there, the loss above the chord and the barrier are

    .. math:: B(\alpha) = L(\alpha) - \alpha L(1) - (1 - \alpha) L(0), \qquad \max_\alpha B(\alpha)

    (Adilova et al., "Layerwise linear mode connectivity", arXiv 2307.06966). For S the whole model
    :math:`L(1)` and :math:`L(0)` are the losses of the two models; for a layer :math:`L(0)` is that
    of the first model with this layer of the second.

    Parameters
    ----------
    first, second
        Two models of one architecture, as :func:`~hild_xr.recorders.load_weights` gives them;
        left as they are.
    objective
        Loss and data; the regulariser takes part.
    alphas
        Places on the line, or how many at equal distances from 0 to 1. The ends are always
        evaluated, and no barrier is below 0 where they are among the places.
    blocks, layers
        The sets: ``"model"``, ``"module"`` (weight and bias together: the layers of the paper),
        ``"layer"`` (each tensor) or custom groups; see
        :func:`~hild_xr.recorders.curvature.resolve_blocks`.
    cumulative
        Add the sets up in their order: the line of the second set moves the first too.
    prepare
        Called with the model at each place, for instance to take the statistics of BatchNorm
        anew.

    Returns
    -------
    xarray.Dataset
        ``path_loss`` and ``excess_loss`` (layer, alpha), ``loss_barrier`` (layer); NaN where the
        loss is.

    Raises
    ------
    ValueError
        If the models are not of one architecture, if something that does not move (a buffer, a
        frozen parameter) differs between them and ``prepare`` is not given, if a place is not
        between 0 and 1, or for blocks that do not fit.

    Examples
    --------
    >>> first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(first.weight, 3.0), nn.init.constant_(second.weight, 1.0)
    >>> objective = Objective(lambda out, y: (out - y).square().mean(), torch.ones(1, 1), torch.ones(1, 1))
    >>> found = linear_connectivity(first, second, objective, alphas=3)
    >>> found.path_loss.values, found.loss_barrier.values
    (array([[0., 1., 4.]]), array([0.]))
    """
    model, other = copy.deepcopy(unwrapped(first)), _of_same_architecture(first, second)
    if prepare is None:
        _check_still(model, other)
    places = _places(alphas)
    sets = resolve_blocks(model, blocks, layers)
    start, end = _weights(model), _weights(other)

    def loss(moved: Sequence[str], alpha: float) -> float:
        mixed = {name: torch.lerp(end[name], start[name], alpha) for name in moved}
        _set(model, start | mixed)
        if prepare is not None:
            prepare(model)
        return objective.value(model)

    at_first = loss((), 1.0)
    losses, at_second = np.empty((len(sets), len(places))), np.empty(len(sets))
    moved: list[str] = []
    for i, block in enumerate(sets):
        moved = [*moved, *block.parameters] if cumulative else list(block.parameters)
        at_second[i] = loss(moved, 0.0)
        ends = {0.0: at_second[i], 1.0: at_first}
        losses[i] = [ends[alpha] if alpha in ends else loss(moved, alpha) for alpha in places]
    excess = losses - _chord(at_second[:, None], at_first, places)
    result = xr.Dataset(
        {
            "path_loss": ((DIM_LAYER, DIM_ALPHA), losses, attrs("path_loss")),
            "excess_loss": ((DIM_LAYER, DIM_ALPHA), excess, attrs("excess_loss")),
            "loss_barrier": (DIM_LAYER, excess.max(axis=1), attrs("loss_barrier")),
        },
        coords={DIM_LAYER: [block.label for block in sets], DIM_ALPHA: _alpha(places)},
    )
    return result.assign_attrs(cumulative=int(cumulative), samples=len(objective), regularizer=objective.l2)


def mode_connectivity(
    first: nn.Module,
    second: nn.Module,
    objective: Objective,
    *,
    bend: nn.Module | None = None,
    alphas: int | Sequence[float] = 21,
    prepare: Prepare | None = None,
) -> xr.Dataset:
    r"""Mode connectivity of two models: how the loss on a path between them differs from their own.

    .. math:: mc = \tfrac12 (L_1 + L_2) - L(\gamma(\alpha^*)), \qquad
              \alpha^* = \arg\max_\alpha |\tfrac12 (L_1 + L_2) - L(\gamma(\alpha))|

    (Yang et al., "Taxonomizing local versus global structure in neural network loss landscapes",
    arXiv 2107.11228): negative where a barrier separates the models, positive where the path
    finds better ones and both are under-trained, near zero where they are well connected.

    Parameters
    ----------
    first, second, objective, alphas, prepare
        As for :func:`linear_connectivity`.
    bend
        Model :math:`\theta_b` that a quadratic Bezier curve bends to,
        :math:`\gamma(\alpha) = \alpha^2\theta_1 + 2\alpha(1-\alpha)\theta_b + (1-\alpha)^2\theta_2`,
        as :func:`fit_bend` finds it; None for the straight line.

    Returns
    -------
    xarray.Dataset
        ``path_loss`` (alpha), ``mode_connectivity`` and ``mode_connectivity_alpha``; NaN where a
        loss on the path is.

    Raises
    ------
    ValueError
        As for :func:`linear_connectivity`.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> objective = Objective(nn.functional.mse_loss, torch.ones(2, 1), torch.zeros(2, 1))
    >>> float(mode_connectivity(model, model, objective).mode_connectivity)
    0.0
    """
    model, other = copy.deepcopy(unwrapped(first)), _of_same_architecture(first, second)
    if prepare is None:
        _check_still(model, other)
    places = _places(alphas)
    start, end = _trainable(model), _trainable(other)
    control = None if bend is None else _trainable(_of_same_architecture(first, bend))

    def loss(alpha: float) -> float:
        _set(model, _on_path(start, end, control, alpha))
        if prepare is not None:
            prepare(model)
        return objective.value(model)

    losses = np.array([loss(alpha) for alpha in places])
    gain = 0.5 * (loss(1.0) + loss(0.0)) - losses
    # where one is NaN, argmax names it, and so the result is NaN
    star = int(np.abs(gain).argmax())
    place = places[star] if np.isfinite(gain[star]) else np.nan
    return xr.Dataset(
        {
            "path_loss": (DIM_ALPHA, losses, attrs("path_loss")),
            "mode_connectivity": ((), gain[star], attrs("mode_connectivity")),
            "mode_connectivity_alpha": ((), place, attrs("mode_connectivity_alpha")),
        },
        coords={DIM_ALPHA: _alpha(places)},
        attrs={
            "path": "line" if bend is None else "bezier",
            "samples": len(objective),
            "regularizer": objective.l2,
        },
    )


def fit_bend(
    first: nn.Module,
    second: nn.Module,
    objective: Objective,
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
) -> nn.Module:
    r"""Find the bend of a quadratic Bezier curve of low loss between two models.

    SGD on :math:`\mathbb{E}_\alpha L(\gamma(\alpha))` over :math:`\theta_b`, with
    :math:`\alpha` uniform and the loss on all data, from the middle of the straight line
    (Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling", arXiv 1802.10026).

    Parameters
    ----------
    first, second, objective
        As for :func:`mode_connectivity`.
    steps, learning_rate, momentum
        Of SGD.
    seed
        Of the places :math:`\alpha`; the global generator is not touched.

    Returns
    -------
    nn.Module
        A copy of the first model that holds :math:`\theta_b`.

    Raises
    ------
    ValueError
        As for :func:`linear_connectivity`, or if ``steps`` is below 1.
    NonFiniteCurvatureError
        If a gradient is NaN or infinite: lower the learning rate.

    Examples
    --------
    >>> first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(first.weight, 1.0), nn.init.constant_(second.weight, -1.0)
    >>> objective = Objective(nn.functional.mse_loss, torch.ones(1, 1), torch.full((1, 1), 2.0))
    >>> fit_bend(first, second, objective, steps=60).weight.item() > 2
    True
    """
    if steps < 1:
        raise ValueError(f"steps of SGD must be at least 1; got {steps}")
    model, other = copy.deepcopy(unwrapped(first)), _of_same_architecture(first, second)
    _check_still(model, other)
    start, end = _trainable(model), _trainable(other)
    control = {name: torch.lerp(end[name], start[name], 0.5).requires_grad_() for name in start}
    optimizer = torch.optim.SGD(control.values(), lr=learning_rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        alpha = float(torch.rand((), generator=generator, dtype=torch.float64))
        _set(model, _on_path(start, end, control, alpha))
        slope = objective_gradient(model, objective, list(control))
        for name, tensor in control.items():
            tensor.grad = 2 * alpha * (1 - alpha) * slope[name].to(tensor.dtype)
        optimizer.step()
    _set(model, control)
    return model


def _of_same_architecture(first: nn.Module, second: nn.Module) -> nn.Module:
    model, other = unwrapped(first), unwrapped(second)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    others = {name: tuple(p.shape) for name, p in other.named_parameters()}
    different = sorted(name for name in shapes | others if shapes.get(name) != others.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"a path needs two models of one architecture; {name!r} has shape {shapes.get(name)} in the "
            f"first and {others.get(name)} in the other"
        )
    return other


def _check_still(model: nn.Module, other: nn.Module) -> None:
    """Check that what does not move along the path is the same in both models."""
    there: dict[str, Tensor] = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    still: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    still |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    different = [name for name, value in still.items() if not torch.equal(value, there[name])]
    if different:
        raise ValueError(
            f"{', '.join(different[:4])}: frozen parameters and buffers (statistics of BatchNorm) do not "
            "move along the path, but differ between the two models: give prepare=..., which sets them at "
            "each place, for instance by a pass over training data (torch.optim.swa_utils.update_bn)"
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set(model: nn.Module, weights: Weights) -> None:
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def _on_path(start: Weights, end: Weights, bend: Weights | None, alpha: float) -> dict[str, Tensor]:
    if bend is None:
        return {name: torch.lerp(end[name], start[name], alpha) for name in start}
    with torch.no_grad():
        # de Casteljau: exact where all three are equal, as the sum of three products is not
        return {
            name: torch.lerp(
                torch.lerp(end[name], bend[name], alpha), torch.lerp(bend[name], start[name], alpha), alpha
            )
            for name in start
        }


def _places(alphas: int | Sequence[float]) -> NDArray[np.float64]:
    if isinstance(alphas, int):
        if alphas < 2:
            raise ValueError(f"alphas: at least 2 places, the ends of the path; got {alphas}")
        return np.linspace(0, 1, alphas)
    places = np.asarray(alphas, dtype=np.float64)
    if places.ndim != 1 or not len(places) or not ((places >= 0) & (places <= 1)).all():
        raise ValueError(f"alphas are places between 0 (the second model) and 1 (the first); got {alphas}")
    return places


def _chord(at_zero: NDArray[np.float64], at_one: float, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Straight line between the losses at the ends, exact at both."""
    rise = at_one - at_zero
    return np.where(places < 0.5, at_zero + places * rise, at_one - (1 - places) * rise)


def _alpha(places: NDArray[np.float64]) -> xr.Variable:
    described = {"long_name": "place on the path", "units": "1", "description": DIMS[DIM_ALPHA]}
    return xr.Variable((DIM_ALPHA,), places, described)
