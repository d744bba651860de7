"""int8 x int8 -> int32 on Hopper's tensor cores, with the epilogue fused.

There is one persistent block per multiprocessor, with three warpgroups: one copies tiles of both operands into rings in shared
memory (TMA), two multiply (``wgmma``) and finish. The two either share an output tile or take turns ("ping-pong"): then each
has its own tile and its own ring, and the epilogue of one runs while the other multiplies. Weights are (N, K): for 8-bit types
``wgmma`` requires the contraction axis last in both operands. 4-bit weights are copied packed; a fourth warpgroup unpacks them.

Warpgroups synchronize at the barriers of the rings' stages. The threads of one synchronize when it commits writes to shared
memory or waits for its copies out of it. The compiler inserts no other barriers.

Arrays of a layer come as a stack (S, ...). Either S = L, and the kernel reads layer ``layer``; or S = 1, and the one layer
serves any index. Or all layers are multiplied, each with its own rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper import common
from ptq4dit_jax.engine.hopper.common import Ref, bytes_of, core_count, load_vector, swizzled, transposed, wgmma, widened
from ptq4dit_jax.engine.hopper.epilogue import fetch_residual, finish_tile
from ptq4dit_jax.engine.hopper.feed import Place, Rings, copy, each_step, place, rings, unpack
from ptq4dit_jax.engine.hopper.plan import EPILOGUE_M, GatedResidual, GeluRequantize, OutputTile, Plan, Tiles

#: Bulk copies require at most this number of rows, or a multiple of it.
ROWS = 8
#: Registers per thread of the multiplying, the copying and, for packed weights, the unpacking warpgroups. All four share 512.
_REGISTERS, _REGISTERS_PACKED = (232, 40, 0), (184, 40, 104)


def int8_matmul(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    column_scale: jax.Array,
    bias: jax.Array,
    layer: jax.Array | None,
    *,
    tiles: Tiles,
    weight_zero: jax.Array | None = None,
    finish: GeluRequantize | GatedResidual | None = None,
    outputs: int = 1,
) -> list[jax.Array]:
    """Computes ``y = (a @ b.T) * scale * column_scale + bias`` and applies ``finish``, in one kernel.

    Args:
      a: (M, K) int8, any M; or (S, M, K), for all layers.
      b: (S, N, K) int8, or packed, (S, N / 2, K) uint8 (:func:`ptq4dit_jax.quantizers.pack_nibbles`). N and K are multiples of
        128, and N / outputs is a multiple of the width of a piece of the epilogue.
      scale: float32, one per row, (M, 1), or one for all, (S,).
      column_scale, bias: (S, N) float32.
      layer: (1,) int32; None for all layers, which requires one scale per layer, no ``finish``, and tiles that divide N.
      tiles: how to cut the work.
      weight_zero: (S, N) int8, the zero points of packed weights; None for 8-bit weights.
      finish: what is done with ``y``; None stores it.
      outputs: the number of arrays of equal width that the columns are split into.

    Returns:
      ``outputs`` arrays ([S,] M, N / outputs), int8 after :class:`GeluRequantize` and bfloat16 otherwise.
    """
    *of_all, given, K = a.shape
    M = given if given <= ROWS else pl.cdiv(given, ROWS) * ROWS
    a = widened(a, M, axis=-2)
    N, groups = column_scale.shape[-1], of_all[0] if layer is None else None
    # Bulk copies stop at the end of an array. Vectors are read without them, so they are padded to the end of the last tile.
    rows, columns = (pl.cdiv(size, tile) * tile for size, tile in zip((M, N), tiles.block, strict=True))
    vectors = {"column_scale": widened(column_scale, columns), "bias": widened(bias, columns)}
    if layer is not None:
        vectors["layer"] = layer
    if scale.ndim == 2:
        vectors["row_scale"] = widened(scale.reshape(-1), rows)
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
    plan = Plan(M, N, K, tiles, outputs, tuple(vectors), requantized, tokens, core_count(), weight_zero is not None, groups)
    kernel = common.kernel(
        partial(_body, plan),
        out_type=[jax.ShapeDtypeStruct((*of_all, M, N // outputs), plan.out_dtype)] * outputs,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=4 if plan.packed else 3,
        thread_name="warpgroup",
        kernel_name=f"int8_matmul_{'gelu' if requantized else 'residual' if residual else 'store'}_{N}x{K}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
    )
    outs = kernel(a, b.reshape(-1, b.shape[-1]), *vectors.values(), *residual)
    return [out[..., :given, :] for out in outs]


def _body(plan: Plan, a: Ref, b: Ref, *rest: Ref) -> None:
    """The body of the kernel: references in device memory, in the order of the call, outputs last."""
    vectors = dict(zip(plan.vectors, rest, strict=False))
    residual, outs = (rest[len(vectors)] if plan.tokens else None), rest[-plan.outputs :]
    block_m, block_n = plan.tiles.block
    _, _, width = plan.pieces[0]

    @partial(
        pl.run_scoped,
        ring=rings(plan),
        staging=plgpu.SMEM((2, plan.slots, EPILOGUE_M, width), plan.out_dtype, transforms=swizzled(width, plan.out_dtype)),
        fetched=plgpu.Barrier(num_barriers=2 * plan.slots) if plan.tokens else None,
        collective_axes="warpgroup",
    )
    def in_shared_memory(ring: Rings[Ref], staging: Ref, fetched: Ref | None) -> None:
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        in_group = plan.counts[0] * plan.counts[1]
        count = (in_group * (plan.groups or 1) - block + plan.blocks - 1) // plan.blocks
        chosen = None if plan.groups else load_vector(vectors["layer"], 0)

        def at_turn(turn: jax.Array) -> OutputTile:
            index = block + turn * plan.blocks
            layer, index = (lax.div(index, in_group), lax.rem(index, in_group)) if chosen is None else (chosen, index)
            im, in_ = plgpu.planar_snake(index, plan.counts, 1, plan.tiles.band)
            return OutputTile(layer, im * block_m, in_ * block_n)

        multiplying, copying, unpacking = _REGISTERS_PACKED if plan.packed else _REGISTERS

        @pl.when(warpgroup == 2)
        def _() -> None:
            plgpu.set_max_registers(copying, action="decrease")
            copy(plan, a, b, ring, count, at_turn)

        if plan.packed:

            @pl.when(warpgroup == 3)
            def _() -> None:
                plgpu.set_max_registers(unpacking, action="decrease")
                unpack(plan, vectors["weight_zero"], ring, count, at_turn)

        @pl.when(warpgroup < 2)
        def multiply() -> None:
            plgpu.set_max_registers(multiplying, action="increase")
            alone = plan.rings == 2
            mine = (count - warpgroup + 1) // 2 if alone else count
            row = warpgroup * plan.tiles.m if plan.tiles.sharing == "m" else 0
            column = warpgroup * plan.tiles.n if plan.tiles.sharing == "n" else 0

            @pl.loop(0, mine)
            def tile(turn: jax.Array) -> None:
                turn = 2 * turn + warpgroup if alone else turn
                layer, m0, n0 = at_turn(turn)
                m0, n0 = m0 + row, n0 + column
                if residual is not None and fetched is not None:
                    fetch_residual(plan, residual, staging.at[warpgroup], fetched, warpgroup, m0, n0)
                of_layer = tuple(plan.of_group(out, layer) for out in outs)
                acc = _accumulate(plan, ring, turn, row, column)
                finish_tile(plan, acc, vectors, layer, staging.at[warpgroup], fetched, warpgroup, of_layer, m0, n0)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _accumulate(plan: Plan, rings: Rings[Ref], turn: jax.Array, row: jax.Array | int, column: jax.Array | int) -> jax.Array:
    """Returns the int32 product of a warpgroup's tile, which begins at ``row`` and ``column`` of the block's tile."""
    rows, columns = pl.ds(row, plan.tiles.m), pl.ds(column, plan.tiles.n)
    b = bytes_of(rings.b) if plan.packed else rings.b

    def leave(at: Place) -> None:
        plgpu.barrier_arrive(rings.empty.at[at.barrier])

    def multiply(acc: Ref) -> jax.Array:
        def step(k: jax.Array, at: Place) -> None:
            plgpu.barrier_wait(rings.full.at[at.barrier])
            wgmma(acc, rings.a.at[at.ring, at.stage, rows], transposed(b.at[at.ring, at.stage, columns]))
            if plan.in_flight:
                plgpu.wgmma_wait(1)  # for the product before this one
                pl.when(k > 0)(lambda: leave(place(plan, turn, k - 1)))
            else:
                plgpu.wgmma_wait(0)
                leave(at)

        each_step(plan, turn, step)
        if plan.in_flight:
            plgpu.wgmma_wait(0)
            leave(place(plan, turn, jnp.int32(plan.steps - 1)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((plan.tiles.m, plan.tiles.n), jnp.int32))
