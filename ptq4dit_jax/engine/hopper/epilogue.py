"""The epilogue of a product on Hopper: scales, bias and what follows the layer, piece by piece through shared memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper.common import At, Ref, load_of_layer, load_vector, to_codes
from ptq4dit_jax.engine.hopper.plan import EPILOGUE_M, Plan


def fetch_residual(
    plan: Plan, residual: Ref, staging: Ref, fetched: Ref, warpgroup: jax.Array, m0: jax.Array, n0: jax.Array
) -> None:
    """Starts copying the residual to where the result will be, once the previous result has been stored from there."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for slot, (i, j, width) in enumerate(plan.pieces):
        piece = residual.at[pl.ds(m0 + i, EPILOGUE_M), pl.ds(n0 + j, width)]
        plgpu.copy_gmem_to_smem(piece, staging.at[slot], fetched.at[warpgroup * plan.slots + slot])


def finish_tile(
    plan: Plan,
    acc: jax.Array,
    vectors: dict[str, Ref],
    layer: jax.Array,
    staging: Ref,
    fetched: Ref | None,
    warpgroup: jax.Array,
    outs: tuple[Ref, ...],
    m0: jax.Array,
    n0: jax.Array,
) -> None:
    """Runs the epilogue of a warpgroup's tile, piece by piece through shared memory to the outputs.

    The warps that read a residual also write the result in its place, so they need not wait for one another.
    """
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
        if plan.tokens is not None and fetched is not None:
            image = lax.min((m0 + i) // plan.tokens, vectors["gate"].shape[1] - 1)
            gate = over_rows(of_layer("gate", image, columns).astype(jnp.float32))
            plgpu.barrier_wait(fetched.at[warpgroup * plan.slots + slot])
            y = staging[slot].astype(jnp.float32) + gate * y
        else:
            # Pieces alternate between the slots, but a tile begins with slot 0 even if the last one ended there.
            again = piece == 0 and len(plan.pieces) % plan.slots
            plgpu.wait_smem_to_gmem(0 if again else plan.slots - 1, wait_read_only=True)
        if plan.requantized is None:
            staging[slot] = y.astype(jnp.bfloat16)
        else:
            y = _gelu(y) * (1 / of_layer("act_scale"))
            y = y * vector("balance") if "balance" in vectors else y
            staging[slot] = to_codes(y, of_layer("zero_point"), *plan.requantized)
        plgpu.commit_smem()
        _store(plan, staging.at[slot], outs, rows, n0 + j, width)


def _store(plan: Plan, piece: Ref, outs: tuple[Ref, ...], rows: At, column: jax.Array, width: int) -> None:
    """Starts copying a piece to the output that its first column falls in."""
    if len(outs) == 1:
        plgpu.copy_smem_to_gmem(piece, outs[0].at[rows, pl.ds(column, width)])
        return
    each = plan.N // len(outs)
    for index, out in enumerate(outs):

        @pl.when(column // each == index)
        def _(index: int = index, out: Ref = out) -> None:
            plgpu.copy_smem_to_gmem(piece, out.at[rows, pl.ds(column - index * each, width)])


def _gelu(x: jax.Array) -> jax.Array:
    """Computes GELU by tanh, with two products fewer than the usual form."""
    return x * (0.5 + 0.5 * jnp.tanh(x * (0.7978845608028654 + 0.035677408136300125 * (x * x))))
