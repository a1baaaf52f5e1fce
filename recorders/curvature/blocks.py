"""Blocks: the parts of the parameter vector whose curvature is taken on its own.

One concept serves every matrix, solver and store. A :class:`Block` is a set of
parameters, seen either as one vector or as many vectors of equal shape (one for
each row of a weight).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from hild_xr.recorders.curvature.isolation import unwrapped

if TYPE_CHECKING:
    from torch import nn

BlockKind = Literal["layer", "rows", "module", "model"]
"""How the parameters are cut: by tensor, by output neuron or class, by module, or not at all."""

Groups: TypeAlias = Mapping[str, str | Sequence[str]]
"""Custom blocks: label to qualified names, or patterns of them such as ``"layers.0.*"``."""

ROOT = "root"
"""Label of the module block of parameters that the model holds itself, outside of any submodule."""


@dataclass(frozen=True)
class Block:
    """A diagonal block of a curvature matrix, or a batch of them.

    Parameters
    ----------
    label
        Name in results: the qualified name of the parameter or module, ``"model"``, or
        that of a custom group.
    kind
        How the parameters were cut; ``"group"`` for a custom group.
    parameters
        Qualified names of the parameters in the block, in the model's order.
    shapes
        Shape of each of these parameters.

    Examples
    --------
    >>> block = Block("fc.weight", "rows", ("fc.weight",), ((10, 32),))
    >>> block.batch_shape, block.vector_shape, block.size, block.count
    ((10,), (32,), 32, 10)
    >>> Block("fc", "module", ("fc.weight", "fc.bias"), ((10, 32), (10,))).vector_shape
    (330,)
    """

    label: str
    kind: BlockKind | Literal["group"]
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_flat(self) -> bool:
        """Whether a vector runs over the parameters one after the other; else it has a tensor's shape."""
        return self.kind in ("module", "model", "group")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of components of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch of independent sub-blocks: ``(rows,)``, or ``()`` for a single block."""
        return self.shapes[0][:1] if self.kind == "rows" else ()

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of one vector of the block, on the dims of the weights it lives on, or flat."""
        if self.is_flat:
            return (sum(self.sizes),)
        return self.shapes[0][1:] if self.kind == "rows" else self.shapes[0]

    @property
    def size(self) -> int:
        """Number of components p of one vector."""
        return math.prod(self.vector_shape)

    @property
    def count(self) -> int:
        """Number of independent sub-blocks."""
        return math.prod(self.batch_shape)


BlockChoice: TypeAlias = BlockKind | Groups | Sequence[Block]
"""What ``blocks=`` takes: a way to cut, custom groups, or blocks that are there already."""


def resolve_blocks(
    model: nn.Module, blocks: BlockChoice, layers: str | Sequence[str] | None = None
) -> list[Block]:
    """Cut a model's trainable parameters into blocks.

    Parameters
    ----------
    model
        The model; frozen parameters are left out, tied ones appear once.
    blocks
        ``"layer"``: one block for each parameter tensor. ``"rows"``: for each
        parameter of two dims or more, one block for each index of its first dim
        (output neuron, class, channel, token). ``"module"``: one flat block for the
        parameters (weight and bias, say) that a module holds itself, labelled by the
        module's qualified name; ``"root"`` for those of the model itself. ``"model"``:
        one flat block.

        A mapping makes custom flat blocks: its keys are the labels, its values
        qualified names or patterns of them (``*``, ``?``, ``[...]`` as in file names,
        a dot is no border). Within a group a parameter counts once. Groups may
        overlap: each is solved on its own, and a part beside its whole is a fair
        question.

        Blocks made before are checked against the model and come back as they are.
    layers
        Labels of the blocks to take, in any order; the blocks come in the model's
        order. ``None`` takes all that fit. Not for ``"model"`` and custom groups.

    Returns
    -------
    list of Block
        In the model's order; custom groups in the mapping's.

    Raises
    ------
    ValueError
        If ``blocks`` is unknown, a name or pattern is unknown, frozen, tied to
        another name or has no rows, or nothing is left.
    TypeError
        If a label, name or pattern is no text.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(block.label, block.size) for block in resolve_blocks(model, "layer")]
    [('0.weight', 12), ('0.bias', 3), ('2.weight', 6), ('2.bias', 2)]
    >>> [(block.label, block.batch_shape, block.size) for block in resolve_blocks(model, "rows")]
    [('0.weight', (3,), 4), ('2.weight', (2,), 3)]
    >>> [(block.label, block.size) for block in resolve_blocks(model, "module")]
    [('0', 15), ('2', 8)]
    >>> resolve_blocks(model, "model")[0].size
    23
    >>> for block in resolve_blocks(model, {"weights": "*.weight", "head": ["2.bias", "2.weight"]}):
    ...     print(block.label, block.parameters)
    weights ('0.weight', '2.weight')
    head ('2.weight', '2.bias')
    """
    model = unwrapped(model)
    shapes = trainable_shapes(model)
    if not shapes:
        raise ValueError(
            "the model has no trainable parameter (requires_grad=True); unfreeze the parameters of interest"
        )
    if isinstance(blocks, str):
        return _cut(model, blocks, layers, shapes)
    if layers is not None:
        raise ValueError(
            "layers is for blocks='layer', 'rows' and 'module': custom blocks say what they hold"
        )
    if isinstance(blocks, Mapping):
        return _groups(model, blocks, shapes)
    return _checked(blocks, shapes)


