from __future__ import annotations

import numpy as np
import pytest

from hild_xr.analysis.base.stacking import flatten_last


@pytest.mark.parametrize(("n_axes", "shape"), [(1, (4, 2, 3)), (2, (4, 6)), (3, (24,))])
def test_flatten_last__makes_one_axis_in_c_order(n_axes: int, shape: tuple[int, ...]) -> None:
    array = np.arange(24).reshape(4, 2, 3)
    np.testing.assert_array_equal(flatten_last(array, n_axes), np.arange(24).reshape(shape))


def test_flatten_last__knows_the_shape_of_no_records() -> None:
    assert flatten_last(np.ones((0, 2, 3)), 2).shape == (0, 6)
