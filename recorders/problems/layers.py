"""Linear layers made without drawing from the global random state."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import skip_init


def blank_linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Return a linear layer whose parameters are still to be filled.

    ``nn.Linear`` itself would draw a start from the global generator.

    Examples
    --------
    >>> blank_linear(3, 2, bias=False).weight.shape
    torch.Size([2, 3])
    """
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs, bias=bias)
    return layer