def trainable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's trainable parameters by qualified name, tied ones once.

    Examples
    --------
    >>> from torch import nn
    >>> trainable_shapes(nn.Linear(3, 2))
    {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def module_label(parameter: str) -> str:
    """Return the label of the module block that holds a parameter.

    Examples
    --------
    >>> module_label("encoder.0.weight"), module_label("scale")
    ('encoder.0', 'root')
    """
    return parameter.rpartition(".")[0] or ROOT


def as_planned(model: nn.Module, block: Block) -> bool:
    """Whether the model still has the block: the same parameters of it require a gradient.

    A layer, its rows and a custom group are there while all their parameters are
    trainable. The whole model and a module are others once a parameter joins them.

    Examples
    --------
    >>> from torch import nn
    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.bias.requires_grad_(False)
    >>> (block,) = resolve_blocks(layer, "module")
    >>> as_planned(layer, block)
    True
    >>> _ = layer.bias.requires_grad_(True)
    >>> as_planned(layer, block)
    False
    """
    shapes = trainable_shapes(unwrapped(model))
    held = set(block.parameters)
    if block.kind == "model":
        return held == shapes.keys()
    if block.kind == "module":
        return held == {name for name in shapes if module_label(name) == block.label}
    return held <= shapes.keys()


def check_k(blocks: Sequence[Block], k: int) -> None:
    """Check that every block is large enough for k eigenpairs.

    Raises
    ------
    ValueError
        If k is below 1, or larger than a block; all such blocks are listed.

    Examples
    --------
    >>> check_k([Block("fc.bias", "layer", ("fc.bias",), ((10,),))], 10)
    """
    if k < 1:
        raise ValueError(f"k, the number of eigenpairs, must be at least 1; got {k}")
    small = [block for block in blocks if block.size < k]
    if small:
        sizes = ", ".join(f"{block.label} ({block.size})" for block in small)
        large = [block.label for block in blocks if block.size >= k]
        ask = f"k={min(block.size for block in small)} or less"
        leave = ""
        if large:
            custom = small[0].kind == "group"
            leave = ", or leave these groups out" if custom else f", or leave them out with layers={large}"
        raise ValueError(
            f"k={k} eigenpairs do not fit blocks with fewer parameters: {sizes}. Ask for {ask}{leave}"
        )


def _cut(
    model: nn.Module, kind: str, layers: str | Sequence[str] | None, shapes: dict[str, tuple[int, ...]]
) -> list[Block]:
    if kind not in get_args(BlockKind):
        known = ", ".join(map(repr, get_args(BlockKind)))
        raise ValueError(f"blocks must be one of {known}, or a mapping of labels to names; got {kind!r}")
    chosen = [layers] if isinstance(layers, str) else layers
    if kind == "model":
        if chosen is not None:
            raise ValueError(
                "blocks='model' takes all trainable parameters: leave layers out, or use blocks='layer'"
            )
        return [_flat("model", "model", shapes, shapes)]
    if kind == "module":
        return _modules(chosen, shapes)
    if chosen is not None:
        for name in chosen:
            _check_name(model, name, shapes)
            if kind == "rows" and len(shapes[name]) < 2:
                raise ValueError(
                    f"{name!r} has shape {shapes[name]} and so no rows: leave it out of layers, "
                    "or use blocks='layer'"
                )
        shapes = {name: shape for name, shape in shapes.items() if name in set(chosen)}
    elif kind == "rows":
        shapes = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
    if not shapes:
        raise ValueError(
            f"no parameter is left for blocks={kind!r}: select a trainable one"
            + (" of two dims or more" if kind == "rows" else "")
        )
    return [
        Block(name, "rows" if kind == "rows" else "layer", (name,), (shape,))
        for name, shape in shapes.items()
    ]


def _modules(chosen: Sequence[str] | None, shapes: dict[str, tuple[int, ...]]) -> list[Block]:
    held: dict[str, list[str]] = {}
    for name in shapes:
        held.setdefault(module_label(name), []).append(name)
    nested = [name for name in held.get(ROOT, []) if name.startswith(f"{ROOT}.")]
    if nested and len(nested) < len(held[ROOT]):
        own = [name for name in held[ROOT] if name not in nested]
        raise ValueError(
            f"parameters of the model itself are labelled {ROOT!r}, but it has a submodule of that name too: "
            f"give labels of your own, as blocks={{'own': {own}, {ROOT!r}: {nested}, ...}}"
        )
    for label in chosen or ():
        if label not in held:
            near = _did_you_mean(label, held, "modules with trainable parameters of their own")
            raise ValueError(f"the model has no such module {label!r}{near}")
    if chosen is not None:
        held = {label: names for label, names in held.items() if label in set(chosen)}
    if not held:
        raise ValueError("no module is left for blocks='module': select one with a trainable parameter")
    return [_flat(label, "module", names, shapes) for label, names in held.items()]


def _groups(model: nn.Module, groups: Groups, shapes: dict[str, tuple[int, ...]]) -> list[Block]:
    if not groups:
        raise ValueError("blocks={} names no group: give label: names, as {'head': ['fc.weight', 'fc.bias']}")
    blocks = []
    for label, names in groups.items():
        if not isinstance(label, str):
            raise TypeError(f"the label of a custom block is a text; got {label!r}")
        if not label:
            raise ValueError("the label of a custom block cannot be empty: it names the block in results")
        blocks.append(_flat(label, "group", select_parameters(model, names, label), shapes))
    return blocks


def select_parameters(model: nn.Module, names: str | Sequence[str], label: str) -> list[str]:
    """Return the trainable parameters that names and patterns select, once each, in the model's order.

    Parameters
    ----------
    model
        The model.
    names
        Qualified names, or patterns of them.
    label
        Name of the selection in errors.

    Raises
    ------
    ValueError
        If a name is unknown, frozen or tied to another one, a pattern fits no
        trainable parameter, or there is no name.
    TypeError
        If a name is no text.

    Examples
    --------
    >>> from torch import nn
    >>> select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["1.bias", "*.weight"], "some")
    ['0.weight', '1.weight', '1.bias']
    """
    model = unwrapped(model)
    shapes = trainable_shapes(model)
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise TypeError(f"block {label!r} holds names of parameters, or patterns; got {name!r}")
        if name in shapes or not set(name) & set("*?["):
            _check_name(model, name, shapes)
            chosen.add(name)
            continue
        matching = [parameter for parameter in shapes if fnmatchcase(parameter, name)]
        if not matching:
            near = _did_you_mean(name, shapes, "trainable parameters", cutoff=0.4)
            raise ValueError(f"the pattern {name!r} of block {label!r} fits no trainable parameter{near}")
        chosen.update(matching)
    if not chosen:
        raise ValueError(f"block {label!r} holds no parameter: give at least one name or pattern")
    return [name for name in shapes if name in chosen]


def _checked(blocks: Sequence[Block], shapes: dict[str, tuple[int, ...]]) -> list[Block]:
    if not isinstance(blocks, Sequence) or not all(isinstance(block, Block) for block in blocks):
        raise TypeError(
            f"blocks is one of {', '.join(map(repr, get_args(BlockKind)))}, a mapping of labels to names, or "
            f"a sequence of Block; got {blocks!r}"
        )
    for block in blocks:
        found = tuple(shapes.get(name) for name in block.parameters)
        if found != block.shapes:
            raise ValueError(
                f"block {block.label!r} has the parameters {block.parameters} of shapes {block.shapes}, "
                f"but the model's trainable ones have shapes {found}: resolve the blocks of this model anew"
            )
    labels = [block.label for block in blocks]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"blocks must hold at least one block and no label twice; got {labels}")
    return list(blocks)


def _flat(
    label: str,
    kind: Literal["module", "model", "group"],
    names: Sequence[str] | Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
) -> Block:
    return Block(label, kind, tuple(names), tuple(shapes[name] for name in names))


def _check_name(model: nn.Module, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if name in shapes:
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    if name in named:
        tied = [other for other in shapes if named[other] is named[name]]
        if tied:
            raise ValueError(f"{name!r} is tied to {tied[0]!r}: name the parameter {tied[0]!r}")
        raise ValueError(
            f"{name!r} is frozen (requires_grad=False), so it has no curvature: unfreeze it or leave it out"
        )
    if any(parameter.startswith(f"{name}.") for parameter in shapes):
        raise ValueError(
            f"{name!r} is a module, not a parameter: write {name + '.*'!r} for its parameters in a custom "
            "block, or use blocks='module'"
        )
    raise ValueError(
        f"the model has no parameter {name!r}{_did_you_mean(name, shapes, 'trainable parameters')}"
    )


def _did_you_mean(name: str, known: Mapping[str, object], what: str, cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Its {what} are {', '.join(known)}"
