"""A search by products that are some thousandths off, and what makes its results exact."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, linear_chain, operators, precision, resolve_blocks, search
from hild_xr.recorders.curvature.certainty import certain_pairs
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.graph import LossGraph
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.linear_chain import LinearChain
from hild_xr.recorders.curvature.operators import ChainHessian
from hild_xr.recorders.curvature.pairs import Eigenpairs, Which, ranking
from hild_xr.recorders.objective import Objective

Product = Callable[[Tensor, Tensor], Tensor]


def planted(values: Tensor, seed: int = 0) -> Tensor:
    """Return a float32 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    matrix: Tensor = (basis * values.double()) @ basis.T
    return matrix.float()


def exact_product(matrix: Tensor) -> Product:
    return lambda vectors, _: vectors @ matrix


def rounded_product(matrix: Tensor) -> Product:
    """Round factors and products to bfloat16, which leaves no symmetry."""
    low = matrix.bfloat16()
    return lambda vectors, _: (vectors.bfloat16() @ low).float()


def true_residuals(pairs: Eigenpairs, matrix: Tensor) -> Tensor:
    """Return the residuals in float64, relative to the own eigenvalue or a thousandth of the largest."""
    exact, vectors = matrix.double(), pairs.eigenvectors[0].double()
    norms = (vectors @ exact - pairs.eigenvalues[0][:, None] * vectors).norm(dim=-1)
    largest = float(torch.linalg.eigvalsh(exact).abs().max()) or 1.0
    relative: Tensor = norms / pairs.eigenvalues[0].abs().clamp(min=1e-3 * largest)
    return relative


def check_honest(pairs: Eigenpairs, matrix: Tensor, tol: float) -> None:
    residuals = true_residuals(pairs, matrix)
    noise = 1e-4  # float32 products, in a thousandth of the largest eigenvalue
    assert bool((residuals <= pairs.residuals[0] + noise).all()), (residuals, pairs.residuals)
    assert torch.equal(pairs.converged, pairs.residuals <= tol)
    vectors = pairs.eigenvectors[0].double()
    torch.testing.assert_close(
        vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-5
    )


BULK = torch.linspace(-0.6, 0.6, 292, dtype=torch.float64)
SPECTRA: dict[str, Tensor] = {
    "outliers": torch.cat([torch.tensor([9.0, -8.0, 7.0, 5.0, -4.0, 3.0, 2.0, 1.5]), BULK]),
    "close at the cut": torch.cat([torch.tensor([9.0, 8.0, 7.0, 5.0, 4.999, 4.998, 4.997, 4.0]), BULK]),
    "double": torch.cat([torch.tensor([9.0, 9.0, -7.0, -7.0, 3.0, 3.0, 2.0, 2.0]), BULK]),
    "small beside large": torch.cat([torch.tensor([900.0, 500.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0]), BULK]),
    "close at both cuts": torch.cat(
        [torch.tensor([9.0, 5.0, 4.9995, 4.999, 4.9985, -8.0, -6.0, -5.9995, -5.999]), BULK[:-1]]
    ),
    "no outliers": torch.linspace(-1, 1, 300, dtype=torch.float64),
    "rank 3": torch.cat([torch.tensor([5.0, -4.0, 3.0]), torch.zeros(297)]),
    "zero": torch.zeros(300),
    "tiny": 1e-18 * torch.cat([torch.tensor([9.0, -8.0, 7.0, 5.0, -4.0, 3.0, 2.0, 1.5]), BULK]),
    "huge": 1e18 * torch.cat([torch.tensor([9.0, -8.0, 7.0, 5.0, -4.0, 3.0, 2.0, 1.5]), BULK]),
}


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs__are_those_of_the_exact_products(name: str, which: Which) -> None:
    values = SPECTRA[name].double()
    matrix = planted(values)
    pairs = lanczos_eigenpairs(
        exact_product(matrix), 300, 5, which=which, tol=1e-3, rounded=rounded_product(matrix)
    )
    expected = values[ranking(values, which)[:5]]
    scale = float(values.abs().max()) or 1.0
    found = pairs.eigenvalues[0]
    if which == "magnitude":  # of equal magnitudes any sign may come first
        found, expected = found.abs(), expected.abs()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)
    assert bool(pairs.converged.all()), pairs.residuals
    check_honest(pairs, matrix, 1e-3)


