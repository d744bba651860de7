"""The warpgroups that feed a product on Hopper: one copies, and of packed weights another unpacks what came.

Every stage of a ring goes round: copied when the multiplying warpgroups have left it (``empty``), unpacked when it has arrived
(``arrived``), multiplied when both operands are there (``full``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper.common import load_of_layer, load_words, store_words, swizzled
from ptq4dit_jax.engine.hopper.plan import OutputTile, Plan

#: In each byte of a word: the low half, and the sign.
_LOW, _SIGN = np.int32(0x0F0F0F0F), np.int32(-0x7F7F7F80)


class Rings(NamedTuple):
    """References in shared memory: operands by ring, stage and part, and the barriers of each stage. Where weights are packed,
    ``packed`` holds what is copied and ``b`` what it unpacks to, both as bytes and as words of the same memory."""

    a: Any
    b: Any
    full: Any
    empty: Any
    packed: Any
    arrived: Any


def rings(plan: Plan) -> Rings:
    """What to allocate."""
    (block_m, block_n), lead = plan.tiles.block, (plan.rings, plan.stages)
    as_bytes = lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.rings * plan.stages)

    def both(shape: tuple[int, ...], dtype: Any) -> Any:
        return plgpu.RefUnion(as_bytes(shape, dtype), as_bytes((*shape[:-1], shape[-1] // 4), jnp.int32))

    b = (*lead, plan.parts, block_n, plan.part_k)
    return Rings(
        a=as_bytes((*lead, plan.parts, block_m, plan.part_k), jnp.int8),
        b=both(b, jnp.int8) if plan.packed else as_bytes(b, jnp.int8),
        full=barriers(plan.parts + 1),  # the parts of the activations, and the weight
        empty=barriers(2 // plan.rings),
        packed=both((*lead, block_n, plan.part_k), jnp.uint8) if plan.packed else None,
        arrived=barriers(1) if plan.packed else None,
    )


class Place(NamedTuple):
    """Where a step goes: its ring, its stage there, the barrier of that stage, and how many steps the ring has seen."""

    ring: jax.Array
    stage: jax.Array
    barrier: jax.Array
    before: jax.Array


def each_step(plan: Plan, turn: jax.Array, body: Callable[[jax.Array, Place], None]) -> None:
    """Does ``body`` for every step of an output tile."""
    ring, first = lax.rem(turn, plan.rings), lax.div(turn, plan.rings) * plan.steps

    @pl.loop(0, plan.steps)
    def step(k: jax.Array) -> None:
        stage = lax.rem(first + k, plan.stages)
        body(k, Place(ring, stage, ring * plan.stages + stage, first + k))


def copy(plan: Plan, a: Any, b: Any, to: Rings, count: jax.Array, at_turn: Callable[[jax.Array], OutputTile]) -> None:
    """Copies what ``count`` output tiles are made of, tile after tile."""
    (block_m, block_n), stages = plan.tiles.block, plan.stages

    @pl.loop(0, count)
    def tile(turn: jax.Array) -> None:
        layer, row, column = at_turn(turn)
        above = layer * plan.N if b.shape[0] > plan.N else 0  # weights of the layers before
        rows, weight_rows = pl.ds(row, block_m), pl.ds(above + column, block_n)
        activations = plan.of_group(a, layer)

        def step(k: jax.Array, at: Place) -> None:
            # Room for the operands is room for packed weights, too: what lay there has been unpacked for what was multiplied.
            @pl.when(at.before >= stages)
            def wait_for_room() -> None:
                plgpu.barrier_wait(to.empty.at[at.barrier])

            weight = b.at[weight_rows, pl.ds(k * plan.part_k, plan.part_k)]
            if plan.packed:
                plgpu.copy_gmem_to_smem(weight, to.packed[0].at[at.ring, at.stage], to.arrived.at[at.barrier])
            else:
                plgpu.copy_gmem_to_smem(weight, to.b.at[at.ring, at.stage, 0], to.full.at[at.barrier])
            for part in range(plan.parts):
                piece = activations.at[rows, pl.ds(part * plan.K // plan.parts + k * plan.part_k, plan.part_k)]
                plgpu.copy_gmem_to_smem(piece, to.a.at[at.ring, at.stage, part], to.full.at[at.barrier])

        each_step(plan, turn, step)

    for ring in range(plan.rings):  # a barrier may not go away while an arrival at it has not been seen
        done = (count - ring + plan.rings - 1) // plan.rings * plan.steps

        @pl.loop(lax.max(done - stages, 0), done)
        def drain(step: jax.Array, ring: int = ring) -> None:
            plgpu.barrier_wait(to.empty.at[ring * stages + lax.rem(step, stages)])


def unpack(plan: Plan, zero_point: Any, to: Rings, count: jax.Array, at_turn: Callable[[jax.Array], OutputTile]) -> None:
    """Unpacks what :func:`copy` brings of packed weights, and takes their zero points from them."""

    @pl.loop(0, count)
    def tile(turn: jax.Array) -> None:
        layer, _, column = at_turn(turn)
        zeros = load_of_layer(zero_point, layer, pl.ds(column, plan.tiles.block[1]))
        offset = _SIGN - zeros.astype(jnp.int32) * np.int32(0x01010101)

        def step(_: jax.Array, at: Place) -> None:
            plgpu.barrier_wait(to.arrived.at[at.barrier])
            words = load_words(to.packed, at.ring, at.stage)
            for part, unpacked in enumerate(_centered(words, offset)):
                store_words(to.b, unpacked, at.ring, at.stage, part)
            plgpu.commit_smem()
            plgpu.barrier_arrive(to.full.at[at.barrier])

        each_step(plan, turn, step)


def _centered(words: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two codes of each byte less the row's zero point, four bytes to a word: ``words`` (rows, columns) int32.

    ``offset`` (rows,) is 128 less the zero point in each byte: the sums stay above 0, and no byte borrows from the next.
    """
    # 16 bytes to a thread: every access to shared memory is as wide as can be.
    words = plgpu.layout_cast(words, plgpu.Layout.SMEM_GMEM_COPY(words.shape, words.dtype, 4 * words.shape[1]))
    offset = lax.broadcast_in_dim(offset, words.shape, (0,))
    center = lambda low: ((low & _LOW) + offset) ^ _SIGN
    return center(words), center(lax.shift_right_logical(words, 4))
