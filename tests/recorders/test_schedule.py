from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.recorders.schedule import Schedule, at, every, log_spaced, log_then_linear


@given(st.integers(1, 100_000), st.integers(2, 300))
def test_log_spaced__has_the_count_asked_for_and_both_ends(total: int, records: int) -> None:
    steps = log_spaced(total_steps=total, records=records).steps
    assert len(steps) == min(records, total + 1)
    assert steps[0] == 0
    assert steps[-1] == total


@given(st.integers(1, 100_000), st.integers(2, 300), st.floats(0.0, 1.0))
def test_log_then_linear__has_the_count_asked_for_and_both_ends(
    total: int, records: int, part: float
) -> None:
    switch = max(1, int(part * total))
    steps = log_then_linear(total_steps=total, records=records, switch=switch).steps
    assert len(steps) == min(records, total + 1)
    assert steps[0] == 0
    assert steps[-1] == total


def test_log_then_linear__is_dense_early_and_even_late() -> None:
    steps = log_then_linear(total_steps=6000, records=200).steps
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    late = [gap for step, gap in zip(steps, gaps, strict=False) if step >= 600]
    assert gaps[0] == 1
    assert max(late) - min(late) <= 1


def test_every__ends_at_the_last_multiple() -> None:
    assert every(40, total_steps=100).steps == (0, 40, 80)


def test_at__sorts_and_drops_repeats() -> None:
    assert at([5, 1, 5]).steps == (1, 5)
    assert 5 in at([5, 1])
    assert 2 not in at([5, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule(()), "at least one step"),
        (lambda: Schedule((3, 3)), "increase strictly"),
        (lambda: at([-1]), "from 0"),
        (lambda: at([1.5]), "whole numbers"),  # type: ignore[list-item]
        (lambda: every(0, total_steps=3), "at least 1"),
        (lambda: every(1, total_steps=-3), "negative"),
        (lambda: log_spaced(total_steps=0, records=3), "at least 1"),
        (lambda: log_spaced(total_steps=5, records=1), "at least 2"),
        (lambda: log_then_linear(total_steps=5, records=3, switch=9), "between 1 and total_steps"),
    ],
)
def test_schedules__refuse_what_makes_no_sense(build: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
