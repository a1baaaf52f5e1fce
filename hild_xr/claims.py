"""Claims of a theory beside what was measured: the table that a reproduction ends in.

A :class:`Claim` is one sentence of the theory, the number measured for it, and
the :class:`Criterion` that decides whether the sentence holds. The report shows
the rows, ``hild-xr reproduce`` exits with them.

>>> claims = [
...     Claim("weights lie in the top eigenspace of the Hessian", 0.966, at_least(0.95)),
...     Claim("the block has one outlier for each class", 3, equals(3)),
... ]
>>> all_hold(claims)
True

This module imports nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Kind = Literal["at_least", "at_most", "between", "equals"]

COLUMNS = ("claim of the theory", "measured", "criterion", "holds")
"""Head of the table whose rows :meth:`Claim.as_row` gives."""


@dataclass(frozen=True)
class Criterion:
    """An interval, both ends included, that a measured number has to lie in.

    Build one with :func:`at_least`, :func:`at_most`, :func:`between` or
    :func:`equals`.

    Parameters
    ----------
    kind
        How the criterion is put in words.
    lower, upper
        Ends of the interval; an infinite end does not bound.

    Raises
    ------
    ValueError
        If the kind is unknown, an end is NaN, the interval is empty, or the
        ends do not fit the kind (an "at least" without a finite lower end).

    Examples
    --------
    >>> at_least(0.95).admits(0.95), at_least(0.95).admits(0.94)
    (True, False)
    """

    kind: Kind
    lower: float
    upper: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"expected a criterion of kind {', '.join(get_args(Kind))}, came {self.kind!r}")
        object.__setattr__(self, "lower", float(self.lower))
        object.__setattr__(self, "upper", float(self.upper))
        if not self.lower <= self.upper:
            raise ValueError(f"expected lower <= upper, came lower={self.lower} and upper={self.upper}")
        bounded = (math.isfinite(self.lower), math.isfinite(self.upper))
        expected = {"at_least": (True, False), "at_most": (False, True)}.get(self.kind, (True, True))
        if bounded != expected:
            raise ValueError(
                f"expected finite bounds as {self.kind!r} has them, "
                f"came lower={self.lower}, upper={self.upper}"
            )

    def admits(self, measured: float) -> bool:
        """Return whether the number lies in the interval; NaN never does."""
        return self.lower <= measured <= self.upper

    def __str__(self) -> str:
        """Put the criterion in words, with every digit of its bounds."""
        if self.kind == "at_least":
            return f"at least {_exact(self.lower)}"
        if self.kind == "at_most":
            return f"at most {_exact(self.upper)}"
        if self.kind == "equals" and self.lower == self.upper:
            return f"equals {_exact(self.lower)}"
        between = f"between {_exact(self.lower)} and {_exact(self.upper)}"
        if self.kind == "between":
            return between
        middle, tolerance = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        return f"equals {middle:.9g} within {tolerance:.3g}"


def at_least(bound: float) -> Criterion:
    """Admit numbers from ``bound`` on.

    Examples
    --------
    >>> str(at_least(0.95))
    'at least 0.95'
    """
    return Criterion("at_least", bound, math.inf)


def at_most(bound: float) -> Criterion:
    """Admit numbers up to ``bound``.

    Examples
    --------
    >>> str(at_most(1.05))
    'at most 1.05'
    """
    return Criterion("at_most", -math.inf, bound)


def between(lower: float, upper: float) -> Criterion:
    """Admit numbers from ``lower`` to ``upper``.

    Examples
    --------
    >>> str(between(0.65, 0.85))
    'between 0.65 and 0.85'
    """
    return Criterion("between", lower, upper)


def equals(value: float, *, within: float = 0.0) -> Criterion:
    """Admit ``value``, and numbers that differ from it by at most ``within``.

    Raises
    ------
    ValueError
        If ``within`` is negative or not finite.

    Examples
    --------
    >>> str(equals(4)), str(equals(0.98713, within=0.001))
    ('equals 4', 'equals 0.98713 within 0.001')
    """
    if not 0 <= within < math.inf:
        raise ValueError(f"expected a tolerance of zero or more, came within={within}")
    return Criterion("equals", value - within, value + within)


@dataclass(frozen=True)
class Claim:
    """One claim of the theory, what was measured, and whether it holds.

    Parameters
    ----------
    statement
        The claim in words.
    measured
        The number measured, anything ``float`` takes; NaN where it could not be
        measured.
    criterion
        What the number has to satisfy.

    Raises
    ------
    TypeError
        If ``measured`` is no number or the criterion none of this module's.
    ValueError
        If the statement is empty.

    Examples
    --------
    >>> claim = Claim("the second layer has four outliers", 4, equals(4))
    >>> claim.as_row()
    ('the second layer has four outliers', '4', 'equals 4', 'yes')
    >>> Claim("not measured", float("nan"), at_most(1)).holds
    False
    """

    statement: str
    measured: float
    criterion: Criterion

    def __post_init__(self) -> None:
        if not self.statement.strip():
            raise ValueError("expected the claim in words, came an empty statement")
        if not isinstance(self.criterion, Criterion):
            raise TypeError(
                "expected at_least(...), at_most(...), between(...) or equals(...) as criterion, "
                f"came {self.criterion!r}"
            )
        object.__setattr__(self, "measured", float(self.measured))

    @property
    def holds(self) -> bool:
        """Whether the measured number satisfies the criterion; NaN never does."""
        return self.criterion.admits(self.measured)

    def as_row(self) -> tuple[str, str, str, str]:
        """Return the texts of the table's row, under :data:`COLUMNS`.

        The number is rounded to four digits, or to as many as it takes for the
        rounded number to give the same verdict.
        """
        return (self.statement, self._rounded(), str(self.criterion), "yes" if self.holds else "no")

    def to_dict(self) -> dict[str, Any]:
        """Return the claim in JSON values; :meth:`from_dict` reads them back.

        JSON has no NaN and no infinity: such a measured number stands as the
        text ``"nan"``, ``"inf"`` or ``"-inf"``, a missing bound as ``None``.
        """
        bounds = {"lower": self.criterion.lower, "upper": self.criterion.upper}
        return {
            "statement": self.statement,
            "measured": self.measured if math.isfinite(self.measured) else str(self.measured),
            "criterion": {
                "kind": self.criterion.kind,
                **{name: end if math.isfinite(end) else None for name, end in bounds.items()},
                "words": str(self.criterion),
            },
            "holds": self.holds,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Claim:
        """Return the claim that :meth:`to_dict` stored.

        The verdict is taken anew from the number and the criterion.
        """
        criterion = stored["criterion"]
        lower, upper = criterion["lower"], criterion["upper"]
        return cls(
            stored["statement"],
            float(stored["measured"]),
            Criterion(
                criterion["kind"],
                -math.inf if lower is None else lower,
                math.inf if upper is None else upper,
            ),
        )

    def _rounded(self) -> str:
        texts = (f"{self.measured:.{digits}g}" for digits in (4, 6, 9, 12))
        same = (text for text in texts if self.criterion.admits(float(text)) == self.holds)
        return next(same, _exact(self.measured))


def all_hold(claims: Iterable[Claim]) -> bool:
    """Return whether every claim holds.

    Raises
    ------
    ValueError
        If there is no claim: nothing measured is no success.

    Examples
    --------
    >>> all_hold([Claim("a", 1.0, at_least(0)), Claim("b", 1.0, at_most(0))])
    False
    """
    verdicts = [claim.holds for claim in claims]
    if not verdicts:
        raise ValueError("expected at least one claim, came none")
    return all(verdicts)


def _exact(number: float) -> str:
    """Write the shortest text that reads back as the number; whole numbers without a point."""
    return f"{number:.0f}" if number.is_integer() and abs(number) < 1e15 else repr(number)
