from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import dask
import numpy as np
import pytest
import xarray as xr
from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

from hild_xr.analysis.base.arguments import apply_kernel
from hild_xr.analysis.base.threads import _set_threads, on_one_blas_thread, one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def _two_blas_threads() -> Iterator[None]:
    """Set two threads for all, as they are where no variable says otherwise, and hold no limit."""
    np.linalg.svd(np.eye(2))
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    before = [library.num_threads for library in libraries]
    for library in libraries:
        _set_threads(library, 2)
    yield
    for library, n in zip(libraries, before, strict=True):
        _set_threads(library, n)


def threads_seen(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A kernel that returns the number of BLAS threads in place of a number."""
    return np.full(values.shape[:-1], max(blas_threads()), dtype=np.float64)


VALUES = xr.DataArray(np.ones((6, 3)), dims=("step", "in"))


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_apply_kernel__runs_dask_tasks_on_one_blas_thread(scheduler: str) -> None:
    lazy = apply_kernel(threads_seen, [VALUES.chunk(step=1)], [["in"]])
    with dask.config.set(scheduler=scheduler, num_workers=3):
        assert lazy.values.tolist() == [1.0] * 6
    assert blas_threads() == {2}


def test_apply_kernel__leaves_arrays_in_memory_all_threads() -> None:
    assert apply_kernel(threads_seen, [VALUES], [["in"]]).values.tolist() == [2.0] * 6


def test_one_blas_thread__is_restored_by_the_last_to_leave() -> None:
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen: dict[str, set[int]] = {}

    def first() -> None:
        with one_blas_thread():
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second() -> None:
        assert first_is_in.wait(10)
        with one_blas_thread():
            second_is_in.set()
            assert first_is_out.wait(10)
            seen["after the first has left"] = blas_threads()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"after the first has left": {1}}
    assert blas_threads() == {2}


def test_one_blas_thread__is_restored_after_an_error() -> None:
    with pytest.raises(np.linalg.LinAlgError), one_blas_thread():
        np.linalg.inv(np.zeros((2, 2)))
    assert blas_threads() == {2}


def test_one_blas_thread__nests() -> None:
    with one_blas_thread():
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {2}


def test_one_blas_thread__leaves_a_limit_that_the_caller_holds() -> None:
    with threadpool_limits(2, user_api="blas"):
        lazy = apply_kernel(threads_seen, [VALUES.chunk(step=1)], [["in"]])
        with dask.config.set(scheduler="synchronous"):
            lazy.compute()
        assert blas_threads() == {2}
    assert blas_threads() == {2}


def test_one_blas_thread__holds_libraries_that_are_loaded_meanwhile() -> None:
    """SciPy brings a BLAS of its own, which the first kernel that needs it loads."""
    code = """
import threading
from threadpoolctl import threadpool_info
from hild_xr.analysis.base.threads import one_blas_thread

def blas():
    return sorted(i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas")

with one_blas_thread():
    before = blas()
    import scipy.linalg
    if len(blas()) > len(before):  # where NumPy and SciPy share one there is nothing to see
        with one_blas_thread():
            assert set(blas()) == {1}, blas()
assert set(blas()) == {2}, blas()
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_on_one_blas_thread__pickles_with_its_kernel() -> None:
    kernel = pickle.loads(pickle.dumps(on_one_blas_thread(threads_seen)))
    assert kernel(np.ones((2, 3))).tolist() == [1.0, 1.0]
