"""What a search of a large block takes at its peak: measured by the system, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

MILLIONS = float(os.environ.get("HILD_XR_MEMORY_MILLIONS", "4"))
"""Parameters; 25 takes a minute or two and 4 GB."""

PROGRAM = """
import resource, sys
import torch
from torch import nn
from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.objective import Objective

torch.set_num_threads(1)
torch.manual_seed(0)
width = int((float(sys.argv[1]) * 1e6) ** 0.5)
targets = torch.randint(10, (128,))
inputs = torch.randn(10, width)[targets] / 2 + torch.randn(128, width) * torch.arange(1, width + 1) ** -0.5
model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(15):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
optimizer.zero_grad(set_to_none=True)
small = nn.Linear(width, 2)
with Curvature(small, Objective(nn.functional.cross_entropy, inputs, targets % 2)) as curvature:
    curvature.eigenpairs(5, "hessian", "model")  # what is loaded at the first use does not count
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# room for the bases of a few vectors only: the smallest basis is taken
with Curvature(model, Objective(nn.functional.cross_entropy, inputs, targets), max_bytes=2**20) as curvature:
    found = curvature.eigenpairs(5, "hessian", "model")["model"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(parameter.numel() for parameter in model.parameters())
assert found.path == "lanczos" and bool(found.converged.all()), found.residuals
print(size, 1024 * (peak - before), 1024 * peak)
"""

BASIS = 14
"""Vectors of the smallest basis for five pairs; each has its product."""


def test_peak__is_the_basis_and_a_few_vectors_more() -> None:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(MILLIONS)], check=True, capture_output=True, text=True
    ).stdout
    size, grown, peak = map(float, output.split())
    vectors = 2 * BASIS + 1 + 5  # of which five for the product and its orthogonalisation
    assert grown < 4 * size * vectors + 100e6, "more copies of the parameters than documented"
    if size > 2e7:
        assert peak < 4e9


BATCHES = """
import resource
import torch
from torch import nn
from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.objective import Objective

torch.set_num_threads(1)
torch.manual_seed(0)
samples, width, depth = 60_000, 64, 4
layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
model = nn.Sequential(*layers, nn.Linear(width, 10))
inputs, targets = torch.randn(samples, width), torch.randint(10, (samples,))
loss = nn.functional.cross_entropy
with Curvature(model, Objective(loss, inputs[:64], targets[:64])) as curvature:
    curvature.eigenpairs(1, "hessian", "model", max_matvec=8)  # what the first use loads does not count
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Curvature(model, Objective(loss, inputs, targets, batch_size=2000)) as curvature:
    curvature.eigenpairs(1, "hessian", "model", max_matvec=8)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak - before), 4 * samples * width * (depth + 1))
"""


def test_peak__of_several_batches_is_four_copies_of_the_activations() -> None:
    output = subprocess.run(
        [sys.executable, "-c", BATCHES], check=True, capture_output=True, text=True
    ).stdout
    grown, activations = map(float, output.split())
    assert grown < 4.5 * activations + 40e6, "more copies of the activations than documented"
