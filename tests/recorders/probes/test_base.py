from __future__ import annotations

import numpy as np
import pytest
import torch

from hild_xr.recorders.probes.base import numpy_dtype, to_numpy


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
def test_numpy_dtype__is_that_of_the_copy(dtype: torch.dtype, stored: str) -> None:
    tensor = torch.ones(2, 3, dtype=dtype)
    assert numpy_dtype(tensor) == stored
    assert to_numpy(tensor).dtype == stored
