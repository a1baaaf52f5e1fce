"""What a validation found, in words that a person and a program can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "note"]
"""``"error"``: the run is not as planned, damaged, or contradicts itself. ``"note"``: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One thing that a validation found.

    Parameters
    ----------
    severity
        ``"error"`` or ``"note"``.
    place
        Key in the store: an array, a node, or one chunk.
    what
        What is wrong there, or worth knowing.
    advice
        What to do about it.
    seed
        Seed concerned, where it is one.
    steps
        First and last step concerned, where it is known.

    Examples
    --------
    >>> lost = Finding("error", "metrics/train_loss/c/0/0", "is missing", "restore it", seed=3, steps=(0, 63))
    >>> print(lost)
    error: metrics/train_loss/c/0/0 (seed 3, steps 0 to 63): is missing; restore it
    """

    severity: Severity
    place: str
    what: str
    advice: str
    seed: int | None = None
    steps: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = [] if self.seed is None else [f"seed {self.seed}"]
        if self.steps is not None:
            first, last = self.steps
            where.append(f"step {first}" if first == last else f"steps {first} to {last}")
        inside = f" ({', '.join(where)})" if where else ""
        return f"{self.severity}: {self.place}{inside}: {self.what}; {self.advice}"


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """Everything that a validation found, and how much it looked at.

    Parameters
    ----------
    path
        The run.
    findings
        Errors and notes; errors first.
    arrays, chunks, nbytes
        Arrays and chunks that were read, and their bytes.

    Examples
    --------
    >>> report = ValidationReport("runs/digits.zarr", (), arrays=3, chunks=7, nbytes=1_500_000)
    >>> report.ok
    True
    >>> report
    runs/digits.zarr: 3 arrays, 7 chunks, 1.5 MB checked: sound
    """

    path: str
    findings: tuple[Finding, ...]
    arrays: int
    chunks: int
    nbytes: int

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is worth knowing of a run that may well be sound."""
        return tuple(finding for finding in self.findings if finding.severity == "note")

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    @property
    def summary(self) -> str:
        """One line: how much was checked, and the verdict."""
        counted = [_counted(len(self.errors), "error"), _counted(len(self.notes), "note")]
        verdict = ", ".join([*(["sound"] if self.ok else []), *(text for text in counted if text)])
        checked = ", ".join(
            [
                _counted(self.arrays, "array") or "no array",
                _counted(self.chunks, "chunk") or "no chunk",
                f"{_size(self.nbytes)} checked",
            ]
        )
        return f"{self.path}: {checked}: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "path": self.path,
            "ok": self.ok,
            "arrays": self.arrays,
            "chunks": self.chunks,
            "nbytes": self.nbytes,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self) -> Iterator[str]:
        """Iterate over the findings, one a line, and the summary."""
        yield from map(str, self.findings)
        yield self.summary

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _counted(number: int, noun: str) -> str:
    if not number:
        return ""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
