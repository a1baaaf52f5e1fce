# %% [markdown]
# # Outliers emerge in the second layer
#
# A two-layer ReLU network with many neurons learns XOR of four Gaussians by online SGD. At the start the
# Hessian block of its second layer has no separated eigenvalues. While the network learns, four outliers
# emerge, and the second layer's weights turn into their span (arXiv 2310.03010).
#
# This script trains the network, records it, analyses the record and checks what it sees, within seconds.

# %%
import tempfile
from pathlib import Path

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.analysis import alignment, outliers, random_alignment_baseline
from hild_xr.recorders.problems import XorMixture

problem = XorMixture(dimension=100, hidden=20, snr=100.0, beta=0.05)
steps = problem.steps(time=40)
store = Path(tempfile.mkdtemp()) / "xor.zarr"

# %% [markdown]
# ## Train and record
#
# The recorder hooks the optimizer; the training loop does not know of it. The second layer has 20 weights, so
# its whole spectrum is recorded.

# %%
model = problem.model(seed=0)
optimizer = problem.optimizer(model)
with rec.Recorder(
    store,
    model,
    optimizer,
    objective=problem.objective(samples=5000, seed=0),
    probes=[rec.Weights(), rec.Hessian(k=20, layers=["second.weight"])],
    schedule=rec.log_spaced(total_steps=steps, records=30),
):
    problem.train(model, optimizer, steps=steps, seed=0)

# %% [markdown]
# ## Analyse
#
# The arrays are labelled and lazy. The regulariser shifts all eigenvalues of the Hessian by beta; the store
# says by how much.

# %%
run = hx.open(store)
hessian = run["hessian"].to_dataset()
spectrum = hessian["eigenvalues"].sel(seed=0, layer="second.weight")
found = outliers(spectrum, method="relative", regularizer=hessian.attrs["regularizer"]).load()

eigenvectors = run["hessian/second.weight/eigenvectors"].sel(seed=0).isel(eig=slice(4))
rho = alignment(run["weights/second.weight/weight"].sel(seed=0), eigenvectors).load()
print(found["outlier_count"].to_series().to_string())
print(rho.to_series().round(3).to_string())

# %% [markdown]
# ## Check
#
# Many eigenvalues of like size at the start, exactly four outliers at the end; alignment goes from chance to
# one.

# %%
chance = random_alignment_baseline(4, 20).item()
assert found["outlier_count"][0] > 8
assert found["outlier_count"][-1] == 4
assert rho[0] < chance + 0.2
assert rho[-1] > 0.99
