"""Chooses tiles for a product: the candidates that measured best on an H200, and a rule (docs/journal/kernels.md)."""

from __future__ import annotations

from typing import Literal

from ptq4dit_jax.engine.hopper.common import core_count
from ptq4dit_jax.engine.hopper.plan import Tiles

#: What the epilogue does: stores bfloat16; applies GELU and stores int8; applies gate and residual.
Kind = Literal["store", "gelu", "residual"]

#: From the largest tiles to the smallest. Large ones read each operand less often; small ones keep all multiprocessors busy.
_CANDIDATES: dict[Kind, tuple[Tiles, ...]] = {
    "store": (Tiles(128, 128, 4), Tiles(64, 128, 4), Tiles(64, 64, 8)),
    "gelu": (Tiles(128, 128, 3, "ping-pong"), Tiles(64, 192, 4), Tiles(64, 128, 4), Tiles(64, 64, 8)),
    "residual": (Tiles(64, 192, 4), Tiles(64, 128, 4), Tiles(64, 64, 8)),
}


def choose(kind: Kind, M: int, N: int) -> Tiles:
    """Returns the largest tiles that keep the multiprocessors busy for 70 % of their rounds; if none do, the fastest.

    A tile must divide N.
    """
    fitting = [tiles for tiles in _CANDIDATES[kind] if N % tiles.block[1] == 0]
    for tiles in fitting:
        if _count(tiles, M, N) >= 0.7 * _rounds(tiles, M, N) * core_count():
            return tiles
    return min(fitting, key=lambda tiles: _rounds(tiles, M, N) * _cost(tiles))


def choose_for_few_rows(N: int) -> Tiles:
    """Returns tiles for all layers at once, bound by reading packed weights: few rows, many columns, N a multiple of 128."""
    return next(tiles for tiles in (Tiles(64, 128, 3, "n"), Tiles(64, 64, 6, "n")) if N % tiles.block[1] == 0)


def _count(tiles: Tiles, M: int, N: int) -> int:
    return -(-M // tiles.block[0]) * (N // tiles.block[1])


def _rounds(tiles: Tiles, M: int, N: int) -> int:
    return -(-_count(tiles, M, N) // core_count())


def _cost(tiles: Tiles) -> int:
    """Returns the time of a tile in units of one element of its product: fetching a row or column takes as long as 71 elements.
    Fitted to six choices of tiles for qkv of DiT-XL/2 with 512 rows on an H200: 7.2 to 8.7 us, of which 3.5 us depend on no
    tile."""
    m, n = tiles.block
    return m * n + 71 * (m + n)
