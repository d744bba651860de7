"""Which tiles for which product: what measured best on an H200, and a rule for the rest (docs/kernels.md)."""

from __future__ import annotations

from typing import Literal

from ptq4dit_jax.engine.hopper.common import core_count
from ptq4dit_jax.engine.hopper.gemm import Tiles

#: What the epilogue does: stores bfloat16; GELU and int8; gate and residual.
Kind = Literal["store", "gelu", "residual"]

#: From the largest tiles to the smallest. Large ones read each operand less often; small ones keep all multiprocessors busy.
_CANDIDATES: dict[Kind, tuple[Tiles, ...]] = {
    "store": (Tiles(128, 128, 4), Tiles(64, 128, 4), Tiles(64, 64, 6)),
    "gelu": (Tiles(128, 128, 3, "ping-pong"), Tiles(64, 128, 4), Tiles(64, 64, 6)),
    "residual": (Tiles(64, 192, 4), Tiles(64, 128, 4), Tiles(64, 64, 6)),
}


def choose(kind: Kind, M: int, N: int, K: int) -> Tiles:
    """The largest tiles of which there is one for at least three quarters of the multiprocessors; the smallest if none are.

    A tile has to divide N.
    """
    fitting = [tiles for tiles in _CANDIDATES[kind] if N % tiles.block[1] == 0]
    for tiles in fitting:
        if -(-M // tiles.block[0]) * (N // tiles.block[1]) >= 0.75 * core_count():
            return tiles
    return fitting[-1]
