"""Curvature of a model on an objective: the public kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from hild_xr.recorders.curvature.arguments import (
    check_dtype,
    check_groups,
    check_problem,
    check_start,
    real_number,
    whole_number,
)
from hild_xr.recorders.curvature.block_parts import PartChoice, require_disjoint, resolve_part
from hild_xr.recorders.curvature.blocks import Block, BlockChoice, check_k, resolve_blocks
from hild_xr.recorders.curvature.columns import FisherMC
from hild_xr.recorders.curvature.cross_operators import CrossOperator, coupling_ratio
from hild_xr.recorders.curvature.cross_spectrum import CrossSpectrum, singular_triplets
from hild_xr.recorders.curvature.densities import DensityOptions, SpectralDensity, spectral_density
from hild_xr.recorders.curvature.diagonals import diagonal
from hild_xr.recorders.curvature.estimate import Estimate, exact_estimate
from hild_xr.recorders.curvature.isolation import Measurement, unwrapped
from hild_xr.recorders.curvature.matrices import Matrices
from hild_xr.recorders.curvature.operators import BlockOperator
from hild_xr.recorders.curvature.pairs import Which
from hild_xr.recorders.curvature.precision import check_matrix_products
from hild_xr.recorders.curvature.solve import SolveOptions, solve
from hild_xr.recorders.curvature.spectrum import BlockSpectrum
from hild_xr.recorders.curvature.traces import frobenius_norm, trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from torch import nn

    from hild_xr.recorders.curvature.precision import MatrixProducts, Precision
    from hild_xr.recorders.objective import Objective

MatrixKind = Literal["hessian", "ggn", "gmatrix", "gmatrix_centered", "fisher", "fisher_mc"]
"""Which curvature matrix: see :class:`Curvature`."""

MatrixChoice: TypeAlias = MatrixKind | FisherMC
"""A kind by its name, or with options; ``"fisher_mc"`` is ``FisherMC()``."""

Given = TypeVar("Given")
Result = TypeVar("Result")

REGULARIZED = ("hessian", "ggn")
"""Matrices that the l2 term takes part in by default: second derivatives of the objective."""

_AT_OUTPUTS = ("ggn", "fisher", "fisher_mc")  # know a sample by the row of its output


class Curvature:
    r"""Curvature matrices of an objective at a model's current parameters.

    With :math:`g_m = \nabla_\theta\, \ell(f_\theta(x_m), y_m)`, :math:`J_m` the derivative of the
    outputs :math:`f_\theta(x_m)` and :math:`\bar g` the mean of the :math:`g_m`:

    ======================  ==================================================================
    ``"hessian"``           :math:`\nabla^2 L(\theta)`
    ``"ggn"``               :math:`\frac1M\sum_m J_m^T \frac{\partial^2\ell_m}{\partial f^2} J_m`, the
                            generalized Gauss-Newton matrix (Schraudolph 2002), of any loss that
                            is a function of one output tensor
    ``"gmatrix"``           :math:`\frac1M\sum_m g_m g_m^T` (also called empirical Fisher)
    ``"gmatrix_centered"``  :math:`\frac1M\sum_m (g_m - \bar g)(g_m - \bar g)^T`, the gradient noise
    ``"fisher"``            the mean of :math:`g g^T` over samples and over all targets, each with
                            the probability the model gives it, for losses that are a negative
                            log-likelihood (see
                            :func:`~hild_xr.recorders.curvature.likelihood.predictive`); equal to
                            ``"ggn"`` where the outputs are the likelihood's natural parameters, as
                            logits are
    ``"fisher_mc"``         the same with targets drawn; options in
                            :class:`~hild_xr.recorders.curvature.columns.FisherMC`
    ======================  ==================================================================

    Make one for each record and use it as a context: on entering, one forward and
    one first backward pass build a graph that all blocks and both matrices share; on
    leaving it is freed. If the objective has several batches no graph is kept, and
    each product builds them anew, one batch at a time. Hessian blocks of linear layers in a row,
    with activations between them, take no pass through these layers (nor through what lies behind
    them, if the last one has 16 outputs at most): see :mod:`~hild_xr.recorders.curvature.linear_chain`.

    Memory, besides the basis of a search: about ten times the activations (inputs and outputs of all
    layers) of one batch; and where there are several batches and linear layers in a row, four times the
    activations of these layers on all samples, unless that is above ``max_bytes``. Searches by rounded
    products, which are for a single batch, take some four times the activations of linear layers in a row,
    unless what is known of these is above ``max_bytes`` then.

    The model is measured in eval mode and found unchanged (see
    :func:`~hild_xr.recorders.curvature.isolation.isolated`). Its parameters must not
    change inside the context.

    Parameters
    ----------
    model
        The model.
    objective
        Loss and data.
    dtype
        Precision to compute in; ``None`` keeps the model's. ``torch.float64`` copies
        parameters and data.
    dense_up_to
        Blocks of at most this size are solved as whole matrices.
    max_bytes
        Memory that per-sample gradients may take; the same again for the bases of rows
        solved at once, and for what is known of linear layers on several batches. A G-matrix that
        does not fit is multiplied from gradients taken anew, chunk by chunk.
    matrix_products
        ``"full"`` multiplies float32 matrices on the CPU by the faster one of torch's two libraries, if it is
        as exact; ``"default"`` by torch's default, with the same rounding errors in every process.
        ``"fastest"`` is ``"full"``, but searches for eigenpairs of linear layers in a row go by factors
        rounded to bfloat16 where the processor multiplies these much faster (AMX). What they find is
        multiplied anew in float32 and corrected, so that residuals and ``converged`` mean the same; see
        :func:`~hild_xr.recorders.curvature.lanczos.lanczos_eigenpairs`. Operators that are used outside
        of this class's own methods may take the default whatever the choice.

    Raises
    ------
    TypeError
        If model, objective or dtype is none.
    NonFiniteCurvatureError
        On entering, if the loss is NaN or infinite.
    ValueError
        On entering, if model, loss and data do not fit together (see
        :meth:`~hild_xr.recorders.objective.Objective.check`).

    Examples
    --------
    >>> from hild_xr.recorders.objective import Objective
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> loss, inputs, targets = torch.nn.functional.cross_entropy, torch.eye(3), torch.tensor([0, 1, 1])
    >>> objective = Objective(loss, inputs, targets, l2=0.1)
    >>> with Curvature(model, objective) as curvature:
    ...     hessian = curvature.eigenpairs(2, "hessian", "rows")
    ...     gmatrix = curvature.eigenpairs(2, "gmatrix", "rows")
    >>> hessian["weight"].eigenvalues.shape, hessian["weight"].eigenvectors.shape
    (torch.Size([2, 2]), torch.Size([2, 2, 3]))
    >>> bool((hessian["weight"].eigenvalues >= 0.1).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        dtype: torch.dtype | None = None,
        dense_up_to: int = 128,
        max_bytes: int = 2**30,
        matrix_products: MatrixProducts = "fastest",
    ) -> None:
        check_problem(model, objective)
        check_dtype(dtype)
        check_matrix_products(matrix_products)
        self.model, self.objective = unwrapped(model), objective
        self.dense_up_to, self.max_bytes = dense_up_to, max_bytes
        self._dtype, self._products = dtype, matrix_products
        self._matrices: Matrices | None = None

    def __enter__(self) -> Self:
        self.objective.check(self.model)
        measuring = Measurement(self.model, self._products)
        with measuring():
            self._matrices = Matrices(self.model, self.objective, self._dtype, measuring, self.max_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._matrices = None

    @property
    def loss(self) -> float:
        """The objective's value, regulariser included."""
        return self._entered().loss

    def eigenpairs(
        self,
        k: int,
        matrix: MatrixChoice = "hessian",
        blocks: BlockChoice = "layer",
        layers: Sequence[str] | None = None,
        *,
        which: Which = "magnitude",
        tol: float = 1e-3,
        max_matvec: int | None = None,
        matrix_up_to: int = 0,
        include_regularizer: bool | None = None,
        dense_up_to: int | None = None,
        start: Mapping[str, Tensor] | None = None,
        max_seconds: float = math.inf,
        guard: int = 2,
        probe_steps: int = 8,
        seed: int = 0,
    ) -> dict[str, BlockSpectrum]:
        """Return k eigenpairs of each block.

        Parameters
        ----------
        k
            Number of eigenpairs.
        matrix
            Its name (see :class:`Curvature`), or a
            :class:`~hild_xr.recorders.curvature.columns.FisherMC` with options.
        blocks
            ``"layer"``, ``"rows"``, ``"module"``, ``"model"``, a mapping of labels to names or
            patterns of parameters, or blocks made before (see
            :func:`~hild_xr.recorders.curvature.blocks.resolve_blocks`).
        layers
            Labels of the blocks to take; ``None`` takes all that fit.
        which
            ``"magnitude"`` (decreasing absolute value), ``"largest"``, ``"smallest"``, or
            ``"both"``: largest, smallest, second largest, and so on.
        tol
            Relative residual up to which a pair counts as converged. The error of an
            eigenvalue is quadratic in the residual, the angle of an eigenvector is the
            residual over the gap.
        max_matvec
            Products allowed for each block solved through products; default ``40 k + 200``.
        matrix_up_to
            Blocks of at most this size come with the whole matrix.
        include_regularizer
            Whether the l2 term takes part: adds beta I to the blocks of the Hessian and of
            the Gauss-Newton matrix (default yes) and of the Fisher matrices (default no), or
            beta theta to each per-sample gradient of G (default no; it cancels in the
            centred G).
        dense_up_to
            Blocks of at most this size are solved as whole matrices; ``None`` takes the
            setting of the class.
        start
            Eigenvectors found some training steps before, by label. Where they turned little,
            they are corrected with some k products; see
            :func:`~hild_xr.recorders.curvature.lanczos.lanczos_eigenpairs`. Others that have
            become larger since are not looked for, so solve without a start now and then.
        max_seconds
            Time allowed for each block solved through products; what is found by then is
            flagged as far as it is exact.
        guard
            Pairs beyond k that a search must find too, so that none is overtaken unseen.
        probe_steps
            Products with which a search looks for what it missed, above all second copies of an
            eigenvalue. More of them make more pairs certain (``n_certain``); 0 for both saves a fifth
            of the products, and one search of seven then misses a pair of a dense spectrum.
        seed
            Seed of random start vectors.

        Returns
        -------
        dict of str to BlockSpectrum
            By the block's label, in the model's order.

        Raises
        ------
        NonFiniteCurvatureError
            If a product is NaN or infinite; it names the block.
        ValueError
            If an argument is out of range, k does not fit a block, or the label of a start is
            unknown.
        TypeError
            If an argument is of the wrong type.
        RuntimeError
            Outside of the ``with`` block.
        """
        options = SolveOptions(
            k,
            which,
            tol,
            max_matvec,
            seed,
            self._dense(dense_up_to),
            matrix_up_to,
            self.max_bytes,
            max_seconds,
            guard,
            probe_steps,
        )
        chosen = self._blocks(blocks, layers)
        check_k(chosen, k)
        check_start(start, [block.label for block in chosen])
        for block in chosen:
            options.check_budget(
                block, "fisher_mc" if isinstance(matrix, FisherMC) else matrix, len(self.objective)
            )
        return self._of_operators(
            lambda operator, vectors: solve(operator, options, vectors),
            chosen,
            matrix,
            include_regularizer,
            start,
        )

    def operators(
        self,
        blocks: Sequence[Block],
        matrix: MatrixChoice = "hessian",
        include_regularizer: bool | None = None,
    ) -> Iterator[BlockOperator]:
        """Yield the matrix of each block as an operator, for products, whole matrices and traces.

        Parameters
        ----------
        blocks
            From :func:`~hild_xr.recorders.curvature.blocks.resolve_blocks`.
        matrix
            Its name (see :class:`Curvature`), or a
            :class:`~hild_xr.recorders.curvature.columns.FisherMC` with options.
        include_regularizer
            As in :meth:`eigenpairs`.

        Yields
        ------
        BlockOperator
            One for each block; valid inside the ``with`` block.

        Raises
        ------
        ValueError
            If ``matrix`` is unknown.
        RuntimeError
            Outside of the ``with`` block.
        """
        l2 = self._l2(matrix, include_regularizer)
        return self._entered().operators(blocks, matrix, l2)

    def density(
        self,
        matrix: MatrixChoice = "hessian",
        blocks: BlockChoice = "layer",
        layers: Sequence[str] | None = None,
        *,
        k_steps: int = 50,
        probes: int = 2,
        n_nodes: int | None = None,
        precision: Precision = "full",
        known: Mapping[str, BlockSpectrum] | None = None,
        include_regularizer: bool | None = None,
        seed: int = 0,
    ) -> dict[str, SpectralDensity]:
        """Return the spectral density of each block, by stochastic Lanczos quadrature.

        Parameters
        ----------
        matrix, blocks, layers, include_regularizer
            As in :meth:`eigenpairs`.
        k_steps, probes, n_nodes, precision, seed
            See :class:`~hild_xr.recorders.curvature.densities.DensityOptions`.
        known
            Eigenpairs of the same matrix and blocks, by label, as :meth:`eigenpairs` gives them.
            Their weights are then exact, and fewer steps do.

        Returns
        -------
        dict of str to SpectralDensity
            By the block's label.

        Raises
        ------
        NonFiniteCurvatureError
            If a product is NaN or infinite; it names the block.
        ValueError
            If an argument is out of range.
        RuntimeError
            Outside of the ``with`` block.

        Examples
        --------
        >>> from hild_xr.recorders.objective import Objective
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> loss = torch.nn.functional.cross_entropy
        >>> with Curvature(model, Objective(loss, torch.eye(3), torch.tensor([0, 1, 1]))) as curvature:
        ...     density = curvature.density(blocks="model", k_steps=4)["model"]
        >>> density.exact, bool(density.weights.sum(-1).allclose(torch.tensor(1.0).double()))
        (True, True)
        """
        options = DensityOptions(k_steps, probes, n_nodes, seed, precision, self.dense_up_to, self.max_bytes)
        return self._of_operators(
            lambda operator, pairs: spectral_density(operator, options, pairs),
            self._blocks(blocks, layers),
            matrix,
            include_regularizer,
            known,
        )

    def trace(
        self,
        matrix: MatrixChoice = "hessian",
        blocks: BlockChoice = "layer",
        layers: Sequence[str] | None = None,
        *,
        products: int = 30,
        known: Mapping[str, BlockSpectrum] | None = None,
        include_regularizer: bool | None = None,
        seed: int = 0,
    ) -> dict[str, Estimate]:
        """Return the trace of each block: exact where that is nearly free, else by Hutch++.

        Parameters
        ----------
        matrix, blocks, layers, include_regularizer
            As in :meth:`eigenpairs`.
        products
            Products allowed for each sub-block; those of at most this size are exact.
        known
            As in :meth:`density`.
        seed
            Seed of the random vectors.

        Returns
        -------
        dict of str to Estimate
            By the block's label; see :func:`~hild_xr.recorders.curvature.traces.trace`.

        Raises
        ------
        NonFiniteCurvatureError
            If a product is NaN or infinite; it names the block.
        ValueError
            If an argument is out of range.
        RuntimeError
            Outside of the ``with`` block.

        Examples
        --------
        >>> from hild_xr.recorders.objective import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(torch.nn.functional.mse_loss, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
        >>> with Curvature(model, objective) as curvature:
        ...     curvature.trace()["weight"].value
        tensor(18., dtype=torch.float64)
        """
        whole_number("products", products)
        return self._of_operators(
            lambda operator, pairs: trace(
                operator, products, seed=seed, known=pairs, max_bytes=self.max_bytes
            ),
            self._blocks(blocks, layers),
            matrix,
            include_regularizer,
            known,
        )

    def frobenius_norm(
        self,
        matrix: MatrixChoice = "hessian",
        blocks: BlockChoice = "layer",
        layers: Sequence[str] | None = None,
        *,
        products: int = 30,
        known: Mapping[str, BlockSpectrum] | None = None,
        include_regularizer: bool | None = None,
        seed: int = 0,
    ) -> dict[str, Estimate]:
        """Return the Frobenius norm of each block.

        Parameters, errors and result are those of :meth:`trace`; see
        :func:`~hild_xr.recorders.curvature.traces.frobenius_norm` for what is exact.
        """
        whole_number("products", products)
        return self._of_operators(
            lambda operator, pairs: frobenius_norm(
                operator, products, seed=seed, known=pairs, max_bytes=self.max_bytes
            ),
            self._blocks(blocks, layers),
            matrix,
            include_regularizer,
            known,
        )

    def diagonal(
        self,
        matrix: MatrixChoice = "hessian",
        blocks: BlockChoice = "layer",
        layers: Sequence[str] | None = None,
        *,
        products: int = 30,
        known: Mapping[str, BlockSpectrum] | None = None,
        include_regularizer: bool | None = None,
        seed: int = 0,
    ) -> dict[str, Estimate]:
        """Return the diagonal of each block, on the dims of the weights.

        Parameters, errors and result are those of :meth:`trace`; see
        :func:`~hild_xr.recorders.curvature.diagonals.diagonal` for what is exact. The weight of a
        linear layer is so too, where its number of outputs is at most ``products``: each
        output takes one backward pass.
        """

        def estimate(operator: BlockOperator, pairs: BlockSpectrum | None) -> Estimate:
            found = self._diagonal_by_rows(operator, matrix, products, include_regularizer)
            if found is not None:
                return found
            return diagonal(operator, products, seed=seed, known=pairs, max_bytes=self.max_bytes)

        whole_number("products", products)
        chosen = self._blocks(blocks, layers)
        return self._of_operators(estimate, chosen, matrix, include_regularizer, known)

    def _diagonal_by_rows(
        self,
        operator: BlockOperator,
        matrix: MatrixChoice,
        products: int,
        include_regularizer: bool | None,
    ) -> Estimate | None:
        """Return the diagonal of a linear layer's weight, where its rows have one in closed form."""
        block = operator.block
        if block.kind != "layer" or operator.size <= products:
            return None
        if not self._entered().has_site(block.parameters[0]):
            return None
        if matrix == "hessian" and block.shapes[0][0] > products:
            return None
        rows = Block(block.label, "rows", block.parameters, block.shapes)
        (found,) = self.operators([rows], matrix, include_regularizer)
        values = found.diagonal()
        if values is None:
            return None
        return exact_estimate(operator, values.reshape(1, *block.vector_shape), rows.count)

    def cross_operator(
        self,
        a: PartChoice,
        b: PartChoice,
        matrix: MatrixChoice = "hessian",
        include_regularizer: bool | None = None,
    ) -> CrossOperator:
        """Return the block of rows a and columns b, beside the diagonal, as an operator.

        Products go through the same graph and per-sample gradients as those of the blocks
        on the diagonal.

        Parameters
        ----------
        a, b
            Disjoint parts: a parameter's name or a pattern, a sequence of them, a row
            ``(name, index)``, or a :class:`~hild_xr.recorders.curvature.blocks.Block`.
        matrix, include_regularizer
            As in :meth:`eigenpairs`; the Hessian's regulariser has no part here.

        Returns
        -------
        CrossOperator
            Valid inside the ``with`` block; ``product`` maps vectors of b to vectors of a,
            ``adjoint_product`` back, ``matrix`` is the whole block.

        Raises
        ------
        ValueError
            If a name is unknown, the parts overlap, or ``matrix`` is unknown.
        RuntimeError
            Outside of the ``with`` block.

        Examples
        --------
        >>> from hild_xr.recorders.objective import Objective
        >>> model = torch.nn.Linear(1, 1)
        >>> data = torch.tensor([[2.0]]), torch.zeros(1, 1)
        >>> with Curvature(model, Objective(torch.nn.functional.mse_loss, *data)) as curvature:
        ...     curvature.cross_operator("weight", "bias").matrix()
        tensor([[4.]])
        """
        rows, columns = resolve_part(self.model, a), resolve_part(self.model, b)
        require_disjoint(rows, columns)
        l2 = self._l2(matrix, include_regularizer)
        return self._entered().cross_operator(rows, columns, matrix, l2)

    def cross_singular(
        self,
        k: int,
        a: PartChoice,
        b: PartChoice,
        matrix: MatrixChoice = "hessian",
        *,
        tol: float = 1e-3,
        max_matvec: int | None = None,
        include_regularizer: bool | None = None,
        dense_up_to: int | None = None,
        seed: int = 0,
    ) -> CrossSpectrum:
        """Return the k leading singular triplets of the block of rows a and columns b.

        Parameters
        ----------
        k
            Number of triplets.
        a, b, matrix, include_regularizer
            As in :meth:`cross_operator`.
        tol, max_matvec, dense_up_to, seed
            See :func:`~hild_xr.recorders.curvature.cross_spectrum.singular_triplets`.

        Returns
        -------
        CrossSpectrum
            Singular values, and vectors on the dims of the weights.

        Raises
        ------
        NonFiniteCurvatureError
            If a product is NaN or infinite.
        ValueError
            If an argument is out of range, or the parts overlap.
        RuntimeError
            Outside of the ``with`` block.
        """
        whole_number("k", k)
        real_number("tol", tol)
        operator = self.cross_operator(a, b, matrix, include_regularizer)
        with self._entered().measuring():
            return singular_triplets(
                operator,
                k,
                tol=tol,
                max_matvec=max_matvec,
                dense_up_to=self._dense(dense_up_to),
                max_bytes=self.max_bytes,
                seed=seed,
            )

    def coupling(
        self,
        a: PartChoice,
        b: PartChoice,
        matrix: MatrixChoice = "hessian",
        include_regularizer: bool | None = None,
    ) -> float:
        r"""Return how strongly two parts are coupled, by whole matrices: for small parts.

        .. math:: \frac{\|A_{ab}\|_F}{\sqrt{\|A_{aa}\|_F \|A_{bb}\|_F}}

        See :func:`~hild_xr.recorders.curvature.cross_operators.coupling_ratio`.

        Parameters
        ----------
        a, b, matrix, include_regularizer
            As in :meth:`cross_operator`; the regulariser is part of the blocks on the diagonal.

        Returns
        -------
        float
            0 without coupling, at most 1 for positive semi-definite matrices; NaN if a block
            on the diagonal is zero.

        Raises
        ------
        NonFiniteCurvatureError
            If an entry is NaN or infinite.
        ValueError
            If the parts overlap, or whole matrices do not fit ``max_bytes``.
        RuntimeError
            Outside of the ``with`` block.
        """
        operator = self.cross_operator(a, b, matrix, include_regularizer)
        own = [operator.a.own, operator.b.own]
        with self._entered().measuring():
            left, right = self.operators(own, matrix, include_regularizer)
            return coupling_ratio(operator, left, right, self.max_bytes)

    def _blocks(self, blocks: BlockChoice, layers: Sequence[str] | None) -> list[Block]:
        check_groups(blocks)
        return resolve_blocks(self.model, blocks, layers)

    def _dense(self, dense_up_to: int | None) -> int:
        return self.dense_up_to if dense_up_to is None else dense_up_to

    def _of_operators(
        self,
        function: Callable[[BlockOperator, Given | None], Result],
        blocks: Sequence[Block],
        matrix: MatrixChoice,
        include_regularizer: bool | None,
        given: Mapping[str, Given] | None,
    ) -> dict[str, Result]:
        """Apply a function to the operator of each block and what the caller gave for it, by label."""
        of_block = given or {}
        with self._entered().measuring():
            return {
                operator.block.label: function(operator, of_block.get(operator.block.label))
                for operator in self.operators(blocks, matrix, include_regularizer)
            }

    def _l2(self, matrix: MatrixChoice, include_regularizer: bool | None) -> float:
        """Check that a matrix can be had of this model, and return the weight of the regulariser in it."""
        known = get_args(MatrixKind)
        if not isinstance(matrix, FisherMC) and matrix not in known:
            raise ValueError(
                f"matrix must be one of {', '.join(map(repr, known))}, or FisherMC(...); got {matrix!r}"
            )
        if isinstance(matrix, FisherMC) or matrix in _AT_OUTPUTS:
            self.objective.check_rows(self.model)
        added = matrix in REGULARIZED if include_regularizer is None else include_regularizer
        return self.objective.l2 if added else 0.0

    def _entered(self) -> Matrices:
        if self._matrices is None:
            raise RuntimeError(
                "the graph lives inside the context only: write "
                "'with Curvature(model, objective) as curvature:' and ask inside"
            )
        return self._matrices
