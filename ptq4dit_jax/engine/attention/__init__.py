"""Attention between the quantized linears (:mod:`ptq4dit_jax.engine.backends`)."""

from __future__ import annotations

import jax

from ptq4dit_jax.engine import backends
from ptq4dit_jax.quantizers import ActQuantizer


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
    in bfloat16 instead where that is faster, and :func:`ptq4dit_jax.describe` says so."""
    return backends.run(__name__, "attention", backend, q_BTD, k_BTD, v_BTD, num_heads, sites)
