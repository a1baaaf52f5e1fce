"""Blocks: how a model's parameters are cut, and clear errors where they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hild_xr.recorders.curvature.blocks import check_k, resolve_blocks


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
        ("layers", None, "'layer', 'rows', 'model'; got 'layers'"),
        ("layer", [], "no parameter is left"),
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
    with pytest.raises(ValueError, match=r"Ask for k=112 or less$"):
        check_k(resolve_blocks(Net(), "model"), 113)


def test_check_k__refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        check_k(resolve_blocks(Net(), "layer"), 0)
