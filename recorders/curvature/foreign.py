"""Symmetric operators of other packages behind the products that our solver takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hild_xr.recorders.curvature.functional import at_least_float32


@dataclass(frozen=True)
class ForeignOperator:
    """A square operator known by its shape and its products with vectors.

    Parameters
    ----------
    operator
        What has ``shape`` and ``@``.
    size
        Its number of rows and columns.
    takes_numpy
        Whether it multiplies NumPy vectors; else torch vectors.
    product_dtype
        Dtype of the vectors it is given.
    device
        Device of the vectors it is given.
    """

    operator: Any
    size: int
    takes_numpy: bool
    product_dtype: torch.dtype
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the basis: products may be in half precision, orthogonality may not."""
        return at_least_float32(torch.empty(0, dtype=self.product_dtype)).dtype

    def products(self, vectors: Tensor, problems: Tensor) -> Tensor:
        """Multiply vectors (n, p) one by one, as :func:`lanczos_eigenpairs` asks.

        Raises
        ------
        ValueError
            If a product has another shape than its vector.
        """
        del problems
        return torch.stack([self._product(vector) for vector in vectors]).to(vectors)

    def _product(self, vector: Tensor) -> Tensor:
        given = vector.to(self.device, self.product_dtype)
        if self.takes_numpy:
            product = torch.from_numpy(np.array(self.operator @ given.numpy()))
        else:
            # Curvature is taken by autograd, also when the caller is under no_grad or in inference mode,
            # whose tensors it cannot use; their clones it can.
            with torch.inference_mode(False), torch.enable_grad():
                product = self.operator @ given.clone()
            product = product.detach()
        if product.shape != vector.shape:
            raise ValueError(
                f"the operator's product with a vector of shape {tuple(vector.shape)} has shape "
                f"{tuple(product.shape)}: operator @ vector must keep the shape"
            )
        return product


def foreign_operator(operator: Any) -> ForeignOperator:
    """Look at an operator of another package: its size, and what vectors it multiplies.

    What has a NumPy dtype (SciPy's LinearOperator, arrays, sparse matrices) is given NumPy
    vectors; all else torch vectors, in its own ``dtype`` and on its own ``device`` where it has
    these (curvlinops' operators, tensors), else float32 on the CPU.

    Parameters
    ----------
    operator
        What has ``shape`` and ``@``.

    Returns
    -------
    ForeignOperator
        The operator with what was found.

    Raises
    ------
    TypeError
        If it has no shape, no ``@``, or is not of real floating numbers.
    ValueError
        If it is not square.

    Examples
    --------
    >>> found = foreign_operator(np.diag([3.0, 1.0]))
    >>> found.size, found.dtype, found.products(torch.ones(1, 2), torch.zeros(1))
    (2, torch.float64, tensor([[3., 1.]]))
    """
    shape = getattr(operator, "shape", None)
    if shape is None or not hasattr(operator, "__matmul__"):
        raise TypeError(
            "an operator needs a shape and products with vectors, operator @ vector, as those of curvlinops "
            f"and scipy.sparse.linalg.LinearOperator; got {type(operator).__name__}"
        )
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"eigenpairs are those of a square symmetric operator; got the shape {tuple(shape)}")
    dtype, device = _declared(operator, "dtype"), _declared(operator, "device")
    takes_numpy = isinstance(dtype, np.dtype)
    if takes_numpy and dtype.kind in "biuf":
        single = dtype in (np.dtype("float16"), np.dtype("float32"))
        dtype, device = torch.float32 if single else torch.float64, "cpu"
    elif dtype is None:
        dtype = torch.float32
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"the operator must be of real floating numbers; its dtype is {dtype}")
    return ForeignOperator(operator, int(shape[0]), takes_numpy, dtype, torch.device(device or "cpu"))


def _declared(operator: Any, name: str) -> Any:
    try:
        return getattr(operator, name, None)
    except NotImplementedError:  # curvlinops' base class declares dtype and device, and some lack them
        return None
