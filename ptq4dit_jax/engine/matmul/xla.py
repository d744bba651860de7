"""The reference implementation: XLA's own int8 products. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ptq4dit_jax.quantizers import QTensor


def accumulate(x: jax.Array, codes: jax.Array) -> jax.Array:
    """int8 (..., K) times int8 (N, K) to int32 (..., N). Never asks for an int8 result, which XLA runs as a slow loop."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, codes, dims, preferred_element_type=jnp.int32)


def linear(x: jax.Array, weight: QTensor, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.matmul.linear`. 4-bit codes are unpacked to int8 here, just before the product: XLA
    would widen an int8 x int4 product to int32 on both sides."""
    return accumulate(x, weight.codes()).astype(scale.dtype) * scale + bias


def batched(a: jax.Array, b: jax.Array) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.matmul.batched`."""
    return jax.lax.dot_general(a, b, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.int32)
