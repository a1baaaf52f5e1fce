r"""Neurons that vanish, coincide or stay independent: stochastic collapse.

Every neuron i of a hidden layer is one vector :math:`\tilde w_i = [w_\mathrm{in}, b, w_\mathrm{out}]`.
Noise of SGD attracts to the sets on which a neuron is zero or two neurons are equal (F. Chen,
D. Kunin, A. Yamamura, S. Ganguli 2023, arXiv:2306.04251):

* vanishing: :math:`|\tilde w_i| < 0.1 \max_j |\tilde w_j|`;
* identical pair: :math:`2 |\tilde w_i - \tilde w_j|^2 < 0.1\, (|\tilde w_i|^2 + |\tilde w_j|^2)`;
* independent neurons: groups of identical ones, vanishing ones left out;
* entropy :math:`-\sum_k s_k \log s_k` of the singular values of the matrix with the rows
  :math:`\tilde w_i`, divided by their sum.

In the toy model :math:`\theta \leftarrow \theta\,(1 - \eta h_i)` the set :math:`\theta = 0` attracts
iff :math:`E \log |1 - \eta h_i| < 0`: :func:`collapse_exponent`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    FLOAT,
    apply_kernel,
    declared,
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.spectra.rank import effective_rank_kernel
from hild_xr.analysis.subspaces.bases import divide_or_zero, finite_matrices, singular_values
from hild_xr.analysis.subspaces.flattening import flatten_kernel
from hild_xr.variables import DIM_COMPONENT, DIM_IN, DIM_NEURON, DIM_OUT, DIM_SAMPLE, DIM_SKETCH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

KERNEL_DIMS = ("kd", "kh", "kw")
"""Dims of a convolution's kernel: its weights into, and out of, a channel run over them."""

UNKNOWN = -1
"""Count where the weights were not recorded."""

COUNTS = ("vanishing_neurons", "identical_pairs", "independent_neurons")
RESULTS = ("neuron_norm", *COUNTS, "neuron_entropy")

# ---------------------------------------------------------------------------- kernels


def neuron_statistics_kernel(
    neurons: FloatArray, vanishing: float, identical: float
) -> tuple[FloatArray, IntArray, IntArray, IntArray, FloatArray]:
    """Norms, counts and entropy of stacked neurons; see :func:`neuron_statistics`.

    Parameters
    ----------
    neurons
        Array of shape (..., h, m): the vectors of h neurons.
    vanishing, identical
        Thresholds.

    Returns
    -------
    neuron_norm
        Array of shape (..., h).
    vanishing_neurons, identical_pairs, independent_neurons, neuron_entropy
        Arrays of shape (...).

    Examples
    --------
    >>> neurons = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.01, 0.0]])
    >>> norm, *counts, entropy = neuron_statistics_kernel(neurons, 0.1, 0.1)
    >>> [int(count) for count in counts]
    [1, 1, 2]
    """
    finite = finite_matrices(neurons)
    w: FloatArray = np.where(finite[..., None, None], neurons, 0.0).astype(np.float64)
    largest = np.abs(w).max(axis=(-2, -1), keepdims=True, initial=0.0)
    w = divide_or_zero(w, largest)  # squares stay in range
    norms = np.linalg.norm(w, axis=-1)
    gone = norms < vanishing * norms.max(axis=-1, keepdims=True)
    gone |= norms == 0
    same = _identical(w, norms, identical) & ~gone[..., :, None] & ~gone[..., None, :]
    entropy = np.log(effective_rank_kernel(singular_values(w)))
    counts = (gone.sum(axis=-1), np.triu(same, 1).sum(axis=(-2, -1)), _groups(same, gone, norms))
    vanished, pairs, independent = (np.where(finite, count, UNKNOWN) for count in counts)
    return (
        np.where(finite[..., None], norms * largest[..., 0], np.nan),
        vanished,
        pairs,
        independent,
        np.where(finite, entropy, np.nan),
    )


def _identical(w: FloatArray, norms: FloatArray, threshold: float) -> NDArray[np.bool_]:
    """Which pairs (..., h, h) are identical: twice the squared distance by the sum of squared norms."""
    squares = norms[..., :, None] ** 2 + norms[..., None, :] ** 2
    distance = 2 * (squares - 2 * (w @ np.swapaxes(w, -1, -2)))
    found: NDArray[np.bool_] = distance < threshold * squares
    return found


def _groups(same: NDArray[np.bool_], gone: NDArray[np.bool_], norms: FloatArray) -> IntArray:
    """Count groups: the largest neuron that is left takes all that are identical with it, and so on.

    From the largest on, not in the order of storage, which means nothing. The loop runs over
    the groups, for all stacked layers at once.
    """
    left = ~gone
    n = np.zeros(gone.shape[:-1], dtype=np.int64)
    while left.any():
        leader = np.where(left, norms, -1.0).argmax(axis=-1)
        group = np.take_along_axis(same, leader[..., None, None], axis=-2)[..., 0, :]
        group |= np.arange(gone.shape[-1]) == leader[..., None]
        n += left.any(axis=-1)
        left = left & ~group
    return n


