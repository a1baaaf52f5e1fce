from __future__ import annotations

import numpy as np
import pytest

from hild_xr.analysis.spectra.recorded import n_recorded

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("values", "n", "usable"),
    [
        ([1.0, 2.0], 2, True),
        ([1.0, NAN], 1, True),
        ([0.0, NAN], 1, True),
        ([NAN, 1.0], 1, False),
        ([1.0, NAN, 1.0, NAN], 2, False),
        ([NAN, NAN], 0, False),
        ([1.0, INF], 1, True),
        ([-INF, 1.0], 1, False),
        ([5.0], 1, True),
    ],
)
def test_n_recorded__nan_at_the_end_means_no_more_values(values: list[float], n: int, usable: bool) -> None:
    found = n_recorded(np.array(values))
    assert (int(found[0]), bool(found[1])) == (n, usable)
