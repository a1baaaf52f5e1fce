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
