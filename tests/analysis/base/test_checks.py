from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis.base.checks import require_values


def test_require_values__returns_what_has_values() -> None:
    array = xr.DataArray(np.ones((2, 3)), dims=("out", "in"))
    assert require_values("weight", array, ["in", "out"], "dims") is array


def test_require_values__names_what_is_wrong() -> None:
    array = xr.DataArray(np.ones((2, 0)), dims=("out", "in"))
    with pytest.raises(ValueError, match=r"of weight along \['in'\]"):
        require_values("weight", array, ["in"], "dims")
    with pytest.raises(ValueError, match=r"missing \['kh'\]: pass row_dims"):
        require_values("weight", array, ["kh"], "row_dims")
    with pytest.raises(TypeError, match="real numbers in weight"):
        require_values("weight", array * 1j, ["out"], "dims")
