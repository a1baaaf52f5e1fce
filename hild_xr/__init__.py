"""Labelled records of how networks train: weights, Hessian spectra, G-matrices.

>>> import hild_xr as hx
>>> run = hx.open("runs/digits.zarr")                          # doctest: +SKIP
>>> hx.analysis.principal_angles(run["hessian/fc1.weight"].eigenvectors, ...)   # doctest: +SKIP

``hild_xr.recorders`` (needs torch) makes stores, ``hild_xr.analysis`` turns
labelled arrays into labelled arrays, and everything else only shows them. What
a run holds is described in :mod:`hild_xr.variables`.

Importing this package is light: xarray, dask and zarr load at first use. The
``.hild`` accessor is registered then too, or at once if xarray is loaded
already.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hild_xr import accessor as accessor
    from hild_xr import analysis as analysis
    from hild_xr import recorders as recorders
    from hild_xr import sketch as sketch
    from hild_xr.plan import RunPlan as RunPlan
    from hild_xr.store import create as create
    from hild_xr.store import open_run as open  # noqa: A004  as gzip.open and xarray's siblings: hx.open
    from hild_xr.store import validate as validate

__version__ = "0.1.0"

_LAZY = {
    "RunPlan": ("hild_xr.plan", "RunPlan"),
    "accessor": ("hild_xr.accessor", None),
    "analysis": ("hild_xr.analysis", None),
    "create": ("hild_xr.store", "create"),
    "open": ("hild_xr.store", "open_run"),
    "recorders": ("hild_xr.recorders", None),
    "sketch": ("hild_xr.sketch", None),
    "validate": ("hild_xr.store", "validate"),
}

__all__ = [
    "RunPlan",
    "__version__",
    "accessor",
    "analysis",
    "create",
    "open",
    "recorders",
    "sketch",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hild_xr' has no attribute {name!r}; it has: {', '.join(__all__)}")
    importlib.import_module("hild_xr.accessor")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    value: object = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "xarray" in sys.modules:
    importlib.import_module("hild_xr.accessor")
