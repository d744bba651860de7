"""Attention on Hopper, in bfloat16: our kernel if it covers the shape and ends in static codes, otherwise cuDNN's."""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.hopper import attention as kernel
from ptq4dit_jax.engine.requirements import require_alike, require_bfloat16, require_static
from ptq4dit_jax.engine.stacks import layer_of, stack_of
from ptq4dit_jax.networks import parts
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range


def attention_codes(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention_codes`."""
    require_alike(q_BTD, k_BTD, v_BTD)
    B, T, D = q_BTD.shape
    require_static(act)
    require_bfloat16(q_BTD.dtype)
    d = D // num_heads
    require(kernel.covers(T, num_heads, d), f"{T} tokens, {num_heads} heads of width {d}")
    finish = kernel.Round(stack_of(act.static_range.zero_point), layer_of(act), *act_code_range(act.bits))
    q, k, v = (x.reshape(B * T, D) for x in (q_BTD, k_BTD, v_BTD))
    codes = kernel.attention(q, k, v, tokens=T, heads=num_heads, finish=finish)
    return Encoded(codes.reshape(B, T, D), *act.static_range)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention`."""
    require_alike(q_BTD, k_BTD, v_BTD)
    d = q_BTD.shape[-1] // num_heads
    fused = parts.can_fuse_attention(q_BTD.dtype, d)
    require(fused, f"cuDNN has no attention for {q_BTD.dtype} and heads of width {d} on this device")
    return parts.in_heads(parts.fused_attention, q_BTD, k_BTD, v_BTD, num_heads)
