r"""Class means and the scatter within and between classes.

Of features :math:`h_i` with labels :math:`y_i`: class means :math:`\mu_c`, the
centre :math:`\mu_G = \sum_c w_c \mu_c`, and

.. math::

    \Sigma_W = \sum_c \frac{w_c}{n_c} \sum_{y_i = c} (h_i - \mu_c)(h_i - \mu_c)^T, \qquad
    \Sigma_B = \sum_c w_c (\mu_c - \mu_G)(\mu_c - \mu_G)^T .

The weights are :math:`w_c = 1/C` ("class": every class counts alike) or
:math:`w_c = n_c/n` ("sample"); with equally many samples of each class they are the
same. The two d x d matrices are never formed: all that is asked of them follows from
the n x d residuals and the C x d centred means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import require_dims, require_real, require_same_labels
from hild_xr.analysis.subspaces.bases import finite_matrices, precision
from hild_xr.variables import DIM_SAMPLE, DIM_UNIT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

Weighting = Literal["class", "sample"]

ROUNDING = 8.0
"""Multiple of eps |class means| below which a difference of class means counts as zero."""


class ClassIndex(NamedTuple):
    """Labels as positions among the classes that occur."""

    positions: IntArray
    """Shape (n,): position of each sample's class in `classes`."""

    classes: NDArray[np.generic]
    """Shape (C,): the labels that occur, sorted."""

    @property
    def averaging(self) -> FloatArray:
        """Matrix of shape (C, n) that takes samples to class means."""
        of_class: FloatArray = np.equal(self.positions, np.arange(len(self.classes))[:, None]).astype(float)
        averaging: FloatArray = of_class / of_class.sum(axis=1, keepdims=True)
        return averaging

    def weights(self, weighting: Weighting) -> FloatArray:
        """Weights of the classes, shape (C,), which sum to 1."""
        if weighting == "class":
            return np.full(len(self.classes), 1.0 / len(self.classes))
        return np.bincount(self.positions) / len(self.positions)

    def sample_weights(self, weighting: Weighting) -> FloatArray:
        """Weights of the samples, shape (n,): that of the class in equal parts."""
        of_each = self.weights(weighting) / np.bincount(self.positions)
        return np.asarray(of_each[self.positions])


class Scatter(NamedTuple):
    """What the scatter matrices of stacked features are made of; see the module."""

    finite: NDArray[np.bool_]
    """Shape (...): whether all features of the record are finite; the rest is zero where not."""

    residuals: FloatArray
    """Shape (..., n, d): features less their class mean."""

    means: FloatArray
    """Shape (..., C, d): class means less the centre; zero where the difference is rounding."""

    rounding: FloatArray
    """Shape (...): norm of a difference of class means that rounding of the features can make."""


# ---------------------------------------------------------------------------- kernels


def scatter_kernel(features: FloatArray, index: ClassIndex, weighting: Weighting) -> Scatter:
    """Centred class means and residuals of stacked features.

    Parameters
    ----------
    features
        Array of shape (..., n, d).
    index
        Classes of the n samples.
    weighting
        Weights of the classes in the centre.

    Examples
    --------
    >>> index = ClassIndex(np.array([0, 0, 1]), np.array([0, 1]))
    >>> found = scatter_kernel(np.array([[0.0], [2.0], [5.0]]), index, "class")
    >>> found.means.ravel(), found.residuals.ravel()
    (array([-2.,  2.]), array([-1.,  1.,  0.]))
    """
    finite = finite_matrices(features)
    h = np.where(finite[..., None, None], features, 0.0).astype(np.float64, copy=False)
    means = index.averaging @ h
    rounding = ROUNDING * precision(features) * np.linalg.norm(means, axis=(-2, -1))
    centre = index.weights(weighting) @ means
    deviations = means - centre[..., None, :]
    zero = np.linalg.norm(deviations, axis=(-2, -1)) <= rounding
    deviations[zero] = 0.0
    return Scatter(finite, h - means[..., index.positions, :], deviations, rounding)


def scatter_traces_kernel(
    scatter: Scatter, index: ClassIndex, weighting: Weighting
) -> tuple[FloatArray, FloatArray]:
    """Traces of the scatter within and between classes, each of shape (...).

    Examples
    --------
    >>> index = ClassIndex(np.array([0, 0, 1, 1]), np.array([0, 1]))
    >>> scatter = scatter_kernel(np.array([[0.0], [2.0], [5.0], [7.0]]), index, "class")
    >>> [float(trace) for trace in scatter_traces_kernel(scatter, index, "class")]
    [1.0, 6.25]
    """
    weights = index.weights(weighting)
    within = np.sum(index.sample_weights(weighting)[:, None] * scatter.residuals**2, axis=(-2, -1))
    between = np.sum(weights[:, None] * scatter.means**2, axis=(-2, -1))
    return within, between


