"""Handwritten digits: scikit-learn's 8x8 images, softmax regression or a 64-32-10 ReLU network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.objective import Objective
from hild_xr.recorders.problems.checks import check_choice, check_integer, check_number
from hild_xr.recorders.problems.gaussian_mixture import SoftmaxRegression
from hild_xr.recorders.problems.layers import blank_linear
from hild_xr.recorders.problems.problem import Problem
from hild_xr.recorders.problems.streams import Purpose, stream

IMAGES = 1797
PIXELS = 64
CLASSES = 10


class ReluNetwork(nn.Module):
    """``fc2(relu(fc1(Y)))`` with biases."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1 = blank_linear(inputs, hidden, bias=True)
        self.fc2 = blank_linear(hidden, classes, bias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, of shape (samples, classes)."""
        outputs: Tensor = self.fc2(F.relu(self.fc1(inputs)))
        return outputs


@dataclass(frozen=True, kw_only=True)
class Digits(Problem):
    """Digits: 1797 images of 8x8 pixels in 10 classes, learnt by SGD.

    Pixels are divided by 16, so that they lie in [0, 1], and centred.

    Parameters
    ----------
    hidden
        None: softmax regression, one linear layer 64 -> 10 without bias, named ``linear``; row c
        of its weight is the x^c of the theory. A number: the network 64 -> hidden -> 10 with
        ReLU and biases, its layers named ``fc1`` and ``fc2``.
    beta
        Regulariser of all parameters.
    learning_rate
        Learning rate of SGD.
    batch_size
        Number of samples in a step.
    centred
        Whether the mean training image is subtracted. Without, that one direction holds most of
        every block's trace and hides the rest.
    test_samples
        Number of images kept for testing.
    split_seed
        Seed of the split into training and test images: a property of the problem, shared by
        all runs.

    Raises
    ------
    TypeError, ValueError
        If a hyperparameter is out of range.
    ModuleNotFoundError
        When the images are first used, if scikit-learn is not installed.

    Examples
    --------
    >>> problem = Digits()
    >>> model = problem.model(seed=0)
    >>> problem.train(model, problem.optimizer(model), steps=2000, seed=0)
    >>> problem.accuracy(model, *problem.samples("test")) > 0.85
    True
    """

    hidden: int | None = None
    beta: float = 0.01
    learning_rate: float = 0.05
    batch_size: int = 1
    centred: bool = True
    test_samples: int = 360
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden is not None:
            check_integer("hidden", self.hidden, minimum=1)
        check_number("beta", self.beta, positive=False)
        check_number("learning_rate", self.learning_rate, positive=True)
        check_integer("test_samples", self.test_samples, minimum=1, maximum=IMAGES - 1)
        check_integer("batch_size", self.batch_size, minimum=1, maximum=IMAGES - self.test_samples)
        check_integer("split_seed", self.split_seed, minimum=0)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy of logits (samples, 10) with class numbers (samples,), mean over the samples."""
        return F.cross_entropy

    def model(self, seed: int) -> nn.Module:
        """Return the network at its start.

        The softmax layer starts from N(0, I/64), as the k-GMM; the ReLU network from torch's
        uniform distribution on +-1/sqrt(fan in), weights and biases.
        """
        generator = stream(Purpose.START, seed)
        if self.hidden is None:
            linear = SoftmaxRegression(PIXELS, CLASSES)
            nn.init.normal_(linear.linear.weight, std=PIXELS**-0.5, generator=generator)
            return linear
        network = ReluNetwork(PIXELS, self.hidden, CLASSES)
        for layer in (network.fc1, network.fc2):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        return network

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class of the largest logit, of shape (samples,)."""
        return outputs.argmax(-1)

    def samples(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Return the images and classes of one part of the data.

        Parameters
        ----------
        split
            ``"train"`` or ``"test"``.

        Returns
        -------
        inputs : Tensor
            float32, of shape (samples, 64).
        targets : Tensor
            Class numbers, of shape (samples,).

        Raises
        ------
        ValueError
            If ``split`` is another.
        ModuleNotFoundError
            If scikit-learn is not installed.
        """
        check_choice("split", split, ("train", "test"))
        inputs, targets = self._images
        part = slice(self.test_samples, None) if split == "train" else slice(self.test_samples)
        return inputs[part], targets[part]

    def objective(self, split: Literal["train", "test"] = "train") -> Objective:
        """Return what Hessian and G-matrix are taken of: the mean loss over the training or the test images.

        Parameters
        ----------
        split
            ``"train"`` or ``"test"``.

        Returns
        -------
        Objective
            With regulariser ``(beta/2) |theta|^2``.

        Raises
        ------
        ValueError
            If ``split`` is another.
        """
        return Objective(self.loss, *self.samples(split), l2=self.beta)

    @property
    def _batch_size(self) -> int:
        return self.batch_size

    @property
    def _block_batches(self) -> int:
        """A block is one pass over the training images; its last batch may be smaller."""
        return -(-len(self.samples("train")[0]) // self.batch_size)

    def _block(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.samples("train")
        order = torch.randperm(len(inputs), generator=stream(Purpose.TRAIN, seed, index))
        return inputs[order], targets[order]

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        """All images in the order of the split: the test images come first."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            message = "the digits need scikit-learn: pip install 'hild-xr[examples]'"
            raise ModuleNotFoundError(message, name=error.name) from error
        images = load_digits()
        order = torch.randperm(len(images.target), generator=stream(Purpose.SPLIT, self.split_seed))
        inputs = torch.tensor(images.data, dtype=torch.float32)[order] / 16
        if self.centred:
            inputs -= inputs[self.test_samples :].mean(0)
        return inputs, torch.tensor(images.target)[order]
