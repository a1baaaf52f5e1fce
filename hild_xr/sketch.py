r"""Sketches: m numbers in place of a vector, with inner products kept.

A network of a billion weights cannot be stored at every record. A sparse
Johnson-Lindenstrauss matrix S with m rows maps each weight vector, gradient and
eigenvector x to the m numbers Sx, and angles, alignments and overlaps are then
taken of the sketches by the same functions as of the vectors themselves.

**The matrix.** Each column has s (``nonzeros``) entries :math:`\pm 1/\sqrt{s}`,
one in each of s blocks of m/s rows (the block construction of Nelson and Nguyen,
arXiv:1211.1002; Kane and Nelson, arXiv:1012.1577). A product costs s additions a
coordinate, and S is never stored.

**The law.** For fixed x and y and a random S

.. math::

    E \langle Sx, Sy \rangle = \langle x, y \rangle, \qquad
    \mathrm{Var} \langle Sx, Sy \rangle
        = \frac{|x|^2 |y|^2 + \langle x, y \rangle^2 - 2 \sum_j x_j^2 y_j^2}{m}.

Each block contributes the sum over :math:`j \ne l` that fall on one row of
:math:`\sigma_j \sigma_l x_j y_l`; two coordinates meet with probability s/m, only
equal pairs have correlated signs, and the s blocks are independent. s does not
enter the variance, but the tails: vectors that live on a few coordinates want a
larger s. By Chebyshev's inequality

.. math::

    P\bigl(|\langle Sx, Sy \rangle - \langle x, y \rangle| \ge t |x| |y|\bigr) \le \frac{2}{m t^2},

with at most ``sqrt(2 / m)`` as standard error relative to |x| |y|
(:func:`standard_error`).

**Angles.** Let delta be the largest relative error of squared norms on a subspace
of dimension D that holds all vectors in question, :math:`E \delta^2 \le D(D+1)/m`
(D = 2k for two bases of k vectors, k + 1 for a vector and a basis; typically delta
is about :math:`2\sqrt{D/m}`). Then the sine of every principal angle is kept up to
the factor :math:`\sqrt{(1+\delta)/(1-\delta)}`: small angles keep their relative
accuracy, and :math:`1 - \rho^2` of an alignment is kept up to the square of it. A
single cosine c errs by about :math:`(1 - c^2)/\sqrt{m}`. **Sketches live in m
dimensions:** the alignment of a random vector with k others is
:math:`\sqrt{k/m}`, not :math:`\sqrt{k/p}`; compare with
``random_alignment_baseline(k, m)``.

**One matrix everywhere.** S follows from the seed and the layer's name alone, so
weights, gradients and eigenvectors of a layer are sketched by the same S, in all
steps, training seeds and runs. The whole model's matrix is :math:`[S_1 \dots S_L]`:
the sketch of the flat vector is the sum of the layers' sketches
(:func:`sketch_model`). A vector of at most m numbers is stored as it is.

**The same numbers everywhere.** Rows and signs come from an explicit hash, written
down in :func:`buckets`, that can be made again in any language. Sums are taken in
fixed point (62 bits and sign), where the order of additions does not matter: NumPy
and torch, CPU and GPU, any number of threads give the same bits. Rounding to fixed
point changes a coordinate by less than ``p * 2**-61`` of the largest one.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from hild_xr.variables import DIM_SKETCH

SCHEME = "osnap-splitmix64-1"
"""Name and version of the hash and the layout; another rule gets another name."""

CHUNK = 2**18
"""Coordinates hashed and summed at a time, so that the working memory stays small."""

KEPT_BYTES = 2**28
"""Hashes are kept up to this size (16 bytes a coordinate at 4 nonzeros), and made anew beyond."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


