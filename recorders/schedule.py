"""Schedules: at which optimizer steps a probe makes a record.

A schedule is known before training, so that the store can be created at its
final shape (the store contract, point 1). Step 0 is the state before the first
update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """The steps at which a record is made, strictly increasing.

    Build one with :func:`every`, :func:`at`, :func:`log_spaced` or
    :func:`log_then_linear`.

    Parameters
    ----------
    steps
        Optimizer steps, 0 for the state before the first update.

    Raises
    ------
    ValueError
        If there is no step, a negative one, or if they do not increase.

    Examples
    --------
    >>> schedule = Schedule((0, 1, 10))
    >>> 10 in schedule, len(schedule)
    (True, 3)
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a schedule needs at least one step; got none")
        if self.steps[0] < 0:
            raise ValueError(f"steps count optimizer updates from 0; got {self.steps[0]}")
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("steps must increase strictly; hild_xr.recorders.at(...) sorts them for you")

    def __contains__(self, step: object) -> bool:
        return step in self._members

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def _members(self) -> frozenset[int]:
        return frozenset(self.steps)


def at(steps: Iterable[int]) -> Schedule:
    """Record at the given steps, sorted and without repeats.

    Parameters
    ----------
    steps
        Optimizer steps, in any order.

    Returns
    -------
    Schedule
        The schedule.

    Raises
    ------
    ValueError
        If a step is negative or not a whole number, or if there is none.

    Examples
    --------
    >>> at([100, 0, 10, 10]).steps
    (0, 10, 100)
    """
    given = list(steps)
    broken = [step for step in given if int(step) != step]
    if broken:
        raise ValueError(f"steps are whole numbers of optimizer updates; got {broken[0]!r}")
    return Schedule(tuple(sorted({int(step) for step in given})))


def every(interval: int, *, total_steps: int) -> Schedule:
    """Record at 0, ``interval``, 2 ``interval``, ... up to and including ``total_steps``.

    Parameters
    ----------
    interval
        Steps between two records, at least 1.
    total_steps
        Length of the training run in optimizer steps.

    Returns
    -------
    Schedule
        The schedule; its last step is the last multiple of ``interval``.

    Raises
    ------
    ValueError
        If ``interval`` is below 1 or ``total_steps`` below 0.

    Examples
    --------
    >>> every(100, total_steps=300).steps
    (0, 100, 200, 300)
    """
    _check_total(total_steps)
    if interval < 1:
        raise ValueError(f"interval must be at least 1 step; got {interval}")
    return Schedule(tuple(range(0, total_steps + 1, interval)))


def log_spaced(*, total_steps: int, records: int) -> Schedule:
    """Record at step 0, then at logarithmically spaced steps up to ``total_steps``.

    The early steps, where the outliers emerge, are dense. Spacings below one
    step are rounded up, so there are exactly ``min(records, total_steps + 1)``
    records.

    Parameters
    ----------
    total_steps
        Length of the training run in optimizer steps.
    records
        Number of records, step 0 and ``total_steps`` included.

    Returns
    -------
    Schedule
        The schedule.

    Raises
    ------
    ValueError
        If ``records`` is below 2 or ``total_steps`` below 1.

    Examples
    --------
    >>> log_spaced(total_steps=1000, records=5).steps
    (0, 1, 10, 100, 1000)
    """
    _check_records(total_steps, records)
    if records >= total_steps + 1:
        return every(1, total_steps=total_steps)
    if records == 2:
        return Schedule((0, total_steps))
    wanted = np.geomspace(1, total_steps, records - 1)
    return Schedule((0, *_spread(wanted, first=1, last=total_steps)))


def log_then_linear(*, total_steps: int, records: int, switch: int | None = None) -> Schedule:
    """Record log-spaced up to ``switch`` with one half of the records, evenly after it.

    Early training moves fast and late training slowly; this covers both with a
    fixed number of records.

    Parameters
    ----------
    total_steps
        Length of the training run in optimizer steps.
    records
        Number of records, step 0 and ``total_steps`` included.
    switch
        Step at which the spacing changes; by default a tenth of the run.

    Returns
    -------
    Schedule
        The schedule.

    Raises
    ------
    ValueError
        If ``records`` is below 2, ``total_steps`` below 1, or ``switch`` not
        between 1 and ``total_steps``.

    Examples
    --------
    >>> log_then_linear(total_steps=1000, records=9, switch=100).steps
    (0, 1, 10, 100, 280, 460, 640, 820, 1000)
    """
    _check_records(total_steps, records)
    switch = max(1, total_steps // 10) if switch is None else switch
    if not 1 <= switch <= total_steps:
        raise ValueError(f"switch must lie between 1 and total_steps = {total_steps}; got {switch}")
    if records >= total_steps + 1:
        return every(1, total_steps=total_steps)
    if records == 2 or switch == total_steps:
        return log_spaced(total_steps=total_steps, records=records)
    # half of the records before the switch, as far as either side has room for its share
    early = min(max(2, (records - 1) // 2), switch + 1)
    early = max(early, records - (total_steps - switch))
    head = log_spaced(total_steps=switch, records=early).steps
    tail = np.linspace(switch, total_steps, records - early + 1)[1:]
    return Schedule((*head, *_spread(tail, first=switch + 1, last=total_steps)))


def _spread(wanted: np.ndarray, *, first: int, last: int) -> tuple[int, ...]:
    """Round increasing positions to distinct whole numbers within ``[first, last]``."""
    steps = np.round(wanted).astype(int)
    count = len(steps)
    for i in range(count):
        lowest = first if i == 0 else int(steps[i - 1]) + 1
        steps[i] = max(steps[i], lowest)
    for i in range(count - 1, -1, -1):
        steps[i] = min(steps[i], last - (count - 1 - i))
    return tuple(int(step) for step in steps)


def _check_total(total_steps: int) -> None:
    if total_steps < 0:
        raise ValueError(f"total_steps must not be negative; got {total_steps}")


def _check_records(total_steps: int, records: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1; got {total_steps}")
    if records < 2:
        raise ValueError(f"records must be at least 2 (the start and the end); got {records}")
