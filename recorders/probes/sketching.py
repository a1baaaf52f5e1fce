"""Sketches on the device: the matrix of :mod:`hild_xr.sketch` in torch, and where a probe uses it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from hild_xr.sketch import CHUNK, KEPT, JohnsonLindenstrauss, Sketch, buckets
from hild_xr.variables import DIM_SKETCH

SketchOption = int | JohnsonLindenstrauss | None
"""``sketch=`` of a probe: m, or m with a seed and nonzeros; None stores vectors whole."""

ERROR_LAW = (
    "inner products <x, y> of sketches are unbiased; their standard error is at most "
    "sqrt((|x|^2 |y|^2 + <x, y>^2) / m)"
)

_SIGN = 2**63
_GOLDEN, *_MIX = (
    constant - 2 * _SIGN for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class VectorLayout:
    """How vectors are stored: whole on their own dims, or as sketches where they are longer than m.

    Parameters
    ----------
    batch_dims, batch_shape
        Dims and extents that number the vectors; they stay.
    vector_dims, vector_shape
        Dims and extents of one vector.
    sketch
        Its matrix, or None to store it whole.
    """

    batch_dims: tuple[str, ...]
    batch_shape: tuple[int, ...]
    vector_dims: tuple[str, ...]
    vector_shape: tuple[int, ...]
    sketch: Sketch | None

    @property
    def dims(self) -> tuple[str, ...]:
        """Dims as stored."""
        return (*self.batch_dims, *self._stored_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents as stored."""
        return (*self.batch_shape, *(self.vector_shape if self.sketch is None else (self.sketch.m,)))

    @property
    def attrs(self) -> dict[str, JsonValue]:
        """Attributes: ``vector_dims``, and all that is needed to make the sketch again."""
        attrs: dict[str, JsonValue] = {"vector_dims": list(self._stored_dims)}
        if self.sketch is not None:
            attrs["sketch"] = {
                **self.sketch.to_json(),
                "dims": list(self.vector_dims),
                "shape": list(self.vector_shape),
                "error": ERROR_LAW,
            }
        return attrs

    def dtype(self, own: str) -> str:
        """Dtype as stored, of vectors in the dtype ``own``: a sketch is at least float32."""
        return own if self.sketch is None else str(np.promote_types(own, "float32"))

    def __call__(self, tensor: Tensor) -> Tensor:
        """Bring vectors on the last axes into the stored layout."""
        if self.sketch is None:
            return tensor
        batch = tensor.shape[: tensor.ndim - len(self.vector_shape)]
        sketched = apply(self.sketch, tensor.reshape(*batch, self.sketch.size))
        return sketched.to(torch.promote_types(tensor.dtype, torch.float32))

    @property
    def _stored_dims(self) -> tuple[str, ...]:
        return self.vector_dims if self.sketch is None else (DIM_SKETCH,)


def vector_layout(
    family: JohnsonLindenstrauss | None,
    sizes: Mapping[str, int],
    vectors: tuple[Sequence[str], Sequence[int]],
    batch: tuple[Sequence[str], Sequence[int]] = ((), ()),
) -> VectorLayout:
    """Decide how vectors are stored: as sketches only where that is shorter.

    The rule looks at m and at the vector's size alone, so that all probes with the same
    ``sketch`` agree on it.

    Parameters
    ----------
    family
        The probe's sketch.
    sizes
        Numbers in each layer that a vector holds.
    vectors, batch
        Dims and extents of a vector, and those that number the vectors.

    Examples
    --------
    >>> layout = vector_layout(as_family(64), {"fc.weight": 300}, (("out", "in"), (3, 100)))
    >>> layout.dims, layout.shape, layout(torch.ones(7, 3, 100)).shape
    (('sketch',), (64,), torch.Size([7, 64]))
    """
    longer = family is not None and sum(sizes.values()) > family.m
    sketch = family.over(dict(sizes)) if family is not None and longer else None
    return VectorLayout(tuple(batch[0]), tuple(batch[1]), tuple(vectors[0]), tuple(vectors[1]), sketch)


def vectors_of_layer(
    family: JohnsonLindenstrauss | None, name: str, dims: Sequence[str], shape: Sequence[int], *, rows: bool
) -> VectorLayout:
    """Return the layout of a parameter tensor as one vector, or row by row.

    A tensor of fewer than two dims has no rows and stays one vector.

    Examples
    --------
    >>> vectors_of_layer(as_family(64), "fc.weight", ("out", "in"), (3, 100), rows=True).dims
    ('out', 'sketch')
    """
    first = 1 if rows and len(dims) > 1 else 0
    size = math.prod(shape[first:])
    return vector_layout(family, {name: size}, (dims[first:], shape[first:]), (dims[:first], shape[:first]))


