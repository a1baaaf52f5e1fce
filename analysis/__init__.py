"""Analysis of recorded runs: labelled arrays in, labelled arrays out.

Every function takes xarray objects with dims by name in any order and returns
xarray objects whose attributes come from :mod:`hild_xr.variables`. Dask-backed
input gives dask-backed output: nothing is computed before you ask for it. What
was not recorded or is not defined comes out as NaN (-1 for counts). No function
trains, reads, writes or plots, and nothing here imports torch.

Beside each labelled function, in the same module, stands its kernel
(``*_kernel``): plain NumPy arrays in and out, stacked along leading axes. The
known answers of theory are in :mod:`hild_xr.analysis.theory`.
"""

from __future__ import annotations

if __name__ != "hild_xr.analysis":
    raise ImportError("import hild_xr.analysis, not analysis: this folder is a part of the hild_xr package")

from hild_xr.analysis import theory
from hild_xr.analysis.alignment import (
    alignment,
    random_alignment_baseline,
    subspace_alignment,
    subspace_overlap,
)
from hild_xr.analysis.angles import angles_to_reference, pairwise_angles, principal_angles
from hild_xr.analysis.flattening import flatten_like
from hild_xr.analysis.outliers import outliers
from hild_xr.analysis.rank import effective_rank, numerical_rank, rank, stable_rank

__all__ = [  # noqa: RUF022  # grouped by topic
    # subspaces
    "angles_to_reference",
    "pairwise_angles",
    "principal_angles",
    "subspace_alignment",
    "subspace_overlap",
    # vectors and subspaces
    "alignment",
    "flatten_like",
    "random_alignment_baseline",
    # spectra
    "outliers",
    # rank
    "effective_rank",
    "numerical_rank",
    "rank",
    "stable_rank",
    # known answers
    "theory",
]