def whitened_trace_kernel(
    scatter: Scatter, index: ClassIndex, weighting: Weighting, rtol: float
) -> FloatArray:
    r"""Trace of :math:`\Sigma_W \Sigma_B^+`, shape (...); NaN where the class means coincide.

    Singular values of the weighted class means count as zero below `rtol` times the
    largest and below what rounding of the features can make.

    Examples
    --------
    >>> index = ClassIndex(np.array([0, 0, 1, 1]), np.array([0, 1]))
    >>> scatter = scatter_kernel(np.array([[0.0], [2.0], [5.0], [7.0]]), index, "class")
    >>> float(whitened_trace_kernel(scatter, index, "class", 1e-9)).__round__(12)
    0.16
    """
    weights = index.weights(weighting)
    _, s, directions = np.linalg.svd(np.sqrt(weights)[:, None] * scatter.means, full_matrices=False)
    kept = (s > rtol * s[..., :1]) & (s > scatter.rounding[..., None])
    inverse = np.divide(1.0, s, out=np.zeros_like(s), where=kept)
    along = scatter.residuals @ np.swapaxes(directions, -1, -2) * inverse[..., None, :]
    trace = np.sum(index.sample_weights(weighting)[:, None] * along**2, axis=(-2, -1))
    return np.where(kept.any(axis=-1), trace, np.nan)


# ---------------------------------------------------------------------------- labelled


def class_index(activations: xr.DataArray, labels: xr.DataArray) -> ClassIndex:
    """Check activations and labels against each other, and number the classes.

    Labels are small and are read at once, even if they are dask-backed.

    Parameters
    ----------
    activations
        Array with the dims ``sample`` and ``unit``.
    labels
        Class of each sample: whole numbers or text on the dim ``sample``.

    Raises
    ------
    TypeError
        If the activations are no DataArray of real numbers, or the labels are no
        DataArray of whole numbers or text.
    ValueError
        If a dim is missing, the samples differ, or there are fewer than two classes.

    Examples
    --------
    >>> activations = xr.DataArray(np.zeros((3, 2)), dims=("sample", "unit"))
    >>> class_index(activations, xr.DataArray([7, 3, 7], dims="sample")).classes
    array([3, 7])
    """
    require_dims(
        "activations", require_real("activations", activations), (DIM_SAMPLE, DIM_UNIT), "activations with"
    )
    if activations.sizes[DIM_UNIT] == 0:
        raise ValueError(f"expected at least one unit in activations, came sizes {dict(activations.sizes)}")
    values = label_values(labels)
    require_same_labels({"activations": activations, "labels": labels})
    classes, positions = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"expected samples of at least two classes, came labels {classes.tolist()}")
    return ClassIndex(positions, classes)


def label_values(labels: xr.DataArray) -> NDArray[np.generic]:
    """Labels as a NumPy array of shape (n,), checked.

    Raises
    ------
    TypeError
        If they are no DataArray of whole numbers or text.
    ValueError
        If their only dim is not ``sample``.

    Examples
    --------
    >>> label_values(xr.DataArray([0, 1], dims="sample"))
    array([0, 1])
    """
    if not isinstance(labels, xr.DataArray):
        raise TypeError(f"expected an xarray.DataArray as labels, came {type(labels).__name__}")
    if labels.dims != (DIM_SAMPLE,):
        raise ValueError(
            f"expected labels with the dim ('{DIM_SAMPLE}',), one for each sample, came {labels.dims}"
        )
    if labels.dtype.kind not in "iubUTO":
        raise TypeError(
            f"expected whole numbers or text as labels, came dtype {labels.dtype}; a missing label is not "
            f"taken for a class: drop such samples, then convert with labels.astype(int)"
        )
    return np.asarray(labels.values)


def require_weighting(weighting: str) -> None:
    """Raise for an unknown weighting.

    Raises
    ------
    ValueError
        If it is unknown.

    Examples
    --------
    >>> require_weighting("class")
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"expected weighting 'class' or 'sample', came {weighting!r}")
