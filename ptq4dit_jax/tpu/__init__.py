"""Softmax attention on TPUs, which both interpreters of a network call, and what its kernel shares with those of the engine.

Only this folder and :mod:`ptq4dit_jax.engine.tpu` touch Pallas's Mosaic TPU. Modules with kernels are imported when they are
first called.
"""
