"""Subspaces and vectors: bases, principal angles, distances, alignment, projection."""
