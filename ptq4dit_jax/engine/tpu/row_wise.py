"""Norm, modulation and codes in one pass over the rows, with a scale per row or one for all."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import EMPTY_RANGE
from ptq4dit_jax.tpu.blocks import Ref, of_rows, row_blocks, scalar, store_codes
from ptq4dit_jax.tpu.generations import vector_memory

#: Rows per step of the grid: several float32 arrays of so many rows are held.
_ROWS = 256


class Codes(NamedTuple):
    """How values become codes. ``factor`` (D,) multiplies the channels first. ``zero_point`` () int32 is added to the codes;
    None stands for a scale per row, from the row's largest magnitude."""

    factor: jax.Array | None
    zero_point: jax.Array | None
    low: int
    high: int


def rows_per_step(tokens: int) -> int | None:
    """Returns the rows per step of the grid; None if no number of them fits."""
    return row_blocks(tokens, _ROWS)


def memory(tokens: int, channels: int, itemsize: int) -> int:
    """Returns the bytes of vector memory that the kernel needs at most."""
    return (rows_per_step(tokens) or tokens) * channels * (2 * (itemsize + 1) + 6 * 4)


def modulate_quantize(
    x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, codes: Codes, norm: Norm
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantizes ``norm(x) * (1 + scale) + shift``, in float32.

    Returns codes (B, T, D) int8, their sums (B, T, 1) int32, and scales (B, T, 1) float32 if there is one per row.
    """
    B, T, D = x_BTD.shape
    rows = rows_per_step(T)
    assert rows is not None
    per_row = codes.zero_point is None
    some = pl.BlockSpec((1, rows, D), lambda b, i: (b, i, 0))
    of_image, whole = pl.BlockSpec((1, 1, D), lambda b, i: (b, 0, 0)), pl.BlockSpec((1, D), lambda b, i: (0, 0))
    vectors = [scale_BD] if shift_BD is None else [scale_BD, shift_BD]
    factors = [] if codes.factor is None else [codes.factor.astype(jnp.float32).reshape(1, D)]
    zero_point = jnp.zeros(1, jnp.int32) if codes.zero_point is None else codes.zero_point.reshape(1)
    found = pl.pallas_call(
        partial(_kernel, norm=norm, shifted=shift_BD is not None, scaled=bool(factors), per_row=per_row, ends=codes[2:]),
        out_shape=[
            jax.ShapeDtypeStruct((B, T, D), jnp.int8),
            jax.ShapeDtypeStruct((B, 1, T), jnp.int32),
            *([jax.ShapeDtypeStruct((B, 1, T), jnp.float32)] if per_row else []),
        ],
        grid=(B, T // rows),
        in_specs=[scalar(), some, *[of_image] * len(vectors), *[whole] * len(factors)],
        out_specs=[some, *[of_rows(rows)] * (2 if per_row else 1)],
        cost_estimate=pl.CostEstimate(
            flops=12 * x_BTD.size, transcendentals=B * T, bytes_accessed=x_BTD.size * (x_BTD.dtype.itemsize + 1)
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vector_memory()),
    )(zero_point, x_BTD, *(vector[:, None] for vector in vectors), *factors)
    sums, *scales = (each.reshape(B, T, 1) for each in found[1:])
    return found[0], sums, scales[0] if per_row else None


def _kernel(
    zero_point: Ref, x: Ref, *refs: Ref, norm: Norm, shifted: bool, scaled: bool, per_row: bool, ends: tuple[int, int]
) -> None:
    given = iter(refs)
    wide = lambda ref: ref[0].astype(jnp.float32)
    low, high = map(jnp.float32, ends)
    y = wide(x)
    if norm.kind is NormKind.LAYER:
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + jnp.float32(norm.eps)) * (1 + wide(next(given)))
    if shifted:
        y = y + wide(next(given))
    if scaled:
        y = y * next(given)[:]
    codes, sums = next(given), next(given)
    if per_row:
        largest = jnp.abs(y).max(-1, keepdims=True)
        step = jnp.where(largest > EMPTY_RANGE, largest / high, 1.0)
        y = jnp.round(y * (1 / step))
        next(given)[0] = step.T
    else:
        y = jnp.clip(jnp.round(y) + zero_point[0].astype(jnp.float32), low, high)
    store_codes(y, codes, sums)
