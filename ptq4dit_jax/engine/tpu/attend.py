"""Attention on TPUs, in floats, by :mod:`ptq4dit_jax.tpu.attention`.

Floats are chosen over codes because the softmax between the products costs more than the products: on codes q, k, v and the
probabilities would have to be rounded, too.
"""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.requirements import require_alike, require_static
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range
from ptq4dit_jax.tpu import attention as kernel


def _require_covered(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int) -> None:
    require_alike(q_BTD, k_BTD, v_BTD)
    _, T, D = q_BTD.shape
    reason = kernel.uncovered(T, D, num_heads, q_BTD.dtype)
    require(not reason, reason)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention`."""
    _require_covered(q_BTD, k_BTD, v_BTD, num_heads)
    return kernel.attention(q_BTD, k_BTD, v_BTD, heads=num_heads)[0]


def attention_codes(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention_codes`."""
    _require_covered(q_BTD, k_BTD, v_BTD, num_heads)
    require_static(act)
    finish = kernel.Round(act.static_range.zero_point, *act_code_range(act.bits))
    codes, sums = kernel.attention(q_BTD, k_BTD, v_BTD, heads=num_heads, finish=finish)
    return Encoded(codes, *act.static_range, sums)
