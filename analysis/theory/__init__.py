"""Known answers: what theory says about the numbers that a run records.

Closed forms and quadratures of plain numbers and NumPy arrays, to be set beside
measured values. Nothing here is fitted or simulated.
"""

from __future__ import annotations

from hild_xr.analysis.theory.bbp import bbp_outlier, bbp_overlap, bbp_spike, bbp_threshold
from hild_xr.analysis.theory.marchenko_pastur import (
    marchenko_pastur_cdf,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    marchenko_pastur_mass_at_zero,
)
from hild_xr.analysis.theory.population import (
    LowRankPlusIdentity,
    SpectrumAtZero,
    gmatrix_at_zero,
    hessian_at_zero,
    population_gmatrix,
    population_hessian,
    weighted_second_moment,
)
from hild_xr.analysis.theory.xor import (
    covered_centres_probability,
    xor_first_layer_outlier,
    xor_fixed_point_norm,
    xor_second_layer_outlier,
)

__all__ = [  # noqa: RUF022  # grouped by topic
    # Gaussian mixture in the limit of many samples
    "LowRankPlusIdentity",
    "SpectrumAtZero",
    "gmatrix_at_zero",
    "hessian_at_zero",
    "population_gmatrix",
    "population_hessian",
    "weighted_second_moment",
    # XOR mixture at its fixed points
    "covered_centres_probability",
    "xor_first_layer_outlier",
    "xor_fixed_point_norm",
    "xor_second_layer_outlier",
    # sample covariance of noise, and of noise with spikes
    "bbp_outlier",
    "bbp_overlap",
    "bbp_spike",
    "bbp_threshold",
    "marchenko_pastur_cdf",
    "marchenko_pastur_density",
    "marchenko_pastur_edges",
    "marchenko_pastur_mass_at_zero",
]
