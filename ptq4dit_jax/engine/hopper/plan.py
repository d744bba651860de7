"""How a product is cut into tiles and how it is finished: what the parts of the kernel in
:mod:`ptq4dit_jax.engine.hopper.gemm` must agree on."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from ptq4dit_jax.engine.hopper.common import Ref

#: Elements of the contraction axis in a stage of a ring: a full swizzle of 128 bytes. The axis is a multiple of it.
TILE_K = 128
#: Rows that an epilogue handles at a time.
EPILOGUE_M = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      m, n: size of a warpgroup's output tile, multiples of 64.
      stages: number of stages of each ring.
      sharing: the axis along which the two warpgroups split one output tile, or ``ping-pong``.
      band: width, in tiles, of the bands in which tiles are visited, so that both operands stay in the L2 cache.
    """

    m: int = 128
    n: int = 128
    stages: int = 4
    sharing: Literal["m", "n", "ping-pong"] = "m"
    band: int = 8

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the block's tile."""
        return self.m * (2 if self.sharing == "m" else 1), self.n * (2 if self.sharing == "n" else 1)


class GeluRequantize(NamedTuple):
    """``clip(round(gelu(y) * balance / scale) + zero_point, low, high)``, int8: ``balance`` (S, N) or None for ones and
    ``scale`` (S,) float32, ``zero_point`` (S,) int32."""

    scale: jax.Array
    zero_point: jax.Array
    balance: jax.Array | None
    low: int
    high: int


class GatedResidual(NamedTuple):
    """``residual + gate * y``: ``residual`` (M, N) bfloat16, ``gate`` (S, M / tokens, N), ``tokens`` a multiple of 64."""

    residual: jax.Array
    gate: jax.Array
    tokens: int


class OutputTile(NamedTuple):
    """The layer that a block's tile belongs to, and its first row and column."""

    layer: jax.Array
    row: jax.Array
    column: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel's body needs to know; all static.

    ``groups`` is the number of layers that are multiplied at once, each with its own rows; None for one layer.
    """

    M: int
    N: int
    K: int
    tiles: Tiles
    outputs: int
    vectors: tuple[str, ...]
    requantized: tuple[int, int] | None
    tokens: int | None
    blocks: int
    packed: bool
    groups: int | None

    @property
    def out_dtype(self) -> DTypeLike:
        return jnp.bfloat16 if self.requantized is None else jnp.int8

    @property
    def counts(self) -> tuple[int, int]:
        """Output tiles along M and N."""
        return pl.cdiv(self.M, self.tiles.block[0]), pl.cdiv(self.N, self.tiles.block[1])

    def of_group(self, ref: Ref, layer: jax.Array) -> Ref:
        """Returns the rows (M, ...) of a layer; if all layers are multiplied, ``ref`` holds the rows of all."""
        return ref if self.groups is None else ref.at[layer]

    @property
    def steps(self) -> int:
        return self.K // TILE_K

    @property
    def rings(self) -> int:
        return 2 if self.tiles.sharing == "ping-pong" else 1

    @property
    def in_flight(self) -> bool:
        """Whether a step's product is still running while the next is issued. That pays off for short products. Larger ones,
        which keep the tensor cores busy longer than it takes to release a stage, become slower (docs/journal/kernels.md)."""
        return self.tiles.m * self.tiles.n <= 64 * 64

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Pieces of a warpgroup's tile that the epilogue handles one at a time: first row, first column, columns."""
        width = 128 if self.requantized and self.tiles.n % 128 == 0 else 64
        return [(i, j, width) for i in range(0, self.tiles.m, EPILOGUE_M) for j in range(0, self.tiles.n, width)]

    @property
    def slots(self) -> int:
        """Pieces in shared memory at a time: all if a residual is fetched ahead, otherwise two."""
        return len(self.pieces) if self.tokens else min(2, len(self.pieces))
