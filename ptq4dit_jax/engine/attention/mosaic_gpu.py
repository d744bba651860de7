"""Attention on Hopper, in bfloat16: our kernel where the next product takes codes, cuDNN's for other shapes."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax import dit
from ptq4dit_jax.engine.hopper import attention as kernel
from ptq4dit_jax.engine.stacks import layer_of, stack_of
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range


def _alike(*parts: jax.Array) -> bool:
    """Whether q, k and v are of one shape (B, T, D), none of it 0, and of one type."""
    return len({(part.shape, part.dtype) for part in parts}) == 1 and parts[0].ndim == 3 and 0 not in parts[0].shape


def attention_codes(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer) -> Encoded:
    """See :func:`ptq4dit_jax.engine.attention.attention_codes`."""
    if not _alike(q_BTD, k_BTD, v_BTD):
        raise NotImplementedError
    B, T, D = q_BTD.shape
    static = not act.dynamic and np.ndim(act.zero_point) == 0
    if not static or q_BTD.dtype != jnp.bfloat16 or not kernel.covers(T, num_heads, D // num_heads):
        raise NotImplementedError
    finish = kernel.Round(stack_of(act.zero_point), layer_of(act), *act_code_range(act.bits))
    q, k, v = (x.reshape(B * T, D) for x in (q_BTD, k_BTD, v_BTD))
    codes = kernel.attention(q, k, v, tokens=T, heads=num_heads, finish=finish)
    return Encoded(codes.reshape(B, T, D), act.scale, act.zero_point)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.attention.attention`."""
    if not _alike(q_BTD, k_BTD, v_BTD) or not dit.can_fuse_attention(q_BTD.dtype, q_BTD.shape[-1] // num_heads):
        raise NotImplementedError
    q, k, v = (einops.rearrange(x, "b t (a d) -> b t a d", a=num_heads) for x in (q_BTD, k_BTD, v_BTD))
    return einops.rearrange(dit.fused_attention(q, k, v), "b t a d -> b t (a d)")
