"""Networks at points of their training, whose curvature the benchmarks take."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.problems import Digits

Inputs = Literal["mixture", "noise", "digits"]
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """How a state comes about.

    Parameters
    ----------
    inputs
        ``"mixture"``: ten Gaussians, means and noise with standard deviation j^-1/2 in coordinate j;
        ``"noise"``: standard normal inputs with random labels; ``"digits"``: scikit-learn's images.
    steps
        Steps of SGD, batch 128, learning rate 0.1.
    seed
        Of start, data and batches.
    activation
        Between the layers.
    sizes
        Widths from input to output.
    samples
        Number of samples M, also those the curvature is taken of.
    """

    inputs: Inputs
    steps: int
    seed: int = 0
    activation: type[nn.Module] = nn.Tanh
    sizes: tuple[int, ...] = (784, 256, 256, CLASSES)
    samples: int = 2048


# The states that solvers were tuned on: those of the measured table of the project's facts.
TUNED = {
    "M100": Setting("mixture", 100),
    "R100": Setting("noise", 100),
    "R0": Setting("noise", 0),
}
# Seeds, activations and data that nothing was tuned on.
FRESH = {
    "M100 seed 11": Setting("mixture", 100, seed=11),
    "R100 seed 12": Setting("noise", 100, seed=12),
    "R0 seed 13": Setting("noise", 0, seed=13),
    "M200 seed 14": Setting("mixture", 200, seed=14),
    "GELU M100 seed 15": Setting("mixture", 100, seed=15, activation=nn.GELU),
    "digits": Setting("digits", 300, seed=16, activation=nn.ReLU, sizes=(64, 32, CLASSES), samples=1437),
}
SETTINGS = TUNED | FRESH
TINY_SETTING = Setting("mixture", 20, seed=1, sizes=(12, 8, 6, 5), samples=64)


@dataclass(frozen=True)
class State:
    """A network in eval mode, its data, and the mean cross-entropy between them."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def objective(self) -> rec.Objective:
        """What our own solver is given."""
        return rec.Objective(F.cross_entropy, self.inputs, self.targets)

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the parameters."""
        return tuple(name for name, _ in self.model.named_parameters())

    def double(self) -> State:
        """Return a copy in float64."""
        return State(copy.deepcopy(self.model).double(), self.inputs.double(), self.targets)


def network(setting: Setting) -> nn.Module:
    """Return the network at its start."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        for width_in, width_out in zip(setting.sizes, setting.sizes[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), setting.activation()]
    return nn.Sequential(*layers[:-1])


def data(setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (M, d) and class numbers (M,)."""
    n, d, classes = setting.samples, setting.sizes[0], setting.sizes[-1]
    if setting.inputs == "digits":
        inputs, targets = Digits(hidden=setting.sizes[1]).samples("train")
        return inputs[:n], targets[:n]
    if setting.inputs == "noise":
        inputs = torch.randn(n, d, generator=generator)
        return inputs, torch.randint(0, classes, (n,), generator=generator)
    targets = torch.randint(0, classes, (n,), generator=generator)
    scale = torch.arange(1, d + 1) ** -0.5
    means = torch.randn(classes, d, generator=generator) * scale
    return means[targets] + torch.randn(n, d, generator=generator) * scale, targets


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Take steps of SGD on random batches of 128."""
    for _ in range(steps):
        index = torch.randint(0, len(targets), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[index]), targets[index]).backward()
        optimizer.step()


def state(setting: Setting) -> State:
    """Train a network to the state of a setting."""
    model, generator = network(setting), torch.Generator().manual_seed(setting.seed + 1)
    inputs, targets = data(setting, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, inputs, targets, setting.steps, generator)
    model.zero_grad()
    return State(model.eval(), inputs, targets)
