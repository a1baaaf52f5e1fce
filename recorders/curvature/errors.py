"""The error that the curvature kernels raise for numbers that are not finite."""

from __future__ import annotations


class NonFiniteCurvatureError(ArithmeticError):
    """The loss, a gradient or a curvature product is NaN or infinite.

    A spectrum computed from such numbers would be meaningless, so none is
    returned. A recorder catches this error, marks the record and lets training
    go on.

    Parameters
    ----------
    block
        Label of the block (``"fc1.weight"``, ``"model"``), or ``"loss"``.
    what
        What was not finite.

    Examples
    --------
    >>> print(NonFiniteCurvatureError("fc1.weight", "a product"))
    a product of 'fc1.weight' is NaN or infinite: the data hold NaN or infinity, or the loss ...
    """

    def __init__(self, block: str, what: str) -> None:
        super().__init__(block, what)
        self.block = block
        self.what = what

    def __str__(self) -> str:
        return (
            f"{self.what} of {self.block!r} is NaN or infinite: the data hold NaN or infinity, or the loss "
            "has diverged, overflowed or has no derivative here. See whether inputs and targets "
            "pass torch.isfinite; then lower the learning rate, or compute with dtype=torch.float64"
        )
