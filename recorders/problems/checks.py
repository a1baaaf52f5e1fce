"""Checks of hyperparameters, with messages that name the parameter, the expectation and the value."""

from __future__ import annotations

import math
import operator


def check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> None:
    """Refuse a value that is no integer between ``minimum`` and ``maximum`` (both included).

    Raises
    ------
    TypeError
        If the value is no integer.
    ValueError
        If it is out of range.

    Examples
    --------
    >>> check_integer("classes", 1, minimum=2)
    Traceback (most recent call last):
    ValueError: classes must be an integer of at least 2, got 1
    """
    expected = (
        f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    )
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # the TypeError is the answer
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {value!r}") from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_number(name: str, value: float, *, positive: bool) -> None:
    """Refuse a value that is not finite, is negative, or is zero where it must be ``positive``.

    Raises
    ------
    ValueError
        If it is out of range.

    Examples
    --------
    >>> check_number("snr", 0.0, positive=True)
    Traceback (most recent call last):
    ValueError: snr must be a finite number above 0, got 0.0
    """
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        expected = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of ``choices``.

    Raises
    ------
    ValueError
        If it is none of them.

    Examples
    --------
    >>> check_choice("start", "warm", ("gaussian", "zero"))
    Traceback (most recent call last):
    ValueError: start must be one of 'gaussian', 'zero', got 'warm'
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
