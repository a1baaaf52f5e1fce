r"""Features, neurons and predictions of recorded runs, and the states that training passes through.

Activations have the dims (..., sample, unit), predictions (..., sample, class\_), labels the
dim ``sample``, weights (..., out, in) as they are stored. Functions over all layers also take
an array for each layer by its name, or the node of a run that holds them.
"""

from __future__ import annotations

from hild_xr.analysis.features.inpca import inpca
from hild_xr.analysis.features.latent_states import (
    fit_latent_states,
    latent_states,
    transition_count,
    transition_features,
)
from hild_xr.analysis.features.manifold import (
    bhattacharyya_distance,
    pairwise_bhattacharyya,
    progress,
    truth,
)
from hild_xr.analysis.features.matching import (
    matched_correlation,
    matched_correlation_baseline,
    neuron_correlation,
    random_rotation,
)
from hild_xr.analysis.features.neural_collapse import neural_collapse
from hild_xr.analysis.features.neurons import collapse_exponent, neuron_statistics, neuron_vectors
from hild_xr.analysis.features.separation import separation, separation_slope
from hild_xr.analysis.features.trajectories import trajectory_distance
from hild_xr.analysis.features.weight_statistics import weight_statistics, z_score

__all__ = [  # noqa: RUF022  # grouped by topic
    # classes in the features
    "neural_collapse",
    "separation",
    "separation_slope",
    # predictions as points
    "bhattacharyya_distance",
    "inpca",
    "pairwise_bhattacharyya",
    "progress",
    "trajectory_distance",
    "truth",
    # neurons
    "collapse_exponent",
    "matched_correlation",
    "matched_correlation_baseline",
    "neuron_correlation",
    "neuron_statistics",
    "neuron_vectors",
    "random_rotation",
    # latent states of training
    "fit_latent_states",
    "latent_states",
    "transition_count",
    "transition_features",
    "weight_statistics",
    "z_score",
]
