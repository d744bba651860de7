"""The reference implementation. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import jax

from ptq4dit_jax.networks import parts
from ptq4dit_jax.numerics import at_least_float32
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def encode(x: jax.Array, act: ActQuantizer) -> Encoded:
    """See :func:`ptq4dit_jax.engine.encode.encode`."""
    return act.encode(x)


def modulate_encode(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, act: ActQuantizer, eps: float) -> Encoded:
    """See :func:`ptq4dit_jax.engine.encode.modulate_encode`."""
    x_BTD, shift_BD, scale_BD = (a.astype(at_least_float32(a.dtype)) for a in (x_BTD, shift_BD, scale_BD))
    return act.encode(parts.modulate(parts.layer_norm(x_BTD, eps), shift_BD, scale_BD))
