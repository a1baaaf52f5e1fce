"""The model as a function of its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature.functional import FunctionalModel


def test_trainable__shares_memory_and_nothing_else_with_the_parameters() -> None:
    net = nn.Linear(2, 1)
    calls: list[Tensor] = []
    net.weight.register_hook(calls.append)
    function = FunctionalModel(net)
    function(torch.ones(3, 2)).sum().backward()
    assert function.trainable["weight"].data_ptr() == net.weight.data_ptr()
    assert net.weight.grad is None
    assert calls == []


def test_dtype__computes_in_another_precision_on_copies() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    function = FunctionalModel(net, torch.float64)
    outputs = function(torch.ones(3, 2, dtype=torch.float64))
    assert outputs.dtype == torch.float64
    torch.testing.assert_close(outputs.float(), net(torch.ones(3, 2)))
    assert net[0].weight.dtype == torch.float32


def test_call__is_the_same_function_each_time_even_if_the_model_counts_its_calls() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs) * self.calls

    net = Counting()
    function = FunctionalModel(net)
    first, second = function(torch.ones(1, 1)), function(torch.ones(1, 1))
    assert torch.equal(first, second)
    assert float(net.calls) == 0


def test_call__takes_other_values_for_some_parameters() -> None:
    function = FunctionalModel(nn.Linear(2, 1))
    outputs = function(torch.ones(1, 2), {"weight": torch.zeros(1, 2), "bias": torch.tensor([7.0])})
    assert outputs.tolist() == [[7.0]]


def test_init__refuses_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        FunctionalModel(nn.Linear(2, 1).requires_grad_(False))


def test_init__refuses_complex_parameters() -> None:
    with pytest.raises(TypeError, match="'weight' is complex"):
        FunctionalModel(nn.Linear(2, 1, dtype=torch.complex64))


def test_flat__joins_the_parameters_in_the_order_given() -> None:
    function = FunctionalModel(nn.Linear(2, 1))
    expected = torch.cat([function.trainable["bias"], function.trainable["weight"][0]])
    assert torch.equal(function.flat(("bias", "weight")), expected.detach())