# ---------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class JohnsonLindenstrauss:
    """A family of sketches: how many numbers, which seed, how many nonzeros a column.

    Parameters
    ----------
    m
        Numbers that stand for a vector; a multiple of ``nonzeros``. The standard error
        of an inner product is at most ``sqrt(2 / m)`` of the product of the norms.
    seed
        Another seed gives an independent matrix.
    nonzeros
        Entries in each column; more of them make large errors rarer for vectors that
        are concentrated on a few coordinates, at proportional cost.

    Raises
    ------
    ValueError
        If m is not a positive multiple of nonzeros, or 2**30 or more.

    Examples
    --------
    >>> sketch = JohnsonLindenstrauss(m=512).over({"fc1.weight": 100_000})
    >>> sketch.apply(np.ones(100_000)).shape
    (512,)
    """

    m: int
    seed: int = 0
    nonzeros: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.m, bool) or not all(
            isinstance(number, int) for number in (self.m, self.seed, self.nonzeros)
        ):
            raise ValueError(f"m, seed and nonzeros are whole numbers; got {self}")
        if self.nonzeros < 1 or self.m < 1 or self.m % self.nonzeros:
            up = max(1, -(-self.m // max(1, self.nonzeros))) * max(1, self.nonzeros)
            raise ValueError(
                f"a sketch has m numbers in {self.nonzeros} equal blocks, one for each nonzero of a column; "
                f"got m={self.m}: take m={up}"
            )
        if self.m >= 2**30:
            raise ValueError(f"a sketch of m={self.m} numbers is no saving: take m below 2**30")

    def over(self, sizes: Mapping[str, int]) -> Sketch:
        """Return the sketch of vectors that hold these layers one after the other."""
        return Sketch(self, dict(sizes))


@dataclass(frozen=True)
class Sketch:
    """The matrix S = [S_1 ... S_L] for vectors over one layer or several.

    Parameters
    ----------
    family
        Size and seed.
    sizes
        Numbers in each layer by its name, in the order in which the vector holds them.

    Raises
    ------
    ValueError
        If there is no layer, or one is empty.

    Examples
    --------
    >>> family = JohnsonLindenstrauss(m=64)
    >>> weights = np.random.default_rng(0).normal(size=(3, 500))
    >>> one, other = family.over({"a": 300}), family.over({"b": 200})
    >>> model = family.over({"a": 300, "b": 200})
    >>> parts = one.apply(weights[:, :300]) + other.apply(weights[:, 300:])
    >>> bool(np.allclose(parts, model.apply(weights)))
    True
    """

    family: JohnsonLindenstrauss
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes.values()) < 1:
            raise ValueError(f"a sketch needs at least one layer and none empty; got sizes {self.sizes}")

    @property
    def m(self) -> int:
        """Numbers in the sketch."""
        return self.family.m

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(self.sizes.values())

    def apply(self, vectors: ArrayLike) -> NDArray[np.float64]:
        """Sketch the vectors along the last axis.

        Parameters
        ----------
        vectors
            Real array of shape (..., p).

        Returns
        -------
        numpy.ndarray
            float64, shape (..., m). NaN throughout where a vector is not finite.

        Raises
        ------
        ValueError
            If the last axis is not of the sketch's size, or the numbers are not real.

        Examples
        --------
        >>> sketch = JohnsonLindenstrauss(m=8, nonzeros=2).over({"fc.bias": 10})
        >>> column = sketch.apply(np.eye(10)[3])
        >>> int(np.count_nonzero(column)), float(np.abs(column).max()).__round__(3)
        (2, 0.707)
        """
        x = np.asarray(vectors)
        if x.dtype.kind not in "fiub":
            raise ValueError(f"a sketch is taken of real numbers; got dtype {x.dtype}")
        self.check_size(x.shape)
        if x.dtype.kind != "f":
            x = x.astype(np.float64)
        flat = x.reshape(-1, self.size)
        out = np.empty((len(flat), self.m))
        at_once = max(1, CHUNK // self.size)
        for start in range(0, len(flat), at_once):
            out[start : start + at_once] = self._apply(flat[start : start + at_once])
        return out.reshape(*x.shape[:-1], self.m)

    def check_size(self, shape: Sequence[int]) -> None:
        """Check that the last axis is that of the vectors.

        Raises
        ------
        ValueError
            If it is not.
        """
        if not shape or shape[-1] != self.size:
            raise ValueError(
                f"this sketch takes vectors of {self.size} numbers on the last axis ({dict(self.sizes)}); "
                f"got shape {tuple(shape)}"
            )

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield ``(offset, key, start, stop)`` of each chunk: its place in the vector and in its layer."""
        offset = 0
        for name, size in self.sizes.items():
            key = layer_key(name, self.family.seed)
            for start in range(0, size, CHUNK):
                yield offset + start, key, start, min(start + CHUNK, size)
            offset += size

    @property
    def headroom(self) -> int:
        """Bits left for the largest entry when p of them may meet in one sum of 62 bits."""
        return 62 - (self.size - 1).bit_length()

    def to_json(self) -> dict[str, Any]:
        """Return what is needed to make this sketch again, as JSON values."""
        return {
            "scheme": SCHEME,
            "m": self.m,
            "nonzeros": self.family.nonzeros,
            "seed": self.family.seed,
            "layers": list(self.sizes),
            "sizes": list(self.sizes.values()),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Sketch:
        """Make the sketch of a stored array again, from its attribute ``sketch``.

        Raises
        ------
        ValueError
            If it follows a scheme that this version does not know.

        Examples
        --------
        >>> sketch = JohnsonLindenstrauss(m=8).over({"fc.bias": 10})
        >>> Sketch.from_json(sketch.to_json()) == sketch
        True
        """
        if stored.get("scheme") != SCHEME:
            raise ValueError(
                f"this sketch follows the scheme {stored.get('scheme')!r}; this version of hild-xr knows "
                f"{SCHEME!r}: use the version that wrote the run"
            )
        family = JohnsonLindenstrauss(m=stored["m"], seed=stored["seed"], nonzeros=stored["nonzeros"])
        return family.over(dict(zip(stored["layers"], stored["sizes"], strict=True)))

    def _apply(self, x: NDArray[Any]) -> NDArray[np.float64]:
        m, s = self.m, self.family.nonzeros
        largest = np.maximum(x.max(axis=1), -x.min(axis=1)).astype(np.float64)
        finite = np.isfinite(largest)
        # the largest entry fills the bits that p additions leave free
        exponent = self.headroom - np.frexp(np.where(finite, largest, 0.0))[1]
        up = _powers_of_two(exponent)
        offset = 2 * m * np.arange(len(x), dtype=np.int64)[:, None]
        sums = np.zeros(2 * m * len(x), dtype=np.int64)
        for at, key, start, stop in self.pieces():
            scaled = x[:, at : at + stop - start].astype(np.float64) * up[0] * up[1]
            scaled[~finite] = 0.0
            fixed = np.rint(scaled).astype(np.int64).ravel()
            make = functools.partial(buckets, key, start, stop, m, s)
            table = KEPT.get(("numpy", key, start, stop, m, s), make)
            for block in table:
                np.add.at(sums, (offset + block).ravel(), fixed)
        signed = sums.reshape(len(x), 2, m)
        down = _powers_of_two(-exponent)
        result = (signed[:, 0] - signed[:, 1]).astype(np.float64) * down[0] * down[1] * (1 / math.sqrt(s))
        result[~finite] = np.nan
        return result


def layer_key(name: str, seed: int) -> int:
    """Key of a layer's matrix: the first 8 bytes, little endian, of SHA-256 of ``"<seed>/<name>"``.

    Examples
    --------
    >>> hex(layer_key("fc1.weight", 0))
    '0x...'
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def splitmix64(key: int, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return outputs of the generator splitmix64 started at ``key``, by their number from 0.

    Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014.

    Examples
    --------
    >>> int(splitmix64(1234567, np.zeros(1, dtype=np.uint64))[0])
    6457827717110365317
    """
    # as arrays: NumPy warns of the wrap-around of scalars, and the wrap-around is meant
    z = (index + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
    return z ^ (z >> np.uint64(31))


def buckets(key: int, start: int, stop: int, m: int, nonzeros: int) -> NDArray[np.int32]:
    """Where the coordinates from start to stop of a layer are added, block by block.

    The rule, which :data:`SCHEME` names: coordinate j has ceil(s/2) outputs of
    :func:`splitmix64`, numbers ``ceil(s/2) * j`` and following. Each gives two 32-bit
    halves, the low one first; half r belongs to block r (of an odd s the last half is
    not used). Its lowest bit says that the sign is negative, the other 31 bits times
    m/s, shifted right by 31, are the row within the block.

    Parameters
    ----------
    key
        Of the layer, from :func:`layer_key`.
    start, stop
        Range of coordinates.
    m, nonzeros
        Of the family.

    Returns
    -------
    numpy.ndarray
        int32, shape (nonzeros, stop - start): row of S, plus m where the sign is negative.

    Examples
    --------
    >>> buckets(1234567, 0, 3, m=8, nonzeros=2).shape
    (2, 3)
    """
    words, width = -(-nonzeros // 2), m // nonzeros
    first = words * np.arange(start, stop, dtype=np.uint64)
    table = np.empty((nonzeros, stop - start), dtype=np.int32)
    for word in range(words):
        drawn = splitmix64(key, first + np.uint64(word))
        for block in range(2 * word, min(2 * word + 2, nonzeros)):
            half = (drawn >> np.uint64(32 * (block % 2))) & np.uint64(2**32 - 1)
            row = ((half >> np.uint64(1)) * np.uint64(width)) >> np.uint64(31)
            table[block] = block * width + row + m * (half & np.uint64(1))
    return table


def standard_error(xx: Any, yy: Any, xy: Any, m: int) -> Any:
    r"""Bound of the standard error of an inner product of sketches.

    .. math:: \sqrt{(|x|^2 |y|^2 + \langle x, y \rangle^2) / m}

    Parameters
    ----------
    xx, yy, xy
        The inner products of x and x, y and y, x and y: floats, NumPy or labelled
        arrays. Those of the sketches serve where the vectors are not known.
    m
        Numbers in the sketch.

    Returns
    -------
    same as the arguments
        In the unit of ``xy``.

    Examples
    --------
    >>> standard_error(1.0, 1.0, 0.0, m=1024)
    0.03125
    """
    return ((xx * yy + xy**2) / m) ** 0.5


class _Kept:
    """Tables of hashes, the least recently used ones dropped beyond a number of bytes.

    Shared by all sketches of the process: the probes of a recorder sketch the same layers.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._tables: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()  # dask calls from several threads

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = make()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self.nbytes += table.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._tables.popitem(last=False)[1].nbytes
        return table


KEPT = _Kept(KEPT_BYTES)


def _powers_of_two(exponent: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two factors whose product is ``2.0**exponent``, which may be out of the range of one float64."""
    half = exponent // 2
    one, other = np.ldexp(1.0, half), np.ldexp(1.0, exponent - half)
    return one[:, None], other[:, None]


# ---------------------------------------------------------------------------- labelled


def sketch(array: xr.DataArray, like: xr.DataArray) -> xr.DataArray:
    """Sketch vectors as a stored array was sketched, for example class means as the eigenvectors.

    Parameters
    ----------
    array
        Real, with the dims that the stored vectors had: its attr ``sketch`` lists them
        under ``dims``. Lazy if dask-backed.
    like
        A recorded array. If it has no attr ``sketch`` it was small enough to be stored
        whole, and ``array`` comes back as it is.

    Returns
    -------
    xarray.DataArray
        float64, the vector dims replaced by ``sketch``; attrs ``vector_dims`` and
        ``sketch`` as on ``like``. NaN where a vector is not finite.

    Raises
    ------
    ValueError
        If the array lacks the dims or has other sizes along them, or is a sketch by
        another matrix.

    Examples
    --------
    >>> made = JohnsonLindenstrauss(m=64).over({"fc.weight": 300})
    >>> attrs = {"sketch": {**made.to_json(), "dims": ["out", "in"], "shape": [3, 100]}}
    >>> stored = xr.DataArray(np.zeros((2, 64)), dims=("step", "sketch"), attrs=attrs)
    >>> means = xr.DataArray(np.ones((5, 3, 100)), dims=("class", "out", "in"))
    >>> sketch(means, like=stored).dims
    ('class', 'sketch')
    """
    stored = like.attrs.get("sketch")
    if stored is None:
        return array
    if "sketch" in array.attrs:
        _check_same(_as_read(array.attrs["sketch"]), stored)
        return array
    dims, shape = _names(stored["dims"]), tuple(stored["shape"])
    found = tuple(array.sizes.get(dim) for dim in dims)
    if found != shape:
        raise ValueError(
            f"expected the dims {dict(zip(dims, shape, strict=True))} of the vectors that {like.name!r} is a "
            f"sketch of; came {dict(array.sizes)}: rename or select so that these dims are there"
        )
    return _sketched(array, Sketch.from_json(stored), dims, stored)


def sketch_model(layers: Mapping[str, xr.DataArray], like: xr.DataArray) -> xr.DataArray:
    """Sketch the flat vector of all trainable parameters from what is stored of each layer.

    The sum of the layers' sketches: with ``blocks="model"`` eigenvectors as ``like`` it
    brings weights or gradients into the space of the model's eigenvectors.

    Parameters
    ----------
    layers
        Array of each layer by its qualified name, sketched or whole with attr
        ``vector_dims``; those that the model's vectors do not hold are left out.
    like
        A recorded array of whole-model vectors, with attr ``sketch``.

    Returns
    -------
    xarray.DataArray
        float64 on the other dims and ``sketch``, with the attrs of ``like``'s sketch.

    Raises
    ------
    KeyError
        If a layer of the model's vectors is missing.
    ValueError
        If ``like`` is no sketch, or a layer was sketched by another matrix (another m,
        seed or row by row) or has another size.

    Examples
    --------
    >>> family = JohnsonLindenstrauss(m=64)
    >>> stored = family.over({"a": 300, "b": 200}).to_json() | {"dims": ["param"], "shape": [500]}
    >>> like = xr.DataArray(np.zeros(64), dims="sketch", attrs={"sketch": stored})
    >>> layers = {name: xr.DataArray(np.ones(n), dims="in", attrs={"vector_dims": ["in"]})
    ...           for name, n in (("a", 300), ("b", 200))}
    >>> bool(np.allclose(sketch_model(layers, like), Sketch.from_json(stored).apply(np.ones(500))))
    True
    """
    stored = like.attrs.get("sketch")
    if stored is None:
        raise ValueError(
            f"{like.name!r} is no sketch (it has no attr 'sketch'): its vectors are stored whole, on "
            f"{like.dims}"
        )
    model = Sketch.from_json(stored)
    missing = [name for name in model.sizes if name not in layers]
    if missing:
        raise KeyError(f"the model's vectors also hold {missing}: give an array for each of {[*model.sizes]}")
    parts = [
        _layer_part(name, layers[name], model.family.over({name: size})) for name, size in model.sizes.items()
    ]
    with xr.set_options(arithmetic_join="exact"):  # type: ignore[no-untyped-call]  # xarray leaves it so
        result: xr.DataArray = functools.reduce(operator.add, parts).astype(np.float64)
    result.attrs = {"vector_dims": [DIM_SKETCH], "sketch": dict(stored)}
    return result


def _layer_part(name: str, array: xr.DataArray, layer: Sketch) -> xr.DataArray:
    if "sketch" in array.attrs:
        _check_same(_as_read(array.attrs["sketch"]), layer.to_json())
        return array
    if "vector_dims" not in array.attrs:
        raise ValueError(
            f"{name!r} has neither an attr 'sketch' nor 'vector_dims'; its dims are {array.dims}"
        )
    dims = _names(array.attrs["vector_dims"])
    size = math.prod(array.sizes[dim] for dim in dims)
    if size != layer.size:
        raise ValueError(f"{name!r} has vectors of {size} numbers on {dims}; the model's has {layer.size}")
    return _sketched(array, layer, dims, layer.to_json())


def _sketched(
    array: xr.DataArray, matrix: Sketch, dims: tuple[str, ...], stored: Mapping[str, Any]
) -> xr.DataArray:
    if array.chunks is not None:
        array = array.chunk(dict.fromkeys(dims, -1))
    result: xr.DataArray = xr.apply_ufunc(
        _flat_apply(matrix, len(dims)),
        array,
        input_core_dims=[list(dims)],
        output_core_dims=[[DIM_SKETCH]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {DIM_SKETCH: matrix.m}},
    )
    kept = {key: value for key, value in array.attrs.items() if key != "vector_dims"}
    return result.assign_attrs({**kept, "vector_dims": [DIM_SKETCH], "sketch": dict(stored)})


def _flat_apply(matrix: Sketch, n_axes: int) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    def apply(x: NDArray[Any]) -> NDArray[np.float64]:
        return matrix.apply(x.reshape(*x.shape[: x.ndim - n_axes], matrix.size))

    return apply


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = ("scheme", "m", "nonzeros", "seed", "layers", "sizes")
    different = {key: (found.get(key), wanted[key]) for key in keys if found.get(key) != wanted[key]}
    if different:
        words = ", ".join(f"{key} {a!r} against {b!r}" for key, (a, b) in different.items())
        raise ValueError(
            f"two sketches can be compared only if one matrix made both; they differ in {words}: record both "
            "with the same sketch=..., by layer or by row alike"
        )


def _as_read(stored: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", stored)


def _names(dims: str | Sequence[str]) -> tuple[str, ...]:
    return (dims,) if isinstance(dims, str) else tuple(dims)
