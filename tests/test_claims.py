from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.claims import COLUMNS, Claim, Criterion, all_hold, at_least, at_most, between, equals

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
CRITERIA = st.one_of(
    st.builds(at_least, NUMBERS),
    st.builds(at_most, NUMBERS),
    st.tuples(NUMBERS, NUMBERS).map(lambda ends: between(min(ends), max(ends))),
    st.builds(equals, NUMBERS),
    st.builds(equals, NUMBERS, within=st.floats(0, 10)),
)


@pytest.mark.parametrize(
    ("criterion", "inside", "outside"),
    [
        (at_least(0.95), [0.95, 2, math.inf], [0.9499, -math.inf]),
        (at_most(1.05), [1.05, -3, -math.inf], [1.0501, math.inf]),
        (between(0.65, 0.85), [0.65, 0.7, 0.85], [0.649, 0.851, math.inf]),
        (equals(4), [4], [4.0001, 3, -4]),
        (equals(0.5, within=0.25), [0.25, 0.5, 0.75], [0.24, 0.76]),
    ],
)
def test_criterion__admits_its_interval_with_both_ends(
    criterion: Criterion, inside: list[float], outside: list[float]
) -> None:
    assert [number for number in inside if not Claim("c", number, criterion).holds] == []
    assert [number for number in outside if Claim("c", number, criterion).holds] == []


@given(CRITERIA)
def test_claim__with_nan_never_holds(criterion: Criterion) -> None:
    claim = Claim("not measured", math.nan, criterion)
    assert not claim.holds
    assert claim.as_row()[1:] == ("nan", str(criterion), "no")


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (at_least(0.95), "at least 0.95"),
        (at_most(-2), "at most -2"),
        (between(0.65, 0.85), "between 0.65 and 0.85"),
        (equals(4), "equals 4"),
        (equals(0.98713, within=0.001), "equals 0.98713 within 0.001"),
        (at_least(1e-12), "at least 1e-12"),
        (at_least(0.94996), "at least 0.94996"),
    ],
)
def test_criterion__is_put_in_words_without_losing_digits(criterion: Criterion, words: str) -> None:
    assert str(criterion) == words


def test_as_row__fits_under_the_columns() -> None:
    row = Claim("the block has k outliers", 3, equals(3)).as_row()
    assert row == ("the block has k outliers", "3", "equals 3", "yes")
    assert len(row) == len(COLUMNS)


@pytest.mark.parametrize(
    ("measured", "criterion", "shown"),
    [
        (0.9661749, at_least(0.95), "0.9662"),
        (0.9499960123, at_least(0.95), "0.949996"),
        (3.0000001, equals(3), "3.0000001"),
        (1e-300, at_most(0), "1e-300"),
        (math.inf, at_most(1), "inf"),
    ],
)
def test_as_row__rounds_to_no_other_verdict(measured: float, criterion: Criterion, shown: str) -> None:
    assert Claim("c", measured, criterion).as_row()[1] == shown


@given(st.floats(), CRITERIA)
def test_as_row__shows_a_number_with_the_verdict_beside_it(measured: float, criterion: Criterion) -> None:
    _, shown, _, verdict = Claim("c", measured, criterion).as_row()
    assert criterion.admits(float(shown)) == (verdict == "yes")


@given(st.floats(), CRITERIA)
def test_to_dict__survives_strict_json(measured: float, criterion: Criterion) -> None:
    claim = Claim("c", measured, criterion)
    text = json.dumps(claim.to_dict(), allow_nan=False)
    again = Claim.from_dict(json.loads(text))
    assert again.to_dict() == claim.to_dict()
    assert again.criterion == claim.criterion
    assert again.holds == claim.holds


def test_to_dict__says_everything_a_program_needs() -> None:
    assert Claim("a", 0.5, at_least(0.95)).to_dict() == {
        "statement": "a",
        "measured": 0.5,
        "criterion": {"kind": "at_least", "lower": 0.95, "upper": None, "words": "at least 0.95"},
        "holds": False,
    }


def test_from_dict__takes_the_verdict_anew() -> None:
    stored = Claim("a", 0.5, at_least(0.95)).to_dict() | {"holds": True}
    assert not Claim.from_dict(stored).holds


def test_claim__takes_numbers_of_any_kind_and_no_text() -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.5

    made: Any = Claim
    assert made("c", Scalar(), at_least(0)).measured == 0.5
    assert type(made("c", 3, at_least(0)).measured) is float
    with pytest.raises(TypeError, match="expected at_least"):
        made("c", 0.5, 0.95)
    with pytest.raises(ValueError, match="empty statement"):
        Claim("  ", 0.5, at_least(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: between(2, 1), "lower <= upper"),
        (lambda: at_least(math.nan), "lower <= upper"),
        (lambda: at_least(math.inf), "finite bounds"),
        (lambda: at_most(-math.inf), "finite bounds"),
        (lambda: between(0, math.inf), "finite bounds"),
        (lambda: equals(1, within=-0.1), "tolerance of zero or more"),
        (lambda: equals(1, within=math.nan), "tolerance of zero or more"),
        (lambda: Criterion("above", 0, 1), "criterion of kind"),
    ],
)
def test_criterion__refuses_bounds_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_all_hold__needs_every_claim_and_at_least_one() -> None:
    good, bad = Claim("a", 1, equals(1)), Claim("b", 2, equals(1))
    assert all_hold([good, good])
    assert not all_hold([good, bad])
    assert not all_hold(claim for claim in [bad, good])
    with pytest.raises(ValueError, match="at least one claim"):
        all_hold([])
