"""The objective: the function of the parameters whose curvature is taken, on fixed data."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hild_xr.recorders.curvature.functional import FunctionalModel, Inputs, cast, map_inputs
from hild_xr.recorders.curvature.isolation import isolated, unwrapped
from hild_xr.recorders.mean_loss import Layout, check_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

_CHECKED_SAMPLES = 16


class Objective:
    r"""The regularised mean loss of a model on fixed data.

    .. math:: L(\theta) = \frac1M \sum_{m=1}^M \ell(f_\theta(x_m), y_m) + \frac\beta2 |\theta|^2

    Hessian and G-matrix are taken of this function. It is evaluated in eval mode
    and leaves no trace in the model (see
    :func:`~hild_xr.recorders.curvature.isolation.isolated`).

    Parameters
    ----------
    loss
        ``loss(outputs, targets)`` returns a scalar tensor, the *mean* over the
        samples of the batch, as ``torch.nn.functional.cross_entropy`` does.
    inputs
        What the model is called with: a tensor, a tuple of tensors (positional)
        or a dict of tensors (keywords). Samples along the first dim.
    targets
        What the loss compares with; samples along the first dim.
    batch_size
        Samples evaluated at a time; ``None`` takes all at once. Batches weigh as
        much as they hold samples, so the value does not depend on it. A single
        batch is fastest, since its graph serves all products of a record.
    l2
        :math:`\beta \ge 0`; the sum runs over the trainable parameters, tied ones once.

    Raises
    ------
    TypeError
        If inputs or targets are no tensors.
    ValueError
        If there are no samples, ``inputs`` and ``targets`` differ in length or
        device, or ``batch_size`` or ``l2`` is out of range.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> inputs, targets = torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])
    >>> objective = Objective(torch.nn.functional.cross_entropy, inputs, targets)
    >>> len(objective), round(objective.value(model), 3)
    (5, 0.693)
    """

    def __init__(
        self,
        loss: Callable[[Any, Tensor], Tensor],
        inputs: Inputs,
        targets: Tensor,
        *,
        batch_size: int | None = None,
        l2: float = 0.0,
    ) -> None:
        for data in (*_tensors(inputs), targets):
            if not isinstance(data, Tensor) or data.ndim == 0:
                raise TypeError(
                    f"inputs and targets must be torch tensors with samples along the first dim, got "
                    f"{type(data).__name__}: convert with torch.as_tensor"
                )
        sizes = {len(tensor) for tensor in _tensors(inputs)}
        if sizes != {len(targets)}:
            raise ValueError(
                f"inputs hold {' and '.join(map(str, sorted(sizes)))} samples (first dim) but targets hold "
                f"{len(targets)}: give one target for each sample"
            )
        if len(targets) == 0:
            raise ValueError("the objective has no samples: give at least one input and its target")
        devices = {tensor.device for tensor in (*_tensors(inputs), targets)}
        if len(devices) > 1:
            raise ValueError(
                f"inputs and targets lie on different devices ({', '.join(sorted(map(str, devices)))}): "
                "bring all to the model's device"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1, or None for all samples at once; got {batch_size}"
            )
        if not (math.isfinite(l2) and l2 >= 0):
            raise ValueError(f"l2 must be a finite number of at least 0 (weight decay); got {l2}")
        self.loss = loss
        self.inputs = map_inputs(_plain, inputs)
        self.targets = _plain(targets)
        self.batch_size = batch_size
        self.l2 = float(l2)
        self._checked: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the models that were checked: a copy checks for itself."""
        return {name: value for name, value in vars(self).items() if name != "_checked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        vars(self).update(state)
        self._checked = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Return the number of samples M."""
        return len(self.targets)

    def __repr__(self) -> str:
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        data = f"{len(self)} samples on {self.device}, batch_size={self.batch_size}"
        return f"Objective({name}, {data}, l2={self.l2})"

    @property
    def device(self) -> torch.device:
        """Device that holds the data."""
        return self.targets.device

    @property
    def single_batch(self) -> bool:
        """Whether all samples are evaluated at once."""
        return self.batch_size is None or self.batch_size >= len(self)

    def to(self, device: torch.device | str) -> Objective:
        """Return the same objective with its data on ``device``.

        Examples
        --------
        >>> Objective(torch.nn.functional.mse_loss, torch.zeros(2, 1), torch.zeros(2, 1)).to("cpu").device
        device(type='cpu')
        """
        moved = Objective(
            self.loss,
            map_inputs(lambda tensor: tensor.to(device), self.inputs),
            self.targets.to(device),
            batch_size=self.batch_size,
            l2=self.l2,
        )
        moved._checked = weakref.WeakKeyDictionary(self._checked)
        return moved

    def batches(self, dtype: torch.dtype | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs and targets batch by batch, floating data brought to ``dtype`` if one is given.

        Examples
        --------
        >>> data = torch.zeros(5, 1)
        >>> objective = Objective(torch.nn.functional.mse_loss, data, data, batch_size=3)
        >>> [len(targets) for inputs, targets in objective.batches()]
        [3, 2]
        """
        size = self.batch_size or len(self)
        for start in range(0, len(self), size):
            yield self.samples(slice(start, start + size), dtype)

    def samples(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> tuple[Inputs, Tensor]:
        """Return the inputs and targets that ``index`` selects, cast like :meth:`batches`."""
        inputs = map_inputs(lambda tensor: cast(tensor[index], dtype), self.inputs)
        return inputs, cast(self.targets[index], dtype)

    def mean_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of a batch, regulariser not included.

        Raises
        ------
        TypeError
            If the loss function returns no scalar tensor.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"loss(outputs, targets) must return a scalar torch tensor, got {type(value).__name__}: "
                "return the tensor itself, not .item()"
            )
        if value.ndim != 0:
            raise TypeError(
                f"loss(outputs, targets) must return a scalar, got a tensor of shape {tuple(value.shape)}: "
                "return the mean over the samples (reduction='mean')"
            )
        return value

    def value(self, model: nn.Module) -> float:
        r"""Return :math:`L(\theta)`, regulariser included, in eval mode and without touching the model.

        Raises
        ------
        ValueError
            See :meth:`check`.
        """
        self.check(model)
        with isolated(model), torch.no_grad():
            network = FunctionalModel(model)
            total = self.penalty(network)
            for inputs, targets in self.batches():
                total += len(targets) / len(self) * float(self.mean_loss(network(inputs), targets))
        return total

    def outputs(self, model: nn.Module) -> Tensor:
        """Return the model's outputs on all samples, shape (M, ...), in eval mode and detached.

        Raises
        ------
        ValueError
            If the data lie on another device than the model.
        TypeError
            If the model returns something else than one tensor.
        """
        self._check_device(model)
        with isolated(model), torch.no_grad():
            network = FunctionalModel(model)
            outputs = [network(inputs) for inputs, _ in self.batches()]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise TypeError(
                f"outputs() needs a model that returns one tensor, got {type(outputs[0]).__name__}"
            )
        return torch.cat(outputs)

    def penalty(self, network: FunctionalModel) -> float:
        r"""Return the regulariser :math:`\frac\beta2|\theta|^2` at the network's trainable parameters."""
        if self.l2 == 0:
            return 0.0
        squares = [leaf.detach().double().square().sum() for leaf in network.trainable.values()]
        return 0.5 * self.l2 * float(torch.stack(squares).sum())

    def check(self, model: nn.Module) -> None:
        """Check that model, loss and data fit together: once a model on samples, and the device each time.

        Weighting batches by their size, and the G-matrix itself, presume that the
        loss is a mean over samples that do not see each other. So the loss of a few
        samples together is compared with the mean of their single losses, at the model's outputs
        and at random ones; see :func:`~hild_xr.recorders.mean_loss.check_mean`. Of a
        single sample it is only seen whether the model repeats itself.

        Raises
        ------
        ValueError
            If the data lie on another device than the model, if the model couples the
            samples of a batch or is random in eval mode, or if the loss is no mean
            over samples.
        TypeError
            If the loss function returns no scalar tensor.
        """
        self._check_device(model)
        inner = unwrapped(model)
        if inner in self._checked:
            return
        with isolated(inner), torch.no_grad():
            index = self.some_samples()
            singles = [self.samples(index[i : i + 1]) for i in range(len(index))]
            layout = check_mean(FunctionalModel(inner), self.mean_loss, self.samples(index), singles)
        if layout is not None:  # else the caller meets the same value and reports that it is not finite
            self._checked[inner] = layout

    def check_rows(self, model: nn.Module) -> None:
        """Check that the rows of a model's output are not taken for its samples by mistake.

        Matrices that are built from the derivative at each sample's output know a sample by its row. An
        output whose first dim is another one (time, say) is told from that by its length alone.

        Raises
        ------
        ValueError
            If such an output has by chance as many rows as a batch has samples; and see :meth:`check`.
        """
        self.check(model)
        layout = self._checked.get(unwrapped(model), Layout())
        size = min(self.batch_size or len(self), len(self))
        if layout.foreign_rows in (size, len(self) % size or size):
            raise ValueError(
                f"the first dim of the model's output is not that of samples, but has {layout.foreign_rows} "
                "entries as a batch has samples, so this matrix cannot tell them apart: let the model return "
                "samples first (.transpose(0, 1)), choose another batch_size, or take matrix='hessian'"
            )

    def some_samples(self) -> Tensor:
        """Return indices of at most a few dozen samples, spread over the data and over its classes."""
        spread = torch.linspace(0, len(self) - 1, min(_CHECKED_SAMPLES, len(self)), dtype=torch.float64)
        index = spread.round().long()
        if self.targets.ndim == 1 and not self.targets.is_floating_point():
            # A class-weighted loss is only told from a mean by samples of classes that weigh differently.
            classes = self.targets.cpu().numpy()
            firsts = np.unique(classes, return_index=True)[1][:_CHECKED_SAMPLES]
            index = torch.from_numpy(np.union1d(index.numpy(), firsts))
        return index.to(self.device)

    def _check_device(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in unwrapped(model).parameters()}
        if devices and self.device not in devices:
            place = sorted(map(str, devices))[0]
            raise ValueError(
                f"the objective's data lie on {self.device} but the model on {place}: "
                f"use objective = objective.to({place!r})"
            )


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    if isinstance(inputs, dict):
        return tuple(inputs.values())
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _plain(tensor: Tensor) -> Tensor:
    # A copy: the data are fixed, whatever the caller's buffers hold later. And tensors made under
    # torch.inference_mode cannot be saved for a backward pass; their clones can.
    with torch.inference_mode(False):
        return tensor.detach().clone()
