"""Blocks: how a model's parameters are cut, and clear errors where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hild_xr.recorders.curvature.blocks import as_planned, check_k, resolve_blocks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(6, 5, bias=False)
        self.fc2.weight = self.fc1.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_layer__is_every_trainable_tensor_once_under_its_qualified_name() -> None:
    blocks = resolve_blocks(Net(), "layer")
    assert [b.label for b in blocks] == ["scale", "conv.weight", "conv.bias", "fc1.weight", "fc1.bias"]
    assert [b.vector_shape for b in blocks] == [(), (4, 2, 3, 3), (4,), (5, 6), (5,)]
    assert [b.size for b in blocks] == [1, 72, 4, 30, 5]
    assert {b.batch_shape for b in blocks} == {()}
    assert {b.count for b in blocks} == {1}


def test_rows__are_one_block_for_each_index_of_the_first_dim() -> None:
    blocks = resolve_blocks(Net(), "rows")
    assert [b.label for b in blocks] == ["conv.weight", "fc1.weight"]
    assert [b.batch_shape for b in blocks] == [(4,), (5,)]
    assert [b.vector_shape for b in blocks] == [(2, 3, 3), (6,)]
    assert [(b.count, b.size) for b in blocks] == [(4, 18), (5, 6)]


def test_model__is_one_flat_block() -> None:
    (block,) = resolve_blocks(Net(), "model")
    assert (block.label, block.vector_shape, block.size, block.batch_shape) == ("model", (112,), 112, ())
    assert block.parameters == ("scale", "conv.weight", "conv.bias", "fc1.weight", "fc1.bias")


def test_module__is_one_flat_block_for_what_each_module_holds_itself() -> None:
    blocks = resolve_blocks(Net(), "module")
    assert [(b.label, b.kind, b.parameters) for b in blocks] == [
        ("root", "module", ("scale",)),
        ("conv", "module", ("conv.weight", "conv.bias")),
        ("fc1", "module", ("fc1.weight", "fc1.bias")),  # the tied weight is in the first module alone
    ]
    assert [b.vector_shape for b in blocks] == [(1,), (76,), (35,)]
    assert [b.sizes for b in blocks] == [(1,), (72, 4), (30, 5)]
    assert all(b.is_flat and b.batch_shape == () and b.count == 1 for b in blocks)
    assert [b.label for b in resolve_blocks(Net(), "module", ["fc1", "root"])] == ["root", "fc1"]


def test_module__leaves_frozen_parameters_out() -> None:
    net = Net()
    net.conv.bias.requires_grad_(False)
    net.fc1.requires_grad_(False)
    assert [b.parameters for b in resolve_blocks(net, "module")] == [("scale",), ("conv.weight",)]


def test_module__of_attention_keeps_the_parameters_that_the_module_holds_itself() -> None:
    (attention, out) = resolve_blocks(nn.MultiheadAttention(4, 2), "module")
    assert (attention.label, attention.parameters) == ("root", ("in_proj_weight", "in_proj_bias"))
    assert (out.label, out.parameters) == ("out_proj", ("out_proj.weight", "out_proj.bias"))


def test_module__refuses_two_blocks_of_one_label() -> None:
    net = nn.Module()
    net.root = nn.Linear(2, 1)
    assert [b.label for b in resolve_blocks(net, "module")] == ["root"]
    net.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"'own': \['gain'\], 'root': \['root.weight', 'root.bias'\]"):
        resolve_blocks(net, "module")


def test_groups__hold_what_names_and_patterns_select_in_the_models_order() -> None:
    groups = {
        "head": ["fc1.bias", "fc1.weight"],
        "weights": "*.weight",
        "all": ["*.weight", "fc1.*", "s?ale"],
    }
    blocks = resolve_blocks(Net(), groups)
    assert [(b.label, b.kind) for b in blocks] == [("head", "group"), ("weights", "group"), ("all", "group")]
    assert [b.parameters for b in blocks] == [
        ("fc1.weight", "fc1.bias"),
        ("conv.weight", "fc1.weight"),
        ("scale", "conv.weight", "fc1.weight", "fc1.bias"),  # once each, whatever names it twice
    ]
    assert [b.vector_shape for b in blocks] == [(35,), (102,), (108,)]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({}, ValueError, "names no group"),
        ({"": ["scale"]}, ValueError, "cannot be empty"),
        ({3: ["scale"]}, TypeError, "a text; got 3"),
        ({"a": []}, ValueError, "'a' holds no parameter"),
        ({"a": [torch.ones(1)]}, TypeError, "names of parameters"),
        ({"a": ["fc1.wieght"]}, ValueError, r"no parameter 'fc1.wieght'; did you mean 'fc1.weight'\?"),
        ({"a": ["scale", "fc3.*"]}, ValueError, r"'fc3.\*' of block 'a' fits no .*did you mean 'fc1"),
        ({"a": ["fc1"]}, ValueError, r"is a module, not a parameter: write 'fc1\.\*'"),
        ({"a": ["frozen.weight"]}, ValueError, "is frozen"),
        ({"a": ["frozen.*"]}, ValueError, "fits no trainable parameter"),
        ({"a": ["fc2.weight"]}, ValueError, "tied to 'fc1.weight'"),
    ],
)
def test_groups__say_what_is_wrong_and_what_to_do(
    groups: dict[str, list[str]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_blocks(Net(), groups)


def test_groups__take_no_layers() -> None:
    with pytest.raises(ValueError, match="say what they hold"):
        resolve_blocks(Net(), {"a": ["scale"]}, ["a"])


def test_blocks_made_before__come_back_if_they_fit_the_model() -> None:
    net = Net()
    blocks = [resolve_blocks(net, "module")[1], resolve_blocks(net, "rows")[1]]
    assert resolve_blocks(net, blocks) == blocks
    with pytest.raises(ValueError, match="no label twice"):
        resolve_blocks(net, [blocks[0], blocks[0]])
    with pytest.raises(ValueError, match="at least one block"):
        resolve_blocks(net, [])
    with pytest.raises(ValueError, match="layers is for"):
        resolve_blocks(net, blocks, ["conv"])
    with pytest.raises(TypeError, match="sequence of Block; got 3"):
        resolve_blocks(net, 3)
    with pytest.raises(TypeError, match="sequence of Block"):
        resolve_blocks(net, ["conv"])  # type: ignore[list-item]
    net.conv.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'conv' has the parameters .* anew"):
        resolve_blocks(net, blocks)


@pytest.mark.parametrize(
    ("kind", "names", "change", "stays"),
    [
        ("layer", ["fc1.bias"], ("conv.bias", False), True),
        ("layer", ["fc1.bias"], ("fc1.bias", False), False),
        ("rows", ["fc1.weight"], ("fc1.weight", False), False),
        ("module", ["fc1"], ("fc1.bias", False), False),
        ("module", ["fc1"], ("frozen.bias", True), True),
        ("module", ["conv"], ("fc1.bias", False), True),
        ("model", None, ("frozen.bias", True), False),
        ("model", None, ("fc1.bias", False), False),
        ({"a": ["fc1.*"]}, None, ("fc1.bias", False), False),
        ({"a": ["fc1.*"]}, None, ("frozen.bias", True), True),
    ],
)
def test_as_planned__is_whether_the_block_is_still_the_one_that_was_cut(
    kind: Any, names: list[str] | None, change: tuple[str, bool], stays: bool
) -> None:
    net = Net()
    (block,) = resolve_blocks(net, kind, names)
    assert as_planned(net, block)
    net.get_parameter(change[0]).requires_grad_(change[1])
    assert as_planned(net, block) is stays


def test_as_planned__sees_that_a_module_grew() -> None:
    net = Net()
    net.fc1.bias.requires_grad_(False)
    (block,) = resolve_blocks(net, "module", ["fc1"])
    net.fc1.bias.requires_grad_(True)
    assert not as_planned(net, block)


def test_layers__select_in_the_models_order() -> None:
    blocks = resolve_blocks(Net(), "layer", ["fc1.bias", "conv.weight"])
    assert [b.label for b in blocks] == ["conv.weight", "fc1.bias"]
    assert [b.label for b in resolve_blocks(Net(), "layer", "fc1.bias")] == ["fc1.bias"]


def test_layers__are_the_same_for_a_compiled_model() -> None:
    net = Net()
    assert resolve_blocks(torch.compile(net, backend="eager"), "rows") == resolve_blocks(net, "rows")


@pytest.mark.parametrize(
    ("blocks", "layers", "message"),
    [
        (
            "layer",
            ["fc1.wieght"],
            r"no parameter 'fc1.wieght'; did you mean 'fc1.weight'\? .* scale, conv.weight",
        ),
        ("layer", ["frozen.weight"], "'frozen.weight' is frozen"),
        ("layer", ["fc2.weight"], "tied to 'fc1.weight'"),
        ("rows", ["fc1.bias"], r"shape \(5,\) and so no rows"),
        ("model", ["fc1.bias"], "blocks='model' takes all"),
        ("layers", None, "'layer', 'rows', 'module', 'model', or a mapping .*; got 'layers'"),
        ("layer", [], "no parameter is left"),
        ("layer", ["fc1"], r"'fc1' is a module, not a parameter: write 'fc1\.\*'"),
        ("module", ["fc"], r"no such module 'fc'; did you mean 'fc1'\? .* are root, conv, fc1"),
        ("module", ["frozen"], r"no such module 'frozen'\. Its modules"),
        ("module", [], "no module is left"),
    ],
)
def test_resolve_blocks__says_what_is_wrong_and_what_to_do(
    blocks: str, layers: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_blocks(Net(), blocks, layers)


def test_rows__refuse_a_model_without_a_weight_of_two_dims() -> None:
    with pytest.raises(ValueError, match=r"no parameter is left .* two dims"):
        resolve_blocks(nn.LayerNorm(3), "rows")


def test_resolve_blocks__refuses_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="unfreeze"):
        resolve_blocks(nn.Linear(1, 1).requires_grad_(False), "layer")


def test_check_k__lists_all_blocks_that_are_too_small_and_the_remedies() -> None:
    blocks = resolve_blocks(Net(), "layer")
    check_k(blocks, 1)
    with pytest.raises(
        ValueError, match=r"k=6 .*: scale \(1\), conv.bias \(4\), fc1.bias \(5\)\. Ask for k=1 "
    ) as error:
        check_k(blocks, 6)
    assert "layers=['conv.weight', 'fc1.weight']" in str(error.value)


def test_check_k__offers_no_layers_where_none_is_large_enough() -> None:
    with pytest.raises(ValueError, match=r"a \(1\)\. Ask for k=1 or less, or leave these groups out$"):
        check_k(resolve_blocks(Net(), {"a": "scale", "b": "fc1.*"}), 2)
    with pytest.raises(ValueError, match=r"Ask for k=112 or less$"):
        check_k(resolve_blocks(Net(), "model"), 113)


def test_check_k__refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        check_k(resolve_blocks(Net(), "layer"), 0)
