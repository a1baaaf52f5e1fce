"""What every problem offers, and the plain torch training loop they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hild_xr.recorders.problems.checks import check_integer

PROGRESS_STEPS = 32
"""Steps between two calls of ``progress``: smooth for the eye, too rare to cost time."""


class Problem(ABC):
    """A network, a loss, samples and SGD: everything of a run but the recorder.

    The loss that SGD descends is ``loss(model(inputs), targets) + (beta/2) |theta|^2``
    over all parameters theta; the second term is the optimizer's weight decay
    in training and ``l2`` in the objective.
    """

    beta: float

    def hyperparameters(self) -> dict[str, JsonValue]:
        """Return the fields of the problem by name as JSON values, for the configuration of a run.

        Examples
        --------
        >>> from hild_xr.recorders.problems import XorMixture
        >>> XorMixture(planted_centres=(4, 3)).hyperparameters()["planted_centres"]
        [4, 3]
        """
        values = {name: getattr(self, name) for name in getattr(self, "__dataclass_fields__", ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Learning rate of SGD."""

    @property
    @abstractmethod
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Loss ``(outputs, targets) -> mean over the samples``, without the regulariser."""

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return the network at the start of the run with this seed."""

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """Return the predicted targets for the network's outputs, in the targets' own shape."""

    @property
    def _batch_size(self) -> int:
        return 1

    @property
    @abstractmethod
    def _block_batches(self) -> int:
        """Number of batches, and so of steps, in one block of training samples."""

    @abstractmethod
    def _block(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the block of training samples with this number."""

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Return plain SGD with the problem's learning rate and weight decay ``beta``.

        Parameters
        ----------
        model
            The network to be trained.

        Returns
        -------
        torch.optim.SGD
            Its weight decay adds exactly ``beta * theta`` to the gradient.
        """
        # the plain loop over the few tensors: torch's own choice costs 6 % more of a step, foreach 12 %
        return torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, weight_decay=self.beta, foreach=False
        )

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        seed: int,
        start_step: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Train in place by SGD: an ordinary torch loop, so that optimizer hooks fire at each step.

        Parameters
        ----------
        model
            The network; inputs take its first parameter's dtype and device.
        optimizer
            The optimizer of its parameters.
        steps
            Number of steps to take now (not the step to stop at).
        seed
            Seed of the run: fixes the samples and their order.
        start_step
            Number of steps the run has taken before. The samples are those that an
            uninterrupted run sees from there on, so training in pieces gives
            bit-identical weights.
        progress
            Called every 32 steps, or sooner at the end of a block, with the number of
            steps taken since the last call.

        Raises
        ------
        TypeError, ValueError
            If ``steps``, ``seed`` or ``start_step`` is no integer or is negative.
        """
        check_integer("steps", steps, minimum=0)
        check_integer("start_step", start_step, minimum=0)
        loss = self.loss
        step, stop = start_step, start_step + steps
        while step < stop:
            index, offset = divmod(step, self._block_batches)
            block = (_like(values, model) for values in self._block(seed, index))
            batches = list(zip(*(torch.split(v, self._batch_size) for v in block), strict=True))
            batches = batches[offset : offset + stop - step]
            step += len(batches)
            for first in range(0, len(batches), PROGRESS_STEPS):
                part = batches[first : first + PROGRESS_STEPS]
                for x, y in part:
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    optimizer.step()
                if progress is not None:
                    progress(len(part))

    @torch.no_grad()
    def accuracy(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """Return the fraction of the samples that the network classifies correctly.

        Parameters
        ----------
        model
            The network.
        inputs, targets
            Samples as :meth:`train` and the objective use them.

        Returns
        -------
        float
            Between 0 and 1.
        """
        return float((self.predict(model(inputs)) == targets).double().mean())


def _like(values: Tensor, model: nn.Module) -> Tensor:
    """Move to the model's device, and floating values to its dtype too."""
    parameter = next(model.parameters())
    dtype = parameter.dtype if values.is_floating_point() else values.dtype
    return values.to(device=parameter.device, dtype=dtype)