def collapse_exponent_kernel(curvature: FloatArray, learning_rate: FloatArray) -> FloatArray:
    """Mean of log |1 - learning rate x curvature| over the last axis of the curvature.

    Parameters
    ----------
    curvature
        Array of shape (..., n).
    learning_rate
        Array that broadcasts with the shape (...).

    Returns
    -------
    exponent
        Array of shape (...): -inf where a step leads to the set at once, NaN where a value
        is not finite.

    Examples
    --------
    >>> float(collapse_exponent_kernel(np.array([0.9, -1.1]), np.array(0.1)).round(4))
    0.005
    """
    change = -learning_rate[..., None] * curvature.astype(np.float64)
    # log1p: the factor is close to 1 for small steps
    size = np.where(change > -1, change, -2 - change)
    with np.errstate(divide="ignore"):
        exponent = np.log1p(size).mean(axis=-1)
    return np.where(np.isfinite(change).all(axis=-1), exponent, np.nan)


# ---------------------------------------------------------------------------- labelled


def neuron_vectors(
    weight_in: xr.DataArray, bias: xr.DataArray | None = None, weight_out: xr.DataArray | None = None
) -> xr.DataArray:
    r"""All numbers that belong to each neuron: :math:`\tilde w = [w_\mathrm{in}, b, w_\mathrm{out}]`.

    Lazy on dask-backed arrays. The tensors are used as the probe of the weights stores them.

    Parameters
    ----------
    weight_in
        Weight of the layer, dims (..., out, in) or of a convolution (..., out, in, kh, kw):
        one neuron (channel) for each ``out``.
    bias
        Bias of the layer, dims (..., out).
    weight_out
        Weight of the layer that reads these neurons, dims (..., out, in) or (..., out, in,
        kh, kw): its ``in`` are the neurons.

    Returns
    -------
    xarray.DataArray
        Dims (..., neuron, component).

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If a dim is missing, an array is a sketch, the numbers of neurons differ, or labels
        along other dims do.

    Examples
    --------
    >>> weight_in = xr.DataArray([[1.0, 2.0]], dims=("out", "in"))
    >>> bias = xr.DataArray([3.0], dims="out")
    >>> weight_out = xr.DataArray([[4.0], [5.0]], dims=("out", "in"))
    >>> neuron_vectors(weight_in, bias, weight_out).values
    array([[1., 2., 3., 4., 5.]])
    """
    parts, sizes = {}, {}
    for name, array, neuron in (
        ("weight_in", weight_in, DIM_OUT),
        ("bias", bias, DIM_OUT),
        ("weight_out", weight_out, DIM_IN),
    ):
        if array is None:
            continue
        wanted = (DIM_OUT,) if name == "bias" else (DIM_OUT, DIM_IN)
        require_dims(name, require_real(name, array), wanted, "the weights as recorded for")
        if DIM_SKETCH in array.dims:
            raise ValueError(f"expected whole weights in {name}, came sketches: dims {array.dims}")
        tensor = [d for d in (DIM_OUT, DIM_IN, *KERNEL_DIMS) if d in array.dims]
        inner = [f"__{d}_of_{name}__" for d in tensor if d != neuron]
        own = [c for c in array.coords if set(tensor) & set(array[c].dims)]
        renames = {d: DIM_NEURON if d == neuron else f"__{d}_of_{name}__" for d in tensor}
        parts[name] = array.drop_vars(own).rename(renames)
        sizes[name] = (parts[name].sizes[DIM_NEURON], inner)
    if len({n for n, _ in sizes.values()}) > 1:
        came = ", ".join(f"{n} in {name}" for name, (n, _) in sizes.items())
        raise ValueError(
            f"expected the same number of neurons, 'out' of weight_in and 'in' of weight_out, came {came}; "
            "flattened maps of a convolution are not its channels"
        )
    require_same_labels(parts)
    n = sizes["weight_in"][0]
    m = sum(math.prod(parts[name].sizes[d] for d in inner) for name, (_, inner) in sizes.items())
    result = apply_kernel(
        functools.partial(flatten_kernel, n_axes=[len(inner) for _, inner in sizes.values()]),
        list(parts.values()),
        [(DIM_NEURON, *inner) for _, inner in sizes.values()],
        output_dims=[(DIM_NEURON, DIM_COMPONENT)],
        output_sizes={DIM_NEURON: n, DIM_COMPONENT: m},
        output_dtypes=[np.result_type(*parts.values())],
    )
    return declared(result, "weight", vector_dims=[DIM_COMPONENT], number_dim=DIM_NEURON)


