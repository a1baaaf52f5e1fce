"""Curvature without a recorder, labelled as a store would hold it.

The functions are found as ``rec.curvature.eigenpairs`` and so on. Each makes the probe that a
recorder would be given, and has it plan and measure a single record; so what they return
equals what is recorded, and there is no second place where labels are made. They live
beside :mod:`hild_xr.recorders.curvature` because that package knows no labels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from pydantic import JsonValue

from hild_xr.plan import OWN_NODE, ArrayPlan, CoordPlan, NodePlan, ProbePlan
from hild_xr.recorders.curvature.arguments import check_dtype, check_problem, whole_number
from hild_xr.recorders.curvature.blocks import resolve_blocks
from hild_xr.recorders.curvature.columns import FisherMC
from hild_xr.recorders.curvature.foreign import foreign_operator
from hild_xr.recorders.curvature.functional import cast, map_inputs
from hild_xr.recorders.curvature.isolation import unwrapped
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.solve import SolveOptions
from hild_xr.recorders.in_memory import as_stored
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes.base import Probe, Snapshot
from hild_xr.recorders.probes.density import Density
from hild_xr.recorders.probes.estimates import Diagonal, FrobeniusNorm, Trace
from hild_xr.recorders.probes.fisher import Fisher
from hild_xr.recorders.probes.gauss_newton import GaussNewton
from hild_xr.recorders.probes.layout import flat_attrs
from hild_xr.recorders.probes.settings import matrix_name
from hild_xr.recorders.probes.spectrum import GMatrix, Hessian, Spectrum
from hild_xr.recorders.wrappers import check_whole
from hild_xr.variables import DIM_EIG, DIM_PARAM, DIM_SEED, DIM_SKETCH, DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from hild_xr.recorders.curvature.blocks import BlockKind, Groups
    from hild_xr.recorders.curvature.engine import MatrixChoice
    from hild_xr.recorders.curvature.pairs import Which
    from hild_xr.recorders.curvature.precision import Precision
    from hild_xr.recorders.probes.sketching import SketchOption


def eigenpairs(
    model: nn.Module,
    objective: Objective,
    k: int,
    matrix: MatrixChoice = "hessian",
    blocks: BlockKind | Groups = "layer",
    layers: Sequence[str] | None = None,
    *,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_matvec: int | None = None,
    max_seconds: float = math.inf,
    dense_up_to: int | None = None,
    matrix_up_to: int = 0,
    sketch: SketchOption = None,
    include_regularizer: bool | None = None,
    start: xr.DataTree | None = None,
    guard: int = SolveOptions.guard,
    probe_steps: int = SolveOptions.probe_steps,
    seed: int = SolveOptions.seed,
    dtype: torch.dtype | None = None,
) -> xr.DataTree:
    r"""Return k eigenpairs of each block of a curvature matrix, labelled.

    :math:`A u_i = \lambda_i u_i` for the matrix A that
    :class:`~hild_xr.recorders.curvature.Curvature` says, in eval mode on the objective's data. For
    several matrices at the same parameters use that class, which shares the passes through the
    network and returns tensors.

    Parameters
    ----------
    model, objective
        The model, found unchanged afterwards, and loss and data.
    k
        Eigenpairs for each block.
    matrix
        ``"hessian"``, ``"ggn"``, ``"gmatrix"``, ``"gmatrix_centered"``, ``"fisher"``,
        ``"fisher_mc"``, or a :class:`~hild_xr.recorders.curvature.FisherMC` with options.
    blocks, layers, which, tol, max_matvec, max_seconds, dense_up_to, matrix_up_to, sketch
        As for :class:`~hild_xr.recorders.Hessian`.
    include_regularizer
        Whether the l2 term takes part; None for the matrix's default (see
        :meth:`~hild_xr.recorders.curvature.Curvature.eigenpairs`).
    start
        Eigenvectors of some training steps before, from which the search of a block begins: what this
        function returned then, or one record of a store, as
        ``run["hessian"].isel(seed=0).sel(step=100)``. Blocks that it does not hold, or holds as
        NaN, are searched from random vectors; so are all without it. Where the vectors turned little
        it takes a fraction of the products, but pairs that became larger since are not looked for.
    guard, probe_steps, seed
        How a search makes sure that it missed no pair, and the seed of its random vectors; see
        :meth:`~hild_xr.recorders.curvature.Curvature.eigenpairs`. Settings other than
        those of a recorder are kept in the attributes, the seed as ``search_seed``.
    dtype
        Precision to compute in and to return; None for the model's. Another one copies
        model and data.

    Returns
    -------
    xarray.DataTree
        The group of a store without the dims ``seed`` and ``step``: ``eigenvalues``,
        ``residuals`` and ``converged`` (layer, eig), ``n_matvec``, ``n_certain`` and ``trace``
        (layer), and a child for each block with its ``eigenvectors`` (eig, \*dims of the weights). With
        ``blocks="rows"`` the children hold all of it, with ``out`` in place of ``layer``.

    Raises
    ------
    NonFiniteCurvatureError
        If the loss or a product is NaN or infinite.
    ValueError
        If an argument is out of range, model, loss and data do not fit together, or ``start`` is more
        than one record or holds none of the blocks.
    TypeError
        If an argument is of the wrong type.

    Examples
    --------
    >>> import torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = rec.Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> found = rec.curvature.eigenpairs(model, objective, 1)
    >>> float(found["eigenvalues"].sel(layer="weight", eig=0))
    18.0
    >>> found["weight/eigenvectors"].dims
    ('eig', 'out', 'in')
    """
    settings: dict[str, Any] = {
        "blocks": blocks,
        "layers": layers,
        "which": which,
        "tol": tol,
        "max_matvec": max_matvec,
        "max_seconds": max_seconds,
        "dense_up_to": dense_up_to,
        "matrix_up_to": matrix_up_to,
        "sketch": sketch,
        "include_regularizer": include_regularizer,
    }
    probe = _spectrum(matrix)(k, **settings)
    probe.options = replace(probe.options, guard=guard, probe_steps=probe_steps, seed=seed)
    if start is not None:
        probe.start_from(_vectors(start))
    return _measured(probe, model, objective, dtype)


def density(
    model: nn.Module,
    objective: Objective,
    matrix: MatrixChoice = "hessian",
    blocks: BlockKind | Groups = "layer",
    layers: Sequence[str] | None = None,
    *,
    k_steps: int = 50,
    probes: int = 2,
    n_nodes: int | None = None,
    precision: Precision = "full",
    include_regularizer: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> xr.Dataset | xr.DataTree:
    r"""Return the spectral density of each block of a curvature matrix, labelled.

    :math:`\frac1p\sum_i\delta_{\lambda_i}` by stochastic Lanczos quadrature (arXiv 1901.10159).

    Parameters
    ----------
    model, objective, matrix, blocks, layers, include_regularizer, dtype
        As for :func:`eigenpairs`.
    k_steps, probes, n_nodes, precision, seed
        As for :class:`~hild_xr.recorders.Density`.

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        ``quadrature_nodes`` and ``quadrature_weights`` (layer, probe, node), ``trace``, and the
        errors of both (layer). With ``blocks="rows"`` a tree with a child for each layer, on
        ``out`` in place of ``layer``, since layers differ in their number of rows.

    Raises
    ------
    NonFiniteCurvatureError, ValueError, TypeError
        As for :func:`eigenpairs`.

    Examples
    --------
    >>> import torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = rec.Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> found = rec.curvature.density(model, objective)
    >>> mean = (found["quadrature_nodes"] * found["quadrature_weights"]).sum("node").mean("probe")
    >>> round(float(mean.sel(layer="weight")), 6)  # half the trace: the weight has two entries
    9.0
    """
    probe = Density(
        matrix,
        k_steps=k_steps,
        probes=probes,
        n_nodes=n_nodes,
        blocks=blocks,
        layers=layers,
        precision=precision,
        include_regularizer=include_regularizer,
        seed=seed,
    )
    return _flattened(_measured(probe, model, objective, dtype))


def trace(
    model: nn.Module,
    objective: Objective,
    matrix: MatrixChoice = "hessian",
    blocks: BlockKind | Groups = "layer",
    layers: Sequence[str] | None = None,
    *,
    products: int = 30,
    include_regularizer: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> xr.Dataset | xr.DataTree:
    """Return the trace of each block of a curvature matrix with its standard error, labelled.

    Exact where that is nearly free, else by Hutch++ (arXiv 2010.09649).

    Parameters
    ----------
    model, objective, matrix, blocks, layers, include_regularizer, dtype
        As for :func:`eigenpairs`.
    products, seed
        As for :class:`~hild_xr.recorders.Trace`.

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        ``trace``, ``trace_standard_error`` (0 where the trace is exact) and ``n_matvec``, on
        (layer). With ``blocks="rows"`` a tree with a child for each layer, on ``out``.

    Raises
    ------
    NonFiniteCurvatureError, ValueError, TypeError
        As for :func:`eigenpairs`.

    Examples
    --------
    >>> import torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = rec.Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> rec.curvature.trace(model, objective)["trace"].values
    array([18.])
    """
    whole_number("products", products)
    probe = Trace(
        matrix,
        products=products,
        blocks=blocks,
        layers=layers,
        include_regularizer=include_regularizer,
        seed=seed,
    )
    return _flattened(_measured(probe, model, objective, dtype))


def frobenius_norm(
    model: nn.Module,
    objective: Objective,
    matrix: MatrixChoice = "hessian",
    blocks: BlockKind | Groups = "layer",
    layers: Sequence[str] | None = None,
    *,
    products: int = 30,
    include_regularizer: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> xr.Dataset | xr.DataTree:
    """Return the Frobenius norm of each block of a curvature matrix with its standard error, labelled.

    Parameters
    ----------
    model, objective, matrix, blocks, layers, products, include_regularizer, seed, dtype
        As for :func:`trace`.

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        ``frobenius_norm``, ``frobenius_norm_standard_error`` and ``n_matvec``, as from :func:`trace`.

    Raises
    ------
    NonFiniteCurvatureError, ValueError, TypeError
        As for :func:`eigenpairs`.

    Examples
    --------
    >>> import torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = rec.Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> rec.curvature.frobenius_norm(model, objective)["frobenius_norm"].values
    array([18.])
    """
    whole_number("products", products)
    probe = FrobeniusNorm(
        matrix,
        products=products,
        blocks=blocks,
        layers=layers,
        include_regularizer=include_regularizer,
        seed=seed,
    )
    return _flattened(_measured(probe, model, objective, dtype))


def diagonal(
    model: nn.Module,
    objective: Objective,
    matrix: MatrixChoice = "hessian",
    blocks: BlockKind | Groups = "layer",
    layers: Sequence[str] | None = None,
    *,
    products: int = 30,
    include_regularizer: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> xr.DataTree:
    """Return the diagonal of each block of a curvature matrix with its standard error, labelled.

    Parameters
    ----------
    model, objective, matrix, blocks, layers, products, include_regularizer, seed, dtype
        As for :func:`trace`.

    Returns
    -------
    xarray.DataTree
        ``n_matvec`` (layer), and a child for each block with ``diagonal`` and
        ``diagonal_standard_error`` on the dims of the weights.

    Raises
    ------
    NonFiniteCurvatureError, ValueError, TypeError
        As for :func:`eigenpairs`.

    Examples
    --------
    >>> import torch
    >>> from hild_xr import recorders as rec
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = rec.Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
    >>> rec.curvature.diagonal(model, objective)["weight/diagonal"].values
    array([[18.,  0.]], dtype=float32)
    """
    whole_number("products", products)
    probe = Diagonal(
        matrix,
        products=products,
        blocks=blocks,
        layers=layers,
        include_regularizer=include_regularizer,
        seed=seed,
    )
    return _measured(probe, model, objective, dtype)


def operator_eigenpairs(
    operator: Any,
    k: int,
    *,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_matvec: int | None = None,
    max_seconds: float = math.inf,
    seed: int = 0,
    name: str | None = None,
    model: nn.Module | None = None,
) -> xr.Dataset:
    r"""Return k eigenpairs of a symmetric operator of another package, labelled and certified.

    By :func:`~hild_xr.recorders.curvature.lanczos_eigenpairs`: every pair comes with its true
    residual :math:`\|A u - \lambda u\|`, relative, from a real product, and a pair that did
    not reach the tolerance is not flagged.

    The operator must be symmetric and give the same product each time; that is not checked. An
    operator that is neither shows in its residuals.

    Parameters
    ----------
    operator
        What has a square ``shape`` and ``@`` with vectors: an operator of curvlinops, SciPy's
        LinearOperator, a tensor, an array or a sparse matrix.
    k
        Number of eigenpairs.
    which, tol, max_matvec, max_seconds, seed
        See :func:`~hild_xr.recorders.curvature.lanczos_eigenpairs`.
    name
        What the operator is, for the attribute ``matrix`` and for messages; its type by default.
    model
        The model over whose trainable parameters, in their order, the operator runs. The
        eigenvectors then say so, and :func:`hild_xr.analysis.flatten_like` brings weights into
        the same order.

    Returns
    -------
    xarray.Dataset
        ``eigenvalues``, ``residuals``, ``converged`` (eig), ``eigenvectors`` (eig, param),
        ``n_matvec`` and ``n_certain``, in the operator's precision, float32 at least.

    Raises
    ------
    NonFiniteCurvatureError
        If a product is NaN or infinite.
    ValueError
        If the operator is not square, an argument is out of range, or the model has another
        number of trainable parameters.
    TypeError
        If an argument is of the wrong type, or the operator has no shape, no ``@``, or is not of real
        floating numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from hild_xr import recorders as rec
    >>> found = rec.curvature.operator_eigenpairs(np.diag([1.0, -5.0, 2.0, 0.0]), 2)
    >>> found["eigenvalues"].values.round(6), found["converged"].values
    (array([-5.,  2.]), array([ True,  True]))
    """
    foreign = foreign_operator(operator)
    layout = _layout_of(model, foreign.size)
    title = type(operator).__name__ if name is None else name
    SolveOptions(k, which, tol, max_matvec, seed, max_seconds=max_seconds)  # checks the arguments
    pairs = lanczos_eigenpairs(
        foreign.products,
        foreign.size,
        k,
        which=which,
        tol=tol,
        max_matvec=max_matvec,
        max_seconds=max_seconds,
        dtype=foreign.dtype,
        device=foreign.device,
        seed=seed,
        name=title,
    )
    dtype = str(foreign.dtype).removeprefix("torch.")
    of_pairs: dict[str, ArrayPlan] = {
        variable: ArrayPlan(variable=variable, dims=(DIM_EIG,), shape=(k,), dtype=kind)
        for variable, kind in (("eigenvalues", dtype), ("residuals", dtype), ("converged", "bool"))
    }
    vectors = ArrayPlan(
        variable="eigenvectors",
        dims=(DIM_EIG, DIM_PARAM),
        shape=(k, foreign.size),
        dtype=dtype,
        attrs={"vector_dims": [DIM_PARAM], "number_dim": DIM_EIG, "matrix": title, **layout},
    )
    counts = {name: ArrayPlan(variable=name, dtype="int32") for name in ("n_matvec", "n_certain")}
    arrays = {**of_pairs, "eigenvectors": vectors, **counts}
    eig = CoordPlan(dim=DIM_EIG, values=tuple(range(k)))
    plan = ProbePlan(
        steps=(0,),
        nodes={OWN_NODE: NodePlan(arrays=arrays, coords={DIM_EIG: eig})},
        attrs={"matrix": title, "k": k, "which": which, "tolerance": tol},
    )
    values = {variable: getattr(pairs, variable)[0] for variable in arrays}
    return as_stored("operator", plan, {OWN_NODE: values}).to_dataset()


def _spectrum(matrix: MatrixChoice) -> Callable[..., Spectrum]:
    """Return the probe of a matrix, to be called with k and its settings."""
    drawn = matrix if isinstance(matrix, FisherMC) else FisherMC()
    probes: dict[str, Callable[..., Spectrum]] = {
        "hessian": Hessian,
        "ggn": GaussNewton,
        "gmatrix": GMatrix,
        "gmatrix_centered": partial(GMatrix, centered=True),
        "fisher": Fisher,
        "fisher_mc": partial(Fisher, draws=drawn.draws, draw_seed=drawn.seed),
    }
    return probes[matrix_name(matrix)]


def _vectors(start: xr.DataTree) -> dict[str, torch.Tensor]:
    """Return the eigenvectors that a record holds, by the label of their block."""
    if not isinstance(start, xr.DataTree):
        raise TypeError(
            "start must be the DataTree that an earlier call returned, or one record of a recorded group, as "
            f"run['hessian'].isel(seed=0).sel(step=100); got {type(start).__name__}"
        )
    held = {
        label: node["eigenvectors"]
        for label, node in start.children.items()
        if "eigenvectors" in node.data_vars
    }
    if not held:
        raise ValueError(
            f"start holds no eigenvectors, but {', '.join(start.children) or 'nothing'}: give the group of a "
            "spectrum, as run['hessian'].isel(seed=0).sel(step=100)"
        )
    for label, vectors in held.items():
        several = [dim for dim in (DIM_SEED, DIM_STEP) if dim in vectors.dims]
        if several:
            raise ValueError(
                f"start holds several records of block {label!r}, along {' and '.join(several)}: select "
                "one, as .isel(seed=0).sel(step=100)"
            )
        if DIM_SKETCH in vectors.dims:
            raise ValueError(
                f"start holds sketches of the eigenvectors of block {label!r}, which no search can begin "
                "with: record or compute them without sketch"
            )
    return {label: torch.from_numpy(np.array(vectors)) for label, vectors in held.items()}


def _measured(probe: Probe, model: nn.Module, objective: Objective, dtype: torch.dtype | None) -> xr.DataTree:
    """Plan and measure one record of a probe, as a recorder does."""
    check_problem(model, objective)
    check_dtype(dtype)
    inner = unwrapped(model)
    check_whole(inner)
    if dtype is not None:
        inner, objective = copy.deepcopy(inner).to(dtype), _cast(objective, dtype)
    objective.check(inner)
    plan = ProbePlan(
        steps=(0,),
        nodes=probe.plan(inner, None, objective),
        attrs={"probe": type(probe).__name__, **probe.attrs(objective)},
    )
    with Snapshot(inner, None, objective, step=0) as snapshot:
        values = probe.record(snapshot)
    return as_stored(probe.group, plan, values)


def _cast(objective: Objective, dtype: torch.dtype) -> Objective:
    return Objective(
        objective.loss,
        map_inputs(partial(cast, dtype=dtype), objective.inputs),
        cast(objective.targets, dtype),
        batch_size=objective.batch_size,
        l2=objective.l2,
    )


def _flattened(tree: xr.DataTree) -> xr.Dataset | xr.DataTree:
    """Return a tree of a single node as a Dataset."""
    return tree if tree.children else tree.to_dataset()


def _layout_of(model: nn.Module | None, size: int) -> dict[str, JsonValue]:
    if model is None:
        return {}
    (block,) = resolve_blocks(model, "model")
    if block.size != size:
        raise ValueError(
            f"the operator is of size {size}, but the model has {block.size} trainable parameters: give the "
            "model whose parameters, all and in their order, the operator was made of, or leave it out"
        )
    return flat_attrs(block)
