"""The registry: every stored or derived variable is declared here once.

A :class:`Variable` gives the name, the dims, the dtype kind, the units, the
axis label and one sentence. Recorders ask it for the attributes of what they
store, analysis for the attributes of what it returns, ``hild_xr.validate``
checks stores against it, and plots take their axis labels from it.

Dimension names are declared here too (``DIM_*`` and :data:`DIMS`), so that a
name means one thing everywhere.

This module imports nothing but the standard library.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = "1.0"
"""Version of the names, dims and meanings declared in this module."""

DIM_SEED = "seed"
DIM_STEP = "step"
DIM_LAYER = "layer"
DIM_EIG = "eig"
DIM_OUT = "out"
DIM_IN = "in"
DIM_PARAM = "param"
DIM_ANGLE = "angle"
DIM_SKETCH = "sketch"
DIM_PROBE = "probe"
DIM_NODE = "node"
DIM_TRACK = "track"
DIM_INSTABILITY = "instability"
DIM_EIGENVALUE = "eigenvalue"
DIM_ORDER = "order"
DIM_FRACTION = "fraction"
DIM_SINGULAR = "singular"
DIM_SAMPLE = "sample"
DIM_UNIT = "unit"
DIM_CLASS = "class_"
DIM_ALPHA = "alpha"
DIM_MODEL = "model"
DIM_COMPONENT = "component"
DIM_NEURON = "neuron"
DIM_STATISTIC = "statistic"
DIM_STATE = "state"
DIM_N_STATES = "n_states"
DIM_RANK = "rank"

LAYER_DIMS = "*"
"""Stands in ``Variable.dims`` for the dims of the layer's own weight tensor."""

DIMS: dict[str, str] = {
    DIM_SEED: "random seed of the training run",
    DIM_STEP: "number of optimizer steps taken when the record was made (0 is the start)",
    DIM_LAYER: "qualified name of the parameter tensor, or name of the block",
    DIM_EIG: "index of the eigenpair, sorted by decreasing absolute eigenvalue",
    DIM_OUT: "output neuron, class or channel of the layer (a row of its weight matrix)",
    DIM_IN: "input of the layer (a column of its weight matrix)",
    "kh": "row of the convolution kernel",
    "kw": "column of the convolution kernel",
    "kd": "depth of the convolution kernel",
    DIM_PARAM: "index of the parameter within a flat block",
    "param_": "index of the parameter within a flat block, second axis of a matrix",
    DIM_ANGLE: "index of the principal angle, sorted from the smallest",
    DIM_SKETCH: "row of the random matrix that the vector was multiplied with (see hild_xr.sketch)",
    DIM_PROBE: "random start vector of a spectral density; the mean over them is the estimate",
    DIM_NODE: "node of the quadrature of a spectral density, in increasing order",
    DIM_TRACK: "eigenpair followed along training, the one with most records first",
    DIM_INSTABILITY: "loss spike above the threshold of stability, in the order of time",
    DIM_EIGENVALUE: "point of the axis of eigenvalues at which a density or a distribution is given",
    DIM_ORDER: "order of the moment",
    DIM_FRACTION: "fraction of the samples on which a unit has to be active",
    DIM_SINGULAR: "index of the singular value, from the largest",
    DIM_SAMPLE: "sample of the fixed probe set",
    DIM_UNIT: "unit (neuron, flattened channel and place) of a layer's output",
    "sample_": "sample of the fixed probe set, second axis of a kernel",
    DIM_CLASS: "output of the model: a class, or a component of the prediction",
    "in_": "input of the layer, second axis of a matrix over inputs",
    DIM_ALPHA: "place on the path between two models: 1 is the first, 0 the second",
    DIM_MODEL: "point of the prediction space: one record of one run",
    DIM_COMPONENT: "coordinate of an embedding, or number in the weights of a neuron",
    DIM_NEURON: "neuron of a hidden layer with the weights into it, its bias and the weights out of it",
    DIM_STATISTIC: "name of a statistic of all weights of a record",
    DIM_STATE: "latent state of training, in the order in which training passes through them",
    DIM_N_STATES: "number of latent states of the model",
    DIM_RANK: "place in the order of decreasing size",
}
"""Every dimension name with its meaning. Lagged copies carry a trailing underscore (``step_``)."""

Kind = Literal["f", "i", "b", "U"]


