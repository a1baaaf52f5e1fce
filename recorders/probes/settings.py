"""What probes of curvature share: the name of their group, and what its attributes say of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from pydantic import JsonValue

from hild_xr.recorders.curvature import BlockKind, FisherMC, MatrixChoice, MatrixKind
from hild_xr.recorders.curvature.arguments import check_groups
from hild_xr.recorders.curvature.blocks import Groups
from hild_xr.recorders.curvature.engine import REGULARIZED
from hild_xr.recorders.objective import Objective


def matrix_name(matrix: MatrixChoice) -> MatrixKind:
    """Return the name of a matrix, be it given by name or with options.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> matrix_name("ggn"), matrix_name(FisherMC(draws=3))
    ('ggn', 'fisher_mc')
    """
    if isinstance(matrix, FisherMC):
        return "fisher_mc"
    if matrix not in get_args(MatrixKind):
        known = ", ".join(map(repr, get_args(MatrixKind)))
        raise ValueError(f"matrix must be one of {known}, or FisherMC(...); got {matrix!r}")
    return matrix


def group_name(quantity: str, blocks: BlockKind | Groups) -> str:
    """Return the default name of a group: what is recorded, and of which blocks if not of layers.

    Raises
    ------
    TypeError
        If ``blocks`` is neither a text nor a mapping to texts or lists of them.

    Examples
    --------
    >>> group_name("hessian", "layer"), group_name("ggn", {"head": "fc.*"})
    ('hessian', 'ggn_groups')
    """
    check_groups(blocks)
    if not isinstance(blocks, str | Mapping):
        raise TypeError(
            f"blocks is one of {', '.join(map(repr, get_args(BlockKind)))}, or a mapping of labels to "
            f"names of parameters; got {blocks!r}"
        )
    kind = blocks if isinstance(blocks, str) else "groups"
    return quantity if kind == "layer" else f"{quantity}_{kind}"


def matrix_attrs(
    matrix: MatrixChoice,
    blocks: BlockKind | Groups,
    objective: Objective | None,
    include_regularizer: bool | None,
) -> dict[str, JsonValue]:
    r"""Return what a reader must know of the matrix: its name, its blocks, its data, its regulariser.

    ``regularizer`` is the :math:`\beta` that takes part in the matrix, 0 where it does not.

    Examples
    --------
    >>> import torch
    >>> objective = Objective(torch.nn.functional.mse_loss, torch.ones(2, 1), torch.ones(2, 1), l2=0.5)
    >>> matrix_attrs("ggn", "layer", objective, None)
    {'matrix': 'ggn', 'blocks': 'layer', 'samples': 2, 'regularizer': 0.5}
    >>> matrix_attrs(FisherMC(draws=3), {"head": "fc.*"}, objective, None)["draws"]
    3
    """
    name = matrix_name(matrix)
    regularized = name in REGULARIZED if include_regularizer is None else include_regularizer
    # l2 theta is the same in every gradient, so the centred ones do not know it
    regularized = regularized and name != "gmatrix_centered"
    attrs: dict[str, JsonValue] = {
        "matrix": name,
        "blocks": blocks if isinstance(blocks, str) else _as_json(blocks),
        "samples": None if objective is None else len(objective),
        "regularizer": objective.l2 if objective is not None and regularized else 0.0,
    }
    if name == "fisher_mc":
        options = matrix if isinstance(matrix, FisherMC) else FisherMC()
        attrs |= {"draws": options.draws, "draw_seed": options.seed}
    return attrs


def _as_json(groups: Groups) -> JsonValue:
    return {label: [names] if isinstance(names, str) else list(names) for label, names in groups.items()}
