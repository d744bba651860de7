"""Softmax attention in one kernel, whose logits stay in vector memory, and the quantization of its output for the next product.

A step of the grid takes some queries of one image, with all heads, and the image's keys and values. Heads lie side by side,
``d`` columns each, and are cut out inside the kernel. Products are in the inputs' type with float32 sums.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ptq4dit_jax.engine.tpu.common import TILE_ROWS, Ref, row_blocks, scalar
from ptq4dit_jax.numerics import product_precision

#: Queries per step of the grid, and logits of one head that are held at a time, both at most.
_QUERIES, _LOGITS = 256, 2**18


class Round(NamedTuple):
    """``clip(round(out) + zero_point, low, high)`` as int8; ``zero_point`` () int32."""

    zero_point: jax.Array
    low: int
    high: int


def queries(tokens: int) -> int | None:
    """Returns the queries per step of the grid; None if no number of them fits."""
    return row_blocks(tokens, min(_QUERIES, max(_LOGITS // tokens, TILE_ROWS)))


def memory(tokens: int, channels: int, itemsize: int) -> int:
    """Returns the bytes of vector memory that the kernel needs at most."""
    rows = queries(tokens) or tokens
    lanes = -(-tokens // 128) * 128
    held = 2 * channels * (2 * tokens * itemsize + rows * (itemsize + 4)) + 4 * rows * channels
    return held + rows * lanes * (4 + 4 + itemsize)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, *, heads: int, vmem: int, finish: Round | None = None
) -> jax.Array:
    """Computes ``softmax(q k^T / sqrt(d)) v`` (B, T, D) in the inputs' type, or its codes int8 with ``finish``."""
    B, T, D = q_BTD.shape
    rows = queries(T)
    assert rows is not None
    dtype = q_BTD.dtype if finish is None else jnp.dtype(jnp.int8)
    some, all_rows = pl.BlockSpec((1, rows, D), lambda b, i: (b, i, 0)), pl.BlockSpec((1, T, D), lambda b, i: (b, 0, 0))
    kernel = partial(_kernel, heads=heads, codes=None if finish is None else (finish.low, finish.high))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((B, T, D), dtype),
        grid=(B, T // rows),
        in_specs=[scalar(), some, all_rows, all_rows],
        out_specs=some,
        scratch_shapes=[pltpu.VMEM((rows, D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem),
    )(jnp.zeros(1, jnp.int32) if finish is None else finish.zero_point.reshape(1), q_BTD, k_BTD, v_BTD)


def _kernel(zero_point: Ref, q: Ref, k: Ref, v: Ref, out: Ref, sums: Ref, *, heads: int, codes: tuple[int, int] | None) -> None:
    d = q.shape[-1] // heads
    product = partial(jax.lax.dot_general, precision=product_precision(q.dtype), preferred_element_type=jnp.float32)
    for head in range(heads):
        columns = slice(head * d, (head + 1) * d)
        logits = product(q[0, :, columns], k[0, :, columns], (((1,), (1,)), ((), ()))) * jnp.float32(d**-0.5)
        exp = jnp.exp(logits - logits.max(-1, keepdims=True))
        of_head = product(exp.astype(v.dtype), v[0, :, columns], (((1,), (0,)), ((), ())))
        sums[:, columns] = of_head / exp.sum(-1, keepdims=True)
    if codes is None:
        out[0] = sums[:].astype(out.dtype)
    else:
        rounded = jnp.round(sums[:]) + zero_point[0].astype(jnp.float32)
        out[0] = jnp.clip(rounded, *map(jnp.float32, codes)).astype(jnp.int32).astype(out.dtype)
