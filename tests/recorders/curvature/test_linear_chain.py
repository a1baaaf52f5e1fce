"""Hessian products of linear layers in a row: the closed form, where it holds, and where it does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, linear_chain, linear_layers, resolve_blocks
from hild_xr.recorders.curvature.activation_links import find_link
from hild_xr.recorders.curvature.graph import LossGraph
from hild_xr.recorders.curvature.linear_chain import ChainActivation, ChainLayer, LinearChain
from hild_xr.recorders.curvature.linear_layers import LinearLayers
from hild_xr.recorders.curvature.operators import BlockOperator, ChainHessian, NetworkHessian
from hild_xr.recorders.objective import Objective


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("tile", [1, 2**19])
def test_multiply__is_the_dense_hessian_of_two_layers(
    n: int, held: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain written down by hand, of a loss with a Hessian that is not diagonal over classes."""
    monkeypatch.setattr(linear_chain, "_TILE", tile)
    x, w, b, v = randn(600, 3), randn(4, 3, seed=1), randn(4, seed=2), randn(2, 4, seed=3)

    def loss(flat: Tensor) -> Tensor:
        first, bias, second = flat.split([12, 4, 8])
        h = torch.sigmoid(x @ first.view(4, 3).T + bias)
        return torch.logsumexp(h @ second.view(2, 4).T, 1).sum()

    point = torch.cat([w.flatten(), b, v.flatten()])
    h = torch.sigmoid(x @ w.T + b)
    p = torch.softmax(h @ v.T, 1)
    slope = h * (1 - h)
    behind = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).permute(1, 2, 0)
    chain = LinearChain(
        [ChainLayer("w", "b", w, x, slope * (p @ v)), ChainLayer("v", None, v, h, p)],
        [ChainActivation(slope, slope * (1 - 2 * h) * (p @ v))],
        behind if held else (lambda d: torch.einsum("ijm,mnj->mni", behind, d)),
    )
    vectors = {"w": randn(n, 4, 3, seed=4), "b": randn(n, 4, seed=5), "v": randn(n, 2, 4, seed=6)}
    products = {name: torch.full_like(vector, torch.nan) for name, vector in vectors.items()}
    chain.multiply(vectors, products)
    exact = torch.func.hessian(loss)(point)
    flat = torch.cat([vector.flatten(1) for vector in vectors.values()], 1)
    found = torch.cat([product.flatten(1) for product in products.values()], 1)
    torch.testing.assert_close(found, flat @ exact, rtol=1e-12, atol=1e-12)


class Residual(nn.Module):
    """Two branches meet behind the layers ``inner``, and its activation is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        outputs: Tensor = self.head(h + self.outer(F.silu(self.inner(h))))
        return outputs


class Heads(nn.Module):
    """Two layers read one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        outputs: Tensor = self.left(h) * torch.sigmoid(self.right(h))
        return outputs


class Gate(nn.Module):
    """The activations of two layers multiply, and a third reads the product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return outputs


class Tied(nn.Module):
    """The second layer's weight is that of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return outputs


def sequence(*widths: int, activation: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(width_in, width_out, bias=bias), activation()] if i < len(widths) - 2 else []
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(4, 3),
    "tanh": lambda: sequence(4, 6, 5, 3, activation=nn.Tanh),
    "relu in place": lambda: sequence(4, 6, 5, 3, activation=lambda: nn.ReLU(inplace=True)),
    "gelu, no bias": lambda: sequence(4, 6, 5, 3, activation=nn.GELU, bias=False),
    "no activation": lambda: sequence(4, 5, 6, 3, activation=nn.Identity),
    "deep": lambda: sequence(4, 5, 4, 6, 4, 5, 3, activation=nn.Softplus),
    "dropout": lambda: sequence(4, 6, 3, activation=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5))),
    "many classes": lambda: sequence(4, 6, 20, activation=nn.SiLU),
    "activation behind": lambda: nn.Sequential(sequence(4, 6, 3, activation=nn.Tanh), nn.Tanh()),
    "norm between": lambda: sequence(4, 6, 5, 3, activation=lambda: nn.Sequential(Norm(), nn.Tanh())),
    "residual": Residual,
    "heads": Heads,
    "tied": Tied,
    "gate": Gate,
    "frozen": lambda: frozen(sequence(4, 6, 5, 3, activation=nn.Tanh), "0.weight", "2.bias"),
}


