"""int8 x int8 -> int32 on Hopper's tensor cores, with the epilogue fused.

One persistent block per multiprocessor, three warpgroups: one copies tiles of both operands into rings in shared memory (TMA),
two multiply (``wgmma``) and finish. The two either share an output tile, or take turns ("ping-pong"): then each has its own
tile and its own ring, and one's epilogue runs while the other multiplies. Weights are (N, K): for 8-bit types ``wgmma`` wants
the contraction axis last in both operands.

What belongs to a layer comes as a stack (S, ...): of all layers, S = L, of which the kernel reads layer ``layer``, or of one,
S = 1, which serves any.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper.common import core_count, load_of_layer, load_vector, swizzled, to_codes, transposed

#: Elements of the contraction axis in a tile: one full swizzle of 128 bytes.
TILE_K = 128
#: Rows that an epilogue handles at a time.
EPILOGUE_M = 64
#: Registers a thread of the copying and of the multiplying warpgroups: 128 * (40 + 2 * 232) fit the register file.
_COPY_REGISTERS, _MATH_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      m, n: a warpgroup's output tile, multiples of 64.
      stages: of each ring.
      sharing: the axis along which the two warpgroups lie in one output tile, or ``ping-pong``.
      band: width, in tiles, of the bands in which tiles are visited, so that both operands stay in the L2 cache.
    """

    m: int = 128
    n: int = 128
    stages: int = 4
    sharing: Literal["m", "n", "ping-pong"] = "m"
    band: int = 8

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a tile of the block."""
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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel's body has to know; all static."""

    M: int
    N: int
    K: int
    tiles: Tiles
    outputs: int
    vectors: tuple[str, ...]
    requantized: tuple[int, int] | None
    tokens: int | None
    blocks: int

    @property
    def out_dtype(self) -> Any:
        return jnp.bfloat16 if self.requantized is None else jnp.int8

    @property
    def counts(self) -> tuple[int, int]:
        """Output tiles along M and N."""
        return pl.cdiv(self.M, self.tiles.block[0]), pl.cdiv(self.N, self.tiles.block[1])

    @property
    def steps(self) -> int:
        return pl.cdiv(self.K, TILE_K)

    @property
    def rings(self) -> int:
        return 2 if self.tiles.sharing == "ping-pong" else 1

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Pieces of a warpgroup's tile that the epilogue handles at a time: first row, first column, columns."""
        width = 128 if self.requantized and self.tiles.n % 128 == 0 else 64
        return [(i, j, width) for i in range(0, self.tiles.m, EPILOGUE_M) for j in range(0, self.tiles.n, width)]

    @property
    def slots(self) -> int:
        """Pieces in shared memory at a time: all where a residual is fetched ahead, else two."""
        return len(self.pieces) if self.tokens else min(2, len(self.pieces))


