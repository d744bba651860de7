"""Attention on TPUs, in floats, by :mod:`ptq4dit_jax.engine.tpu.attention`.

Floats are chosen over codes because the softmax between the products costs more than the products: on codes q, k, v and the
probabilities would have to be rounded, too.
"""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.requirements import require_alike, require_static
from ptq4dit_jax.engine.tpu import attention as kernel
from ptq4dit_jax.engine.tpu.generations import vector_memory
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range

_MOST_TOKENS, _MOST_WIDTH = 4096, 128


def _vmem(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int) -> int:
    """Returns the vector memory to ask for, after checking that the kernel covers these arrays."""
    require_alike(q_BTD, k_BTD, v_BTD)
    _, T, D = q_BTD.shape
    d = D // num_heads
    require(d % 8 == 0 and d <= _MOST_WIDTH, f"heads of width {d} are no multiple of 8 up to {_MOST_WIDTH}")
    require(T % 8 == 0 and T <= _MOST_TOKENS, f"{T} tokens are no multiple of 8 up to {_MOST_TOKENS}")
    require(kernel.queries(T) is not None, f"{T} tokens are no whole number of blocks of queries")
    return vector_memory(kernel.memory(T, D, q_BTD.dtype.itemsize), f"keys and values of {T} tokens")


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention`."""
    vmem = _vmem(q_BTD, k_BTD, v_BTD, num_heads)
    return kernel.attention(q_BTD, k_BTD, v_BTD, heads=num_heads, vmem=vmem)[0]


def attention_codes(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention_codes`."""
    vmem = _vmem(q_BTD, k_BTD, v_BTD, num_heads)
    require_static(act)
    finish = kernel.Round(act.static_range.zero_point, *act_code_range(act.bits))
    codes, sums = kernel.attention(q_BTD, k_BTD, v_BTD, heads=num_heads, vmem=vmem, finish=finish)
    return Encoded(codes, *act.static_range, sums)
