"""Eigenvalues and singular values: outliers, bulk, densities, ranks, tails."""
