"""The warpgroups that feed a product on Hopper: one copies, and for packed weights another unpacks what was copied.

Every stage of a ring is reused in a cycle: filled when the multiplying warpgroups have left it (``empty``), unpacked when the
copy has arrived (``arrived``), multiplied when both operands are there (``full``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine.hopper import nibbles
from ptq4dit_jax.engine.hopper.common import Ref, bytes_of, swizzled
from ptq4dit_jax.engine.hopper.plan import TILE_K, OutputTile, Plan

_Held = TypeVar("_Held")


class Rings(NamedTuple, Generic[_Held]):
    """References in shared memory, or what allocates it: operands by ring and stage, and the barriers of each stage. If
    weights are packed, ``packed`` holds the copied bytes and ``b`` the unpacked ones, both as bytes and as words of the same
    memory."""

    a: _Held
    b: _Held
    full: _Held
    empty: _Held
    packed: _Held | None
    arrived: _Held | None


def rings(plan: Plan) -> Rings[pl.MemoryRef | plgpu.Barrier]:
    """Returns what to allocate."""
    (block_m, block_n), lead = plan.tiles.block, (plan.rings, plan.tiles.stages)
    as_bytes = lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.rings * plan.tiles.stages)
    b = (*lead, block_n, TILE_K)
    return Rings(
        a=as_bytes((*lead, block_m, TILE_K), jnp.int8),
        b=nibbles.bytes_and_words(b, jnp.int8) if plan.packed else as_bytes(b, jnp.int8),
        full=barriers(2),  # both operands
        empty=barriers(2 // plan.rings),
        packed=nibbles.bytes_and_words((*lead, block_n // 2, TILE_K), jnp.uint8) if plan.packed else None,
        arrived=barriers(1) if plan.packed else None,
    )


class Place(NamedTuple):
    """Where a step goes: its ring, its stage in the ring, the barrier of that stage, and the steps of the ring before it."""

    ring: jax.Array
    stage: jax.Array
    barrier: jax.Array
    before: jax.Array


def place(plan: Plan, turn: jax.Array, k: jax.Array) -> Place:
    """Returns where step ``k`` of an output tile goes."""
    ring, before = lax.rem(turn, plan.rings), lax.div(turn, plan.rings) * plan.steps + k
    stage = lax.rem(before, plan.tiles.stages)
    return Place(ring, stage, ring * plan.tiles.stages + stage, before)


def each_step(plan: Plan, turn: jax.Array, body: Callable[[jax.Array, Place], None]) -> None:
    """Runs ``body`` for every step of an output tile."""

    @pl.loop(0, plan.steps)
    def step(k: jax.Array) -> None:
        body(k, place(plan, turn, k))


def copy(plan: Plan, a: Ref, b: Ref, to: Rings[Ref], count: jax.Array, at_turn: Callable[[jax.Array], OutputTile]) -> None:
    """Copies the operands of ``count`` output tiles, tile by tile."""
    (block_m, block_n), stages = plan.tiles.block, plan.tiles.stages
    rows_of = lambda columns: columns // 2 if plan.packed else columns  # of the weight; two packed rows share one row of bytes

    @pl.loop(0, count)
    def tile(turn: jax.Array) -> None:
        layer, row, column = at_turn(turn)
        above = layer * rows_of(plan.N) if b.shape[0] > rows_of(plan.N) else 0  # rows of the layers before
        weight_row = above + pl.multiple_of(rows_of(column), rows_of(block_n))
        rows, weight_rows = pl.ds(row, block_m), pl.ds(weight_row, rows_of(block_n))
        activations = plan.of_group(a, layer)

        def step(k: jax.Array, at: Place) -> None:
            # Room for the operands means room for packed weights, too: what was multiplied had been unpacked before.
            @pl.when(at.before >= stages)
            def wait_for_room() -> None:
                plgpu.barrier_wait(to.empty.at[at.barrier])

            part, in_ring = pl.ds(k * TILE_K, TILE_K), (at.ring, at.stage)
            weight, full = b.at[weight_rows, part], to.full.at[at.barrier]
            if to.packed is not None and to.arrived is not None:
                plgpu.copy_gmem_to_smem(weight, bytes_of(to.packed).at[*in_ring], to.arrived.at[at.barrier])
            else:
                plgpu.copy_gmem_to_smem(weight, to.b.at[*in_ring], full)
            plgpu.copy_gmem_to_smem(activations.at[rows, part], to.a.at[*in_ring], full)

        each_step(plan, turn, step)

    for ring in range(plan.rings):  # a barrier must not be freed before all arrivals at it have been waited for
        done = (count - ring + plan.rings - 1) // plan.rings * plan.steps

        @pl.loop(lax.max(done - stages, 0), done)
        def drain(step: jax.Array, ring: int = ring) -> None:
            plgpu.barrier_wait(to.empty.at[ring * stages + lax.rem(step, stages)])


def unpack(plan: Plan, zero_point: Ref, to: Rings[Ref], count: jax.Array, at_turn: Callable[[jax.Array], OutputTile]) -> None:
    """Unpacks the packed weights that :func:`copy` brings, and subtracts their zero points.

    It takes several stages at a time if the ring has them: most of the time from an arrival to the fence after it is waiting.
    """
    block_n = plan.tiles.block[1]
    together = max(1, min(3, plan.tiles.stages // 2))
    copied, arrived = to.packed, to.arrived
    assert copied is not None
    assert arrived is not None

    def load(at: Place) -> list[jax.Array]:
        plgpu.barrier_wait(arrived.at[at.barrier])
        return nibbles.load(copied, block_n, at.ring, at.stage)

    @pl.loop(0, count)
    def tile(turn: jax.Array) -> None:
        layer, _, column = at_turn(turn)
        offsets = nibbles.offsets(zero_point, layer, column, block_n)

        def unpack_stages(first: jax.Array, number: int) -> None:
            places = [place(plan, turn, first + k) for k in range(number)]
            packed = [load(at) for at in places]
            for at, words in zip(places, packed, strict=True):
                nibbles.store(to.b, words, offsets, at.ring, at.stage)
            plgpu.commit_smem()
            for at in places:
                plgpu.barrier_arrive(to.full.at[at.barrier])

        left = plan.steps % together
        pl.loop(0, plan.steps - left, step=together)(partial(unpack_stages, number=together))
        pl.loop(plan.steps - left, plan.steps)(partial(unpack_stages, number=1))
