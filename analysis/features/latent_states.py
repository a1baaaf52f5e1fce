r"""Latent states of training: a Gaussian hidden Markov model of what is recorded along many runs.

Every record is an observation (z-scored statistics of the weights, see
:func:`~hild_xr.analysis.features.weight_statistics`), every run a sequence. In each state the
observations are Gaussian with diagonal covariance. The number of states is chosen by the
criteria

.. math:: \mathrm{AIC} = 2 k - 2 \log L, \qquad \mathrm{BIC} = k \log n - 2 \log L

on held-out runs, with k free parameters and n held-out records. M. Hu, A. Chen, N. Saphra,
K. Cho (2023), arXiv:2308.09543.

The fit is global: it reads all records, computes at once and needs the package hmmlearn
(``pip install "hild-xr[hmm]"``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import apply_kernel, declared, require_dims, require_real
from hild_xr.variables import DIM_N_STATES, DIM_RANK, DIM_SEED, DIM_STATE, DIM_STATISTIC, DIM_STEP

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

Criterion = Literal["aic", "bic"]

LAGGED = f"{DIM_STATE}_"
"""Dim of the state after a transition."""

UNKNOWN = -1
"""State where there is no record."""

CRITERIA = ("log_likelihood", "held_out_log_likelihood", "aic", "bic", "em_converged")
PARAMETERS = {
    "start_probability": (DIM_STATE,),
    "transition_probability": (DIM_STATE, LAGGED),
    "state_means": (DIM_STATE, DIM_STATISTIC),
    "state_variances": (DIM_STATE, DIM_STATISTIC),
}


class Sequences(NamedTuple):
    """Runs one after the other, as hmmlearn takes them."""

    records: FloatArray
    """Shape (records of all runs, statistics)."""

    lengths: IntArray
    """Number of records of each run."""

    @property
    def times(self) -> FloatArray:
        """Place of each record in its run, from 0 to 1."""
        return np.concatenate([np.linspace(0.0, 1.0, n) for n in self.lengths])


# ---------------------------------------------------------------------------- kernel


def transition_count_kernel(states: IntArray, n_states: int) -> IntArray:
    """Count the transitions of stacked sequences of states.

    Parameters
    ----------
    states
        Array of shape (..., n); negative numbers are missing records.
    n_states
        Number of states.

    Returns
    -------
    count
        Array of shape (..., n_states, n_states): how often the second follows the first.

    Examples
    --------
    >>> transition_count_kernel(np.array([0, 0, 1, 1, 1]), 2)
    array([[1, 1],
           [0, 2]])
    """
    one_hot = (states[..., None] == np.arange(n_states)).astype(np.int64)
    count: IntArray = np.swapaxes(one_hot[..., :-1, :], -1, -2) @ one_hot[..., 1:, :]
    return count


# ---------------------------------------------------------------------------- labelled


def fit_latent_states(
    observations: xr.DataArray,
    n_states: Iterable[int] = range(1, 9),
    *,
    run_dim: str = DIM_SEED,
    dim: str = DIM_STEP,
    held_out: float | Sequence[object] = 0.2,
    n_restarts: int = 5,
    max_iterations: int = 1000,
    tolerance: float = 1e-2,
    random_seed: int = 0,
) -> xr.Dataset:
    """Fit hidden Markov models with several numbers of states, and their criteria on held-out runs.

    Computes at once: all records are read. Of the restarts (k-means with another seed,
    then EM) that with the largest likelihood of the fitted runs is kept. Variances have
    the weak prior of hmmlearn (``covars_prior=0.01``). States are numbered in the order of
    their mean time in the fitted runs. A state that is never left in them is its own
    successor.

    Parameters
    ----------
    observations
        Array with the dims `run_dim`, `dim` and ``statistic``, scored by
        :func:`~hild_xr.analysis.features.z_score`. Records that are NaN as a whole may
        stand at the end of a run; it ends before them.
    n_states
        Numbers of states to try.
    run_dim, dim
        Dims of the runs and of the records of a run.
    held_out
        Part of the runs that is held out, at least one, chosen by the seed; or their labels
        (positions, where the dim has no labels).
    n_restarts
        Number of fits for each number of states.
    max_iterations, tolerance
        EM ends when the log-likelihood rises by less than the tolerance.
    random_seed
        Seed of the choice of runs and of the restarts.

    Returns
    -------
    xarray.Dataset
        On ``n_states``: ``log_likelihood`` and ``held_out_log_likelihood`` per record,
        ``aic``, ``bic``, ``em_converged``. On (n_states, state, ...), NaN beyond the number
        of states: ``start_probability``, ``transition_probability`` (to ``state_``),
        ``state_means``, ``state_variances``.

    Raises
    ------
    ImportError
        If hmmlearn is not installed.
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If a dim is missing or there are others, a number of states or an option is out of
        range, no run is left to fit or to hold out, or observations are missing within a
        run or for some of the statistics.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> path = np.repeat([0, 1], 30)  # every run changes from one state to the other
    >>> values = 6.0 * path[:, None] + rng.standard_normal((5, 60, 2))
    >>> runs = xr.DataArray(values, dims=("seed", "step", "statistic"))
    >>> model = fit_latent_states(runs, n_states=[1, 2, 3], n_restarts=2)
    >>> int(model.bic.idxmin())
    2
    """
    hmm = _hmmlearn()
    numbers = _numbers_of_states(n_states)
    if n_restarts < 1 or max_iterations < 1 or not tolerance > 0:
        raise ValueError(
            "expected n_restarts >= 1, max_iterations >= 1 and tolerance > 0, came "
            f"{n_restarts}, {max_iterations} and {tolerance}"
        )
    runs = _runs(observations, run_dim, dim)
    rng = np.random.default_rng(random_seed)
    is_held_out = _held_out(observations, run_dim, held_out, rng)
    fitted, tested = (
        _sequences([run for run, out in zip(runs, is_held_out, strict=True) if out == which])
        for which in (False, True)
    )
    if len(fitted.records) < max(numbers):
        raise ValueError(
            f"expected at least {max(numbers)} records in the fitted runs, as many as states, came "
            f"{len(fitted.records)}"
        )
    results = []
    for n in numbers:
        seeds = rng.integers(2**31, size=n_restarts)
        best = max(
            (_fit(hmm, n, fitted, int(seed), max_iterations, tolerance) for seed in seeds),
            key=lambda fit: fit[1],
        )
        results.append(_as_dataset(*best, fitted, tested, max(numbers)))
    said = {
        "held_out": [_plain(label) for label in _labels(observations, run_dim)[is_held_out]],
        "random_seed": random_seed,
    }
    found = xr.concat(results, dim=xr.DataArray(numbers, dims=DIM_N_STATES, name=DIM_N_STATES))
    if DIM_STATISTIC in observations.indexes:
        found = found.assign_coords({DIM_STATISTIC: observations[DIM_STATISTIC].values})
    found = found.assign_coords({DIM_N_STATES: numbers})
    return xr.Dataset({name: declared(a, str(name), **said) for name, a in found.items()})


def latent_states(
    observations: xr.DataArray,
    model: xr.Dataset,
    *,
    n_states: int | None = None,
    criterion: Criterion = "bic",
    run_dim: str = DIM_SEED,
    dim: str = DIM_STEP,
) -> xr.DataArray:
    """Most probable path of states of every run (Viterbi).

    Computes at once.

    Parameters
    ----------
    observations
        As in :func:`fit_latent_states`, with the statistics of the model.
    model
        Result of :func:`fit_latent_states`.
    n_states
        Which of its numbers of states; by default that with the smallest `criterion`.
    criterion
        ``"bic"`` or ``"aic"``.
    run_dim, dim
        As in :func:`fit_latent_states`.

    Returns
    -------
    xarray.DataArray
        State of each record, dims (`run_dim`, `dim`); -1 where there is none. The attr
        ``n_states`` says how many there are.

    Raises
    ------
    ImportError, TypeError, ValueError
        As :func:`fit_latent_states`, and if the statistics are not those of the model or
        the criterion is unknown.
    KeyError
        If the model has no such number of states.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> path = np.repeat([0, 1], 30)  # every run changes from one state to the other
    >>> values = 6.0 * path[:, None] + rng.standard_normal((5, 60, 2))
    >>> runs = xr.DataArray(values, dims=("seed", "step", "statistic"))
    >>> model = fit_latent_states(runs, n_states=[2], n_restarts=2)
    >>> bool((latent_states(runs, model) == path).all())
    True
    """
    hmm = _hmmlearn()
    n = _chosen(model, n_states, criterion)
    runs = _runs(observations, run_dim, dim)
    known = model["state_means"]
    if known.sizes[DIM_STATISTIC] != observations.sizes[DIM_STATISTIC] or not np.array_equal(
        _labels(known, DIM_STATISTIC), _labels(observations, DIM_STATISTIC)
    ):
        raise ValueError(
            f"expected the statistics of the model, {_labels(known, DIM_STATISTIC).tolist()}, came "
            f"{_labels(observations, DIM_STATISTIC).tolist()}; select them, in that order"
        )
    one = model.sel({DIM_N_STATES: n}).isel({DIM_STATE: slice(n), LAGGED: slice(n)})
    decoder = hmm.GaussianHMM(n_components=n, covariance_type="diag")
    decoder.startprob_ = one["start_probability"].values
    decoder.transmat_ = one["transition_probability"].transpose(DIM_STATE, LAGGED).values
    decoder.means_ = one["state_means"].transpose(DIM_STATE, DIM_STATISTIC).values
    decoder.covars_ = one["state_variances"].transpose(DIM_STATE, DIM_STATISTIC).values
    states = np.full((observations.sizes[run_dim], observations.sizes[dim]), UNKNOWN)
    for path, run in zip(states, runs, strict=True):
        if len(run):
            path[: len(run)] = decoder.predict(run)
    kept = {c: v for c, v in observations.coords.items() if set(v.dims) <= {run_dim, dim}}
    result = xr.DataArray(states, dims=(run_dim, dim), coords=kept)
    return declared(result, "latent_state", n_states=n)


def transition_count(
    states: xr.DataArray, *, n_states: int | None = None, dim: str = DIM_STEP
) -> xr.DataArray:
    """Count how often each state follows each other one: the transition graph of the runs.

    Lazy on dask-backed states. ``transition_count(states).sum("seed")`` is the graph of all
    runs together.

    Parameters
    ----------
    states
        Result of :func:`latent_states`.
    n_states
        Number of states; by default the attr ``n_states``.
    dim
        Dim of the records of a run.

    Returns
    -------
    xarray.DataArray
        Integers on (..., state, state_): the second follows the first. Pairs with a missing
        record are not counted.

    Raises
    ------
    TypeError
        If the array is no DataArray of whole numbers.
    ValueError
        If the dim is missing or the number of states is not known.

    Examples
    --------
    >>> states = xr.DataArray([0, 0, 1, 1, 1], dims="step", attrs={"n_states": 2})
    >>> transition_count(states).values
    array([[1, 1],
           [0, 2]])
    """
    require_dims("states", require_real("states", states), (dim,), "dim")
    if states.dtype.kind not in "iu":
        raise TypeError(f"expected states as whole numbers, came dtype {states.dtype}")
    n = states.attrs.get("n_states") if n_states is None else n_states
    if n is None or int(n) < 1:
        raise ValueError(f"expected the number of states, at least 1, came {n!r}; pass n_states=...")
    n = int(n)
    result = apply_kernel(
        functools.partial(transition_count_kernel, n_states=n),
        [states],
        [(dim,)],
        output_dims=[(DIM_STATE, LAGGED)],
        output_sizes={DIM_STATE: n, LAGGED: n},
        output_dtypes=[np.dtype(np.int64)],
    )
    return declared(result, "transition_count")


def transition_features(
    model: xr.Dataset,
    *,
    n_states: int | None = None,
    criterion: Criterion = "bic",
    n_features: int = 3,
) -> xr.DataArray:
    r"""Statistics that change most at each transition: differences of the means of the two states.

    Parameters
    ----------
    model
        Result of :func:`fit_latent_states`.
    n_states, criterion
        As in :func:`latent_states`.
    n_features
        Number of statistics to return for a transition.

    Returns
    -------
    xarray.DataArray
        Mean after less mean before, dims (state, state\_, rank), by decreasing size, in
        standard deviations over the run if the observations were z-scored. The coord
        ``statistic`` on the same dims names them.

    Raises
    ------
    KeyError
        If the model has no such number of states.
    ValueError
        If the criterion is unknown or there are not so many statistics.

    Examples
    --------
    >>> means = xr.DataArray(
    ...     [[[0.0, 1.0], [3.0, 0.0]]],
    ...     dims=("n_states", "state", "statistic"),
    ...     coords={"n_states": [2], "statistic": ["l1", "l2"]},
    ... )
    >>> found = transition_features(xr.Dataset({"state_means": means}), n_states=2, n_features=2)
    >>> found[0, 1].values, found.statistic[0, 1].values.tolist()
    (array([ 3., -1.]), ['l1', 'l2'])
    """
    n = _chosen(model, n_states, criterion)
    means = model["state_means"].sel({DIM_N_STATES: n}).isel({DIM_STATE: slice(n)})
    means = means.transpose(DIM_STATE, DIM_STATISTIC)
    if not 1 <= n_features <= means.sizes[DIM_STATISTIC]:
        raise ValueError(
            f"expected 1 <= n_features <= {means.sizes[DIM_STATISTIC]}, the number of statistics, came "
            f"{n_features}"
        )
    change = means.values[None, :, :] - means.values[:, None, :]
    order = np.argsort(-np.abs(change), axis=-1, kind="stable")[..., :n_features]
    dims = (DIM_STATE, LAGGED, DIM_RANK)
    names = _labels(means, DIM_STATISTIC)[order]
    result = xr.DataArray(
        np.take_along_axis(change, order, axis=-1), dims=dims, coords={DIM_STATISTIC: (dims, names)}
    )
    return declared(result, "transition_feature", n_states=n)


def _hmmlearn() -> ModuleType:
    try:
        from hmmlearn import hmm
    except ImportError as error:
        raise ImportError(
            'latent states need the package hmmlearn: install it with pip install "hild-xr[hmm]"'
        ) from error
    module: ModuleType = hmm
    return module


def _fit(
    hmm: ModuleType, n: int, fitted: Sequences, seed: int, max_iterations: int, tolerance: float
) -> tuple[Any, float, bool]:
    """Fit once: model with its states in order of time, log-likelihood, whether EM converged."""
    model = hmm.GaussianHMM(
        n_components=n,
        covariance_type="diag",
        n_iter=max_iterations,
        tol=tolerance,
        random_state=seed,
    )
    model.fit(fitted.records, fitted.lengths)
    history = model.monitor_.history
    # hmmlearn's own monitor_.converged is also true at the last iteration
    converged = len(history) > 1 and history[-1] - history[-2] < tolerance
    never_left = model.transmat_.sum(axis=1) == 0
    model.transmat_[never_left] = np.eye(n)[never_left]
    share = model.predict_proba(fitted.records, fitted.lengths)
    total = share.sum(axis=0)
    times = np.divide(fitted.times @ share, total, out=np.full(n, np.inf), where=total > 0)
    order = np.argsort(times, kind="stable")
    model.startprob_ = model.startprob_[order]
    model.transmat_ = model.transmat_[np.ix_(order, order)]
    model.means_ = model.means_[order]
    model.covars_ = np.diagonal(model.covars_, axis1=-2, axis2=-1)[order]
    return model, float(model.score(fitted.records, fitted.lengths)), converged


def _as_dataset(
    model: Any, log_likelihood: float, converged: bool, fitted: Sequences, tested: Sequences, size: int
) -> xr.Dataset:
    n = model.n_components
    held_out = model.score(tested.records, tested.lengths)
    criteria = (
        log_likelihood / len(fitted.records),
        held_out / len(tested.records),
        model.aic(tested.records, tested.lengths),
        model.bic(tested.records, tested.lengths),
        converged,
    )
    variances = np.diagonal(model.covars_, axis1=-2, axis2=-1)
    values = (model.startprob_, model.transmat_, model.means_, variances)
    arrays = {name: xr.DataArray(value) for name, value in zip(CRITERIA, criteria, strict=True)}
    for (name, dims), value in zip(PARAMETERS.items(), values, strict=True):
        padding = [(0, size - n) if d in (DIM_STATE, LAGGED) else (0, 0) for d in dims]
        arrays[name] = xr.DataArray(np.pad(value, padding, constant_values=np.nan), dims=dims)
    return xr.Dataset(arrays)


def _runs(observations: xr.DataArray, run_dim: str, dim: str) -> list[FloatArray]:
    """Return the records of each run, shape (n, statistics), up to where it ends; checked."""
    dims = (run_dim, dim, DIM_STATISTIC)
    require_dims("observations", require_real("observations", observations), dims, "run_dim=..., dim")
    if set(observations.dims) != set(dims):
        raise ValueError(f"expected the dims {list(dims)} only, came {observations.dims}; select or stack")
    values = observations.transpose(*dims).values.astype(np.float64)
    finite = np.isfinite(values)
    recorded = np.asarray(finite.any(axis=-1))
    holes = np.asarray((~finite & recorded[..., None]).any(axis=(0, 1)) | ~finite.any(axis=(0, 1)))
    if holes.any():
        raise ValueError(
            "expected every statistic at every record, came NaN or inf in "
            f"{_labels(observations, DIM_STATISTIC)[holes].tolist()}: leave these out, with "
            f".drop_sel({DIM_STATISTIC}=[...]); a z-score is NaN where a statistic is constant"
        )
    lengths = recorded.sum(axis=-1)
    gaps = recorded != (np.arange(values.shape[1]) < lengths[:, None])
    if gaps.any():
        raise ValueError(
            f"expected no missing record before another, came some in the runs "
            f"{_labels(observations, run_dim)[gaps.any(axis=-1)].tolist()}; select steps that all runs have"
        )
    return [run[:n] for run, n in zip(values, lengths, strict=True)]


def _sequences(runs: list[FloatArray]) -> Sequences:
    runs = [run for run in runs if len(run)]
    if not runs:
        raise ValueError(
            "expected at least one run with records to fit and one to hold out, came none of one of them: "
            "record more seeds, or pass held_out=..."
        )
    return Sequences(np.concatenate(runs), np.array([len(run) for run in runs]))


def _held_out(
    observations: xr.DataArray, run_dim: str, held_out: float | Sequence[object], rng: np.random.Generator
) -> NDArray[np.bool_]:
    labels = _labels(observations, run_dim)
    n = len(labels)
    if isinstance(held_out, int | float):
        if not 0 < held_out < 1:
            raise ValueError(f"expected held_out in (0, 1) or labels of runs, came {held_out}")
        chosen = rng.permutation(n)[: max(1, round(held_out * n))]
        return np.isin(np.arange(n), chosen)
    unknown = [label for label in held_out if label not in labels.tolist()]
    if unknown:
        raise ValueError(
            f"expected labels of {run_dim!r} as held_out, came {unknown}; it has {labels.tolist()}"
        )
    return np.isin(labels, np.array(list(held_out)))


def _numbers_of_states(n_states: Iterable[int]) -> list[int]:
    numbers = [int(n) for n in n_states]
    if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise ValueError(f"expected different numbers of states from 1 on, came {numbers}")
    return numbers


def _chosen(model: xr.Dataset, n_states: int | None, criterion: str) -> int:
    if criterion not in ("aic", "bic"):
        raise ValueError(f"expected criterion 'aic' or 'bic', came {criterion!r}")
    if n_states is None:
        return int(model[criterion].idxmin())
    numbers = model[DIM_N_STATES].values.tolist()
    if n_states not in numbers:
        raise KeyError(f"the model was fitted with {numbers} states, came n_states={n_states}")
    return n_states


def _labels(array: xr.DataArray, dim: str) -> NDArray[Any]:
    """Labels along a dim, or positions where it has none."""
    return np.asarray(array[dim].values)


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label
