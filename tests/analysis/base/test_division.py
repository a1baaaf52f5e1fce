from __future__ import annotations

import numpy as np

from hild_xr.analysis.base.division import divide_or_nan


def test_divide_or_nan__divides_where_defined_and_is_silent_elsewhere() -> None:
    found = divide_or_nan([1.0, 1.0, np.nan], [4.0, 0.0, 1.0], np.array([True, False, True]))
    np.testing.assert_array_equal(found, [0.25, np.nan, np.nan])


def test_divide_or_nan__broadcasts_and_computes_in_float64() -> None:
    found = divide_or_nan(np.ones((2, 1), dtype=np.float32), np.array([2, 4]), True)
    assert found.dtype == np.float64
    assert found.tolist() == [[0.5, 0.25], [0.5, 0.25]]