def test_probe__does_not_begin_where_the_search_did() -> None:
    """From there it would see no more than the search."""
    matrix, seen = planted(SPECTRA["outliers"]), []

    def noted(vectors: Tensor, _: Tensor) -> Tensor:
        seen.append(vectors[0].clone())
        return vectors @ matrix

    lanczos_eigenpairs(exact_product(matrix), 300, 3, rounded=noted)
    start, *others = seen
    assert float((torch.stack(others) @ start).abs().max()) < 0.5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [1e-3, 3e-3])
def test_cluster__that_the_cut_goes_through_is_left_to_exact_products(seed: int, spread: float) -> None:
    """More pairs than those that guard the last one may be as large, and rounded products cannot tell."""
    generator = torch.Generator().manual_seed(seed)
    cluster = 5 * (1 + spread * torch.rand(12, generator=generator, dtype=torch.float64))
    values = torch.cat([cluster, torch.linspace(-1, 1, 238).double()])
    matrix = planted(values, seed)
    exact, rounded = Counted(exact_product(matrix)), Counted(rounded_product(matrix))
    pairs = lanczos_eigenpairs(exact, 250, 3, tol=1e-3, seed=seed, rounded=rounded)
    alone = lanczos_eigenpairs(exact_product(matrix), 250, 3, tol=1e-3, seed=seed)
    assert rounded.vectors > 0
    top = cluster.sort(descending=True).values[:3]
    missing, missing_alone = ((top - one.eigenvalues[0]).clamp(min=0).max() for one in (pairs, alone))
    assert float(missing) <= float(missing_alone) + 5e-3  # a thousandth


