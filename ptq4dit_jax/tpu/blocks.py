"""What the kernels share."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

#: A reference to memory inside a kernel; Pallas has no public type for it.
Ref: TypeAlias = Any
#: Columns of a tile.
LANES = 128


def row_blocks(rows: int, most: int) -> int | None:
    """Returns the rows of a block of ``rows``: all, or the most up to ``most`` that divide them and fill tiles when they lie
    along the columns; None if no block fits."""
    if rows <= most:
        return rows
    return next((size for size in range(most - most % LANES, 0, -LANES) if rows % size == 0), None)


def scalar() -> pl.BlockSpec:
    """Returns the place of arrays whose elements are read one by one."""
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def of_rows(rows: int) -> pl.BlockSpec:
    """Returns the blocks of an array (B, 1, T) with one number per row. As a column, (B, T, 1), it would take a whole tile for
    every 8 rows."""
    return pl.BlockSpec((1, 1, rows), lambda b, i: (b, 0, i))


def store_codes(values: jax.Array, codes: Ref, sums: Ref) -> None:
    """Stores whole numbers (rows, D) of float32 as int8, and their sums, which are exact: they lie below 2^24."""
    codes[0] = values.astype(jnp.int32).astype(jnp.int8)
    sums[0] = values.sum(-1, keepdims=True).astype(jnp.int32).T
