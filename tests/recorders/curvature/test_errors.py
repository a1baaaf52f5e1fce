"""Numbers that are not finite: what the error says of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, NonFiniteCurvatureError
from hild_xr.recorders.objective import Objective


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_data__are_named_among_the_causes(value: float) -> None:
    inputs = torch.ones(3, 2)
    inputs[1, 0] = value
    objective = Objective(F.mse_loss, inputs, torch.zeros(3, 1))
    with (
        pytest.raises(
            NonFiniteCurvatureError, match=r"(?s)the data hold NaN.*isfinite.*learning rate"
        ) as caught,
        Curvature(nn.Linear(2, 1), objective),
    ):
        pass
    assert caught.value.block == "loss"
