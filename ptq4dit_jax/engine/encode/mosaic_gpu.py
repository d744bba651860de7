"""One pass on Hopper by :mod:`ptq4dit_jax.engine.hopper.rows`.

Covers bfloat16 with ranges per tensor or, behind adaLN, per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.engine.hopper import rows
from ptq4dit_jax.engine.stacks import Leaf, layer_of, stack_of
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range


def _check(x_BTD: jax.Array, act: ActQuantizer) -> None:
    grouped = not act.dynamic and np.ndim(act.scale)
    if x_BTD.ndim != 3 or x_BTD.dtype != jnp.bfloat16 or 0 in x_BTD.shape or grouped:
        raise NotImplementedError
    if x_BTD.shape[1] % rows.ROWS or x_BTD.shape[2] % rows.COLUMNS:
        raise NotImplementedError


def encode(x: jax.Array, act: ActQuantizer) -> Encoded:
    """See :func:`ptq4dit_jax.engine.encode.encode`."""
    _check(x, act)
    if act.dynamic:
        raise NotImplementedError
    low, high = act_code_range(act.bits)
    K = x.shape[-1]
    scale, zero_point = stack_of(act.scale), stack_of(act.zero_point)
    balance = None if act.balance is None else stack_of(act.balance)
    codes = rows.quantize(x.reshape(-1, K), scale, zero_point, balance, layer_of(act), low=low, high=high)
    return Encoded(codes.reshape(x.shape), act.scale, act.zero_point)


def modulate_encode(x_BTD: jax.Array, shift_BD: Leaf, scale_BD: Leaf, act: ActQuantizer, eps: float) -> Encoded:
    """See :func:`ptq4dit_jax.engine.encode.modulate_encode`."""
    _check(x_BTD, act)
    B, T, D = x_BTD.shape
    if act.balance is not None or act.nonnegative or {shift_BD.shape, scale_BD.shape} != {(B, D)}:
        raise NotImplementedError
    low, high = act_code_range(act.bits)
    ranges = None if act.dynamic else (stack_of(act.scale), stack_of(act.zero_point))
    codes, *scale = rows.modulate_quantize(
        x_BTD.reshape(B * T, D), stack_of(shift_BD), stack_of(scale_BD), ranges, layer_of(shift_BD, scale_BD, act),
        tokens=T, eps=eps, low=low, high=high,
    )  # fmt: skip
    values = codes.reshape(B, T, D)
    if act.dynamic:
        return Encoded(values, scale[0].reshape(B, T, 1), None)
    return Encoded(values, act.scale, act.zero_point)
