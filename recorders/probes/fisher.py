"""Probe of Fisher spectra, exact or by Monte Carlo: leading eigenpairs, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hild_xr.plan import NodePlan
from hild_xr.recorders.curvature import BlockKind, FisherMC, Which, isolated
from hild_xr.recorders.curvature.blocks import Groups
from hild_xr.recorders.curvature.functional import FunctionalModel, at_least_float32
from hild_xr.recorders.curvature.likelihood import predictive
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.sketching import SketchOption
from hild_xr.recorders.probes.spectrum import COLD_EVERY, Spectrum
from hild_xr.recorders.schedule import Schedule


class Fisher(Spectrum):
    r"""Record the leading eigenpairs of the Fisher information matrix, block by block.

    The mean of :math:`g g^T` over the objective's inputs and over targets from the model's own
    prediction, :math:`g = \nabla_\theta\,\ell(f_\theta(x_m), y)`, :math:`y \sim p_\theta(\cdot|x_m)`
    (Martens 2020, arXiv 1412.1193). The targets of the data play no part; with them it would be
    the G-matrix, which is also called empirical Fisher matrix.

    Parameters
    ----------
    k, blocks, layers, which, tol, max_matvec, max_seconds, dense_up_to, matrix_up_to
    cold_every, sketch, schedule, group
        As for :class:`~hild_xr.recorders.Hessian`; groups are ``/fisher``, ``/fisher_rows`` and so
        on, and ``/fisher_mc`` where targets are drawn.
    include_regularizer
        Whether :math:`\beta I` of the l2 term is added, by default it is not.
    draws
        Targets drawn for each sample; None for the exact sum over all of them.
    draw_seed
        Seed of the draws. They follow the same random numbers at each record, so two records differ by
        what training changed and not by chance.

    Raises
    ------
    ValueError, TypeError
        As for :class:`~hild_xr.recorders.Hessian`. A ValueError also at once, if ``draws`` is
        below 1; and when the recorder starts, if the objective's loss is no negative
        log-likelihood (see :func:`~hild_xr.recorders.curvature.likelihood.predictive`).

    Examples
    --------
    >>> Fisher(k=10).group, Fisher(k=10, draws=4).group
    ('fisher', 'fisher_mc')
    """

    def __init__(
        self,
        k: int,
        *,
        blocks: BlockKind | Groups = "layer",
        layers: Sequence[str] | None = None,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        max_seconds: float = math.inf,
        dense_up_to: int | None = None,
        matrix_up_to: int = 0,
        cold_every: int = COLD_EVERY,
        sketch: SketchOption = None,
        schedule: Schedule | None = None,
        group: str | None = None,
        include_regularizer: bool | None = None,
        draws: int | None = None,
        draw_seed: int = 0,
    ) -> None:
        self.matrix = "fisher" if draws is None else FisherMC(draws, draw_seed)
        super().__init__(
            k,
            blocks=blocks,
            layers=layers,
            which=which,
            tol=tol,
            max_matvec=max_matvec,
            max_seconds=max_seconds,
            dense_up_to=dense_up_to,
            matrix_up_to=matrix_up_to,
            cold_every=cold_every,
            sketch=sketch,
            schedule=schedule,
            group=group,
            include_regularizer=include_regularizer,
        )

    def plan(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, objective: Objective | None
    ) -> dict[str, NodePlan]:
        """Plan the nodes, and check that the loss tells a distribution of targets."""
        if objective is not None:
            _check_likelihood(model, objective)
        return super().plan(model, optimizer, objective)


def _check_likelihood(model: nn.Module, objective: Objective) -> None:
    """Raise a ValueError for a loss that is none, on a few samples, before a store is made."""
    inputs, targets = objective.samples(objective.some_samples())
    with isolated(model), torch.no_grad():
        outputs = FunctionalModel(model)(inputs)
        if isinstance(outputs, Tensor) and bool(outputs.isfinite().all()):
            targets = at_least_float32(targets) if targets.is_floating_point() else targets
            predictive(objective.mean_loss, at_least_float32(outputs), targets)
