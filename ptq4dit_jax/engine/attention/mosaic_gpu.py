"""cuDNN's bfloat16 attention, which no int8 kernel of ours beats yet."""

from __future__ import annotations

import einops
import jax

from ptq4dit_jax import dit
from ptq4dit_jax.quantizers import ActQuantizer


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.attention.attention`."""
    if not dit.can_fuse_attention(q_BTD.dtype, q_BTD.shape[-1] // num_heads):
        raise NotImplementedError
    q, k, v = (einops.rearrange(x, "b t (a d) -> b t a d", a=num_heads) for x in (q_BTD, k_BTD, v_BTD))
    return einops.rearrange(dit.fused_attention(q, k, v), "b t a d -> b t (a d)")
