"""Recorders for training loops that others wrote: Lightning, Hugging Face Trainer, distributed training.

Each adapter is a module of its own and imports its framework only when it is imported itself.
"""
