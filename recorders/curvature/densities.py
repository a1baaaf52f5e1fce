r"""Spectral density of a block by stochastic Lanczos quadrature.

The density :math:`\mu = \frac1p \sum_i \delta_{\lambda_i}` of a p x p matrix A is the mean of
:math:`\mu_z = \sum_i \langle u_i, z\rangle^2 \delta_{\lambda_i}` over unit vectors z drawn
uniformly from the sphere, and each :math:`\mu_z` has a quadrature from a few products with A
(Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; Chen, Trogdon and Ubaru 2021, arXiv
2105.06595). Eigenpairs that are known are taken exactly, and z is drawn from the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.deflation import Deflation
from hild_xr.recorders.curvature.estimate import check_finite, random_directions, row_chunks
from hild_xr.recorders.curvature.precision import check_precision, product_precision
from hild_xr.recorders.curvature.quadrature import lanczos_recurrence, quadrature, wasserstein

if TYPE_CHECKING:
    from collections.abc import Callable

    from hild_xr.recorders.curvature.blocks import Block
    from hild_xr.recorders.curvature.operators import BlockOperator
    from hild_xr.recorders.curvature.precision import Precision
    from hild_xr.recorders.curvature.spectrum import BlockSpectrum

# From 20 steps, 200 nodes have 0.6 to 0.8 of the Wasserstein error of 80; 400 have no less than 200.
_N_NODES = 200


@dataclass(frozen=True)
class DensityOptions:
    """What is asked of a density.

    Parameters
    ----------
    k_steps
        Lanczos steps for each probe, each a product.
    probes
        Random vectors for each sub-block.
    n_nodes
        Nodes of the rule of a probe, at least ``k_steps``; ``None`` for 200, or ``4 k_steps`` if
        that is more.
    seed
        Seed of the probes. Equal seeds give equal probes, so that two records differ by
        what changed and not by chance.
    precision
        ``"bfloat16"`` multiplies faster where the processor can
        (:func:`~hild_xr.recorders.curvature.precision.product_precision`).
    dense_up_to
        Blocks of at most this size are solved as whole matrices if all their
        eigenvalues fit the nodes.
    max_bytes
        Memory for the vectors of sub-blocks treated at once.

    Raises
    ------
    ValueError
        If a number is out of range or the precision is unknown.
    """

    k_steps: int = 50
    probes: int = 2
    n_nodes: int | None = None
    seed: int = 0
    precision: Precision = "full"
    dense_up_to: int = 128
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("k_steps", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.nodes_per_probe < self.k_steps:
            raise ValueError(
                f"n_nodes={self.n_nodes} cannot hold a rule of k_steps={self.k_steps}: "
                f"give {self.k_steps} or more, or None for the default"
            )
        check_precision(self.precision)

    @property
    def nodes_per_probe(self) -> int:
        """Nodes of the rule of a probe, known eigenvalues not included."""
        return max(_N_NODES, 4 * self.k_steps) if self.n_nodes is None else self.n_nodes


@dataclass(frozen=True)
class SpectralDensity:
    r"""Density of the eigenvalues of a block, as nodes and weights.

    Each probe has a rule of its own, :math:`\sum_j w_j f(\theta_j) \approx \frac1p \mathrm{tr}
    f(A)`; its weights are not negative and sum to 1. The mean over the probes is the estimate.
    All tensors are float64 on the CPU; ``batch`` is ``(rows,)`` for blocks of rows and empty
    otherwise.

    Parameters
    ----------
    block
        The block.
    nodes, weights
        Shape (*batch, probes, node). Known eigenvalues come first, each of weight 1/p; unused
        nodes have weight 0.
    n_known
        How many of the nodes are kept for known eigenvalues.
    n_matvec
        Shape (*batch,), int64: products spent.
    quadrature_error
        Shape (*batch,): Wasserstein-1 distance between the rule and that of three quarters of
        the steps. An estimate of the error that more steps would remove, not a bound.
    product_error
        Shape (*batch,): :math:`|\tilde A z - A z|` of products :math:`\tilde A` in low precision,
        root mean square over the probes; 0 in full precision. Its square estimates
        :math:`|\tilde A - A|_F^2 / p`, which bounds the squared Wasserstein-2 (so -1) distance
        of the densities of :math:`\tilde A` and A (Hoffman and Wielandt 1953).
    exact
        Whether the eigenvalues were computed, and no random vector took part.
    exact_trace
        Shape (*batch,): the trace where the matrix knows its own, or ``None``.

    Examples
    --------
    >>> from hild_xr.recorders.curvature import Block
    >>> nodes = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    >>> zero = torch.zeros((), dtype=torch.float64)
    >>> block = Block("w", "layer", ("w",), ((3,),))
    >>> weights = torch.full_like(nodes, 1 / 3)
    >>> density = SpectralDensity(block, nodes, weights, 0, zero.long(), zero, zero, True)
    >>> value, error = density.expectation(torch.square)
    >>> value.round(decimals=3), error
    (tensor(4.6670, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    block: Block
    nodes: Tensor
    weights: Tensor
    n_known: int
    n_matvec: Tensor
    quadrature_error: Tensor
    product_error: Tensor
    exact: bool
    exact_trace: Tensor | None = None

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\frac1p \mathrm{tr} f(A)` and its standard error.

        For z uniform on the sphere of the m dimensions that are left, the variance of
        :math:`z^Tf(A)z` is :math:`\frac{2}{m + 2}` times the variance of f under the density, and
        this is taken from the rule itself. So one probe has a standard error too. The errors of
        quadrature and rounding are not in it.

        Parameters
        ----------
        function
            Maps nodes (..., node) to values of shape (..., node), or (..., node, q) for q
            functions at once.

        Returns
        -------
        value, standard_error
            Each of shape (*batch,) or (*batch, q).
        """
        values = function(self.nodes)
        # (..., probes, node, q)
        several = values.ndim > self.nodes.ndim
        values = values if several else values[..., None]
        weights = self.weights[..., None]
        value = (weights * values).sum(-2).mean(-2)
        error = self._standard_error(weights[..., self.n_known :, :], values[..., self.n_known :, :])
        return (value, error) if several else (value[..., 0], error[..., 0])

    def moment(self, order: int) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\frac1p \mathrm{tr} A^{order}` and its standard error, each of shape (*batch,)."""
        return self.expectation(lambda nodes: nodes**order)

    def trace(self) -> tuple[Tensor, Tensor]:
        """Return the trace and its standard error, each of shape (*batch,); exact where it is known."""
        if self.exact_trace is not None:
            return self.exact_trace, torch.zeros_like(self.exact_trace)
        value, error = self.moment(1)
        return self.block.size * value, self.block.size * error

    def cdf(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fraction of eigenvalues up to each point and its standard error.

        Parameters
        ----------
        points
            Shape (q,), float64.

        Returns
        -------
        fraction, standard_error
            Each of shape (*batch, q).
        """
        return self.expectation(lambda nodes: (nodes[..., None] <= points).double())

    def density(self, points: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Return the density smoothed by a Gaussian, and its standard error.

        Parameters
        ----------
        points
            Shape (q,), float64.
        width
            Standard deviation of the Gaussian, in the units of the eigenvalues.

        Returns
        -------
        density, standard_error
            Each of shape (*batch, q).

        Raises
        ------
        ValueError
            If the width is not positive.
        """
        if not width > 0:
            raise ValueError(f"width, the standard deviation of the Gaussian, must be positive; got {width}")
        norm = width * math.sqrt(2 * math.pi)
        return self.expectation(
            lambda nodes: torch.exp(-0.5 * ((nodes[..., None] - points) / width) ** 2) / norm
        )

    def sampling_error(self) -> Tensor:
        r"""Return the expected Wasserstein-1 error from the random choice of probes, shape (*batch,).

        :math:`\sqrt{2/\pi} \int \sigma(x) dx` for the standard error :math:`\sigma` of the
        distribution function at x. The error of the quadrature is not in it.
        """
        rest = self.weights.clone()
        rest[..., : self.n_known] = 0
        nodes, order = self.nodes.flatten(-2).sort(-1)
        cumulated = rest.flatten(-2).gather(-1, order).cumsum(-1) / rest.shape[-2]
        mass = cumulated[..., -1:]
        variance = self._variance_factor(mass) * (cumulated * (mass - cumulated)).clamp(min=0)
        error = math.sqrt(2 / math.pi) * (variance.sqrt()[..., :-1] * nodes.diff(dim=-1)).sum(-1)
        return torch.zeros_like(error) if self.exact else error

    def _standard_error(self, weights: Tensor, values: Tensor) -> Tensor:
        mass = weights.sum(-2, keepdim=True).mean(-3, keepdim=True)
        mean = (weights * values).sum(-2, keepdim=True).mean(-3, keepdim=True) / mass
        variance = mass * (weights * (values - mean).square()).sum(-2, keepdim=True).mean(-3, keepdim=True)
        error = (self._variance_factor(mass) * variance).sqrt()[..., 0, 0, :]
        return torch.zeros_like(error) if self.exact else error

    def _variance_factor(self, mass: Tensor) -> Tensor:
        """2 / (m + 2) by the number of probes; m dimensions of weight 1/p each make up the mass."""
        return 2 / (mass * self.block.size + 2) / self.nodes.shape[-2]


def spectral_density(
    operator: BlockOperator, options: DensityOptions, known: BlockSpectrum | None = None
) -> SpectralDensity:
    """Estimate the spectral density of each sub-block of a block.

    Parameters
    ----------
    operator
        The block's matrix.
    options
        What is asked for.
    known
        Eigenpairs of the same matrix, such as its outliers: they stand in the result as they are,
        and the probes are drawn from the complement.

    Returns
    -------
    SpectralDensity
        Exact where all eigenvalues fit the nodes and cost no more products than the probes would.

    Raises
    ------
    NonFiniteCurvatureError
        If a product or an entry is NaN or infinite.
    ValueError
        If ``known`` belongs to another block.
    """
    deflation = Deflation(operator, known)
    cheap = max(options.dense_up_to, options.probes * options.k_steps)
    if operator.size <= min(cheap, options.nodes_per_probe):
        return _exact(operator, options, deflation.taken.shape[1])
    generator = torch.Generator().manual_seed(options.seed)
    bytes_each = 5 * options.probes * operator.size * torch.finfo(operator.dtype).bits // 8
    parts = [
        _probed(operator, options, deflation, generator, rows)
        for rows in row_chunks(operator, bytes_each, options.max_bytes)
    ]
    nodes, weights, n_matvec, quadrature_error, product_error = map(torch.cat, zip(*parts, strict=True))
    return _labelled(
        operator, nodes, weights, deflation.taken.shape[1], n_matvec, quadrature_error, product_error, False
    )


def _probed(
    operator: BlockOperator,
    options: DensityOptions,
    deflation: Deflation,
    generator: torch.Generator,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return nodes, weights, products, quadrature and product errors of some sub-blocks."""
    owners, name = rows.repeat_interleave(options.probes), operator.block.label
    starts = deflation.project(random_directions(generator, (len(owners), operator.size), operator), owners)
    starts = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)
    first: list[Tensor] = []

    def multiply(vectors: Tensor, problems: Tensor) -> Tensor:
        product = deflation.project(operator.product(vectors, owners[problems]), owners[problems])
        if not first:
            first.append(product)
        return product

    with product_precision(options.precision):
        recurrence = lanczos_recurrence(multiply, starts, options.k_steps, name)
    n_matvec, shape = recurrence.length, (len(rows), options.probes)
    squared = torch.zeros(len(owners), dtype=torch.float64)
    if options.precision != "full":
        exact = deflation.project(operator.product(starts, owners), owners)
        squared = (first[0] - exact).double().square().sum(1).cpu()
        n_matvec = n_matvec + 1
    nodes, weights = quadrature(recurrence, options.nodes_per_probe)
    coarse = quadrature(recurrence, options.nodes_per_probe, max(1, 3 * options.k_steps // 4))
    taken = deflation.taken[rows.cpu()]
    mass = (1 - taken.sum(1, keepdim=True) / operator.size)[:, None]
    nodes, weights = nodes.reshape(*shape, -1), mass * weights.reshape(*shape, -1)
    known = torch.where(taken, deflation.values[rows.cpu()], nodes[:, 0, :1])
    before = (*shape, taken.shape[1])
    return (
        torch.cat([known[:, None].expand(before), nodes], -1),
        torch.cat([(taken / operator.size)[:, None].expand(before), weights], -1),
        n_matvec.reshape(shape).sum(1),
        wasserstein(nodes, weights, coarse[0].reshape(*shape, -1), mass * coarse[1].reshape(*shape, -1)).mean(
            1
        ),
        squared.reshape(shape).mean(1).sqrt(),
    )


def _exact(operator: BlockOperator, options: DensityOptions, n_known: int) -> SpectralDensity:
    """Return all eigenvalues, each of weight 1/p, the same for every probe."""
    eigenvalues = []
    for rows in row_chunks(operator, 40 * operator.size**2, options.max_bytes):
        matrix = operator.matrix(rows)
        check_finite(operator, matrix, "an entry of the matrix")
        exact = matrix.to("cpu", torch.float64)
        eigenvalues.append(torch.linalg.eigvalsh((exact + exact.mT) / 2))
    values = torch.cat(eigenvalues)
    unused = n_known + options.nodes_per_probe - operator.size
    nodes = torch.cat([values, values[:, -1:].expand(-1, unused)], 1)
    weights = torch.zeros_like(nodes)
    weights[:, : operator.size] = 1 / operator.size
    shape = (operator.count, options.probes, nodes.shape[1])
    none = torch.zeros(operator.count, dtype=torch.float64)
    return _labelled(
        operator,
        nodes[:, None].expand(shape).contiguous(),
        weights[:, None].expand(shape).contiguous(),
        0,
        none.long(),
        none,
        none,
        True,
    )


def _labelled(
    operator: BlockOperator,
    nodes: Tensor,
    weights: Tensor,
    n_known: int,
    n_matvec: Tensor,
    quadrature_error: Tensor,
    product_error: Tensor,
    exact: bool,
) -> SpectralDensity:
    batch = operator.block.batch_shape
    trace = operator.trace()
    if trace is not None:
        check_finite(operator, trace, "the trace")
        trace = trace.to("cpu", torch.float64).reshape(batch)
    return SpectralDensity(
        operator.block,
        nodes.reshape(*batch, *nodes.shape[1:]),
        weights.reshape(*batch, *weights.shape[1:]),
        n_known,
        n_matvec.reshape(batch),
        quadrature_error.reshape(batch),
        product_error.reshape(batch),
        exact,
        trace,
    )
