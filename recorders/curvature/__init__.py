"""Hessian and G-matrix spectra of torch models: pure torch, no store and no labels.

The layers, each knowing only those before it: ``isolation`` and ``functional`` make a
model a function that leaves no trace; ``graph``, ``linear_sites`` and
``sample_gradients`` take derivatives of it; ``operators`` turn them into matrices of
blocks; ``eigensolvers`` know matrices only; ``engine`` brings them together.
"""

from __future__ import annotations

from hild_xr.recorders.curvature.blocks import Block, BlockKind, check_k, resolve_blocks
from hild_xr.recorders.curvature.eigensolvers import Eigenpairs, Which, dense_eigenpairs, lanczos_eigenpairs
from hild_xr.recorders.curvature.engine import Curvature, MatrixKind, eigenpairs
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.isolation import isolated
from hild_xr.recorders.curvature.spectrum import BlockSpectrum

__all__ = [
    "Block",
    "BlockKind",
    "BlockSpectrum",
    "Curvature",
    "Eigenpairs",
    "MatrixKind",
    "NonFiniteCurvatureError",
    "Which",
    "check_k",
    "dense_eigenpairs",
    "eigenpairs",
    "isolated",
    "lanczos_eigenpairs",
    "resolve_blocks",
]
