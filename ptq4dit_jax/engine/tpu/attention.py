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

from ptq4dit_jax.engine.tpu.common import LANES, Ref, of_rows, row_blocks, scalar, store_codes
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
    return row_blocks(tokens, min(_QUERIES, max(_LOGITS // tokens, LANES)))


def memory(tokens: int, channels: int, itemsize: int) -> int:
    """Returns the bytes of vector memory that the kernel needs at most."""
    rows = queries(tokens) or tokens
    lanes = -(-tokens // LANES) * LANES
    held = 2 * channels * (2 * tokens * itemsize + rows * (itemsize + 4)) + 4 * rows * channels
    return held + rows * lanes * (4 + 4 + itemsize)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, *, heads: int, vmem: int, finish: Round | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes ``softmax(q k^T / sqrt(d)) v`` (B, T, D) in the inputs' type; or, with ``finish``, its codes (B, T, D) int8 and
    their sums (B, T, 1) int32. ``vmem``: bytes of vector memory to ask for."""
    B, T, D = q_BTD.shape
    rows = queries(T)
    assert rows is not None
    some, all_rows = pl.BlockSpec((1, rows, D), lambda b, i: (b, i, 0)), pl.BlockSpec((1, T, D), lambda b, i: (b, 0, 0))
    like_x = lambda dtype: jax.ShapeDtypeStruct((B, T, D), dtype)
    out, *sums = pl.pallas_call(
        partial(_kernel, heads=heads, ends=None if finish is None else finish[1:]),
        out_shape=[like_x(q_BTD.dtype)] if finish is None else [like_x(jnp.int8), jax.ShapeDtypeStruct((B, 1, T), jnp.int32)],
        grid=(B, T // rows),
        in_specs=[scalar(), some, all_rows, all_rows],
        out_specs=[some] if finish is None else [some, of_rows(rows)],
        scratch_shapes=[pltpu.VMEM((rows, D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem),
    )(jnp.zeros(1, jnp.int32) if finish is None else finish.zero_point.reshape(1), q_BTD, k_BTD, v_BTD)
    return out, sums[0].reshape(B, T, 1) if sums else None


def _kernel(zero_point: Ref, q: Ref, k: Ref, v: Ref, out: Ref, *refs: Ref, heads: int, ends: tuple[int, int] | None) -> None:
    *sums, attended = refs
    d = q.shape[-1] // heads
    product = partial(jax.lax.dot_general, precision=product_precision(q.dtype), preferred_element_type=jnp.float32)
    for head in range(heads):
        columns = slice(head * d, (head + 1) * d)
        logits = product(q[0, :, columns], k[0, :, columns], (((1,), (1,)), ((), ()))) * jnp.float32(d**-0.5)
        exp = jnp.exp(logits - logits.max(-1, keepdims=True))
        of_head = product(exp.astype(v.dtype), v[0, :, columns], (((1,), (0,)), ((), ())))
        attended[:, columns] = of_head / exp.sum(-1, keepdims=True)
    if ends is None:
        out[0] = attended[:].astype(out.dtype)
    else:
        rounded = jnp.round(attended[:]) + zero_point[0].astype(jnp.float32)
        store_codes(jnp.clip(rounded, *map(jnp.float32, ends)), out, *sums)
