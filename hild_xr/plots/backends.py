"""HoloViews' current backend, for as long as a style works with another one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import holoviews as hv

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def current_backend(name: str) -> Iterator[None]:
    """Make a loaded backend the current one, and give the place back afterwards.

    Options that are set for another backend than the current one come out mixed
    with the current one's defaults: an area styled for matplotlib while bokeh is
    current takes its colour from bokeh's cycle (HoloViews 1.23).

    Parameters
    ----------
    name
        Name of the backend.

    Examples
    --------
    >>> before = hv.Store.current_backend
    >>> with current_backend("matplotlib"):
    ...     hv.Store.current_backend
    'matplotlib'
    >>> hv.Store.current_backend == before
    True
    """
    before = hv.Store.current_backend
    hv.Store.current_backend = name
    try:
        yield
    finally:
        hv.Store.current_backend = before
