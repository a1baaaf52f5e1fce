from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis.base.checks import real_number, require_values, whole_number


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


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_whole_number__takes_whole_numbers_of_any_library(value: object) -> None:
    assert whole_number("k", value) == 3
    assert type(whole_number("k", value)) is int
    assert real_number("k", value) == 3.0


@pytest.mark.parametrize("value", ["2", True, np.True_, 1j, [1], None])
def test_numbers__are_no_text_no_truth_values_and_not_complex(value: object) -> None:
    with pytest.raises(TypeError, match=r"expected a whole number as k, came .* of type"):
        whole_number("k", value)
    with pytest.raises(TypeError, match=r"expected a real number as width, came .* of type"):
        real_number("width", value)


def test_whole_number__refuses_fractions_and_real_number_takes_them() -> None:
    for value in (2.5, 2.0, np.float32(2.5)):
        with pytest.raises(TypeError, match="whole number as k"):
            whole_number("k", value)
        assert real_number("k", value) == float(value)
