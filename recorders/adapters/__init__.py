"""Recorders for training loops that others wrote: Lightning, Hugging Face Trainer, distributed training.

Each adapter is a module of its own and imports its framework only when it is imported itself:

* :mod:`hild_xr.recorders.adapters.lightning`: a callback for Lightning's Trainer;
* :mod:`hild_xr.recorders.adapters.transformers`: a callback for the Trainer of Transformers;
* :mod:`hild_xr.recorders.adapters.distributed`: recorders for DDP and FSDP2, which the
  callbacks use on several devices.
"""
