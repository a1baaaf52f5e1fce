"""A number with its standard error, and random vectors to estimate it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hild_xr.recorders.curvature.blocks import Block
    from hild_xr.recorders.curvature.operators import BlockOperator


@dataclass(frozen=True)
class Estimate:
    """A quantity of a block, exact or estimated from random vectors; tensors on the CPU.

    Parameters
    ----------
    block
        The block.
    value
        Shape (*batch, ...), float64.
    standard_error
        Of the value's shape: 0 where it is exact, NaN where a single sample tells none.
    n_matvec
        Shape (*batch,), int64: products spent; 0 where none was needed.
    """

    block: Block
    value: Tensor
    standard_error: Tensor
    n_matvec: Tensor

    @property
    def exact(self) -> bool:
        """Whether no random vector took part."""
        return bool((self.standard_error == 0).all())


def exact_estimate(operator: BlockOperator, value: Tensor, n_matvec: int = 0) -> Estimate:
    """Wrap a value (count, ...) that is exact up to rounding."""
    check_finite(operator, value)
    shaped = value.to("cpu", torch.float64).reshape((*operator.block.batch_shape, *value.shape[1:]))
    spent = torch.full(operator.block.batch_shape, n_matvec, dtype=torch.int64)
    return Estimate(operator.block, shaped, torch.zeros_like(shaped), spent)


def mean_of_samples(operator: BlockOperator, samples: Tensor, n_matvec: int) -> Estimate:
    """Average samples (n, count, ...); the standard error is that of their mean."""
    batch, n = operator.block.batch_shape, len(samples)
    spread = torch.full_like(samples[0], torch.nan) if n == 1 else samples.std(0) / n**0.5
    value = samples.mean(0)
    spent = torch.full(batch, n_matvec, dtype=torch.int64)
    shape = (*batch, *value.shape[1:])
    return Estimate(operator.block, value.reshape(shape), spread.reshape(shape), spent)


def check_finite(operator: BlockOperator, values: Tensor, what: str = "a product") -> None:
    """Raise for NaN or infinity, with the block's name.

    Raises
    ------
    NonFiniteCurvatureError
        If a value is not finite.
    """
    if not bool(values.isfinite().all()):
        raise NonFiniteCurvatureError(operator.block.label, what)


def all_rows(operator: BlockOperator) -> Tensor:
    """Return the indices of all sub-blocks."""
    return torch.arange(operator.count, device=operator.device)


def row_chunks(operator: BlockOperator, bytes_each: int, max_bytes: int) -> Iterator[Tensor]:
    """Yield the indices of the sub-blocks, as many at a time as fit the memory."""
    size = max(1, max_bytes // max(1, bytes_each))
    return iter(all_rows(operator).split(size))


def random_signs(generator: torch.Generator, shape: tuple[int, ...], operator: BlockOperator) -> Tensor:
    """Return independent signs (Rademacher vectors), drawn on the CPU for equality on all devices."""
    signs = 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1
    return signs.to(operator.device, operator.dtype)


def random_directions(generator: torch.Generator, shape: tuple[int, ...], operator: BlockOperator) -> Tensor:
    """Return Gaussian vectors, drawn on the CPU for equality on all devices; not normalised."""
    return torch.randn(shape, generator=generator, dtype=operator.dtype).to(operator.device)