class Norm(nn.Module):
    """Layer normalisation, written out: torch.func takes wrong second derivatives of the fused one."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def network(name: str) -> tuple[nn.Module, Objective]:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    classes = 20 if name == "many classes" else 3
    return model, Objective(F.cross_entropy, randn(9, 4), torch.arange(9) % classes, l2=0.1)


def dense(model: nn.Module, objective: Objective, names: Sequence[str]) -> Tensor:
    """Return the Hessian of the named parameters by torch.func, regulariser included."""
    model = model.eval()
    held = {name: model.get_parameter(name).detach() for name in names}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([value.numel() for value in held.values()])
        state = {name: part.view(v.shape) for (name, v), part in zip(held.items(), parts, strict=True)}
        return F.cross_entropy(
            torch.func.functional_call(model, state, (objective.inputs,)), objective.targets
        )

    hessian: Tensor = torch.func.hessian(loss)(torch.cat([value.flatten() for value in held.values()]))
    return hessian + objective.l2 * torch.eye(len(hessian), dtype=torch.float64)


def check(operator: BlockOperator, exact: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (1, 3, 1):
        vectors = torch.randn(n, operator.size, generator=generator, dtype=torch.float64)
        found = operator.product(vectors, torch.zeros(n, dtype=torch.long))
        torch.testing.assert_close(found, vectors @ exact, rtol=1e-10, atol=1e-12)


# The blocks of each network that the closed form does not reach: something else lies between, or a layer
# is tied or has a frozen weight.
THROUGH_NETWORK = {
    "norm between": {"model", "0+4"},
    "residual": {"model", "0+4"},
    "heads": {"model", "0+4"},
    "gate": {"model"},
    "tied": {"first.weight", "first.bias", "second.bias", "model", "0+4"},
    "frozen": {"0.bias", "model", "0+4"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian__of_a_chain_equals_the_dense_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks, single parameters, and parameters that are no neighbours."""
    monkeypatch.setattr(LossGraph, "vectors_at_once", 1)  # as of a large network
    model, objective = network(name)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    groups = {"model": names, **{n: [n] for n in names}, "0+4": [*names[:1], *names[4:5]]}
    with Curvature(model, objective) as curvature:
        blocks = resolve_blocks(model, groups)
        through_network = set()
        for operator in curvature.operators(blocks):
            check(operator, dense(model, objective, operator.block.parameters))
            if type(operator) is NetworkHessian:
                through_network.add(operator.block.label)
    assert through_network == THROUGH_NETWORK.get(name, set())


@pytest.mark.parametrize("few", [0, 16])
def test_hessian__behind_the_last_layer_is_held_or_multiplied(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_layers, "_HELD_UP_TO", few)
    monkeypatch.setattr(LossGraph, "vectors_at_once", 1)  # as of a large network
    model, objective = network("activation behind")
    passes: list[int] = []
    taken = LinearLayers._second_derivative_products

    def counted(self: LinearLayers, weight: str, directions: Tensor) -> Tensor:
        passes.append(len(directions))
        return taken(self, weight, directions)

    monkeypatch.setattr(LinearLayers, "_second_derivative_products", counted)
    with Curvature(model, objective) as curvature:
        (operator,) = curvature.operators(resolve_blocks(model, "model"))
        check(operator, dense(model, objective, operator.block.parameters))
    # a pass for each of three classes, or for each of five products
    assert passes == [1] * (3 if few else 5)


def test_hessian__of_a_chain_asks_the_network_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a pass through the network")

    monkeypatch.setattr(LossGraph, "hessian_products", refuse)
    model, objective = network("tanh")
    with Curvature(model, objective, dense_up_to=0) as curvature:
        found = curvature.eigenpairs(2, "hessian", "model")["model"]
    assert bool(found.converged.all())


def test_chains__share_what_is_known_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def noted(*args: Any) -> Any:
        found.append(find_link(*args))
        return found[-1]

    monkeypatch.setattr(linear_layers, "find_link", noted)
    model, objective = network("deep")
    with Curvature(model, objective) as curvature:
        operators = list(curvature.operators(resolve_blocks(model, "layer")))
        assert {type(operator) for operator in operators} == {ChainHessian}
    assert len(found) == 5  # one for each activation, of twelve blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hessian__in_half_precision_goes_through_the_network(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = sequence(4, 6, 3, activation=nn.Tanh).to(dtype)
    objective = Objective(F.cross_entropy, randn(9, 4).to(dtype), torch.arange(9) % 3)
    with Curvature(model, objective) as curvature:
        (operator,) = curvature.operators(resolve_blocks(model, "model"))
        assert type(operator) is (ChainHessian if dtype == torch.float32 else NetworkHessian)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_size", [4, 8])
def test_hessian__of_several_batches_equals_the_dense_matrix(name: str, batch_size: int) -> None:
    """Nine samples: the last batch is smaller, and weighs less."""
    model, whole = network(name)
    objective = Objective(F.cross_entropy, whole.inputs, whole.targets, batch_size=batch_size, l2=whole.l2)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    with Curvature(model, objective) as curvature:
        blocks = resolve_blocks(model, {"model": names, names[0]: names[:1], names[-1]: names[-1:]})
        for operator in curvature.operators(blocks):
            check(operator, dense(model, objective, operator.block.parameters))
            # of many classes the second derivatives are not held, so that there is nothing to join
            through_network = name == "many classes" or operator.block.label in THROUGH_NETWORK.get(
                name, set()
            )
            assert type(operator) is (NetworkHessian if through_network else ChainHessian)


