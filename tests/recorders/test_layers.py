from __future__ import annotations

import pytest
from torch import nn

from hild_xr.recorders.layers import layer_dims, select_layers


def test_layer_dims__follow_the_kind_of_layer() -> None:
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(3, 2),
            "conv1": nn.Conv1d(2, 3, 4),
            "conv3": nn.Conv3d(2, 3, 4),
            "up": nn.ConvTranspose2d(2, 3, 4),
            "token": nn.Embedding(5, 2),
        }
    )
    model.register_parameter("scale", nn.Parameter(nn.Linear(1, 1).weight.detach().reshape(())))
    dims = layer_dims(model)
    assert dims["scale"] == ()
    assert dims["fc.weight"] == ("out", "in")
    assert dims["fc.bias"] == ("out",)
    assert dims["conv1.weight"] == ("out", "in", "kw")
    assert dims["conv3.weight"] == ("out", "in", "kd", "kh", "kw")
    assert dims["up.weight"] == ("in", "out", "kh", "kw")
    assert dims["up.bias"] == ("out",)
    assert dims["token.weight"] == ("out", "in")


def test_layer_dims__name_tied_weights_once() -> None:
    model = nn.ModuleDict({"token": nn.Embedding(5, 2), "head": nn.Linear(2, 5, bias=False)})
    model["head"].weight = model["token"].weight
    assert list(layer_dims(model)) == ["token.weight"]


def test_select_layers__takes_frozen_ones_too() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert select_layers(model, None) == ["weight", "bias"]
    assert select_layers(model, ["bias"]) == ["bias"]


def test_select_layers__says_what_is_wrong() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="did you mean 'weight'"):
        select_layers(model, ["weigth"])
    with pytest.raises(TypeError, match="sequence of names"):
        select_layers(model, "weight")
    with pytest.raises(ValueError, match="none twice"):
        select_layers(model, ["bias", "bias"])
    with pytest.raises(ValueError, match="no parameter"):
        select_layers(nn.ReLU(), None)
