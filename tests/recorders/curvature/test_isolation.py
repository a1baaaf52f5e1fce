"""Isolation: whatever happens inside, everything is found as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, MatrixKind
from hild_xr.recorders.curvature.isolation import Measurement, isolated, unwrapped
from hild_xr.recorders.objective import Objective


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].eval()
    return net


def switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_isolated__is_eval_mode_with_gradients_and_without_fused_kernels() -> None:
    net = model()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), isolated(net):
        assert not any(module.training for module in net.modules())
        assert switches() == (True, False, False, False, True, False)


@pytest.mark.parametrize("fails", [False, True])
def test_isolated__restores_flags_buffers_rng_and_switches(fails: bool) -> None:
    net = model()
    flags, rng, before = [m.training for m in net.modules()], torch.get_rng_state(), switches()
    state = copy.deepcopy(net.state_dict())
    buffers = dict(net.named_buffers())
    try:
        with isolated(net):
            net.train()
            net(torch.randn(8, 3))  # draws random numbers and moves the running statistics
            net[1].num_batches_tracked = torch.tensor(99)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert switches() == before
    assert all(net.get_buffer(name) is buffer for name, buffer in buffers.items())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_isolated__leaves_the_version_of_untouched_buffers() -> None:
    # A backward pass of the user that saved a buffer would fail if its version moved.
    net = model()
    versions = [buffer._version for buffer in net.buffers()]
    with isolated(net):
        net(torch.randn(8, 3))
    assert [buffer._version for buffer in net.buffers()] == versions


def doubling(module: nn.Module, *gradients: Any) -> tuple[Tensor | None, ...]:
    """Double the gradients by the inputs, or by the outputs, of a module."""
    return tuple(None if g is None else 2 * g for g in gradients[0])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
def test_isolated__runs_no_backward_hook_and_leaves_all_of_them_in_place(fails: bool, of_all: bool) -> None:
    net, calls = model(), []

    def noted(*args: Any) -> Any:
        calls.append(args[0])
        return doubling(*args)

    every = nn.modules.module
    handles = [
        every.register_module_full_backward_hook(noted)
        if of_all
        else net[0].register_full_backward_hook(noted),
        every.register_module_full_backward_pre_hook(noted)
        if of_all
        else net[3].register_full_backward_pre_hook(noted),
    ]
    removed = net[1].register_full_backward_hook(noted)
    inputs = torch.randn(8, 3, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(net(inputs).square().sum(), inputs)[0]

    try:
        hooks = [(m._backward_hooks, dict(m._backward_hooks)) for m in net.modules()]
        try:
            with isolated(net):
                isolated_gradient = gradient()
                assert calls == []
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
        for module, (own, entries) in zip(net.modules(), hooks, strict=True):
            assert module._backward_hooks is own
            assert dict(own) == entries
        with isolated(net):
            removed.remove()
        assert net[1]._backward_hooks == {}
        net.eval()
        outside = gradient()
        assert set(calls) == (set(net.modules()) if of_all else {net[0], net[3]})
        assert not torch.allclose(outside, isolated_gradient)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(gradient(), isolated_gradient)


@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
def test_backward_hooks__are_no_part_of_the_curvature(matrix: MatrixKind) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    objective = Objective(F.cross_entropy, torch.randn(8, 3), torch.arange(8) % 2)

    def curvature_of_it() -> Tensor:
        with Curvature(net, objective) as curvature:
            return curvature.eigenpairs(3, matrix=matrix, blocks="model")["model"].eigenvalues

    expected = curvature_of_it()
    net[1].register_full_backward_hook(doubling)
    net[2].register_full_backward_pre_hook(doubling)
    net[0].weight.register_hook(lambda gradient: 2 * gradient)
    assert torch.equal(curvature_of_it(), expected)


def test_measurement__can_be_entered_inside_itself_and_again() -> None:
    net = model()
    measuring = Measurement(net)
    for _ in range(2):
        with measuring():
            with measuring():
                assert not net.training
            assert not net.training
        assert net.training


def test_unwrapped__finds_the_module_inside_wrappers() -> None:
    net = model()
    compiled = torch.compile(net, backend="eager")
    assert unwrapped(compiled) is net
    assert unwrapped(nn.DataParallel(net)) is net
    assert unwrapped(net) is net


def test_isolated__makes_attention_twice_differentiable() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    inputs = torch.randn(2, 3, 4, requires_grad=True)

    def second_derivative() -> Tensor:
        output = attention(inputs, inputs, inputs, need_weights=False)[0].pow(2).sum()
        (gradient,) = torch.autograd.grad(output, inputs, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), inputs)
        return second

    with isolated(attention):
        assert bool(second_derivative().abs().sum() > 0)