@dataclass(frozen=True)
class Variable:
    """One declared variable.

    Parameters
    ----------
    name
        Name in stores and datasets.
    dims
        Dimension names in order; :data:`LAYER_DIMS` stands for the dims of the
        layer's weight tensor. Empty for derived variables whose dims follow
        from their input.
    kind
        NumPy dtype kind: ``"f"`` float, ``"i"`` integer, ``"b"`` bool, ``"U"`` text.
    long_name
        Axis label.
    description
        One sentence that says what the number is.
    units
        ``"1"`` for dimensionless; UDUNITS spelling otherwise.

    Examples
    --------
    >>> VARIABLES["eigenvalues"].attrs()["units"]
    '1'
    """

    name: str
    dims: tuple[str, ...]
    kind: Kind
    long_name: str
    description: str
    units: str = "1"

    def attrs(self) -> dict[str, str]:
        """Return the attributes that every array of this variable carries."""
        return {
            "long_name": self.long_name,
            "units": self.units,
            "description": self.description,
            "schema_version": SCHEMA_VERSION,
        }


_RECORD = (DIM_SEED, DIM_STEP)
_PER_LAYER = (*_RECORD, DIM_LAYER)

_DECLARED = (
    # the store's own
    Variable(
        "committed",
        _RECORD,
        "i",
        "attempt that wrote the record",
        "Number of the attempt that wrote the record; 0 means that there is no record.",
    ),
    # metrics
    Variable(
        "train_loss",
        _RECORD,
        "f",
        "training loss",
        "Loss on the objective's data, regulariser included, in eval mode.",
    ),
    Variable(
        "test_loss",
        _RECORD,
        "f",
        "test loss",
        "Loss on the test objective's data, regulariser included, in eval mode.",
    ),
    Variable(
        "accuracy",
        _RECORD,
        "f",
        "training accuracy",
        "Fraction of the objective's samples classified correctly, in eval mode.",
    ),
    Variable(
        "test_accuracy",
        _RECORD,
        "f",
        "test accuracy",
        "Fraction of the test objective's samples classified correctly, in eval mode.",
    ),
    Variable(
        "learning_rate",
        _RECORD,
        "f",
        "learning rate",
        "Learning rate of the optimizer's first parameter group after the step.",
    ),
    # weights
    Variable(
        "weight", (*_RECORD, LAYER_DIMS), "f", "weight", "Value of the parameter tensor after the step."
    ),
    Variable(
        "gradient",
        (*_RECORD, LAYER_DIMS),
        "f",
        "gradient",
        "Gradient of the objective by the parameter tensor, regulariser included, in eval mode.",
    ),
    # spectra: the same names serve the Hessian and the G-matrix; the group says which
    Variable(
        "eigenvalues",
        (*_PER_LAYER, DIM_EIG),
        "f",
        "eigenvalue",
        "Eigenvalue of the block, in decreasing order of absolute value.",
    ),
    Variable(
        "residuals",
        (*_PER_LAYER, DIM_EIG),
        "f",
        "relative residual",
        "Residual norm |A v - lambda v| by |lambda|, or by a thousandth of the largest one if that is more.",
    ),
    Variable(
        "converged",
        (*_PER_LAYER, DIM_EIG),
        "b",
        "converged",
        "Whether the residual of the eigenpair is below the tolerance asked for.",
    ),
    Variable(
        "n_matvec",
        _PER_LAYER,
        "i",
        "matrix-vector products",
        "Number of matrix-vector products spent on the block; 0 for a dense solve.",
    ),
    Variable(
        "n_certain",
        _PER_LAYER,
        "i",
        "certain eigenpairs",
        "Number of eigenpairs, from the first on, that no missed eigenvalue exceeds (99 % sure).",
    ),
    Variable(
        "trace",
        _PER_LAYER,
        "f",
        "trace",
        "Trace of the block, exact unless a standard error stands beside it; NaN where it was not computed.",
    ),
    Variable(
        "trace_standard_error",
        _PER_LAYER,
        "f",
        "standard error of the trace",
        "Standard error of the trace from the random choice of probes; 0 where the trace is exact.",
    ),
    Variable(
        "frobenius_norm",
        _PER_LAYER,
        "f",
        "Frobenius norm",
        "Frobenius norm of the block, exact unless a standard error stands beside it.",
    ),
    Variable(
        "frobenius_norm_standard_error",
        _PER_LAYER,
        "f",
        "standard error of the Frobenius norm",
        "Standard error of the Frobenius norm from the random choice of probes; 0 where it is exact.",
    ),
    Variable(
        "diagonal",
        (*_RECORD, LAYER_DIMS),
        "f",
        "diagonal entry",
        "Diagonal of the block on the dims of the weights, exact unless a standard error stands beside it.",
    ),
    Variable(
        "diagonal_standard_error",
        (*_RECORD, LAYER_DIMS),
        "f",
        "standard error of the diagonal entry",
        "Standard error of the diagonal entry from the random choice of probes; 0 where it is exact.",
    ),
    Variable(
        "quadrature_nodes",
        (*_PER_LAYER, DIM_PROBE, DIM_NODE),
        "f",
        "eigenvalue",
        "Node of the quadrature of the spectral density; unused nodes have weight 0.",
    ),
    Variable(
        "quadrature_weights",
        (*_PER_LAYER, DIM_PROBE, DIM_NODE),
        "f",
        "fraction of eigenvalues",
        "Weight of the quadrature node: the weights of a probe sum to 1.",
    ),
    Variable(
        "quadrature_error",
        _PER_LAYER,
        "f",
        "quadrature error of the density",
        "Wasserstein-1 distance between the quadrature and that of three quarters of the steps: an estimate.",
    ),
    Variable(
        "sampling_error",
        _PER_LAYER,
        "f",
        "sampling error of the density",
        "Wasserstein-1 error of the density expected from the random choice of probes; 0 where it is exact.",
    ),
    Variable(
        "product_error",
        _PER_LAYER,
        "f",
        "product error of the density",
        "Root mean square error of products of unit vectors in low precision; 0 in full precision.",
    ),
    Variable(
        "eigenvectors",
        (*_RECORD, DIM_EIG, LAYER_DIMS),
        "f",
        "eigenvector component",
        "Unit eigenvector of the block, on the dims of the weights it lives on; its sign is arbitrary.",
    ),
    Variable(
        "matrix",
        (*_RECORD, DIM_PARAM, "param_"),
        "f",
        "matrix entry",
        "The whole block as a symmetric matrix over the flattened parameters.",
    ),
    # derived
    Variable(
        "principal_angles",
        (DIM_ANGLE,),
        "f",
        "principal angle",
        "Principal angle between two subspaces, in increasing order.",
        "rad",
    ),
    Variable(
        "alignment",
        (),
        "f",
        "alignment",
        "Norm of the projection of the vector onto the subspace divided by the norm of the vector.",
    ),
    Variable(
        "subspace_overlap",
        (),
        "f",
        "subspace overlap",
        "Mean squared cosine of the principal angles, |U^T V|_F^2 / k.",
    ),
    Variable(
        "subspace_alignment",
        (),
        "f",
        "subspace alignment",
        "Smallest cosine of the principal angles: the worst alignment of a vector of one with the other.",
    ),
    Variable(
        "outlier_count",
        (),
        "i",
        "number of outliers",
        "Number of eigenvalues separated from the bulk; -1 where the spectrum was not recorded.",
    ),
    Variable(
        "gap_ratio",
        (),
        "f",
        "gap ratio",
        "Last outlier divided by the first eigenvalue of the bulk, both less the regulariser.",
    ),
    Variable("bulk_edge", (), "f", "bulk edge", "Threshold above which an eigenvalue counts as an outlier."),
    Variable(
        "bulk_reached",
        (),
        "b",
        "bulk reached",
        "Whether an eigenvalue of the bulk was recorded; where not, the number of outliers is a lower bound.",
    ),
    Variable(
        "numerical_rank",
        (),
        "i",
        "numerical rank",
        "Number of singular values above the relative tolerance; -1 where they were not recorded.",
    ),
    Variable(
        "stable_rank", (), "f", "stable rank", "Squared Frobenius norm divided by squared spectral norm."
    ),
    Variable(
        "effective_rank",
        (),
        "f",
        "effective rank",
        "Exponential of the entropy of the normalised singular values.",
    ),
    # derived: rank, spectra, densities and kernels
    Variable(
        "participation_ratio",
        (),
        "f",
        "participation ratio",
        "Squared sum of the absolute values divided by the sum of their squares.",
    ),
    Variable(
        "feature_rank",
        (),
        "i",
        "feature rank",
        "Least number of singular values that hold the stated part of the squares; -1 where missing.",
    ),
    Variable(
        "active_units",
        (),
        "i",
        "active units",
        "Number of units that are active on more than the stated fraction of samples; -1 where missing.",
    ),
    Variable(
        "sparsity",
        (),
        "f",
        "sparsity",
        "Fraction of activations that do not exceed the stated fraction of the largest one.",
    ),
    Variable(
        "rank_deficiency",
        (),
        "i",
        "rank deficiency",
        "Number of outliers that the full rank has and the spectrum lacks; -1 where it is not known.",
    ),
    Variable(
        "spectral_density",
        (),
        "f",
        "spectral density",
        "Density of the eigenvalues smoothed by a Gaussian of the stated width, mean over the probes.",
    ),
    Variable(
        "spectral_density_standard_error",
        (),
        "f",
        "standard error of the spectral density",
        "Standard error of the density from the spread between probes; NaN for a single probe.",
    ),
    Variable(
        "spectral_distribution",
        (),
        "f",
        "fraction of eigenvalues",
        "Fraction of the eigenvalues up to the point, mean over the probes.",
    ),
    Variable(
        "spectral_distribution_standard_error",
        (),
        "f",
        "standard error of the fraction of eigenvalues",
        "Standard error of the fraction from the spread between probes; NaN for a single probe.",
    ),
    Variable(
        "spectral_moment",
        (),
        "f",
        "spectral moment",
        "Mean over all eigenvalues of a power of the eigenvalue.",
    ),
    Variable(
        "spectral_moment_standard_error",
        (),
        "f",
        "standard error of the spectral moment",
        "Standard error of the moment from the spread between probes; NaN for a single probe.",
    ),
    Variable(
        "outlier_mass",
        (),
        "f",
        "fraction of outliers",
        "Fraction of the eigenvalues that lie outside of the bulk and were left out.",
    ),
    Variable(
        "wasserstein_distance",
        (),
        "f",
        "Wasserstein-1 distance",
        "Area between the distribution functions of two spectra.",
    ),
    Variable(
        "kolmogorov_smirnov_distance",
        (),
        "f",
        "Kolmogorov-Smirnov distance",
        "Largest difference of the distribution functions of two spectra.",
    ),
    Variable(
        "tail_index",
        (),
        "f",
        "tail index",
        "Exponent of the survival function in the tail of the spectrum (Hill estimator).",
    ),
    Variable(
        "tail_index_standard_error",
        (),
        "f",
        "standard error of the tail index",
        "Tail index divided by the square root of the number of values in the tail.",
    ),
    Variable(
        "power_law_exponent",
        (),
        "f",
        "power-law exponent",
        "Exponent of the density in the tail of the spectrum, one more than the tail index.",
    ),
    Variable(
        "tail_minimum",
        (),
        "f",
        "start of the tail",
        "Value from which the spectrum is taken to follow a power law.",
    ),
    Variable(
        "tail_count",
        (),
        "i",
        "values in the tail",
        "Number of values that the tail index was estimated from; -1 where there are none recorded.",
    ),
    Variable(
        "tail_distance",
        (),
        "f",
        "distance to the power law",
        "Kolmogorov-Smirnov distance between the tail and the fitted power law.",
    ),
    Variable(
        "singular_values",
        (),
        "f",
        "singular value",
        "Singular value of the weight matrix, from the largest.",
    ),
    Variable(
        "entry_variance",
        (),
        "f",
        "variance of an entry",
        "Variance of an entry of the noise that the bulk of singular values is compared with.",
    ),
    Variable(
        "singular_bulk_lower",
        (),
        "f",
        "lower edge of the bulk",
        "Lower Marchenko-Pastur edge of the singular values of pure noise of that variance.",
    ),
    Variable(
        "singular_bulk_upper",
        (),
        "f",
        "upper edge of the bulk",
        "Upper Marchenko-Pastur edge of the singular values of pure noise of that variance.",
    ),
    Variable(
        "spike_threshold",
        (),
        "f",
        "spike threshold",
        "Singular value that pure noise of that variance exceeds with the stated small probability only.",
    ),
    Variable(
        "spike_count",
        (),
        "i",
        "number of spikes",
        "Number of singular values above the spike threshold; -1 where the weights are missing.",
    ),
    Variable(
        "spike_alignment",
        (),
        "f",
        "spike alignment",
        "Absolute cosine between a leading singular vector and the target.",
    ),
    Variable(
        "relative_drift",
        (),
        "f",
        "relative drift",
        "Frobenius norm of the change since the reference divided by that of the reference.",
    ),
    Variable(
        "conjugate_kernel",
        (*_RECORD, DIM_SAMPLE, "sample_"),
        "f",
        "conjugate kernel",
        "Mean over units of the product of the activations on two samples.",
    ),
    Variable(
        "kernel_alignment",
        (),
        "f",
        "kernel alignment",
        "Cosine between the kernel and the kernel of the targets.",
    ),
    Variable(
        "cka",
        (),
        "f",
        "linear CKA",
        "Cosine between the centred linear kernels of two sets of activations on the same samples.",
    ),
    Variable("r_med", (), "f", "R_med", "Largest absolute diagonal entry divided by the median one."),
    Variable(
        "trace_to_frobenius",
        (),
        "f",
        "trace by Frobenius norm",
        "Trace of the block divided by its Frobenius norm.",
    ),
    Variable(
        "positive_fraction",
        (),
        "f",
        "fraction of positive eigenvalues",
        "Fraction of the recorded eigenvalues that are positive.",
    ),
    Variable(
        "noise_scale",
        (),
        "f",
        "gradient noise scale",
        "Trace of the covariance of per-sample gradients divided by the squared norm of their mean.",
    ),
    Variable(
        "gauss_newton_residual",
        (),
        "f",
        "part beyond Gauss-Newton",
        "Frobenius norm of the Hessian less the Gauss-Newton matrix, divided by that of the Hessian.",
    ),
    Variable(
        "gauss_newton_overlap",
        (),
        "f",
        "overlap with Gauss-Newton",
        "Mean squared cosine of the principal angles of the top eigenspaces of Hessian and Gauss-Newton.",
    ),
    Variable(
        "feature_matrix_alignment",
        (),
        "f",
        "feature-matrix alignment",
        "Cosine between W^T W and the average gradient outer product of the layer's input.",
    ),
    # probes of fixed inputs
    Variable(
        "activations",
        (*_RECORD, DIM_SAMPLE, DIM_UNIT),
        "f",
        "activation",
        "What the module gives, or takes (see the attr side), on the probe set, flattened, in eval mode.",
    ),
    Variable(
        "outputs",
        (*_RECORD, DIM_SAMPLE, DIM_CLASS),
        "f",
        "output",
        "Output of the model on the probe set, or what the attr transform says of it, in eval mode.",
    ),
    Variable(
        "tangent_kernel",
        (*_RECORD, DIM_SAMPLE, "sample_"),
        "f",
        "tangent kernel",
        "Inner product of the derivatives of the outputs by the parameters, on two samples of the probe set.",
    ),
    Variable(
        "agop",
        (*_RECORD, DIM_IN, "in_"),
        "f",
        "average gradient outer product",
        "Mean over samples of J^T J, with J the derivative of the outputs by the input of the layer.",
    ),
    # derived: loss landscape of models rebuilt from stored weights
    Variable(
        "path_loss",
        (),
        "f",
        "loss on the path",
        "Loss at a place of the path between two models, regulariser included.",
    ),
    Variable(
        "excess_loss",
        (),
        "f",
        "loss above the chord",
        "Loss on the path less the straight line between the losses at its two ends.",
    ),
    Variable(
        "loss_barrier",
        (),
        "f",
        "loss barrier",
        "Largest loss above the chord along the path; 0 where the loss is convex on it.",
    ),
    Variable(
        "mode_connectivity",
        (),
        "f",
        "mode connectivity",
        "Mean loss of the two ends less the loss where it differs most on the path: negative is a barrier.",
    ),
    Variable(
        "mode_connectivity_alpha",
        (),
        "f",
        "place of the mode connectivity",
        "Place on the path where the loss differs most from the mean of its two ends.",
    ),
    Variable(
        "sam_sharpness",
        (),
        "f",
        "SAM sharpness",
        "Rise of the loss by one step of length rho along the gradient; NaN where the gradient vanishes.",
    ),
    Variable(
        "ascent_sharpness",
        (),
        "f",
        "sharpness by ascent",
        "Largest rise of the loss found within a ball of radius rho: a lower bound of the maximum.",
    ),
    Variable(
        "modified_loss",
        (),
        "f",
        "modified loss",
        "Loss plus a quarter of the learning rate times the squared norm of the gradient.",
    ),
    Variable(
        "discretization_error",
        (),
        "f",
        "discretisation error",
        "Distance between the steps of gradient descent and the flow of the same time from the same start.",
    ),
    # derived: features, neurons, predictions and latent states of training
    Variable(
        "nc1",
        (),
        "f",
        "NC1, variability collapse",
        "Scatter of the features within classes by that between classes, as the attr nc1 says.",
    ),
    Variable(
        "nc2_equinorm",
        (),
        "f",
        "NC2, spread of norms",
        "Standard deviation of the norms of the centred class means divided by their mean.",
    ),
    Variable(
        "nc2_equiangular",
        (),
        "f",
        "NC2, spread of cosines",
        "Standard deviation of the cosines between the centred class means.",
    ),
    Variable(
        "nc2_maximal_angle",
        (),
        "f",
        "NC2, distance from the largest angle",
        "Mean of |cos + 1/(C - 1)| over pairs of centred class means: 0 for a simplex.",
    ),
    Variable(
        "nc3",
        (),
        "f",
        "NC3, self-duality",
        "Frobenius distance of the classifier and the centred class means, each divided by its norm.",
    ),
    Variable(
        "nc4",
        (),
        "f",
        "NC4, mismatch to the nearest class mean",
        "Fraction of samples that the network classifies otherwise than the nearest class mean.",
    ),
    Variable(
        "nearest_mean_accuracy",
        (),
        "f",
        "accuracy of the nearest class mean",
        "Fraction of samples whose nearest class mean is that of their label.",
    ),
    Variable(
        "separation",
        (),
        "f",
        "log scatter ratio",
        "Logarithm of the scatter of the features within classes by that between classes.",
    ),
    Variable(
        "separation_slope",
        (),
        "f",
        "slope of the separation",
        "Least-squares slope of the separation over the layers.",
    ),
    Variable(
        "separation_correlation",
        (),
        "f",
        "linearity of the separation",
        "Pearson correlation of the separation with the number of the layer.",
    ),
    Variable(
        "bhattacharyya_distance",
        (),
        "f",
        "Bhattacharyya distance",
        "Mean over samples of -log sum_c sqrt(p(c) q(c)) of two predictions; inf where they are disjoint.",
    ),
    Variable(
        "inpca_coordinates",
        (),
        "f",
        "InPCA coordinate",
        "Coordinate of the intensive principal component; those of negative eigenvalue are timelike.",
    ),
    Variable(
        "inpca_eigenvalues",
        (),
        "f",
        "InPCA eigenvalue",
        "Eigenvalue of the doubly centred distances, in decreasing order of absolute value.",
    ),
    Variable(
        "explained_stress",
        (),
        "f",
        "explained stress",
        "Part of the doubly centred distances that the components up to this one reproduce.",
    ),
    Variable(
        "progress",
        (),
        "f",
        "progress",
        "Place of the nearest point on the geodesic from ignorance (0) to truth (1).",
    ),
    Variable(
        "distance_to_geodesic",
        (),
        "f",
        "distance to the geodesic",
        "Bhattacharyya distance of the prediction to the nearest point of the geodesic.",
    ),
    Variable(
        "trajectory_distance",
        (),
        "f",
        "distance of trajectories",
        "Distance between two trajectories in prediction space, as the attr method says.",
    ),
    Variable(
        "neuron_norm",
        (),
        "f",
        "norm of the neuron",
        "Norm of the weights into a neuron, its bias and the weights out of it, taken as one vector.",
    ),
    Variable(
        "vanishing_neurons",
        (),
        "i",
        "vanishing neurons",
        "Number of neurons whose norm is below the stated part of the largest; -1 where missing.",
    ),
    Variable(
        "identical_pairs",
        (),
        "i",
        "identical pairs of neurons",
        "Number of pairs of neurons, vanishing ones left out, with nearly equal weights; -1 where missing.",
    ),
    Variable(
        "independent_neurons",
        (),
        "i",
        "independent neurons",
        "Number of groups of nearly equal neurons, vanishing ones left out; -1 where missing.",
    ),
    Variable(
        "neuron_entropy",
        (),
        "f",
        "entropy of the neurons",
        "Entropy of the normalised singular values of the matrix whose rows are the neurons.",
    ),
    Variable(
        "collapse_exponent",
        (),
        "f",
        "collapse exponent",
        "Mean of log |1 - learning rate x curvature|: negative where noise attracts to the invariant set.",
    ),
    Variable(
        "neuron_correlation",
        (),
        "f",
        "correlation of units",
        "Pearson correlation over samples of a unit of one network with a unit of the other.",
    ),
    Variable(
        "matched_correlation",
        (),
        "f",
        "correlation with the matched unit",
        "Correlation of a unit with the unit that is assigned to it; NaN where there is none.",
    ),
    Variable(
        "mean_matched_correlation",
        (),
        "f",
        "mean matched correlation",
        "Mean correlation of the pairs of units in the assignment that makes it largest.",
    ),
    Variable(
        "matched_unit",
        (),
        "i",
        "matched unit",
        "Position of the unit of the other network that is assigned to the unit; -1 where there is none.",
    ),
    Variable(
        "weight_statistics",
        (),
        "f",
        "statistic of the weights",
        "Statistic of all weights of a record, named by the label along the dim statistic.",
    ),
    Variable(
        "log_likelihood",
        (),
        "f",
        "log-likelihood per record",
        "Log-likelihood of the runs that the model was fitted to, divided by the number of their records.",
    ),
    Variable(
        "held_out_log_likelihood",
        (),
        "f",
        "held-out log-likelihood per record",
        "Log-likelihood of the held-out runs divided by the number of their records.",
    ),
    Variable(
        "aic",
        (),
        "f",
        "Akaike information criterion",
        "2 k - 2 log-likelihood of the held-out runs, with k free parameters: smaller is better.",
    ),
    Variable(
        "bic",
        (),
        "f",
        "Bayesian information criterion",
        "k log n - 2 log-likelihood of the n held-out records, with k free parameters: smaller is better.",
    ),
    Variable(
        "em_converged",
        (),
        "b",
        "EM converged",
        "Whether the fit that was kept ended by its tolerance, and not by its number of iterations.",
    ),
    Variable(
        "start_probability", (), "f", "start probability", "Probability that a run starts in the state."
    ),
    Variable(
        "transition_probability",
        (),
        "f",
        "transition probability",
        "Probability that the state is followed by another (the dim state_) at the next record.",
    ),
    Variable("state_means", (), "f", "mean in the state", "Mean of the statistic in the state."),
    Variable("state_variances", (), "f", "variance in the state", "Variance of the statistic in the state."),
    Variable(
        "latent_state",
        (),
        "i",
        "latent state",
        "State of the record on the most probable path (Viterbi); -1 where there is no record.",
    ),
    Variable(
        "transition_count",
        (),
        "i",
        "number of transitions",
        "Number of times that the state is followed by another (the dim state_) at the next record.",
    ),
    Variable(
        "transition_feature",
        (),
        "f",
        "change at the transition",
        "Mean of the statistic in the state after the transition (state_) less that in the state before.",
    ),
    # the fitted bulk
    Variable(
        "marchenko_pastur_scale",
        (),
        "f",
        "mean eigenvalue of the bulk",
        "Scale of the Marchenko-Pastur law fitted to the bulk: variance of the noise.",
    ),
    Variable(
        "marchenko_pastur_ratio",
        (),
        "f",
        "dimensions per sample",
        "Ratio of the Marchenko-Pastur law of the bulk: dimensions of the noise by number of samples.",
    ),
    Variable(
        "marchenko_pastur_distance",
        (),
        "f",
        "distance to the Marchenko-Pastur law",
        "Kolmogorov-Smirnov distance between the bulk and the Marchenko-Pastur law fitted to it.",
    ),
    # drift and tracks of eigenpairs
    Variable(
        "eigenvector_overlap",
        (),
        "f",
        "overlap of eigenvectors",
        "Absolute cosine between two eigenvectors, |<u_i, v_j>|.",
    ),
    Variable(
        "track_eigenvalue",
        (),
        "f",
        "eigenvalue of the track",
        "Eigenvalue of the followed eigenpair; NaN where the track has none.",
    ),
    Variable(
        "track_index",
        (),
        "i",
        "place of the track",
        "Position of the followed eigenpair in its record; -1 where the track has none.",
    ),
    Variable(
        "track_overlap",
        (),
        "f",
        "overlap with the record before",
        "Overlap of the eigenpair, in a group of its span, with the last record of the track; NaN at birth.",
    ),
    Variable(
        "track_group",
        (),
        "i",
        "group of the track",
        "First track of the group of nearly equal eigenvalues; -1 where the eigenvalue stands alone.",
    ),
    Variable(
        "track_birth",
        (),
        "f",
        "first record of the track",
        "Label of the first record in which the track has an eigenpair; NaN where there is no such track.",
    ),
    Variable(
        "track_death",
        (),
        "f",
        "end of the track",
        "Label of the record in which the track was first not found; NaN where it lives to the end.",
    ),
    Variable(
        "track_count",
        (),
        "i",
        "number of tracks",
        "Number of tracks found, also of those beyond the largest number given out; -1 without any record.",
    ),
    Variable(
        "eigenvalue_drift",
        (),
        "f",
        "change of the eigenvalue",
        "Eigenvalue of the track less its eigenvalue in the last record in which it was found.",
    ),
    Variable(
        "eigenvector_rotation",
        (),
        "f",
        "rotation",
        "One minus the overlap of the eigenpair, in a group of its span, with the last record of the track.",
    ),
    # subspaces: distances, projections, updates
    Variable(
        "geodesic_distance",
        (),
        "f",
        "geodesic distance",
        "Root of the sum of the squared principal angles: length of the shortest path between the subspaces.",
        "rad",
    ),
    Variable(
        "chordal_distance",
        (),
        "f",
        "chordal distance",
        "Root of the sum of the squared sines of the principal angles.",
    ),
    Variable(
        "projection_distance",
        (),
        "f",
        "projection distance",
        "Sine of the largest principal angle: spectral norm of the difference of the projections.",
    ),
    Variable("dominant", (), "f", "dominant part", "Projection of the vector onto the subspace."),
    Variable("bulk", (), "f", "bulk part", "Vector less its projection onto the subspace."),
    Variable(
        "chi",
        (),
        "f",
        "dominant fraction of the norm",
        "Norm of the dominant part divided by the norm of the vector.",
    ),
    Variable(
        "f_top",
        (),
        "f",
        "dominant fraction of the squared norm",
        "Squared norm of the dominant part divided by the squared norm of the vector.",
    ),
    Variable(
        "update",
        (),
        "f",
        "update",
        "Difference of the parameter tensor between the record and the record before it.",
    ),
    # edge of stability and effective parameters
    Variable(
        "sharpness",
        (),
        "f",
        "sharpness",
        "Largest eigenvalue of the Hessian, of a preconditioned method that of P^-1 H.",
    ),
    Variable(
        "landscape_phase",
        (),
        "i",
        "phase of the loss landscape",
        "Phase of the loss landscape: sharp or flat, connected or not, alike or not; -1 where undefined.",
    ),
    Variable(
        "stability_threshold",
        (),
        "f",
        "threshold of stability",
        "Sharpness above which the optimizer diverges on a quadratic loss.",
    ),
    Variable(
        "sharpness_ratio",
        (),
        "f",
        "sharpness by threshold",
        "Sharpness divided by the threshold of stability: 1 at the edge of stability.",
    ),
    Variable(
        "first_crossing",
        (),
        "f",
        "first crossing",
        "Label of the first record whose sharpness reaches the threshold; NaN where none does.",
    ),
    Variable(
        "non_monotone_fraction",
        (),
        "f",
        "fraction of rises of the loss",
        "Fraction of recorded losses that exceed the loss recorded before.",
    ),
    Variable(
        "instability_index",
        (),
        "i",
        "instability",
        "Number of the instability that the record lies in; -1 where it lies in none.",
    ),
    Variable(
        "instability_before",
        (),
        "f",
        "record before",
        "Label of the last record before the instability; NaN where there is no such instability.",
    ),
    Variable(
        "instability_start",
        (),
        "f",
        "start",
        "Label of the first record of the instability; NaN where there is no such instability.",
    ),
    Variable(
        "instability_end",
        (),
        "f",
        "end",
        "Label of the first record after the instability; NaN where the loss did not come back.",
    ),
    Variable(
        "instability_count",
        (),
        "i",
        "number of instabilities",
        "Number of loss spikes above the threshold of stability; -1 where no loss was recorded.",
    ),
    Variable(
        "flattening",
        (),
        "f",
        "flattening",
        "Sharpness before the instability less the sharpness after it.",
    ),
    Variable(
        "instability_rotation",
        (),
        "f",
        "rotation of the span",
        "One minus the root of the subspace overlap of the eigenvectors before and after the instability.",
    ),
    Variable(
        "effective_parameters",
        (),
        "f",
        "effective number of parameters",
        "Sum of lambda / (lambda + alpha) over the positive eigenvalues.",
    ),
)

VARIABLES: dict[str, Variable] = {variable.name: variable for variable in _DECLARED}
"""Every declared variable by name."""


def variable(name: str) -> Variable:
    """Look a variable up, and suggest the nearest name where there is none.

    Parameters
    ----------
    name
        Name as stored.

    Returns
    -------
    Variable
        The declaration.

    Raises
    ------
    KeyError
        If no variable of that name is declared.

    Examples
    --------
    >>> variable("weight").long_name
    'weight'
    """
    if name not in VARIABLES:
        near = difflib.get_close_matches(name, VARIABLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"no variable {name!r} in the registry hild_xr.variables{hint}")
    return VARIABLES[name]


def attrs(name: str, **more: object) -> dict[str, object]:
    """Attributes for an array of the variable ``name``, plus those given.

    Examples
    --------
    >>> attrs("eigenvalues", order="magnitude")["order"]
    'magnitude'
    """
    return {**variable(name).attrs(), **more}
