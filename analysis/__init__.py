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

from hild_xr.analysis import features, theory
from hild_xr.analysis.features.feature_matrix import feature_matrix_alignment
from hild_xr.analysis.features.feature_rank import active_units, feature_rank, sparsity
from hild_xr.analysis.features.kernels import cka, conjugate_kernel, kernel_alignment, spike_alignment
from hild_xr.analysis.spectra.bulk import marchenko_pastur_fit
from hild_xr.analysis.spectra.curvature_scalars import (
    noise_scale,
    positive_fraction,
    r_med,
    trace_to_frobenius,
)
from hild_xr.analysis.spectra.density import (
    bulk_weights,
    spectral_density,
    spectral_distribution,
    spectral_moments,
)
from hild_xr.analysis.spectra.effective_parameters import effective_parameters
from hild_xr.analysis.spectra.gauss_newton import gauss_newton_split
from hild_xr.analysis.spectra.outliers import outliers
from hild_xr.analysis.spectra.rank import (
    effective_rank,
    numerical_rank,
    participation_ratio,
    rank,
    stable_rank,
)
from hild_xr.analysis.spectra.rank_deficiency import rank_deficiency
from hild_xr.analysis.spectra.spectral_distance import bulk_distance
from hild_xr.analysis.spectra.tails import tail_index
from hild_xr.analysis.spectra.weight_spectra import weight_spectrum
from hild_xr.analysis.subspaces.alignment import (
    alignment,
    random_alignment_baseline,
    subspace_alignment,
    subspace_overlap,
)
from hild_xr.analysis.subspaces.angles import (
    angles_to_reference,
    consecutive_angles,
    pairwise_angles,
    principal_angles,
)
from hild_xr.analysis.subspaces.flattening import flatten_like
from hild_xr.analysis.subspaces.grassmann import grassmann_distances
from hild_xr.analysis.subspaces.projection import projection, updates
from hild_xr.analysis.trajectories.drift import (
    consecutive_overlap,
    eigenvector_overlap,
    pairwise_overlap,
    pairwise_subspace_overlap,
)
from hild_xr.analysis.trajectories.instabilities import instabilities, instability_rotation
from hild_xr.analysis.trajectories.phases import landscape_phase
from hild_xr.analysis.trajectories.relative_drift import relative_drift
from hild_xr.analysis.trajectories.stability import (
    edge_of_stability,
    preconditioned_sharpness,
    sharpness,
    stability_threshold,
)
from hild_xr.analysis.trajectories.tracking import track, track_drift

__all__ = [  # noqa: RUF022  # grouped by topic
    # subspaces
    "angles_to_reference",
    "consecutive_angles",
    "grassmann_distances",
    "pairwise_angles",
    "principal_angles",
    "subspace_alignment",
    "subspace_overlap",
    # vectors and subspaces
    "alignment",
    "flatten_like",
    "projection",
    "random_alignment_baseline",
    "updates",
    # eigenpairs along training
    "consecutive_overlap",
    "eigenvector_overlap",
    "pairwise_overlap",
    "pairwise_subspace_overlap",
    "track",
    "track_drift",
    # spectra
    "marchenko_pastur_fit",
    "outliers",
    # stability of training
    "edge_of_stability",
    "instabilities",
    "instability_rotation",
    "preconditioned_sharpness",
    "sharpness",
    "landscape_phase",
    "stability_threshold",
    # rank
    "effective_parameters",
    "effective_rank",
    "numerical_rank",
    "participation_ratio",
    "rank",
    "rank_deficiency",
    "stable_rank",
    # features and kernels on fixed samples
    "active_units",
    "cka",
    "conjugate_kernel",
    "feature_matrix_alignment",
    "feature_rank",
    "kernel_alignment",
    "sparsity",
    "spike_alignment",
    # densities, distances and tails of spectra
    "bulk_distance",
    "bulk_weights",
    "spectral_density",
    "spectral_distribution",
    "spectral_moments",
    "tail_index",
    "weight_spectrum",
    # scalars of weights and curvature
    "gauss_newton_split",
    "noise_scale",
    "positive_fraction",
    "r_med",
    "relative_drift",
    "trace_to_frobenius",
    # features, neurons and predictions
    "features",
    # known answers
    "theory",
]
