"""Inputs of e4m3 products, by XLA, which fuses their conversion with what precedes it."""

from __future__ import annotations

import jax

from ptq4dit_jax import float8
from ptq4dit_jax.engine.xla.encode import normed
from ptq4dit_jax.float8 import ScaledFloat8
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer


def encode(x: jax.Array, act: ActQuantizer) -> ScaledFloat8:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.encode` and :func:`ptq4dit_jax.float8.encode`."""
    return float8.encode(x, act)


def modulate_encode(
    x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, act: ActQuantizer, norm: Norm
) -> ScaledFloat8:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.modulate_encode`."""
    return float8.encode(normed(x_BTD, shift_BD, scale_BD, norm), act)
