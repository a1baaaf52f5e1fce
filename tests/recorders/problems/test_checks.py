from __future__ import annotations

import numpy as np
import pytest

from hild_xr.recorders.problems.checks import check_choice, check_integer, check_number


@pytest.mark.parametrize("value", [3, np.int64(3)])
def test_check_integer__accepts_both_ends_and_numpy_integers(value: int) -> None:
    check_integer("k", value, minimum=3)
    check_integer("k", value, minimum=1, maximum=3)


@pytest.mark.parametrize("value", [2, 5])
def test_check_integer__refuses_a_value_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match=f"k must be an integer from 3 to 4, got {value}"):
        check_integer("k", value, minimum=3, maximum=4)


@pytest.mark.parametrize("value", [3.0, "3", None])
def test_check_integer__refuses_what_is_no_integer(value: object) -> None:
    with pytest.raises(TypeError, match="k must be an integer of at least 1, got"):
        check_integer("k", value, minimum=1)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_check_number__refuses_negative_and_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
        check_number("beta", value, positive=False)


def test_check_number__takes_zero_only_where_it_may_be_zero() -> None:
    check_number("beta", 0.0, positive=False)
    with pytest.raises(ValueError, match=r"snr must be a finite number above 0, got 0\.0"):
        check_number("snr", 0.0, positive=True)


def test_check_choice__names_the_choices() -> None:
    check_choice("start", "zero", ("gaussian", "zero"))
    with pytest.raises(ValueError, match="start must be one of 'gaussian', 'zero', got 'warm'"):
        check_choice("start", "warm", ("gaussian", "zero"))
