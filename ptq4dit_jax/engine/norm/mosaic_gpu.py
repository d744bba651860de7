"""One pass on Hopper by :mod:`ptq4dit_jax.engine.hopper.rows`. Covers bfloat16 with ranges per tensor or per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.engine.hopper import rows
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range, reciprocal


def modulate_encode(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, act: ActQuantizer, eps: float) -> Encoded:
    """See :func:`ptq4dit_jax.engine.norm.modulate_encode`."""
    B, T, D = x_BTD.shape
    grouped = not act.dynamic and np.ndim(act.scale)
    if x_BTD.dtype != jnp.bfloat16 or T % rows.ROWS or D % rows.COLUMNS or act.balance is not None or act.nonnegative or grouped:
        raise NotImplementedError
    low, high = act_code_range(act.bits)
    ranges = None if act.dynamic else (reciprocal(act.scale)[None], act.zero_point.astype(jnp.float32)[None])
    codes, *scale = rows.modulate_quantize(
        x_BTD.reshape(B * T, D), shift_BD, scale_BD, ranges, tokens=T, eps=eps, low=low, high=high
    )
    values = codes.reshape(B, T, D)
    if act.dynamic:
        return Encoded(values, scale[0].reshape(B, T, 1), None)
    return Encoded(values, act.scale, act.zero_point)
