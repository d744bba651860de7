"""The reference implementation. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import jax

from ptq4dit_jax import dit
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def modulate_encode(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, act: ActQuantizer, eps: float) -> Encoded:
    """See :func:`ptq4dit_jax.engine.norm.modulate_encode`."""
    wide = x_BTD.astype(dit.at_least_float32(x_BTD.dtype))
    return act.encode(dit.modulate(dit.layer_norm(wide, eps), shift_BD, scale_BD))