@pytest.mark.parametrize("seed", range(12))
def test_pair_beyond__within_the_errors_may_be_one_of_those_asked_for(seed: int) -> None:
    """From both ends in turn, the first pair beyond is one of the other end, and far from the cut."""
    tops = [9.0, 7.0, 5.0, 4.9996, -8.0, -6.0, -3.0]
    matrix = planted(torch.cat([torch.tensor(tops).double(), torch.linspace(-0.5, 0.5, 113).double()]), seed)
    pairs = lanczos_eigenpairs(
        exact_product(matrix), 120, 5, which="both", seed=seed, rounded=rounded_product(matrix)
    )
    expected = torch.tensor([9.0, -8.0, 7.0, -6.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvalues[0], expected, rtol=0, atol=1e-4)


def test_certainty__is_reckoned_with_twice_the_errors_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, reckoned = planted(SPECTRA["outliers"]), []

    def noted(*args: Any) -> Tensor:
        reckoned.append(float(args[-1]))
        return certain_pairs(*args)

    monkeypatch.setattr(search, "certain_pairs", noted)
    pairs = lanczos_eigenpairs(exact_product(matrix), 300, 5, rounded=rounded_product(matrix))
    vectors, rows = pairs.eigenvectors[0], torch.zeros(5, dtype=torch.int64)
    errors = (rounded_product(matrix)(vectors, rows) - vectors @ matrix).norm(dim=1)
    assert reckoned == [pytest.approx(2 * float(errors.max()), rel=0.5)]
    lanczos_eigenpairs(exact_product(matrix), 300, 5)
    assert reckoned[1:] == [0.0]


def test_correction__takes_fewer_exact_products_than_a_search_where_eigenvalues_lie_close() -> None:
    matrix = planted(SPECTRA["no outliers"])
    exact = Counted(exact_product(matrix))
    pairs = lanczos_eigenpairs(exact, 300, 5, rounded=rounded_product(matrix))
    alone = lanczos_eigenpairs(exact_product(matrix), 300, 5)
    assert bool(pairs.converged.all())
    assert exact.vectors < int(alone.n_matvec) / 2


@pytest.mark.parametrize("copies", [4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_copies__are_found_all_where_the_last_pairs_are_at_the_edge_of_the_rest(
    copies: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outliers = (1 + 9 * torch.rand(3, generator=generator, dtype=torch.float64)).repeat(copies)
    values = torch.cat([outliers, torch.linspace(-0.5, 0.5, 160 - len(outliers)).double()])
    matrix, k = planted(values, seed), 3 * copies + 2
    pairs = lanczos_eigenpairs(
        exact_product(matrix), 160, k, tol=1e-3, seed=seed, rounded=rounded_product(matrix)
    )
    expected = values.abs().sort(descending=True).values[:k]
    torch.testing.assert_close(pairs.eigenvalues[0].abs(), expected, rtol=0, atol=2e-3 * float(expected[0]))
    check_honest(pairs, matrix, 1e-3)


def test_search__is_given_up_soon_where_rounding_hides_the_pairs() -> None:
    matrix = planted(SPECTRA["small beside large"])
    exact, rounded = Counted(exact_product(matrix)), Counted(rounded_product(matrix))
    pairs = lanczos_eigenpairs(exact, 300, 5, tol=1e-3, rounded=rounded)
    alone = lanczos_eigenpairs(exact_product(matrix), 300, 5, tol=1e-3)
    assert rounded.vectors <= 15
    assert exact.vectors == int(alone.n_matvec)
    torch.testing.assert_close(pairs.eigenvalues, alone.eigenvalues, rtol=1e-6, atol=0)


def test_rounded_products__alone_would_not_do() -> None:
    """What the correction is for: Ritz pairs of a rounded search have residuals above the tolerance."""
    matrix = planted(SPECTRA["outliers"])
    rounded = lanczos_eigenpairs(rounded_product(matrix), 300, 5, tol=1e-3, max_matvec=60)
    assert float(true_residuals(rounded, matrix).min()) > 1e-3


class Counted:
    """Products that are counted."""

    def __init__(self, product: Product) -> None:
        self.product, self.vectors = product, 0

    def __call__(self, vectors: Tensor, problems: Tensor) -> Tensor:
        self.vectors += len(vectors)
        return self.product(vectors, problems)


def test_search__goes_by_rounded_products_and_few_exact_ones() -> None:
    matrix = planted(SPECTRA["outliers"])
    exact, rounded = Counted(exact_product(matrix)), Counted(rounded_product(matrix))
    pairs = lanczos_eigenpairs(exact, 300, 5, tol=1e-3, rounded=rounded)
    assert bool(pairs.converged.all())
    assert exact.vectors == 5  # those found, once
    assert rounded.vectors > 15
    assert int(pairs.n_matvec) == exact.vectors + rounded.vectors
    alone = lanczos_eigenpairs(exact_product(matrix), 300, 5, tol=1e-3)
    assert rounded.vectors <= int(alone.n_matvec) + 5 + 4
    assert int(pairs.n_certain) >= 3


def test_search__does_not_wait_for_residuals_that_errors_keep_large() -> None:
    """Errors of half a percent in all directions: no product shows a residual below the tolerance."""
    matrix, generator = planted(SPECTRA["outliers"]), torch.Generator().manual_seed(0)

    def noisy(vectors: Tensor, _: Tensor) -> Tensor:
        products = vectors @ matrix
        noise = torch.randn(products.shape, generator=generator) / 300**0.5
        products += 5e-3 * products.norm(dim=1, keepdim=True) * noise
        return products

    rounded, exact = Counted(noisy), Counted(exact_product(matrix))
    pairs = lanczos_eigenpairs(exact, 300, 5, tol=1e-3, rounded=rounded)
    alone = lanczos_eigenpairs(exact_product(matrix), 300, 5, tol=1e-3)
    assert rounded.vectors <= int(alone.n_matvec) + 15
    assert exact.vectors <= 20
    assert bool(pairs.converged.all())
    check_honest(pairs, matrix, 1e-3)


@pytest.mark.parametrize("arguments", [{"tol": 4e-4}, {"max_matvec": 56}, {"max_basis": 13}])
def test_rounded_products__are_left_out_where_they_cannot_pay(arguments: dict[str, float]) -> None:
    def never(vectors: Tensor, problems: Tensor) -> Tensor:
        raise AssertionError("asked for")

    matrix = planted(SPECTRA["outliers"])
    lanczos_eigenpairs(exact_product(matrix), 300, 5, rounded=never, **arguments)


WRONG: dict[str, Callable[[Tensor], Product]] = {
    "zero": lambda _: lambda vectors, _: torch.zeros_like(vectors),
    "another matrix": lambda matrix: rounded_product(planted(torch.linspace(-20, 20, len(matrix)), seed=9)),
    "negative": lambda matrix: rounded_product(-matrix),
    "noise": lambda _: lambda vectors, _: vectors.flip(-1).roll(7, -1) * vectors.abs().sum(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("which", ["magnitude", "largest"])
def test_products__that_are_nothing_alike_never_make_a_flag_dishonest(wrong: str, which: Which) -> None:
    matrix = planted(SPECTRA["outliers"])
    pairs = lanczos_eigenpairs(
        exact_product(matrix), 300, 5, which=which, tol=1e-3, rounded=WRONG[wrong](matrix)
    )
    check_honest(pairs, matrix, 1e-3)
    values = SPECTRA["outliers"].double()
    top = values[ranking(values, which)[: int(pairs.n_certain)]]
    torch.testing.assert_close(pairs.eigenvalues[0][: len(top)], top, rtol=1e-4, atol=0)


@settings(max_examples=150, deadline=None)
@given(
    outliers=st.lists(st.floats(1.0, 50.0), min_size=0, max_size=8),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=8, max_size=8),
    copies=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1e-2]),
    k=st.integers(1, 6),
    which=st.sampled_from(["magnitude", "largest", "smallest", "both"]),
    guarded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_flags__are_honest_for_all_spectra(
    outliers: list[float],
    signs: list[float],
    copies: int,
    spread: float,
    k: int,
    which: Which,
    guarded: bool,
    seed: int,
) -> None:
    tops = [
        sign * value * (1 + spread * i)
        for value, sign in zip(outliers, signs, strict=False)
        for i in range(copies)
    ]
    values = torch.cat([torch.tensor(tops, dtype=torch.float64), torch.linspace(-0.9, 0.9, 160).double()])
    matrix = planted(values, seed)
    options = {} if guarded else {"guard": 0, "probe_steps": 0}
    pairs = lanczos_eigenpairs(
        exact_product(matrix),
        len(values),
        k,
        which=which,
        tol=1e-3,
        seed=seed,
        rounded=rounded_product(matrix),
        **options,
    )
    check_honest(pairs, matrix, 1e-3)
    alone = lanczos_eigenpairs(
        exact_product(matrix), len(values), k, which=which, tol=1e-3, seed=seed, **options
    )
    assert bool((pairs.converged | ~alone.converged).all()), pairs.residuals
    certain = int(pairs.n_certain)
    expected = values[ranking(values, which)]
    found = pairs.eigenvalues[0]
    if which == "magnitude":
        expected, found = expected.abs(), found.abs()
    torch.testing.assert_close(
        found[:certain], expected[:certain], rtol=0, atol=1e-4 * float(values.abs().max())
    )


def test_start__that_turned_much_is_searched_from_by_rounded_products() -> None:
    matrix = planted(SPECTRA["outliers"])
    start = planted(SPECTRA["outliers"], seed=1)[None, :5]
    exact, rounded = Counted(exact_product(matrix)), Counted(rounded_product(matrix))
    pairs = lanczos_eigenpairs(exact, 300, 5, tol=1e-3, rounded=rounded, start=start)
    assert bool(pairs.converged.all())
    assert rounded.vectors > 10
    assert exact.vectors == 6  # to see how far it turned, and those found
    check_honest(pairs, matrix, 1e-3)


def test_start__that_turned_little_is_corrected_by_exact_products() -> None:
    matrix = planted(SPECTRA["outliers"])
    exact = lanczos_eigenpairs(exact_product(matrix), 300, 5, tol=1e-4)
    rounded = Counted(rounded_product(matrix))
    again = lanczos_eigenpairs(
        exact_product(matrix), 300, 5, tol=1e-3, rounded=rounded, start=exact.eigenvectors
    )
    assert rounded.vectors == 0
    assert int(again.n_matvec) == 5


def test_several_problems__are_each_corrected() -> None:
    names = ["outliers", "close at the cut", "no outliers", "rank 3", "small beside large"]
    matrices = torch.stack([planted(SPECTRA[name], seed=i) for i, name in enumerate(names)])
    low = matrices.bfloat16()

    def exact(vectors: Tensor, problems: Tensor) -> Tensor:
        return (matrices[problems] @ vectors[:, :, None])[:, :, 0]

    def rounded(vectors: Tensor, problems: Tensor) -> Tensor:
        return (low[problems] @ vectors.bfloat16()[:, :, None])[:, :, 0].float()

    pairs = lanczos_eigenpairs(exact, 300, 4, n_problems=5, tol=1e-3, rounded=rounded)
    for i, name in enumerate(names):
        alone = Eigenpairs(*(getattr(pairs, field)[i : i + 1] for field in pairs.__dataclass_fields__))
        check_honest(alone, matrices[i], 1e-3)
        assert bool(alone.converged.all())
        values = SPECTRA[name].double()
        expected = values[ranking(values, "magnitude")[:4]].abs()
        torch.testing.assert_close(
            alone.eigenvalues[0].abs(), expected, rtol=0, atol=2e-5 * float(expected.max())
        )


@pytest.mark.parametrize("max_matvec", [57, 70, 90])
def test_budget__is_kept(max_matvec: int) -> None:
    matrix = planted(SPECTRA["no outliers"])
    pairs = lanczos_eigenpairs(
        exact_product(matrix), 300, 5, max_matvec=max_matvec, rounded=rounded_product(matrix)
    )
    assert int(pairs.n_matvec) <= max_matvec
    check_honest(pairs, matrix, 1e-3)


def test_rounded_product__that_is_not_finite_is_named() -> None:
    matrix = planted(SPECTRA["outliers"])
    with pytest.raises(NonFiniteCurvatureError, match="head"):
        lanczos_eigenpairs(
            exact_product(matrix), 300, 5, name="head", rounded=lambda vectors, _: vectors * torch.nan
        )


# ---- chains


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round whatever the processor is and however small the network."""
    monkeypatch.setattr(precision, "_rounding_is_faster", lambda threads: True)
    monkeypatch.setattr(operators, "_WORTH_ROUNDING", 0)
    monkeypatch.setattr(operators, "_LARGE", 0)


def noted_copies(monkeypatch: pytest.MonkeyPatch) -> list[LinearChain]:
    """Return a list that all chains of which a rounded copy is made are put in."""
    noted: list[LinearChain] = []
    make = LinearChain._made_rounded

    def note(self: LinearChain) -> LinearChain:
        noted.append(self)
        return make(self)

    monkeypatch.setattr(LinearChain, "_made_rounded", note)
    return noted


def problem(out: int = 4, samples: int = 300, batch_size: int | None = None) -> tuple[nn.Module, Objective]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 14), nn.GELU(), nn.Linear(14, out))
    targets = torch.randint(out, (samples,), generator=generator)
    inputs = torch.randn(out, 20, generator=generator)[targets] + torch.randn(
        samples, 20, generator=generator
    )
    return model, Objective(F.cross_entropy, inputs, targets, l2=0.01, batch_size=batch_size)


@pytest.mark.parametrize("out", [4, 30])  # second derivatives behind the last layer held, and multiplied
@pytest.mark.parametrize("tile", [2**13, 2**19])  # several tiles of samples, and one
@pytest.mark.usefixtures("rounding")
def test_rounded_chain__is_some_thousandths_off(out: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chain, "_TILE", tile)
    monkeypatch.setattr(LossGraph, "vectors_at_once", 1)  # as of a large network
    model, objective = problem(out, 700)
    names = [name for name, _ in model.named_parameters()]
    groups = [[name] for name in names] + [names, ["0.weight", "2.bias"], ["2.weight", "4.weight"]]
    blocks = resolve_blocks(model, {"+".join(group): group for group in groups})
    with Curvature(model, objective) as curvature, precision.matrix_products("fastest"):
        for operator in curvature.operators(blocks, "hessian"):
            low = operator.rounded()
            assert isinstance(low, ChainHessian)
            vectors = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(2))
            rows = torch.zeros(3, dtype=torch.int64)
            exact, found = operator.product(vectors, rows), low.product(vectors, rows)
            assert found.dtype == torch.float32
            error = (found - exact).norm(dim=1) / exact.norm(dim=1)
            assert bool((error < 1.5e-2).all()), (operator.block.label, error)
            assert bool((error > 1e-5).all()), "not rounded"


@pytest.mark.usefixtures("rounding")
def test_rounded_chain__is_made_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = noted_copies(monkeypatch)
    with Curvature(*problem()) as curvature:
        curvature.eigenpairs(3, dense_up_to=0)
        curvature.eigenpairs(3, blocks="model")
    assert len(made) == 1


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("blocks", ["layer", "model"])
@pytest.mark.parametrize("batch_size", [None, 70])
def test_eigenpairs__of_a_chain_are_exact(blocks: str, batch_size: int | None) -> None:
    model, objective = problem(batch_size=batch_size)
    with Curvature(model, objective) as curvature:
        found = curvature.eigenpairs(4, blocks=blocks, dense_up_to=13)
    with Curvature(model, objective, dtype=torch.float64) as curvature:
        exact = curvature.eigenpairs(4, blocks=blocks, dense_up_to=10_000)
        searched = 0
        for operator in curvature.operators([spectrum.block for spectrum in exact.values()], "hessian"):
            label = operator.block.label
            searched += found[label].path == "lanczos"
            values, vectors = found[label].eigenvalues, found[label].eigenvectors.reshape(4, -1).double()
            torch.testing.assert_close(values, exact[label].eigenvalues, rtol=1e-4, atol=1e-6)
            products = operator.product(vectors, torch.zeros(4, dtype=torch.int64))
            residuals = (products - values[:, None] * vectors).norm(dim=1) / values.abs()
            assert bool((residuals <= found[label].residuals * (1 + 1e-2) + 1e-5).all())
            assert bool((residuals <= 1e-3).all())
    assert searched


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("out", [4, 30])
def test_chains__are_gone_with_the_context(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody looks for cycles, for these would hold all activations."""
    monkeypatch.setattr(LossGraph, "vectors_at_once", 1)  # as of a large network
    made: list[weakref.ref[LinearChain]] = []
    make = LinearChain.__init__

    def note(self: LinearChain, *args: Any) -> None:
        made.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(LinearChain, "__init__", note)
    model, objective = problem(out)
    gc.collect()
    gc.disable()
    try:
        with Curvature(model, objective) as curvature:
            curvature.eigenpairs(2, dense_up_to=0)
            curvature.eigenpairs(2, blocks="model")
        del curvature
        assert len(made) > 5
        assert not [chain for chain in made if chain() is not None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("classes", "d", "k"), [(10, 20, 19), (4, 20, 9), (6, 40, 14)])
def test_softmax_regression_at_zero_weights__has_all_its_copies(classes: int, d: int, k: int) -> None:
    """Its eigenvalues come in as many copies as there are classes, less one."""
    generator = torch.Generator().manual_seed(classes)
    model = nn.Linear(d, classes)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    scales = torch.arange(1, d + 1) ** -0.7
    inputs = torch.randn(500, d, generator=generator) * scales
    objective = Objective(F.cross_entropy, inputs, torch.randint(classes, (500,), generator=generator))
    with Curvature(model, objective) as curvature:
        found = curvature.eigenpairs(k, blocks="model", dense_up_to=0)["model"]
        exact = curvature.eigenpairs(k, blocks="model", dense_up_to=10_000)["model"]
    torch.testing.assert_close(found.eigenvalues, exact.eigenvalues, rtol=1e-3, atol=0)


@pytest.mark.parametrize("choice", ["full", "default"])
def test_choice__decides_about_rounding(
    choice: precision.MatrixProducts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_rounding_is_faster", lambda threads: True)
    cpu = torch.device("cpu")
    assert not precision.may_round(cpu)  # where nothing is chosen
    with precision.matrix_products(choice):
        assert not precision.may_round(cpu)
    with precision.matrix_products("fastest"):
        assert precision.may_round(cpu)
        assert not precision.may_round(torch.device("cuda"))
        monkeypatch.setattr(precision, "_rounding_is_faster", lambda threads: False)
        assert not precision.may_round(cpu)


@pytest.mark.parametrize("faster", [0.1, 0.2, 0.5, 1.5])
def test_rounding__is_for_processors_that_multiply_bfloat16_much_faster(
    faster: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.cycle([faster, 1.0])
    monkeypatch.setattr(precision, "_seconds", lambda function: next(times))
    assert precision._rounding_is_faster.__wrapped__(1) == (faster < 0.25)


@pytest.mark.usefixtures("rounding")
def test_rounding__is_left_out_where_it_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = noted_copies(monkeypatch)
    model, objective = problem()
    for arguments in ({"dtype": torch.float64}, {"max_bytes": 10_000}, {"matrix_products": "full"}):
        with Curvature(model, objective, **arguments) as curvature:
            curvature.eigenpairs(2, dense_up_to=0)
    with Curvature(model, objective) as curvature:
        curvature.eigenpairs(2, dense_up_to=0, max_seconds=100.0)
        curvature.eigenpairs(2, dense_up_to=0, tol=1e-5)
        curvature.eigenpairs(2, dense_up_to=0, max_matvec=60)
        curvature.eigenpairs(2, dense_up_to=0, guard=12)
    with Curvature(*problem(batch_size=70)) as curvature:
        curvature.eigenpairs(2, dense_up_to=0)
    assert not asked
    with Curvature(model, objective) as curvature:
        curvature.eigenpairs(2, dense_up_to=0)
    assert asked
