"""How float32 matrices are multiplied: as fast as is exact, or rounded to bfloat16 where that is allowed.

Torch has two libraries for it on a CPU, MKL and oneDNN, and takes MKL unless rounding to bfloat16 is
allowed. MKL leaves half of the speed of other makers' processors unused. oneDNN rounds only where the
processor multiplies in bfloat16 faster (AMX), so whether it may take over is a matter of measuring. There
a search may go by tensors of bfloat16, which no other thread has to do with, if its results are made exact.
"""

from __future__ import annotations

import functools
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

Precision = Literal["full", "bfloat16"]
"""Precision of the matrix products inside a curvature product."""

MatrixProducts = Literal["fastest", "full", "default"]
"""How a CPU multiplies float32 matrices.

``"full"`` is the faster way of equal precision, ``"default"`` torch's own. ``"fastest"`` is ``"full"``, and
lets searches whose results are multiplied anew round their factors to bfloat16.
"""

_CHOICE: ContextVar[MatrixProducts] = ContextVar("matrix_products", default="default")

_FULL = "none", "ieee"  # settings without rounding: nobody's, and set_float32_matmul_precision("highest")

_AS_EXACT = 4.0
"""Rounding errors, in those of the default, up to which products count as float32."""

_FASTER = 0.75
"""Part of the default's time at most that makes another library worth taking.

On other makers' processors it is 0.6, else 1: far from both, so that a noisy machine decides as ever.
"""


_MUCH_FASTER = 0.25
"""Part of the time of float32 at most that makes bfloat16 worth its errors: 0.1 to 0.2 with AMX, else 0.5."""


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
    _check_one_of("precision", precision, get_args(Precision))


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
    _check_one_of("matrix_products", choice, get_args(MatrixProducts))


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


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
    gets other rounding errors, of the same size. Nor may it ask for torch's precision then, as the
    user's own code may not; so none of that runs inside. Where the user has set the precision of
    products, theirs stays.
    """
    if _CHOICE.get() == "default" or not other_library_is_better():
        yield
        return
    with _SETTING.held("fast"):
        yield


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
    with _SETTING.held("rounded"):
        yield


class _Setting:
    """Torch's settings of products, which all threads of a process share.

    Who comes first notes what the user had set, and who leaves last puts it back: two threads that each put
    back what they found would leave one's setting behind.
    """

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), {"fast": 0, "rounded": 0}
        self._on_cpu, self._full = "none", True
        self._general = "highest"

    @contextmanager
    def held(self, mode: Literal["fast", "rounded"]) -> Iterator[None]:
        """Hold a mode; while one thread wants products rounded, they are."""
        with self._lock:
            self._enter(mode)
        try:
            yield
        finally:
            with self._lock:
                self._leave(mode)

    def _enter(self, mode: str) -> None:
        if not any(self._holders.values()):
            self._on_cpu, self._full = _cpu_setting()
        if mode == "rounded" and not self._holders["rounded"]:
            _set_on_cpu(self._on_cpu)  # torch tells no precision while its two ways to set one disagree
            self._general = torch.get_float32_matmul_precision()
        self._holders[mode] += 1
        self._apply()

    def _leave(self, mode: str) -> None:
        self._holders[mode] -= 1
        if mode == "rounded" and not self._holders["rounded"]:
            torch.set_float32_matmul_precision(self._general)
        self._apply()

    def _apply(self) -> None:
        if self._holders["rounded"]:
            torch.set_float32_matmul_precision("medium")
        elif self._holders["fast"] and self._full:
            _set_on_cpu("bf16")
        else:
            _set_on_cpu(self._on_cpu)


_SETTING = _Setting()


def _cpu_setting() -> tuple[str, bool]:
    """Return what torch's switch is set to, and whether products are not rounded then."""
    switch = _switch()
    if switch is None:
        return "none", True
    setting: str = switch.fp32_precision
    follows = setting == getattr(torch.backends.mkldnn, "fp32_precision", None)
    return "none" if follows else setting, setting in _FULL


def _set_on_cpu(setting: str) -> None:
    switch = _switch()
    if switch is not None:
        switch.fp32_precision = setting


def other_library_is_better() -> bool:
    """Whether ``"fastest"`` and ``"default"`` differ on this machine."""
    return _switch() is not None and _other_library_is_better(torch.get_num_threads())


def may_round(device: torch.device) -> bool:
    """Whether matrices may be rounded to bfloat16 for a search, and are multiplied much faster then."""
    chosen = _CHOICE.get() == "fastest" and device.type == "cpu"
    return chosen and _rounding_is_faster(torch.get_num_threads())


@functools.cache
def _rounding_is_faster(threads: int) -> bool:  # noqa: ARG001 (measured for each number)
    """Whether products of bfloat16 matrices take a small part of the time, as with AMX."""
    # small ones first: a processor that knows no bfloat16 takes a tenth of a second for the others
    return _part_of_time(64) < 1.0 and _part_of_time(1024) < _MUCH_FASTER


def _part_of_time(rows: int) -> float:
    """Return the time of a product in bfloat16, in that of one in float32 as it is chosen."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 512, generator=generator), torch.randn(512, 256, generator=generator)
    low, beside = a.bfloat16(), b.bfloat16()
    seconds = []
    for _ in range(9):
        rounded = _seconds(lambda: low @ beside)
        with chosen_products():
            seconds.append((rounded, _seconds(lambda: a @ b)))
    return min(s for s, _ in seconds) / min(s for _, s in seconds)


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
