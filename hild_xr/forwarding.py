"""Which functions the ``.hild`` accessor forwards to, and which variables it hands them.

One line a function: the variables that its first arguments take, by their names in the
registry. A new public function of :mod:`hild_xr.analysis` gets a line in :data:`FORWARDED`,
or in :data:`NOT_FORWARDED` with the reason; a test compares both with what is public.

This module imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass

TREE = "/"
"""In the place of a variable: the node itself, with all its layers."""

LAYERS = "/activations"
"""In the place of a variable: the node itself, if it has layers below; else its variable."""

ANY = "*"
"""In the place of a variable: whatever the array is; a node must be given by its variable."""


@dataclass(frozen=True)
class Forward:
    """What a function takes.

    Parameters
    ----------
    own
        Variables of the object whose accessor is called, for the first arguments. With
        alternatives, ``"eigenvalues|singular_values"``, the first one that is there.
    others
        Variables of the objects given as the next arguments.
    module
        Where the function is public.
    """

    own: tuple[str, ...]
    others: tuple[str, ...] = ()
    module: str = "hild_xr.analysis"


def _of_features(own: str, *others: str) -> Forward:
    return Forward((own,), others, "hild_xr.analysis.features")


_SPACES = Forward(("eigenvectors",), ("eigenvectors",))
_SPECTRUM = Forward(("eigenvalues",))
_DENSITY = Forward(("quadrature_nodes", "quadrature_weights"))
_FEATURES = Forward(("activations",))
_KERNELS = "conjugate_kernel|tangent_kernel"
_SPECTRA = "eigenvalues|singular_values"

FORWARDED: dict[str, Forward] = {
    # subspaces
    "angles_to_reference": Forward(("eigenvectors",)),
    "consecutive_angles": Forward(("eigenvectors",)),
    "grassmann_distances": Forward(("principal_angles",)),
    "pairwise_angles": Forward(("eigenvectors",)),
    "principal_angles": _SPACES,
    "pairwise_overlap": Forward(("eigenvectors",)),
    "pairwise_subspace_overlap": Forward(("eigenvectors",)),
    "consecutive_overlap": Forward(("eigenvectors",)),
    "eigenvector_overlap": _SPACES,
    "subspace_alignment": _SPACES,
    "subspace_overlap": _SPACES,
    # vectors and subspaces
    "alignment": Forward(("weight",), ("eigenvectors",)),
    "flatten_like": Forward((TREE,), ("eigenvectors",)),
    "projection": Forward(("gradient|weight",), ("eigenvectors",)),
    "updates": Forward(("weight",)),
    # spectra
    "outliers": _SPECTRUM,
    "marchenko_pastur_fit": _SPECTRUM,
    "effective_parameters": _SPECTRUM,
    "tail_index": Forward((_SPECTRA,)),
    "bulk_distance": Forward((_SPECTRA,), (_SPECTRA,)),
    "weight_spectrum": Forward(("weight",)),
    "bulk_weights": _DENSITY,
    "spectral_density": _DENSITY,
    "spectral_distribution": _DENSITY,
    "spectral_moments": _DENSITY,
    # eigenpairs along training, and the edge of stability
    "track": Forward(("eigenvalues", "eigenvectors")),
    "sharpness": _SPECTRUM,
    "landscape_phase": Forward(("sharpness",), ("mode_connectivity", "cka")),
    "stability_threshold": Forward(("learning_rate",)),
    "edge_of_stability": Forward(("sharpness",), ("learning_rate", "train_loss")),
    "instabilities": Forward(("train_loss",), ("sharpness", "stability_threshold")),
    "instability_rotation": Forward(("eigenvectors",)),
    "preconditioned_sharpness": Forward(("matrix",)),
    # rank
    "effective_rank": _SPECTRUM,
    "numerical_rank": _SPECTRUM,
    "participation_ratio": _SPECTRUM,
    "rank": _SPECTRUM,
    "rank_deficiency": _SPECTRUM,
    "stable_rank": _SPECTRUM,
    # features and kernels on fixed samples
    "active_units": _FEATURES,
    "cka": Forward(("activations",), ("activations",)),
    "conjugate_kernel": _FEATURES,
    "feature_matrix_alignment": Forward(("weight",), ("agop",)),
    "feature_rank": _FEATURES,
    "kernel_alignment": Forward((_KERNELS,)),
    "sparsity": _FEATURES,
    "spike_alignment": Forward((f"weight|{_KERNELS}",)),
    # scalars of weights and curvature
    "gauss_newton_split": Forward(("matrix",), ("matrix",)),
    "noise_scale": Forward(("trace",), ("gradient",)),
    "positive_fraction": _SPECTRUM,
    "r_med": Forward(("diagonal",)),
    "relative_drift": Forward((f"weight|{_KERNELS}|agop|eigenvalues",)),
    "trace_to_frobenius": Forward(("trace",), ("frobenius_norm",)),
    # features: classes, predictions, neurons, latent states
    "neural_collapse": _of_features(LAYERS),
    "separation": _of_features(LAYERS),
    "separation_slope": _of_features("separation"),
    "bhattacharyya_distance": _of_features("outputs", "outputs"),
    "inpca": _of_features("bhattacharyya_distance"),
    "pairwise_bhattacharyya": _of_features("outputs", "outputs"),
    "progress": _of_features("outputs"),
    "trajectory_distance": _of_features("bhattacharyya_distance"),
    "matched_correlation": _of_features("activations", "activations"),
    "neuron_correlation": _of_features("activations", "activations"),
    "neuron_statistics": _of_features("weight", "weight", "weight"),
    "neuron_vectors": _of_features("weight", "weight", "weight"),
    "random_rotation": _of_features("activations"),
    "collapse_exponent": _of_features(ANY),
    "fit_latent_states": _of_features("weight_statistics"),
    "latent_states": _of_features("weight_statistics"),
    "transition_count": _of_features("latent_state"),
    "weight_statistics": _of_features(TREE),
    "z_score": _of_features("weight_statistics"),
}

NOT_FORWARDED: dict[str, str] = {
    "features": "a package; its functions are forwarded one by one",
    "theory": "a package of known answers, which take numbers and no records",
    "random_alignment_baseline": "takes two numbers",
    "matched_correlation_baseline": "takes two numbers",
    "truth": "takes labels, which no run records",
    "track_drift": "takes the Dataset that track returns",
    "transition_features": "takes the model that fit_latent_states returns",
}
