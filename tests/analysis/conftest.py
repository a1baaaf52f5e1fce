"""Fixtures of the analysis tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import dask
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def _refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("something was computed")


@pytest.fixture
def nothing_computes() -> Iterator[None]:
    """Let any dask computation within the test raise."""
    with dask.config.set(scheduler=_refuse):
        yield
