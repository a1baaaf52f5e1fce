"""One BLAS thread in each dask task (kernel).

Dask runs as many tasks at once as there are cores, and BLAS starts as many threads again
in each of them. They wait for each other at every small matrix: on two cores shared with
other work the singular values of 40 matrices of 256 x 200 took 15.7 s in chunks of 4, and
0.3 s with one thread a task. :func:`hild_xr.analysis.base.arguments.apply_kernel` therefore
runs kernels of dask-backed arrays on one BLAS thread each. Arrays in memory use all
threads, as NumPy does.

The number of threads is mostly a property of the process, and tasks overlap: a task that
set it back on leaving would set it back for the others. It is lowered by the first task
that comes and restored by the last one that leaves, whichever threads these are. Where the
caller holds a limit of its own around the computation, ``with threadpool_limits(...)`` of
threadpoolctl, the limit of the caller holds.
"""

from __future__ import annotations

import functools
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Key = tuple[str, int | None]
"""A library by its path; where the number of threads belongs to the calling thread, with that."""


@dataclass
class _Held:
    """A library held at one thread."""

    library: Any
    before: int
    inside: int = 0


class _Pin:
    """Holds the BLAS libraries of this process at one thread while somebody is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: list[Any] = []
        self._modules = 0
        self._held: dict[Key, _Held] = {}

    def enter(self) -> list[Key]:
        with self._lock:
            self._look_for_libraries()
            keys = [_key(library) for library in self._libraries]
            for key, library in zip(keys, self._libraries, strict=True):
                if key not in self._held:
                    self._held[key] = _Held(library, library.num_threads)
                    _set_threads(library, 1)
                self._held[key].inside += 1
            return keys

    def leave(self, keys: list[Key]) -> None:
        with self._lock:
            for key in keys:
                self._held[key].inside -= 1
                if self._held[key].inside == 0:
                    held = self._held.pop(key)
                    _set_threads(held.library, held.before)

    def _look_for_libraries(self) -> None:
        """Look again if a module was imported since: SciPy and torch bring a BLAS of their own.

        A look takes milliseconds, setting the number of threads microseconds.
        """
        if len(sys.modules) == self._modules:
            return
        from threadpoolctl import ThreadpoolController

        self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        self._modules = len(sys.modules)


def _key(library: Any) -> Key:
    # OpenBLAS on OpenMP asks OpenMP, which counts for each calling thread; all others have one number
    of_the_thread = getattr(library, "threading_layer", None) == "openmp"
    return library.filepath, threading.get_ident() if of_the_thread else None


def _set_threads(library: Any, n: int) -> None:
    library.set_num_threads(n)
    # Newer versions of threadpoolctl let one thread set OpenBLAS and silently ignore all others until it
    # gives the right back; the last task to leave may run on another thread than the first that came.
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread()


_PIN = _Pin()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS at one thread in this process, together with all others who do so.

    Examples
    --------
    >>> from threadpoolctl import threadpool_info
    >>> with one_blas_thread():
    ...     {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    {1}
    """
    keys = _PIN.enter()
    try:
        yield
    finally:
        _PIN.leave(keys)


def on_one_blas_thread(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let a kernel run on one BLAS thread; the result pickles if the kernel does.

    Examples
    --------
    >>> import numpy as np
    >>> float(on_one_blas_thread(np.linalg.norm)([3.0, 4.0]))
    5.0
    """
    return functools.partial(_call_on_one_blas_thread, kernel)


def _call_on_one_blas_thread(kernel: Callable[..., Any], *arrays: Any) -> Any:
    with one_blas_thread():
        return kernel(*arrays)
