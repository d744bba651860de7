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
from jax.typing import DTypeLike

from ptq4dit_jax.networks.parts import float_attention, in_heads
from ptq4dit_jax.numerics import product_precision
from ptq4dit_jax.tpu.blocks import LANES, Ref, of_rows, row_blocks, scalar, store_codes
from ptq4dit_jax.tpu.generations import too_large, vector_memory

#: Queries per step of the grid, and logits of one head that are held at a time, both at most.
_QUERIES, _LOGITS = 256, 2**18
_MOST_TOKENS, _MOST_WIDTH = 4096, 128


class Round(NamedTuple):
    """``clip(round(out) + zero_point, low, high)`` as int8; ``zero_point`` () int32."""

    zero_point: jax.Array
    low: int
    high: int


def queries(tokens: int) -> int | None:
    """Returns the queries per step of the grid; None if no number of them fits."""
    return row_blocks(tokens, min(_QUERIES, max(_LOGITS // tokens, LANES)))


def uncovered(tokens: int, channels: int, heads: int, dtype: DTypeLike) -> str:
    """Returns why the kernel does not take q, k and v (B, tokens, channels) of this type; empty if it does."""
    width, itemsize = channels // heads, jnp.dtype(dtype).itemsize
    if itemsize > 4:
        return f"q, k and v are {jnp.dtype(dtype)}"
    if width % 8 or width > _MOST_WIDTH:
        return f"heads of width {width} are no multiple of 8 up to {_MOST_WIDTH}"
    if tokens % 8 or tokens > _MOST_TOKENS:
        return f"{tokens} tokens are no multiple of 8 up to {_MOST_TOKENS}"
    if queries(tokens) is None:
        return f"{tokens} tokens are no whole number of blocks of queries"
    return too_large(memory(tokens, channels, itemsize), f"keys and values of {tokens} tokens")


def memory(tokens: int, channels: int, itemsize: int) -> int:
    """Returns the bytes of vector memory that the kernel needs at most."""
    rows = queries(tokens) or tokens
    lanes = -(-tokens // LANES) * LANES
    held = 2 * channels * (2 * tokens * itemsize + rows * (itemsize + 4)) + 4 * rows * channels
    return held + rows * lanes * (4 + 4 + itemsize)


def cost(images: int, tokens: int, channels: int, heads: int, itemsize: int, out_itemsize: int) -> pl.CostEstimate:
    """Returns what the kernel does: two products, an exponential per logit, q, k, v and the output moved once."""
    values = images * tokens * channels
    return pl.CostEstimate(
        flops=4 * values * tokens,
        transcendentals=images * heads * tokens * tokens,
        bytes_accessed=values * (3 * itemsize + out_itemsize),
    )


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, *, heads: int, finish: Round | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes ``softmax(q k^T / sqrt(d)) v`` (B, T, D) in the inputs' type; or, with ``finish``, its codes (B, T, D) int8 and
    their sums (B, T, 1) int32. The arrays must not be :func:`uncovered`."""
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
        cost_estimate=cost(B, T, D, heads, q_BTD.dtype.itemsize, 1 if finish else q_BTD.dtype.itemsize),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vector_memory()),
    )(jnp.zeros(1, jnp.int32) if finish is None else finish.zero_point.reshape(1), q_BTD, k_BTD, v_BTD)
    return out, sums[0].reshape(B, T, 1) if sums else None


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _differentiable(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, heads: int) -> jax.Array:
    return attention(q_BTD, k_BTD, v_BTD, heads=heads)[0]


@_differentiable.defjvp
def _tangent(heads: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    plain = partial(in_heads, float_attention, heads=heads)
    return _differentiable(*primals, heads), jax.jvp(plain, primals, tangents)[1]


def fused_attention(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, heads: int) -> jax.Array | None:
    """Computes softmax attention (B, T, D) as one kernel; returns None for arrays that it does not take. Derivatives are those
    of the plain products."""
    _, T, D = q_BTD.shape
    return None if uncovered(T, D, heads, q_BTD.dtype) else _differentiable(q_BTD, k_BTD, v_BTD, heads)


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
