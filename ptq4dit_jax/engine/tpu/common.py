"""What the kernels share."""

from __future__ import annotations

from typing import Any, TypeAlias

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

#: A reference to memory inside a kernel; Pallas has no public type for it.
Ref: TypeAlias = Any
#: Rows of a tile of int8; tiles of wider types have fewer.
TILE_ROWS = 32


def row_blocks(rows: int, most: int) -> int | None:
    """Returns the rows of a block of ``rows``: all, or the most whole tiles up to ``most`` that divide them; None if no block
    fits."""
    if rows <= most:
        return rows
    return next((size for size in range(most - most % TILE_ROWS, 0, -TILE_ROWS) if rows % size == 0), None)


def scalar() -> pl.BlockSpec:
    """Returns the place of arrays whose elements are read one by one."""
    return pl.BlockSpec(memory_space=pltpu.SMEM)
