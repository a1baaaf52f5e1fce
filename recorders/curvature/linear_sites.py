r"""Linear layers whose curvature has a closed form.

A layer :math:`z = W h + b` that is used once, with one row of ``h`` for each sample,
has per-sample gradients :math:`\delta_m h_m^T` with :math:`\delta_m = \partial\ell_m/\partial z_m`,
and row c of W has the Hessian block
:math:`\frac1M\sum_m \frac{\partial^2\ell_m}{\partial z_{mc}^2} h_m h_m^T`, both exactly. So h,
:math:`\delta` and these second derivatives replace the network.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hild_xr.recorders.curvature.functional import FunctionalModel
    from hild_xr.recorders.objective import Objective


@dataclass(frozen=True)
class LinearSite:
    """A linear layer with closed-form curvature.

    Parameters
    ----------
    module
        Qualified name of the layer.
    weight
        Qualified name of its weight.
    bias
        Qualified name of its bias, or ``None`` where none is trainable and used only here.
    """

    module: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Call:
    """Input h and output z of one call of a linear layer."""

    h: Tensor
    z: Tensor


@contextmanager
def recorded_calls(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """Record inputs and outputs of the named linear layers during forward passes.

    The network goes on with a copy of each output, so that an in-place activation
    behind the layer leaves the recorded one as it was.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> with recorded_calls(model, ["0"]) as calls:
    ...     outputs = model(torch.ones(4, 2))
    >>> calls["0"][0].h.shape, calls["0"][0].z.shape
    (torch.Size([4, 2]), torch.Size([4, 3]))
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            calls[name].append(Call(args[0] if args else kwargs["input"], output))
            return output.clone()

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True) for name in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_linear_sites(
    network: FunctionalModel, objective: Objective, dtype: torch.dtype | None
) -> list[LinearSite]:
    """Find the layers with closed-form curvature, by forward passes on some samples, together and alone.

    A layer qualifies if it is a plain ``nn.Linear`` without hooks, is called once with
    as many rows as there are samples, and its weight enters the loss nowhere else (not
    tied, not used by hand).

    Parameters
    ----------
    network
        The model.
    objective
        Loss and data.
    dtype
        Precision the data are brought to.

    Returns
    -------
    list of LinearSite
        In the model's order.

    Raises
    ------
    ValueError
        If the loss reaches the model's parameters past the model (a regulariser
        written into the loss, a module that keeps a list of its weights).
    """
    names = [name for name, module in network.model.named_modules() if _is_plain_linear(module)]
    index = objective.some_samples()
    inputs, targets = objective.samples(index, dtype)
    with recorded_calls(network.model, names) as calls:
        loss = objective.mean_loss(network(inputs), targets)
    names = [name for name in names if [call.h.shape[:-1] for call in calls[name]] == [(len(index),)]]
    together = {name: calls[name][0].h.detach() for name in names}
    counts = _uses(loss, network)
    # Row m of h must be sample m by itself: a layer that runs over tokens, a table of its own, the samples
    # routed to one expert or a sorted batch can have the right number of rows by chance.
    alone: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for m in range(len(index)):
            with recorded_calls(network.model, list(alone)) as calls:
                network(objective.samples(index[m : m + 1], dtype)[0])
            alone = {
                name: [*rows, calls[name][0].h.detach()]
                for name, rows in alone.items()
                if [call.h.shape[:-1] for call in calls[name]] == [(1,)]
            }
    names = [name for name, rows in alone.items() if _are_rows(torch.cat(rows), together[name])]
    sites = []
    for name in names:
        prefix = f"{name}." if name else ""
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        if counts.get(weight) == 1 and network.trainable[weight].ndim == 2:
            # a bias put in place of the layer's own may be one number for all outputs
            whole = (
                counts.get(bias) == 1 and network.trainable[bias].shape == network.trainable[weight].shape[:1]
            )
            sites.append(LinearSite(name, weight, bias if whole else None))
    return sites


def _are_rows(alone: Tensor, together: Tensor) -> bool:
    """Whether forward passes on single samples gave the layer the rows that it got of the batch."""
    if alone.numel() == 0:  # a layer without inputs
        return True
    finite = alone.isfinite() & together.isfinite()
    difference = torch.where(finite, alone - together, 0.0).abs().amax(1)
    scale = torch.where(finite, together, 0.0).abs().amax()
    return bool((difference <= torch.finfo(alone.dtype).eps ** 0.4 * scale).all())


def _is_plain_linear(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        nn.modules.module._global_forward_hooks,
        nn.modules.module._global_forward_pre_hooks,
    )
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(hooks)


def _uses(loss: Tensor, network: FunctionalModel) -> dict[str, int]:
    """Count how often each trainable parameter enters the graph of the loss."""
    names = {id(leaf): name for name, leaf in network.trainable.items()}
    originals = {id(parameter): name for name, parameter in network.model.named_parameters()}
    counts = dict.fromkeys(network.trainable, 0)
    seen = {loss.grad_fn}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            leaf = id(getattr(following, "variable", None))
            if leaf in originals:
                raise ValueError(
                    f"the loss reaches the parameter {originals[leaf]!r} past the model, so its curvature "
                    "would be wrong: give a regulariser as Objective(l2=...), not in the loss function, "
                    "and let modules use their parameters as attributes"
                )
            if leaf in names:
                counts[names[leaf]] += 1
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    return counts