@pytest.mark.parametrize(("max_bytes", "graphs"), [(2**30, 3), (500, 3 * 2 * 3)])
def test_several_batches__are_passed_once_for_all_products_if_that_fits_the_memory(
    max_bytes: int, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = network("tanh")
    objective = Objective(F.cross_entropy, whole.inputs, whole.targets, batch_size=4)
    built: list[int] = []
    made = LossGraph.__init__

    def counted(self: LossGraph, *args: Any) -> None:
        built.append(1)
        made(self, *args)

    with Curvature(model, objective, max_bytes=max_bytes) as curvature:
        monkeypatch.setattr(LossGraph, "__init__", counted)
        for operator in curvature.operators(resolve_blocks(model, "layer", ["0.weight", "4.weight"])):
            check(operator, dense(model, objective, operator.block.parameters))
    # of three batches: once, or for each of three products of two blocks
    assert len(built) == graphs


def test_products__of_vectors_in_other_numbers_do_not_mix() -> None:
    model, objective = network("tanh")
    with Curvature(model, objective) as curvature:
        first, second = curvature.operators(resolve_blocks(model, "layer", ["0.weight", "2.weight"]))
        one, other = randn(1, first.size), randn(2, second.size)
        row, rows = torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        before = first.product(one, row)
        kept = before.clone()
        second.product(other, rows)
        first.product(-3 * one, row)
        assert torch.equal(before, kept)  # what was handed out is not written over
        assert torch.equal(first.product(one, row), kept)


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    samples=st.integers(1, 6),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.ELU, nn.Sigmoid, nn.Identity, nn.Softsign]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_hessian__of_any_chain_equals_that_through_the_network(
    widths: list[int], samples: int, activation: type[nn.Module], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = sequence(*widths, activation=activation, bias=bias).double()
    objective = Objective(F.mse_loss, randn(samples, widths[0]), randn(samples, widths[-1], seed=1))
    with Curvature(model, objective) as curvature:
        for operator in curvature.operators(resolve_blocks(model, {"all": ["*"]})):
            assert type(operator) is ChainHessian
            vectors = randn(2, operator.size, seed=2)
            found = operator.product(vectors, torch.zeros(2, dtype=torch.long))
            graphs = curvature._entered().graphs
            expected = NetworkHessian(operator.block, graphs, 0.0, torch.float64, torch.device("cpu"))
            exact = expected.product(vectors, torch.zeros(2, dtype=torch.long))
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


class Temperature(nn.Module):
    """A trainable number without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x) * self.temperature
        return outputs


def with_bias(*shape: int) -> nn.Module:
    """A layer whose own bias was exchanged for one that several outputs share."""
    model = sequence(4, 6, 3, activation=nn.Tanh)
    model[0].bias = nn.Parameter(torch.full(shape, 0.3))
    return model


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class Autocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs: Tensor = super().forward(x).float()  # type: ignore[no-untyped-call]
        return outputs


class Swap(nn.Module):
    """Two activations change places."""

    def __init__(self, i: int, j: int) -> None:
        super().__init__()
        self.order = [j if k == i else i if k == j else k for k in range(6)]

    def forward(self, z: Tensor) -> Tensor:
        return z[:, self.order].tanh()


class Clipped(nn.Module):
    """Small gradients are cut off on the way back, so that the activation is not all there is."""

    def __init__(self, smallest: float) -> None:
        super().__init__()
        self.smallest = smallest

    def forward(self, z: Tensor) -> Tensor:
        h = z.relu()  # whose second derivatives, which are none, tell nothing
        if h.requires_grad:
            h.register_hook(lambda g: torch.where(g.abs() < self.smallest, 0 * g, g))
        return h


class Bent(torch.autograd.Function):
    """The backward pass of a formula whose derivatives are no symmetric matrix."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        product: Tensor = gradient * (1 + z.roll(1, 1) ** 2)
        return product


class Nonsymmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = sequence(4, 6, 3, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = Bent.apply(self.layers(x))  # type: ignore[no-untyped-call]
        return outputs


ODD: dict[str, Callable[[], nn.Module]] = {
    "no dims": Temperature,
    "bias for all outputs": lambda: with_bias(1),
    "bias of two dims": lambda: with_bias(1, 6),
    "bias without dims": with_bias,
    "two precisions": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), To(torch.float32), nn.Linear(6, 3).float(), To(torch.float64)
    ),
    "autocast": lambda: Autocast(*sequence(4, 6, 5, 3, activation=nn.Tanh)),
    "nonsymmetric": Nonsymmetric,
    **{
        f"swap {i} {j}": lambda i=i, j=j: sequence(4, 6, 3, activation=lambda: Swap(i, j))  # type: ignore[misc]
        for i, j in itertools.combinations(range(6), 2)
    },
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("samples", [1, 9])
def test_hessian__of_odd_layers_is_that_of_the_passes_through_the_network(name: str, samples: int) -> None:
    """Of a single sample, chance could take numbers that change places for equal ones."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = ODD[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    dtype = torch.float32 if name == "autocast" else torch.float64
    model = model.to(dtype) if name == "autocast" else model
    objective = Objective(F.cross_entropy, randn(samples, 4).to(dtype), torch.arange(samples) % 3)
    tolerance = 2e-2 if name == "autocast" else 1e-5 if name == "two precisions" else 1e-10
    with Curvature(model, objective) as curvature:
        for kind in ("layer", "model"):
            for operator in curvature.operators(resolve_blocks(model, kind)):
                plain = NetworkHessian(
                    operator.block, curvature._entered().graphs, 0.0, operator.dtype, operator.device
                )
                for n in (1, 2):
                    vectors = randn(n, operator.size).to(operator.dtype)
                    rows = torch.zeros(n, dtype=torch.long)
                    found, exact = operator.product(vectors, rows), plain.product(vectors, rows)
                    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("smallest", "scale"), [(0.02, 1.0), (2e-8, 1e-6), (0.0, 1.0), (0.0, 1e-6)])
def test_link__is_none_where_more_happens_on_the_way_back(smallest: float, scale: float) -> None:
    """A hook that numbers of a test size pass through unchanged is seen in the gradient itself."""
    torch.manual_seed(0)
    model = sequence(4, 6, 5, 3, activation=lambda: Clipped(smallest)).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * F.cross_entropy(outputs, targets)

    with Curvature(model, Objective(loss, randn(9, 4), torch.arange(9) % 3)) as curvature:
        graph = curvature._entered().graphs.kept
        assert graph is not None
        links = sum(graph.layers._link(f"{i}.weight") is not None for i in (0, 2, 4))
    assert links == (0 if smallest else 2)


@pytest.mark.parametrize("n", [1, 3])
def test_products__do_not_depend_on_what_the_caller_has_set(n: int) -> None:
    """Operators may be used by themselves, outside of the calls that see to this."""
    torch.manual_seed(0)
    model = sequence(4, 6, 5, 3, activation=nn.Tanh)
    objective = Objective(F.cross_entropy, randn(9, 4).float(), torch.arange(9) % 3)
    with Curvature(model, objective) as curvature:
        (operator,) = curvature.operators(resolve_blocks(model, "model"))
        vectors, rows = randn(n, operator.size).float(), torch.zeros(n, dtype=torch.long)
        with torch.inference_mode():
            operator.product(vectors, rows)
        plain = operator.product(vectors, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(operator.product(vectors, rows), plain)
        found = operator.product(vectors.clone().requires_grad_(), rows)
        assert torch.equal(found, plain)
        assert not found.requires_grad
        doubled = operator.product(vectors.double(), rows)
        assert doubled.dtype == torch.float64
        torch.testing.assert_close(doubled.float(), plain)


def test_chains__are_not_prepared_where_no_block_can_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second derivatives behind each branch of a residual network would cost as much as many products."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("second derivatives for nothing")

    monkeypatch.setattr(LinearLayers, "_second_derivatives", refuse)
    model, objective = network("residual")
    batched = Objective(F.cross_entropy, objective.inputs, objective.targets, batch_size=4)
    graphs: list[int] = []
    made = LossGraph.__init__

    def counted(*args: Any, **settings: Any) -> None:
        graphs.append(1)
        made(*args, **settings)

    for asked in (objective, batched):
        with Curvature(model, asked) as curvature, monkeypatch.context() as patch:
            patch.setattr(LossGraph, "__init__", counted)
            for _ in range(3):
                list(curvature.operators(resolve_blocks(model, "model")))
    assert len(graphs) == 3  # of three batches, to find that out once


def test_several_batches__take_no_more_memory_than_allowed() -> None:
    """Second derivatives of many outputs are much, and the layers behind two gates are held for each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 16).double()
    objective = Objective(F.cross_entropy, randn(40, 4), torch.arange(40) % 16, batch_size=10)
    numbers = 40 * (4 + 16 + 16 * 16)
    for max_bytes, kind in ((8 * numbers, ChainHessian), (8 * numbers - 1, NetworkHessian)):
        with Curvature(model, objective, max_bytes=max_bytes) as curvature:
            (operator,) = curvature.operators(resolve_blocks(model, "model"))
            assert type(operator) is kind
