"""The phases of a Lanczos search: until the pairs are found, a probe for what was missed, exact products.

A search may go by rounded products, some thousandths off. What it finds is multiplied anew and corrected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hild_xr.recorders.curvature.certainty import certain_pairs
from hild_xr.recorders.curvature.pairs import Eigenpairs, Which, certified, own_scale
from hild_xr.recorders.curvature.subspace import Matrices, Ritz, Subspace

_STOP = 0.9
"""The estimated residual must be this far below the tolerance, so that the true one is below it too."""

_GUARD_GAP = 0.2
"""Residual, in gaps to the last pair asked for, at which a pair beyond is known well enough.

It lies that near to an eigenvalue, so nothing on its way up past the last pair hides behind it.
"""

_CHECK_EVERY = 4
"""Products between two looks at the Ritz pairs where a look is not free."""

_WARM_LEAK = 2.0
"""Times the tolerance: how far the old eigenvectors may have turned to be corrected one by one."""

_ROUNDS = 4
"""Corrections after which these have failed and Lanczos takes over."""

_ROUNDED_STOP = 0.8
"""Part of the residual otherwise looked for at which a search by rounded products ends: errors are added."""

_ROUNDED_NOISE = 1e-4
"""Residual, in largest eigenvalues, from which on a search by rounded products leaves the rest to others."""

_ROUNDED_SPAN = 0.02
"""Size of a pair, in largest eigenvalues, below which rounded products do not tell it from noise."""

_ROUNDED_ERROR = 1e-2
"""Error of a rounded product, in the eigenvalue, that must be reckoned with: three times what is common."""

_BOUND = 4.0
"""Errors of rounded products, in the largest one seen, that are reckoned with."""


def rounded_budget(wanted: int) -> int:
    """Return after how many rounded products a search goes on by exact ones: their errors may hold it up.

    Examples
    --------
    >>> rounded_budget(12)
    220
    """
    return 10 * wanted + 100


@dataclass(frozen=True)
class Search:
    """The settings of a solve, and its phases: start, search, probe, residuals.

    Parameters
    ----------
    k
        Pairs asked for.
    wanted
        Pairs that must be found, those that guard the others too.
    which, tol
        See :func:`~hild_xr.recorders.curvature.lanczos.lanczos_eigenpairs`.
    budget, deadline
        Products allowed, and the time (``time.monotonic``) by which a search ends.
    capacity
        Vectors of a basis.
    probe_steps
        Steps of a probe; 0 for none.
    rounded
        Matrices of cheaper products that stand for the exact ones in a search; ``None`` for none.

    Examples
    --------
    >>> diagonal = torch.arange(50.0)
    >>> product = lambda vectors, problems: vectors * diagonal
    >>> matrices = Matrices(product, 50, torch.float32, torch.device("cpu"), "diagonal", seed=0)
    >>> search = Search(1, 2, "largest", 1e-3, 100, float("inf"), 20, 8)
    >>> search.run(Subspace(matrices, torch.tensor([0]), 20), None).eigenvalues.round(decimals=2)
    tensor([[49.]], dtype=torch.float64)
    """

    k: int
    wanted: int
    which: Which
    tol: float
    budget: int
    deadline: float
    capacity: int
    probe_steps: int
    rounded: Matrices | None = None

    def run(self, space: Subspace, start: Tensor | None) -> Eigenpairs:
        """Solve, from an empty subspace and perhaps from vectors (n, s, p) near the eigenvectors."""
        if start is not None:
            return self.certify(self.warm(space, start.to(space.vectors)), torch.tensor(0))
        space.aim_randomly()
        space, certain = self.searched(space)
        return self.certify(space, certain)

    def searched(self, space: Subspace, *, probe: bool = True) -> tuple[Subspace, Tensor]:
        """Search from the vector aimed at; also return how many pairs are certain after a probe, shape (n,).

        By rounded products if there are. Where these do not lead to good pairs at once, they may have led to
        others than those asked for: the search begins anew then, as if they had not been.
        """
        if self.rounded is not None:
            exact, aim = space.matrices, space.vectors[:, 0].clone()
            space.matrices = self.rounded
            space = self.until_found(space)
            if not self.is_too_small(space, space.ritz(self.which)).any():
                space, sure = self.probed(space) if probe else (space, _none(space))
                found = space.ritz(self.which).eigenvalues
                errors = self.make_exact(space, exact)
                told = not self.not_good_enough(space) and not self.is_cut_in_cluster(found, errors)
                if told or 2 * int(space.count.max()) > self.budget:
                    return space, self.certain(space, sure, found, 2 * errors)
            space = self.begun_anew(space, exact, aim)
        space = self.until_found(space)
        space, sure = self.probed(space) if probe else (space, _none(space))
        return space, self.certain(space, sure, space.ritz(self.which).eigenvalues)

    def probed(self, space: Subspace) -> tuple[Subspace, Tensor]:
        """Look for what a search missed; also return whether nothing more is to be found, shape (n,)."""
        pending = torch.ones(len(space.problems), dtype=torch.bool)
        clustered = self.are_clustered(space)
        sure = torch.zeros(len(space.problems), dtype=torch.bool)
        while self.probe_steps and not space.exhausted and time.monotonic() < self.deadline:
            # Probe all whose search was not cut short; those that change are probed again.
            pending = pending & (space.count + self.probe_steps <= self.allowed_products(space))
            if not bool(pending.any()):
                break
            before = space.projected.diagonal(dim1=1, dim2=2).clone()
            parts = [] if bool(pending.all()) else [space.select(~pending)]
            probed = space.select(pending)
            probed.aim_randomly()
            parts.append(self.until_found(probed, self.probe_steps, clustered[pending]))
            space = Subspace.joined(parts, self.capacity)
            moved = (space.projected.diagonal(dim1=1, dim2=2) - before)[:, : self.wanted].abs().amax(-1)
            stayed = pending & (moved <= self.tol * space.scale)
            # what was missed once has more copies, and so had others maybe
            clustered |= (pending & ~stayed) | self.are_clustered(space)
            sure = sure | stayed
            pending = pending & ~stayed
        return space, sure | space.exhausted

    def is_too_small(self, space: Subspace, ritz: Ritz) -> Tensor:
        """Whether pairs asked for drown in the errors of rounded products, shape (n,)."""
        return ritz.eigenvalues[:, : self.k].abs().amin(-1) < _ROUNDED_SPAN * space.scale

    def is_cut_in_cluster(self, found: Tensor, errors: Tensor) -> bool:
        """Whether all pairs that guard the others lie within the errors (n,): more may then be as large."""
        gaps = self.gaps(found[:, : self.wanted])
        return gaps.shape[1] > 0 and bool((gaps <= 2 * errors[:, None]).all(1).any())

    @staticmethod
    def begun_anew(space: Subspace, matrices: Matrices, aim: Tensor) -> Subspace:
        """Forget all but how many products were spent, and go in a direction (n, p)."""
        space.matrices, space.filled = matrices, 0
        space.projected.zero_()
        space.scale.zero_()
        space.aim(aim)
        return space

    def make_exact(self, space: Subspace, exact: Matrices) -> Tensor:
        """Multiply anew what was found by rounded products, and correct it.

        First by rounded products of the residuals, then by exact ones. Return the largest error of a rounded
        product, shape (n,).
        """
        values = space.ritz(self.which).eigenvalues[:, : self.wanted]
        space.filled = self.k
        errors = space.multiply_anew(slice(self.k), exact).amax(-1)
        # a pair beyond that lies within the errors may be one of those asked for
        near = (self.gaps(values) <= 2 * errors[:, None]).any(0).nonzero()
        if len(near):
            space.filled += 1 + int(near.max())
            space.multiply_anew(slice(self.k, space.filled), exact)
        known, bad = space.filled, self.not_good_enough(space)
        if bad:
            residuals = space.residual_vectors(space.ritz(self.which), bad)
            space.append(residuals, by=self.rounded, errors=_BOUND * errors)
            if self.not_good_enough(space):
                space.multiply_anew(slice(known, space.filled), exact)
        for _ in range(_ROUNDS):
            bad = self.not_good_enough(space)
            if not bad or space.filled + len(bad) > self.capacity:
                break
            space.append(space.residual_vectors(space.ritz(self.which), bad))
        return errors

    def not_good_enough(self, space: Subspace) -> list[int]:
        """Return which of the pairs asked for have too large a residual in one of the problems."""
        ritz = space.ritz(self.which)
        large = space.residuals(ritz, self.k) > self.allowed(space, ritz, self.k)
        return large.any(0).nonzero()[:, 0].tolist()

    def are_clustered(self, space: Subspace) -> Tensor:
        """Whether eigenvalues found lie closer together than the tolerance, shape (n,)."""
        values = space.ritz(self.which).eigenvalues[:, : self.wanted].sort(-1).values
        larger = torch.maximum(values[:, 1:].abs(), values[:, :-1].abs())
        return (values.diff(dim=1) <= self.tol * larger).any(-1)

    def certain(self, space: Subspace, sure: Tensor, found: Tensor, errors: Tensor | None = None) -> Tensor:
        """Count the certain pairs of problems that a probe left as they were, shape (n,).

        ``found`` are the eigenvalues then, shape (n, wanted), ``errors`` (n,) how far they may be off.
        """
        off = torch.zeros(len(sure), dtype=torch.float64) if errors is None else errors
        size = space.matrices.size
        if found.shape[1] == size:  # the whole space was searched
            return torch.where(sure, self.k, 0)
        found = found[:, : self.wanted]
        certain = certain_pairs(found, self.k, self.which, space.scale, size, self.probe_steps, off)
        # what the probe vouched for must be what is returned
        now = space.ritz(self.which).eigenvalues[:, : self.k]
        same = (now - found[:, : self.k]).abs() <= (off + self.tol * space.scale)[:, None]
        return torch.where(sure, torch.minimum(certain, same.cumprod(1).sum(1)), 0)

    def warm(self, space: Subspace, start: Tensor) -> Subspace:
        """Begin with vectors that were eigenvectors a moment ago."""
        space.aim(start.sum(1))
        space.extend()
        turned = self.leak(space, start) > _WARM_LEAK * self.tol
        if not self.k <= start.shape[1] <= min(self.capacity, self.budget):
            turned[:] = True
        parts = []
        if bool(turned.any()):
            parts.append(self.best(self.searched(space.select(turned), probe=False)[0]))
        if not bool(turned.all()):
            near = start[~turned.to(start.device)]
            parts.extend(map(self.best, self.corrected(self.with_start(space.select(~turned), near))))
        return Subspace.joined(parts, self.capacity)

    def best(self, space: Subspace) -> Subspace:
        """Keep the k pairs asked for."""
        space.restart(space.ritz(self.which), self.k)
        return space

    @staticmethod
    def leak(space: Subspace, start: Tensor) -> Tensor:
        """Return how much of the newest product lies outside the span of the start vectors, shape (n,)."""
        product = space.products[:, space.filled - 1, :, None]
        basis = torch.linalg.qr(start.mT)[0]
        rest = torch.linalg.vector_norm(product - basis @ (basis.mT @ product), dim=(1, 2))
        leak: Tensor = rest / torch.linalg.vector_norm(product, dim=(1, 2)).clamp(min=1e-30)
        return leak.cpu()

    @staticmethod
    def with_start(space: Subspace, start: Tensor) -> Subspace:
        """Multiply all start vectors, of which the sum has been."""
        if start.shape[1] > 1:
            space.append(start[:, 1:])  # with their sum they span the same space
        return space

    def corrected(self, space: Subspace) -> list[Subspace]:
        """Multiply the residuals of the pairs that are not good enough, until all are."""
        finished: list[Subspace] = []
        for _ in range(_ROUNDS):
            ritz = space.ritz(self.which)
            large = space.residuals(ritz, self.k) > self.allowed(space, ritz, self.k)
            pairs = large.any(0).nonzero()[:, 0].tolist()
            no_budget = self.is_cut_short(space) or int(space.count.max()) + len(pairs) > self.budget
            done = ~large.any(1) | space.exhausted | no_budget
            if bool(done.any()):
                finished.append(self.taken_out(space, ritz, done, self.k))
                if bool(done.all()):
                    return finished
                space, ritz = space.select(~done), ritz.select(~done)
            room = min(self.capacity, space.matrices.size)
            if space.filled + len(pairs) > room:
                space.restart(ritz, max(self.k, room - len(pairs)))
                ritz = space.ritz(self.which)
            space.append(space.residual_vectors(ritz, pairs[: room - space.filled]))
        space.restart(space.ritz(self.which), self.k)
        if int(space.count.max()) + self.wanted > self.budget:
            return [*finished, space]  # no search can end within the products left
        sums = space.vectors[:, : self.k].sum(1)
        return [*finished, self.until_found(self.begun_anew(space, space.matrices, sums))]

    def allowed(self, space: Subspace, ritz: Ritz, n_pairs: int) -> Tensor:
        """Return the residual at which each of the first pairs is good enough, shape (n, n_pairs)."""
        found = ritz.eigenvalues[:, :n_pairs]
        scale = torch.maximum(space.scale, ritz.eigenvalues.abs().amax(-1))
        allowed = _STOP * self.tol * own_scale(found, scale[:, None])
        if space.matrices is self.rounded:
            allowed *= _ROUNDED_STOP
            allowed = torch.maximum(allowed, _ROUNDED_NOISE * scale[:, None])
            if not space.follows_recurrence:  # real residuals, then, with the errors in them
                allowed = torch.maximum(allowed, _ROUNDED_ERROR * own_scale(found, scale[:, None]))
        allowed[:, self.k :] = torch.maximum(allowed[:, self.k :], _GUARD_GAP * self.gaps(found))
        return allowed

    def gaps(self, eigenvalues: Tensor) -> Tensor:
        """Return how far the pairs beyond those asked for are from the last one at their end, (n, beyond)."""
        size = eigenvalues.abs() if self.which == "magnitude" else eigenvalues
        beyond = range(self.k, size.shape[1])
        last = [
            self.k - 1 if self.which != "both" or (i - self.k) % 2 or self.k == 1 else self.k - 2
            for i in beyond
        ]
        return (size[:, last] - size[:, self.k :]).abs()

    def until_found(self, space: Subspace, min_steps: int = 0, clustered: Tensor | None = None) -> Subspace:
        """Extend until every problem is done; keep its best Ritz vectors.

        A probe of a problem whose eigenvalues are ``clustered`` goes on until the best pair in
        its own directions is known like a guard: a copy near the last pairs shows itself late.
        """
        finished: list[Subspace] = []
        steps = 0
        more = torch.zeros(len(space.problems), dtype=torch.bool) if clustered is None else clustered
        while True:
            n_pairs = self.wanted + int(bool(more.any()) and self.wanted < space.matrices.size)
            if self.is_time_to_look(space, steps, min_steps, n_pairs):
                ritz = space.ritz(self.which)
                done = self.is_found(space, ritz, n_pairs, more) & (steps >= min_steps)
                done = done | space.exhausted | self.is_cut_short(space)
                if space.matrices is self.rounded and space.filled >= 2 * self.wanted:
                    done = done | self.is_too_small(space, ritz)
                if bool(done.any()):
                    finished.append(self.taken_out(space, ritz, done, self.wanted))
                    if bool(done.all()):
                        return Subspace.joined(finished, self.capacity)
                    space, ritz, more = space.select(~done), ritz.select(~done), more[~done]
                if space.full:
                    space.restart(ritz, self.wanted + (self.capacity - self.wanted) // 2)
            space.extend()
            steps += 1

    @staticmethod
    def taken_out(space: Subspace, ritz: Ritz, done: Tensor, keep: int) -> Subspace:
        """Return the problems that are done, with their best Ritz vectors alone."""
        found = space.select(done)
        found.restart(ritz.select(done), keep)
        return found if found is space else found.trimmed()

    def is_cut_short(self, space: Subspace) -> bool:
        """Whether products or time are spent."""
        return int(space.count.max()) >= self.allowed_products(space) or time.monotonic() >= self.deadline

    def allowed_products(self, space: Subspace) -> int:
        """Return the budget, less what it takes to make rounded products exact."""
        if space.matrices is not self.rounded:
            return self.budget
        return min(self.budget - (3 + _ROUNDS) * self.wanted, rounded_budget(self.wanted))

    def is_time_to_look(self, space: Subspace, steps: int, min_steps: int, n_pairs: int) -> bool:
        """Whether the Ritz pairs are looked at now: where it is free, else now and then, and at the end."""
        if space.filled < n_pairs:
            return False
        if space.full or space.exhausted or self.is_cut_short(space):
            return True
        free = space.follows_recurrence and len(space.problems) == 1
        return steps >= min_steps and (free or (steps - min_steps) % _CHECK_EVERY == 0)

    def is_found(self, space: Subspace, ritz: Ritz, n_pairs: int, more: Tensor) -> Tensor:
        """Whether all wanted pairs of each problem are good enough, and one more of some, shape (n,)."""
        known = space.follows_recurrence
        norms = ritz.estimates[:, :n_pairs] if known else space.residuals(ritz, n_pairs)
        good = norms <= self.allowed(space, ritz, n_pairs)
        good[:, self.wanted :] |= ~more[:, None]
        return good.all(-1)

    def certify(self, space: Subspace, certain: Tensor) -> Eigenpairs:
        """Return the pairs with the residuals of the products kept."""
        ritz = space.ritz(self.which)
        norms = space.residuals(ritz, self.k)
        vectors = space.taken_apart(ritz, self.k)
        eigenvalues, certain = ritz.eigenvalues[:, : self.k], certain.expand_as(space.count)
        return certified(eigenvalues, vectors, norms, space.scale, self.tol, space.count, certain)


def _none(space: Subspace) -> Tensor:
    return torch.zeros(len(space.problems), dtype=torch.bool)
