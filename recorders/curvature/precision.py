"""How float32 matrices are multiplied: as fast as is exact, or rounded to bfloat16 where that is asked for.

Torch has two libraries for it on a CPU, MKL and oneDNN, and takes MKL unless rounding to bfloat16 is
allowed. MKL leaves half of the speed of other makers' processors unused. oneDNN rounds only where the
processor multiplies in bfloat16 faster (AMX), so whether it may take over is a matter of measuring.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

Precision = Literal["full", "bfloat16"]
"""Precision of the matrix products inside a curvature product."""

MatrixProducts = Literal["fastest", "default"]
"""How a CPU multiplies float32 matrices: the faster way of equal precision, or torch's default."""

_CHOICE: ContextVar[MatrixProducts] = ContextVar("matrix_products", default="default")

_FULL = "none", "ieee"  # settings without rounding: nobody's, and set_float32_matmul_precision("highest")

_AS_EXACT = 4.0
"""Rounding errors, in those of the default, up to which products count as float32."""

_FASTER = 0.75
"""Part of the default's time at most that makes another library worth taking.

On other makers' processors it is 0.6, else 1: far from both, so that a noisy machine decides as ever.
"""


def check_precision(precision: str) -> None:
    """Check the name of a precision.

    Raises
    ------
    ValueError
        If it is unknown.

    Examples
    --------
    >>> check_precision("full")
    """
    if precision not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"precision must be one of {known}; got {precision!r}")


def check_matrix_products(choice: str) -> None:
    """Check the name of a choice of matrix products.

    Raises
    ------
    ValueError
        If it is unknown.

    Examples
    --------
    >>> check_matrix_products("fastest")
    """
    if choice not in get_args(MatrixProducts):
        known = ", ".join(map(repr, get_args(MatrixProducts)))
        raise ValueError(f"matrix_products must be one of {known}; got {choice!r}")


@contextmanager
def matrix_products(choice: MatrixProducts) -> Iterator[None]:
    """Choose how :func:`chosen_products` are taken, in this thread.

    Examples
    --------
    >>> with matrix_products("fastest"), chosen_products():
    ...     product = torch.eye(2) @ torch.eye(2)
    """
    token = _CHOICE.set(choice)
    try:
        yield
    finally:
        _CHOICE.reset(token)


@contextmanager
def chosen_products() -> Iterator[None]:
    """Multiply float32 matrices on the CPU as :func:`matrix_products` says; a decorator too.

    ``"fastest"`` is by the library that is faster at the same precision, for products of two
    matrices: with a vector it is three times as slow. It is measured once in a process (some
    hundredths of a second) and holds for the process, so another thread that multiplies meanwhile
    gets other rounding errors, of the same size. Where the user has set torch's precision of
    products, theirs stays.
    """
    switch = _switch()
    before = None if switch is None else switch.fp32_precision
    if _CHOICE.get() == "default" or before not in _FULL or not other_library_is_better():
        yield
        return
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def product_precision(precision: Precision) -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16 inside; sums stay float32.

    The setting is torch's own ``set_float32_matmul_precision("medium")``, which acts on the graph
    that is there already. On a CPU with AMX a Hessian product of a 784-256-256-10 net took 0.48
    times as long with a relative error of 2e-3; a copy of the network in bfloat16 took 0.44 times
    as long with 1e-2, and autocast does not reach a retained graph. Where the processor has no
    such products the setting changes nothing, and a GPU takes TF32 instead. It holds for the
    process, so another thread that multiplies meanwhile is rounded too; it is put back on leaving.

    Examples
    --------
    >>> with product_precision("bfloat16"):
    ...     torch.get_float32_matmul_precision()
    'medium'
    """
    if precision == "full":
        yield
        return
    switch = _switch()
    chosen = None if switch is None else switch.fp32_precision
    if switch is not None and chosen == "bf16":
        switch.fp32_precision = "none"  # torch tells no precision while its two ways to set one disagree
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if switch is not None:
            switch.fp32_precision = chosen


def other_library_is_better() -> bool:
    """Whether ``"fastest"`` and ``"default"`` differ on this machine."""
    return _switch() is not None and _other_library_is_better(torch.get_num_threads())


def _switch() -> Any:
    """Return torch's switch for products on a CPU alone; ``None`` before torch 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@functools.cache
def _other_library_is_better(threads: int) -> bool:  # noqa: ARG001 (measured for each number)
    """Whether oneDNN multiplies as exactly as the default, and faster."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1024, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = a.double() @ b.double()

    def error(product: Tensor) -> float:
        return float((product - exact).norm())

    def other() -> Tensor:
        switch = _switch()
        before, switch.fp32_precision = switch.fp32_precision, "bf16"
        try:
            return a @ b
        finally:
            switch.fp32_precision = before

    def default() -> Tensor:
        return a @ b

    if error(other()) > _AS_EXACT * error(default()):
        return False
    seconds = [(_seconds(other), _seconds(default)) for _ in range(9)]
    return min(s for s, _ in seconds) < _FASTER * min(s for _, s in seconds)


def _seconds(function: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