def neuron_statistics(
    weight_in: xr.DataArray,
    bias: xr.DataArray | None = None,
    weight_out: xr.DataArray | None = None,
    *,
    vanishing: float = 0.1,
    identical: float = 0.1,
) -> xr.Dataset:
    """Vanishing, identical and independent neurons of a hidden layer, record by record.

    Lazy on dask-backed arrays.

    Parameters
    ----------
    weight_in, bias, weight_out
        As in :func:`neuron_vectors`.
    vanishing
        A neuron vanishes if its norm is below this part of the largest one.
    identical
        Two neurons are identical if twice their squared distance is below this part of the
        sum of their squared norms.

    Returns
    -------
    xarray.Dataset
        ``neuron_norm``
            On (..., neuron).
        ``vanishing_neurons``
            Their number; all if all weights are zero.
        ``identical_pairs``
            Pairs among the neurons that do not vanish.
        ``independent_neurons``
            Groups of the neurons that do not vanish: the largest takes all that are
            identical with it, then the largest that is left, and so on.
        ``neuron_entropy``
            Entropy of the normalised singular values, in nats; NaN for zero weights.

        -1 and NaN where weights are missing.

    Raises
    ------
    TypeError, ValueError
        As :func:`neuron_vectors`, and if a threshold is not positive.

    Examples
    --------
    >>> weight_in = xr.DataArray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dims=("out", "in"))
    >>> found = neuron_statistics(weight_in)
    >>> int(found.identical_pairs), int(found.independent_neurons)
    (1, 2)
    """
    for name, value in (("vanishing", vanishing), ("identical", identical)):
        if not 0 < value < math.inf:
            raise ValueError(f"expected a positive threshold {name}, came {value}")
    neurons = neuron_vectors(weight_in, bias, weight_out)
    if neurons.sizes[DIM_NEURON] == 0:
        raise ValueError("expected at least one neuron in weight_in, came none")
    results = apply_kernel(
        functools.partial(neuron_statistics_kernel, vanishing=vanishing, identical=identical),
        [neurons],
        [(DIM_NEURON, DIM_COMPONENT)],
        output_dims=[(DIM_NEURON,), (), (), (), ()],
        output_sizes={DIM_NEURON: neurons.sizes[DIM_NEURON]},
        output_dtypes=[FLOAT, *[np.dtype(np.int64)] * len(COUNTS), FLOAT],
    )
    said: dict[str, dict[str, Any]] = {
        "vanishing_neurons": {"vanishing": vanishing},
        "identical_pairs": {"vanishing": vanishing, "identical": identical},
        "independent_neurons": {"vanishing": vanishing, "identical": identical},
    }
    named = zip(RESULTS, results, strict=True)
    return xr.Dataset({name: declared(a, name, **said.get(name, {})) for name, a in named})


def collapse_exponent(
    curvature: xr.DataArray, learning_rate: float | xr.DataArray, *, dim: str = DIM_SAMPLE
) -> xr.DataArray:
    r"""Exponent :math:`E \log |1 - \eta h_i|` with which SGD leaves, or falls into, an invariant set.

    For :math:`\theta \leftarrow \theta (1 - \eta h_i)`. Negative: the set :math:`\theta = 0`
    attracts, even where the mean curvature is negative and gradient descent would leave it.
    For small steps that is :math:`\eta \sigma^2 / 2 > |h|`, with the variance
    :math:`\sigma^2` and the mean -\|h\| of the curvature.

    Parameters
    ----------
    curvature
        Curvature across the set on each sample (batch), along `dim`.
    learning_rate
        Number, or array without `dim`.
    dim
        Dim of the samples.

    Returns
    -------
    xarray.DataArray
        On the dims that are left and those of the learning rate. -inf where a sample leads
        to the set at once; NaN where a value is missing.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If `dim` is missing or empty, the learning rate has it, or labels differ.

    Examples
    --------
    >>> curvature = xr.DataArray([-1.1, 0.9], dims="sample")  # mean -0.1, standard deviation 1
    >>> learning_rate = xr.DataArray([0.1, 0.2, 0.5], dims="learning_rate")
    >>> collapse_exponent(curvature, learning_rate).values.round(4)
    array([ 0.005 ,  0.0002, -0.0798])
    """
    require_dims("curvature", require_real("curvature", curvature), (dim,), "dim")
    if curvature.sizes[dim] == 0:
        raise ValueError(f"expected at least one sample along {dim!r}, came none")
    if not isinstance(learning_rate, xr.DataArray):
        learning_rate = xr.DataArray(float(learning_rate))
    if dim in require_real("learning_rate", learning_rate).dims:
        raise ValueError(f"expected a learning rate without {dim!r}, came dims {learning_rate.dims}")
    require_same_labels({"curvature": curvature, "learning_rate": learning_rate})
    result = apply_kernel(collapse_exponent_kernel, [curvature, learning_rate], [(dim,), ()])
    return declared(result, "collapse_exponent")