def int8_matmul(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    column_scale: jax.Array,
    bias: jax.Array,
    layer: jax.Array,
    *,
    tiles: Tiles,
    finish: GeluRequantize | GatedResidual | None = None,
    outputs: int = 1,
) -> list[jax.Array]:
    """``y = (a @ b.T) * scale * column_scale + bias``, finished, in one kernel.

    Args:
      a: (M, K) int8, any M.
      b: (S, N, K) int8; N and K are multiples of 128, and N / outputs one of the width of a piece of the epilogue.
      scale: float32, one for each row, (M, 1), or one for all, (S,).
      column_scale, bias: (S, N) float32.
      layer: (1,) int32.
      tiles: how to cut the work.
      finish: what is done with ``y``; None stores it.
      outputs: into how many arrays of equal width the columns go.

    Returns:
      ``outputs`` arrays (M, N / outputs), int8 after :class:`GeluRequantize` and bfloat16 otherwise.
    """
    (M, K), N = a.shape, b.shape[1]
    rows, columns = (pl.cdiv(size, tile) * tile for size, tile in zip((M, N), tiles.block, strict=True))
    # Bulk copies stop at the end of an array; vectors are read without them, so they reach to the end of the last tile.
    widened = lambda v, size: v if v.shape[-1] == size else jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, size - v.shape[-1])])
    vectors = {"layer": layer, "column_scale": widened(column_scale, columns), "bias": widened(bias, columns)}
    if scale.ndim == 2:
        vectors["row_scale"] = widened(scale.reshape(M), rows)
    else:
        vectors["scale"] = scale
    requantized = tokens = None
    residual: list[jax.Array] = []
    if isinstance(finish, GeluRequantize):
        vectors |= {"act_scale": finish.scale, "zero_point": finish.zero_point}
        if finish.balance is not None:
            vectors["balance"] = widened(finish.balance, columns)
        requantized = (finish.low, finish.high)
    if isinstance(finish, GatedResidual):
        vectors["gate"] = widened(finish.gate, columns)
        tokens, residual = finish.tokens, [finish.residual]
    plan = _Plan(M, N, K, tiles, outputs, tuple(vectors), requantized, tokens, core_count())
    kernel = plgpu.kernel(
        partial(_body, plan), out_type=[jax.ShapeDtypeStruct((M, N // outputs), plan.out_dtype)] * outputs,
        grid=(plan.blocks,), grid_names=("block",), num_threads=3, thread_name="warpgroup",
        kernel_name=f"int8_matmul_{'gelu' if requantized else 'residual' if residual else 'store'}_{N}x{K}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )  # fmt: skip
    return list(kernel(a, b.reshape(-1, K), *vectors.values(), *residual))


def _body(plan: _Plan, a: Any, b: Any, *rest: Any) -> None:
    """The kernel: references in device memory, in the order of the call, outputs last."""
    vectors = dict(zip(plan.vectors, rest, strict=False))
    residual, outs = (rest[len(vectors)] if plan.tokens else None), rest[-plan.outputs :]
    (block_m, block_n), stages = plan.tiles.block, plan.tiles.stages
    _, _, width = plan.pieces[0]
    operand = swizzled(TILE_K, jnp.int8)

    @partial(
        pl.run_scoped,
        a_ring=plgpu.SMEM((plan.rings, stages, block_m, TILE_K), jnp.int8, transforms=operand),
        b_ring=plgpu.SMEM((plan.rings, stages, block_n, TILE_K), jnp.int8, transforms=operand),
        staging=plgpu.SMEM(
            (2, plan.slots, EPILOGUE_M, width), plan.out_dtype, transforms=swizzled(width, plan.out_dtype)
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=plan.rings * stages),
        empty=plgpu.Barrier(num_arrivals=2 // plan.rings, num_barriers=plan.rings * stages),
        fetched=plgpu.Barrier(num_barriers=2 * plan.slots) if plan.tokens else None,
        collective_axes="warpgroup",
    )  # fmt: skip
    def in_shared_memory(a_ring: Any, b_ring: Any, staging: Any, full: Any, empty: Any, fetched: Any) -> None:
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        layer = load_vector(vectors["layer"], 0)
        count = (plan.counts[0] * plan.counts[1] - block + plan.blocks - 1) // plan.blocks
        origin = lambda turn: plgpu.planar_snake(block + turn * plan.blocks, plan.counts, 1, plan.tiles.band)

        @pl.when(warpgroup == 2)
        def copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            offset = layer * plan.N if b.shape[0] > plan.N else 0

            def fetch_tile(turn: jax.Array, _: Any) -> Any:
                (im, in_), ring, first = origin(turn), lax.rem(turn, plan.rings), (turn // plan.rings) * plan.steps

                def fetch(k: jax.Array, _: Any) -> Any:
                    slot = lax.rem(first + k, stages)
                    barrier = ring * stages + slot

                    @pl.when(first + k >= stages)
                    def wait_for_room() -> None:
                        plgpu.barrier_wait(empty.at[barrier])

                    at_k = pl.ds(k * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(a.at[pl.ds(im * block_m, block_m), at_k], a_ring.at[ring, slot], full.at[barrier])
                    plgpu.copy_gmem_to_smem(
                        b.at[pl.ds(offset + in_ * block_n, block_n), at_k], b_ring.at[ring, slot], full.at[barrier]
                    )
                    return ()

                return lax.fori_loop(0, plan.steps, fetch, ())

            lax.fori_loop(0, count, fetch_tile, ())
            for ring in range(plan.rings):  # a barrier may not go away while an arrival at it has not been seen
                done = (count - ring + plan.rings - 1) // plan.rings * plan.steps

                def drain(step: jax.Array, _: Any, ring: int = ring) -> Any:
                    plgpu.barrier_wait(empty.at[ring * stages + lax.rem(step, stages)])
                    return ()

                lax.fori_loop(lax.max(done - stages, 0), done, drain, ())

        @pl.when(warpgroup < 2)
        def multiply() -> None:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
            alone = plan.rings == 2
            ring, mine = (warpgroup, (count - warpgroup + 1) // 2) if alone else (0, count)
            row = warpgroup * plan.tiles.m if plan.tiles.sharing == "m" else 0
            column = warpgroup * plan.tiles.n if plan.tiles.sharing == "n" else 0

            def tile(turn: jax.Array, _: Any) -> Any:
                im, in_ = origin(2 * turn + warpgroup if alone else turn)
                m0, n0 = im * block_m + row, in_ * block_n + column
                if residual is not None:
                    _fetch_residual(plan, residual, staging.at[warpgroup], fetched, warpgroup, m0, n0)
                operands = a_ring.at[ring, :, pl.ds(row, plan.tiles.m)], b_ring.at[ring, :, pl.ds(column, plan.tiles.n)]
                acc = _accumulate(plan, *operands, full, empty, ring * stages, turn * plan.steps)
                _finish(plan, acc, vectors, layer, staging.at[warpgroup], fetched, warpgroup, outs, m0, n0)
                return ()

            lax.fori_loop(0, mine, tile, ())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _fetch_residual(
    plan: _Plan, residual: Any, staging: Any, fetched: Any, warpgroup: jax.Array, m0: jax.Array, n0: jax.Array
) -> None:
    """Starts copying the residual to where the result will lie, once what lay there has been stored."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for slot, (i, j, width) in enumerate(plan.pieces):
        piece = residual.at[pl.ds(m0 + i, EPILOGUE_M), pl.ds(n0 + j, width)]
        plgpu.copy_gmem_to_smem(piece, staging.at[slot], fetched.at[warpgroup * plan.slots + slot])


def _accumulate(plan: _Plan, a_ring: Any, b_ring: Any, full: Any, empty: Any, barriers: Any, first: jax.Array) -> jax.Array:
    """The int32 product of a warpgroup's tile, whose steps begin at ``first`` in the ring."""

    def multiply(acc: Any) -> jax.Array:
        def step(k: jax.Array, _: Any) -> Any:
            slot = lax.rem(first + k, plan.tiles.stages)
            plgpu.barrier_wait(full.at[barriers + slot])
            plgpu.wgmma(acc, a_ring.at[slot], transposed(b_ring.at[slot]))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[barriers + slot])
            return ()

        lax.fori_loop(0, plan.steps, step, ())
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((plan.tiles.m, plan.tiles.n), jnp.int32))


def _finish(
    plan: _Plan, acc: jax.Array, vectors: dict[str, Any], layer: jax.Array, staging: Any, fetched: Any,
    warpgroup: jax.Array, outs: tuple[Any, ...], m0: jax.Array, n0: jax.Array,
) -> None:  # fmt: skip
    """The epilogue of a warpgroup's tile, piece by piece through shared memory to the outputs."""
    of_layer = lambda name, *index: load_of_layer(vectors[name], layer, *index)
    for piece, (i, j, width) in enumerate(plan.pieces):
        slot = piece % plan.slots
        rows, columns = pl.ds(m0 + i, EPILOGUE_M), pl.ds(n0 + j, width)
        over_rows = lambda v: lax.broadcast_in_dim(v, (EPILOGUE_M, width), (1,))  # noqa: B023  (used at once)
        vector = lambda name: over_rows(of_layer(name, columns))  # noqa: B023
        y = acc[i : i + EPILOGUE_M, j : j + width].astype(jnp.float32)
        column_scale = of_layer("column_scale", columns)
        if "row_scale" in vectors:
            y = y * lax.broadcast_in_dim(load_vector(vectors["row_scale"], rows), y.shape, (0,))
        else:
            column_scale = column_scale * of_layer("scale")
        y = y * over_rows(column_scale) + vector("bias")
        if plan.tokens is not None:
            image = lax.min((m0 + i) // plan.tokens, vectors["gate"].shape[1] - 1)
            gate = over_rows(of_layer("gate", image, columns).astype(jnp.float32))
            plgpu.barrier_wait(fetched.at[warpgroup * plan.slots + slot])
            y = staging[slot].astype(jnp.float32) + gate * y
        else:
            plgpu.wait_smem_to_gmem(plan.slots - 1, wait_read_only=True)
        if plan.requantized is None:
            staging[slot] = y.astype(jnp.bfloat16)
        else:
            y = _gelu(y) * (1 / of_layer("act_scale"))
            y = y * vector("balance") if "balance" in vectors else y
            staging[slot] = to_codes(y, of_layer("zero_point"), *plan.requantized)
        plgpu.commit_smem()
        _store(plan, staging.at[slot], outs, rows, n0 + j, width)


def _store(plan: _Plan, piece: Any, outs: tuple[Any, ...], rows: Any, column: jax.Array, width: int) -> None:
    """Starts copying a piece to the output that its first column falls in."""
    if len(outs) == 1:
        plgpu.copy_smem_to_gmem(piece, outs[0].at[rows, pl.ds(column, width)])
        return
    each = plan.N // len(outs)
    for index, out in enumerate(outs):

        @pl.when(column // each == index)
        def _(index: int = index, out: Any = out) -> None:
            plgpu.copy_smem_to_gmem(piece, out.at[rows, pl.ds(column - index * each, width)])


def _gelu(x: jax.Array) -> jax.Array:
    """GELU by tanh; two products less than as it is usually written."""
    return x * (0.5 + 0.5 * jnp.tanh(x * (0.7978845608028654 + 0.035677408136300125 * (x * x))))
