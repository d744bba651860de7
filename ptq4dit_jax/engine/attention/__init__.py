"""Attention between the quantized linears (:mod:`ptq4dit_jax.engine.backends`)."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ptq4dit_jax.engine import backends
from ptq4dit_jax.networks import parts
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def attention(
    q_BTD: jax.Array,
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    num_heads: int,
    sites: dict[str, ActQuantizer],
    *,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention, (B, T, D). The reference quantizes q, k, v and the probabilities by ``sites``; a backend may compute
    in bfloat16 instead where that is faster, and :func:`ptq4dit_jax.describe` says so. Without sites it is that of a float
    model, whatever the backend."""
    if not sites:
        q, k, v = (einops.rearrange(x, "b t (a d) -> b t a d", a=num_heads) for x in (q_BTD, k_BTD, v_BTD))
        return einops.rearrange(parts.float_attention(q, k, v), "b t a d -> b t (a d)")
    return backends.run(__name__, "attention", backend, q_BTD, k_BTD, v_BTD, num_heads, sites)


def attention_codes(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer, *, backend: str = "xla"
) -> Encoded:
    """Softmax attention of floats, quantized by ``act`` for the next product: static, its scale is 1 and it balances nothing.
    Both lie in ``v_BTD`` then (:func:`ptq4dit_jax.engine.layers.in_unit_steps`)."""
    return backends.run(__name__, "attention_codes", backend, q_BTD, k_BTD, v_BTD, num_heads, act)


def covers_codes(shape_BTD: tuple[int, ...], dtype: DTypeLike, num_heads: int, act: ActQuantizer, backend: str) -> bool:
    """Whether the backend has a kernel for :func:`attention_codes`."""
    x = jax.ShapeDtypeStruct(shape_BTD, jnp.dtype(dtype))
    return backends.covers(__name__, "attention_codes", backend, x, x, x, num_heads, act)
