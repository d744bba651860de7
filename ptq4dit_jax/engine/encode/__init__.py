"""Activations to integer codes, alone or behind adaLN (:mod:`ptq4dit_jax.engine.backends`)."""

from __future__ import annotations

import jax

from ptq4dit_jax.engine import backends
from ptq4dit_jax.engine.stacks import Leaf
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def encode(x: jax.Array, act: ActQuantizer, *, backend: str = "xla") -> Encoded:
    """``act.encode(x)``: (..., K) int8."""
    return backends.run(__name__, "encode", backend, x, act)


def modulate_encode(
    x_BTD: jax.Array, shift_BD: Leaf, scale_BD: Leaf, act: ActQuantizer, eps: float, *, backend: str = "xla"
) -> Encoded:
    """``act`` of ``layer_norm(x) * (1 + scale) + shift``, (B, T, D) int8; computed in float32 at least."""
    return backends.run(__name__, "modulate_encode", backend, x_BTD, shift_BD, scale_BD, act, eps)
