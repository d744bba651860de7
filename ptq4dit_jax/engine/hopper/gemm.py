"""int8 x int8 -> int32 on Hopper's tensor cores, with the epilogue fused.

One persistent block per multiprocessor, three warpgroups: one copies tiles of both operands into rings in shared memory (TMA),
two multiply (``wgmma``) and finish. The two either share an output tile, or take turns ("ping-pong"): then each has its own
tile and its own ring, and one's epilogue runs while the other multiplies. Weights are (N, K): for 8-bit types ``wgmma`` wants
the contraction axis last in both operands. 4-bit weights are copied packed, and unpacked by the copying warpgroup.

What belongs to a layer comes as a stack (S, ...): of all layers, S = L, of which the kernel reads layer ``layer``, or of one,
S = 1, which serves any.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper.common import core_count, load_vector, swizzled, transposed
from ptq4dit_jax.engine.hopper.epilogue import fetch_residual, finish_tile
from ptq4dit_jax.engine.hopper.feed import Rings, feed, rings
from ptq4dit_jax.engine.hopper.plan import EPILOGUE_M, GatedResidual, GeluRequantize, Plan, Tiles

#: Registers a thread of the copying and of each multiplying warpgroup, which fit the register file: of 8-bit weights, and of
#: packed ones.
_REGISTERS, _REGISTERS_PACKED = (40, 232), (72, 216)


def int8_matmul(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    column_scale: jax.Array,
    bias: jax.Array,
    layer: jax.Array,
    weight_zero: jax.Array | None = None,
    *,
    tiles: Tiles,
    finish: GeluRequantize | GatedResidual | None = None,
    outputs: int = 1,
) -> list[jax.Array]:
    """``y = (a @ b.T) * scale * column_scale + bias``, finished, in one kernel.

    Args:
      a: (M, K) int8, any M.
      b: (S, N, K) int8, or packed, (S, N, K / 2) uint8 (:func:`ptq4dit_jax.quantizers.pack_nibbles`); N and K are multiples of
        128, and N / outputs one of the width of a piece of the epilogue.
      scale: float32, one for each row, (M, 1), or one for all, (S,).
      column_scale, bias: (S, N) float32.
      layer: (1,) int32.
      weight_zero: (S, N) int8, what codes of packed weights are less; None for 8-bit weights.
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
    if weight_zero is not None:
        vectors["weight_zero"] = widened(weight_zero, columns)
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
    plan = Plan(M, N, K, tiles, outputs, tuple(vectors), requantized, tokens, core_count(), weight_zero is not None)
    kernel = plgpu.kernel(
        partial(_body, plan), out_type=[jax.ShapeDtypeStruct((M, N // outputs), plan.out_dtype)] * outputs,
        grid=(plan.blocks,), grid_names=("block",), num_threads=3, thread_name="warpgroup",
        kernel_name=f"int8_matmul_{'gelu' if requantized else 'residual' if residual else 'store'}_{N}x{K}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )  # fmt: skip
    return list(kernel(a, b.reshape(-1, b.shape[-1]), *vectors.values(), *residual))


def _body(plan: Plan, a: Any, b: Any, *rest: Any) -> None:
    """The kernel: references in device memory, in the order of the call, outputs last."""
    vectors = dict(zip(plan.vectors, rest, strict=False))
    residual, outs = (rest[len(vectors)] if plan.tokens else None), rest[-plan.outputs :]
    block_m, block_n = plan.tiles.block
    _, _, width = plan.pieces[0]

    @partial(
        pl.run_scoped,
        ring=rings(plan),
        staging=plgpu.SMEM(
            (2, plan.slots, EPILOGUE_M, width), plan.out_dtype, transforms=swizzled(width, plan.out_dtype)
        ),
        fetched=plgpu.Barrier(num_barriers=2 * plan.slots) if plan.tokens else None,
        collective_axes="warpgroup",
    )  # fmt: skip
    def in_shared_memory(ring: Rings, staging: Any, fetched: Any) -> None:
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        layer = load_vector(vectors["layer"], 0)
        count = (plan.counts[0] * plan.counts[1] - block + plan.blocks - 1) // plan.blocks
        origin = lambda turn: plgpu.planar_snake(block + turn * plan.blocks, plan.counts, 1, plan.tiles.band)
        copying, multiplying = _REGISTERS_PACKED if plan.packed else _REGISTERS

        @pl.when(warpgroup == 2)
        def copy() -> None:
            plgpu.set_max_registers(copying, action="decrease")
            feed(plan, a, b, vectors.get("weight_zero"), layer, ring, count, origin)

        @pl.when(warpgroup < 2)
        def multiply() -> None:
            plgpu.set_max_registers(multiplying, action="increase")
            alone = plan.rings == 2
            mine = (count - warpgroup + 1) // 2 if alone else count
            row = warpgroup * plan.tiles.m if plan.tiles.sharing == "m" else 0
            column = warpgroup * plan.tiles.n if plan.tiles.sharing == "n" else 0

            def tile(turn: jax.Array, _: Any) -> Any:
                im, in_ = origin(2 * turn + warpgroup if alone else turn)
                m0, n0 = im * block_m + row, in_ * block_n + column
                if residual is not None:
                    fetch_residual(plan, residual, staging.at[warpgroup], fetched, warpgroup, m0, n0)
                acc = _accumulate(plan, ring, warpgroup if alone else 0, row, column, turn * plan.steps)
                finish_tile(plan, acc, vectors, layer, staging.at[warpgroup], fetched, warpgroup, outs, m0, n0)
                return ()

            lax.fori_loop(0, mine, tile, ())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _accumulate(plan: Plan, rings: Rings, ring: Any, row: Any, column: Any, first: jax.Array) -> jax.Array:
    """The int32 product of a warpgroup's tile, which begins at ``row`` and ``column`` of the block's, and at step ``first`` of
    its ring."""
    rows, columns = pl.ds(row, plan.tiles.m), pl.ds(column, plan.tiles.n)
    b = rings.b[0] if plan.packed else rings.b

    def multiply(acc: Any) -> jax.Array:
        def step(k: jax.Array, _: Any) -> Any:
            slot = lax.rem(first + k, plan.tiles.stages)
            barrier = ring * plan.tiles.stages + slot
            plgpu.barrier_wait(rings.full.at[barrier])
            for part in range(plan.parts):
                plgpu.wgmma(acc, rings.a.at[ring, slot, part, rows], transposed(b.at[ring, slot, part, columns]))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(rings.empty.at[barrier])
            return ()

        lax.fori_loop(0, plan.steps, step, ())
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((plan.tiles.m, plan.tiles.n), jnp.int32))
