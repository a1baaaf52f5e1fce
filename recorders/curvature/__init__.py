"""Spectra of curvature matrices and kernels of torch models.

The modules here are pure torch, without store and labels. Labelled results, as a recorder would
store them, come from the functions :func:`eigenpairs`, :func:`density`, :func:`trace`,
:func:`frobenius_norm`, :func:`diagonal` and :func:`operator_eigenpairs`, which live in
:mod:`hild_xr.recorders.measure` and are only named here.

The layers, each knowing only those before it: ``isolation`` and ``functional`` make a
model a function that leaves no trace; ``graph``, ``linear_sites``, ``linear_layers`` and
``sample_gradients`` take derivatives of it, and ``linear_chain`` second ones in closed form;
``likelihood`` and ``columns`` say what each matrix is at the outputs; ``operators`` and
``second_moments`` turn that into matrices of blocks; ``pairs``, ``subspace`` and ``lanczos`` know
matrices only; ``engine`` brings them together.
"""

from __future__ import annotations

from hild_xr.recorders.curvature.blocks import Block, BlockChoice, BlockKind, check_k, resolve_blocks
from hild_xr.recorders.curvature.columns import FisherMC
from hild_xr.recorders.curvature.cross_operators import CrossOperator
from hild_xr.recorders.curvature.cross_spectrum import CrossSpectrum
from hild_xr.recorders.curvature.densities import SpectralDensity
from hild_xr.recorders.curvature.engine import Curvature, MatrixChoice, MatrixKind
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.estimate import Estimate
from hild_xr.recorders.curvature.isolation import isolated
from hild_xr.recorders.curvature.kernels import conjugate_kernel, tangent_kernel
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.pairs import Eigenpairs, Which, dense_eigenpairs
from hild_xr.recorders.curvature.precision import Precision
from hild_xr.recorders.curvature.spectrum import BlockSpectrum

# The labelled functions, for those who call rec.curvature.trace(...). They are made of probes, which are made
# of this package, so they come last, when all that probes take from here is there. No submodule here may bear
# the name of one of them: Python binds it in its place when it is loaded.
from hild_xr.recorders.measure import (
    density,
    diagonal,
    eigenpairs,
    frobenius_norm,
    operator_eigenpairs,
    trace,
)

__all__ = [
    "Block",
    "BlockChoice",
    "BlockKind",
    "BlockSpectrum",
    "CrossOperator",
    "CrossSpectrum",
    "Curvature",
    "Eigenpairs",
    "Estimate",
    "FisherMC",
    "MatrixChoice",
    "MatrixKind",
    "NonFiniteCurvatureError",
    "Precision",
    "SpectralDensity",
    "Which",
    "check_k",
    "conjugate_kernel",
    "dense_eigenpairs",
    "density",
    "diagonal",
    "eigenpairs",
    "frobenius_norm",
    "isolated",
    "lanczos_eigenpairs",
    "operator_eigenpairs",
    "resolve_blocks",
    "tangent_kernel",
    "trace",
]
