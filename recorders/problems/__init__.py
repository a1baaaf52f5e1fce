"""The papers' models as ready problems: network, loss, samples and what theory knows about them.

Each problem is a frozen dataclass of its hyperparameters with the same methods:
``model(seed)``, ``optimizer(model)``, ``train(model, optimizer, steps=..., seed=...)``
and ``objective(...)``, which is what Hessian and G-matrix are taken of.

========================  ==========================================================================
:class:`GaussianMixture`  k-GMM: softmax regression on a Gaussian mixture, one layer
:class:`XorMixture`       XOR-GMM: two-layer ReLU network on four Gaussians in XOR position
:class:`Digits`           scikit-learn's 8x8 digits: softmax regression or a 64-32-10 ReLU network
========================  ==========================================================================

Every random number comes from a generator of its own, named by purpose and
seed (:mod:`hild_xr.recorders.problems.streams`): the global random state is
neither read nor changed, and the same seed gives the same run bit by bit, also
when the run is continued at a later step.
"""

from __future__ import annotations

from hild_xr.recorders.problems.digits import Digits
from hild_xr.recorders.problems.gaussian_mixture import GaussianMixture
from hild_xr.recorders.problems.problem import Problem
from hild_xr.recorders.problems.xor_mixture import XorMixture

__all__ = ["Digits", "GaussianMixture", "Problem", "XorMixture"]