def as_family(option: SketchOption) -> JohnsonLindenstrauss | None:
    """Turn the option of a probe into a family of sketches.

    Raises
    ------
    ValueError
        If m is not a positive multiple of the nonzeros in a column.

    Examples
    --------
    >>> as_family(512)
    JohnsonLindenstrauss(m=512, seed=0, nonzeros=4)
    """
    return (
        option if option is None or isinstance(option, JohnsonLindenstrauss) else JohnsonLindenstrauss(option)
    )


def apply(sketch: Sketch, vectors: Tensor) -> Tensor:
    """Sketch the vectors along the last axis, on their device, to the bits of ``sketch.apply``.

    Sums are of integers, so the result does not depend on the order in which a GPU adds
    (``index_add_`` of floats would). Nothing waits for the device.

    Parameters
    ----------
    sketch
        The matrix.
    vectors
        Real tensor of shape (..., p); no gradient is kept.

    Returns
    -------
    Tensor
        float64, shape (..., m). NaN throughout where a vector is not finite.

    Raises
    ------
    ValueError
        If the last axis is not of the sketch's size.

    Examples
    --------
    >>> apply(JohnsonLindenstrauss(m=16).over({"fc.weight": 300}), torch.ones(2, 300)).shape
    torch.Size([2, 16])
    """
    sketch.check_size(vectors.shape)
    flat = vectors.detach().reshape(-1, sketch.size)
    at_once = max(1, CHUNK // sketch.size)
    parts = [_apply(sketch, some) for some in flat.split(at_once)]
    return torch.cat(parts).reshape(*vectors.shape[:-1], sketch.m)


def _apply(sketch: Sketch, x: Tensor) -> Tensor:
    m, s = sketch.m, sketch.family.nonzeros
    low, high = x.aminmax(dim=1)
    largest = torch.maximum(high, -low).double()
    finite = largest.isfinite()
    exponent = sketch.headroom - torch.frexp(torch.where(finite, largest, 0.0)).exponent.long()
    up, down = _powers_of_two(exponent), _powers_of_two(-exponent)
    offset = 2 * m * torch.arange(len(x), device=x.device)[:, None]
    sums = torch.zeros(2 * m * len(x), dtype=torch.int64, device=x.device)
    for at, key, start, stop in sketch.pieces():
        fixed = (x[:, at : at + stop - start].double() * up[0]).mul_(up[1]).round_().long().reshape(-1)
        for block in _table(key, start, stop, m, s, x.device):
            sums.index_add_(0, block if len(x) == 1 else (offset + block).reshape(-1), fixed)
    signed = sums.reshape(len(x), 2, m)
    result = (signed[:, 0] - signed[:, 1]).double() * down[0] * down[1] * (1 / math.sqrt(s))
    return result.masked_fill_(~finite[:, None], math.nan)


def _table(key: int, start: int, stop: int, m: int, nonzeros: int, device: torch.device) -> Tensor:
    place = "numpy" if device.type == "cpu" else str(device)  # NumPy and torch on the CPU share tables
    function = buckets if device.type == "cpu" else functools.partial(device_buckets, device=device)
    make = functools.partial(function, key, start, stop, m, nonzeros)
    return torch.as_tensor(KEPT.get((place, key, start, stop, m, nonzeros), make))


def device_buckets(key: int, start: int, stop: int, m: int, nonzeros: int, device: torch.device) -> Tensor:
    """Compute :func:`hild_xr.sketch.buckets` on a device; int64 arithmetic wraps as uint64 does.

    Examples
    --------
    >>> device_buckets(1234567, 0, 3, m=8, nonzeros=2, device=torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    words, width = -(-nonzeros // 2), m // nonzeros
    first = words * torch.arange(start, stop, device=device)
    table = torch.empty((nonzeros, stop - start), dtype=torch.int32, device=device)
    for word in range(words):
        drawn = _splitmix64(key, first + word)
        for block in range(2 * word, min(2 * word + 2, nonzeros)):
            half = (drawn >> (32 * (block % 2))) & (2**32 - 1)
            table[block] = block * width + (((half >> 1) * width) >> 31) + m * (half & 1)
    return table


def _splitmix64(key: int, index: Tensor) -> Tensor:
    z = (index + 1) * _GOLDEN + (key if key < _SIGN else key - 2 * _SIGN)
    z = (z ^ _shifted(z, 30)) * _MIX[0]
    z = (z ^ _shifted(z, 27)) * _MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    # torch shifts the sign in from the left, the hash is of unsigned numbers
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _powers_of_two(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose product is ``2.0**exponent``, made of their bits: exp2 may round."""
    half = exponent.div(2, rounding_mode="floor")
    one, other = (((part + 1023) << 52).view(torch.float64)[:, None] for part in (half, exponent - half))
    return one, other
