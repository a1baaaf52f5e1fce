from __future__ import annotations

import numpy as np
import pytest
import torch

from hild_xr.recorders.host_copy import HostCopier, numpy_dtype, to_numpy

LARGE = 65_536


def test_to_numpy__is_a_copy_that_training_cannot_change() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    recorded = to_numpy(weight)
    with torch.no_grad():
        weight.add_(1.0)
    np.testing.assert_array_equal(recorded, np.zeros(3))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, "float32"),
        (torch.float16, "float16"),
        (torch.float64, "float64"),
        (torch.bool, "bool"),
    ],
)
@pytest.mark.parametrize("size", [2, LARGE])
def test_copy__has_the_dtype_that_was_planned(dtype: torch.dtype, stored: str, size: int) -> None:
    tensor = torch.ones(size, 3, dtype=dtype)
    assert numpy_dtype(tensor) == stored
    copied = HostCopier().take({"": {"weight": tensor}}).wait()[""]["weight"]
    assert (copied.dtype, copied.shape) == (np.dtype(stored), (size, 3))
    assert (copied == 1).all()


@pytest.mark.parametrize("size", [4, LARGE])
def test_take__holds_the_state_of_its_moment(size: int) -> None:
    copier = HostCopier()
    live, view = torch.nn.Parameter(torch.zeros(size)), np.zeros(4)
    copy = copier.take({"a": {"weight": live}, "b": {"array": view, "number": 2.5}})
    with torch.no_grad():
        live.add_(1.0)
    view += 1
    values = copy.wait()
    assert (values["a"]["weight"] == 0).all()
    assert (values["b"]["array"] == 0).all()
    assert values["b"]["number"] == 2.5
    assert copy.nbytes == size * 4 + 4 * 8 + 8


def test_memory__is_used_again_only_after_release() -> None:
    copier = HostCopier()
    first = copier.take({"": {"weight": torch.full((LARGE,), 1.0)}})
    second = copier.take({"": {"weight": torch.full((LARGE,), 2.0)}})
    assert (first.wait()[""]["weight"] == 1).all()
    kept = first.wait()[""]["weight"]
    first.release()
    third = copier.take({"": {"weight": torch.full((LARGE // 2, 2), 3.0)}})
    assert np.shares_memory(third.wait()[""]["weight"], kept)
    assert third.wait()[""]["weight"].shape == (LARGE // 2, 2)
    assert (second.wait()[""]["weight"] == 2).all()


def test_idle_memory__goes_when_another_size_is_needed() -> None:
    copier = HostCopier()
    for size in range(LARGE, LARGE + 5):
        copier.take({"": {"weight": torch.zeros(size)}}).release()
    assert sum(len(idle) for idle in copier._pool.values()) == 1
    copier.clear()
    assert not copier._pool


def test_memory_taken_in_inference_mode__serves_outside_of_it() -> None:
    copier = HostCopier()
    with torch.inference_mode():
        copier.take({"": {"weight": torch.zeros(LARGE)}}).release()
    assert (copier.take({"": {"weight": torch.ones(LARGE)}}).wait()[""]["weight"] == 1).all()


def test_take__of_strided_and_transposed_tensors() -> None:
    tensor = torch.arange(4.0 * LARGE).reshape(LARGE, 4)[:, ::2].T
    copied = HostCopier().take({"": {"weight": tensor}}).wait()[""]["weight"]
    np.testing.assert_array_equal(copied, tensor.numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_take__from_a_gpu_is_ordered_before_the_next_update(dtype: torch.dtype) -> None:
    copier = HostCopier()
    weight = torch.zeros(4096, 4096, device="cuda", dtype=dtype)
    copies = []
    for _ in range(20):
        copies.append(copier.take({"": {"weight": weight}}))
        weight.add_(1)  # queued at once; must run after the copy
    for i, copy in enumerate(copies):
        assert (copy.wait()[""]["weight"] == i).all()
        copy.release()
