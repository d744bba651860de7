"""The copying warpgroup of a product on Hopper: fills the rings that the others multiply from."""

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
from ptq4dit_jax.engine.hopper.plan import TILE_K, Plan

#: Rows of a weight that are unpacked at a time.
_UNPACK_N = 64
#: In each byte of a word: the low half, and the sign.
_LOW, _SIGN = np.int32(0x0F0F0F0F), np.int32(-0x7F7F7F80)


class Rings(NamedTuple):
    """References in shared memory: operands by ring, stage and part, and the barriers of each stage. ``b`` and ``packed`` are
    pairs of the same bytes, as bytes and as words, where weights are packed."""

    a: Any
    b: Any
    full: Any
    empty: Any
    packed: Any
    arrived: Any


def rings(plan: Plan) -> Rings:
    """What to allocate."""
    (block_m, block_n), stages, lead = plan.tiles.block, plan.tiles.stages, (plan.rings, plan.tiles.stages, plan.parts)
    bytes_ = lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.rings * stages)

    def both(shape: tuple[int, ...], dtype: Any) -> Any:
        return plgpu.RefUnion(bytes_(shape, dtype), bytes_((*shape[:-1], shape[-1] // 4), jnp.int32))

    b = (*lead, block_n, plan.part_k)
    return Rings(
        a=bytes_((*lead, block_m, plan.part_k), jnp.int8),
        b=both(b, jnp.int8) if plan.packed else bytes_(b, jnp.int8),
        full=barriers(3 if plan.packed else 2),  # two copies each; of packed weights, those of the activations and the unpacking
        empty=barriers(2 // plan.rings),
        packed=both((plan.ahead + 1, block_n, plan.part_k), jnp.uint8) if plan.packed else None,
        arrived=plgpu.Barrier(num_barriers=plan.ahead + 1) if plan.packed else None,
    )


def feed(plan: Plan, a: Any, b: Any, zero_point: Any, layer: jax.Array, to: Rings, count: jax.Array, origin: Callable) -> None:
    """Copies what ``count`` output tiles are made of, tile after tile; ``origin`` says which tile comes when."""
    (block_m, block_n), stages = plan.tiles.block, plan.tiles.stages
    first_row = layer * plan.N if b.shape[0] > plan.N else 0

    def feed_tile(turn: jax.Array, _: Any) -> Any:
        (im, in_), ring, before = origin(turn), lax.rem(turn, plan.rings), lax.div(turn, plan.rings) * plan.steps
        column = in_ * block_n
        rows, weight_rows = pl.ds(im * block_m, block_m), pl.ds(first_row + column, block_n)

        def fetch(k: jax.Array) -> None:
            slot = lax.rem(before + k, stages)
            full = to.full.at[ring * stages + slot]

            @pl.when(before + k >= stages)
            def wait_for_room() -> None:
                plgpu.barrier_wait(to.empty.at[ring * stages + slot])

            for part in range(plan.parts):
                columns = pl.ds(part * plan.K // plan.parts + k * plan.part_k, plan.part_k)
                plgpu.copy_gmem_to_smem(a.at[rows, columns], to.a.at[ring, slot, part], full)
            weight = b.at[weight_rows, pl.ds(k * plan.part_k, plan.part_k)]
            if plan.packed:
                place = lax.rem(k, plan.ahead + 1)
                plgpu.copy_gmem_to_smem(weight, to.packed[0].at[place], to.arrived.at[place])
            else:
                plgpu.copy_gmem_to_smem(weight, to.b.at[ring, slot, 0], full)

        if not plan.packed:
            _loop(0, plan.steps, fetch)
            return ()

        pieces = [pl.ds(i, _UNPACK_N) for i in range(0, block_n, _UNPACK_N)]
        zeros = [load_of_layer(zero_point, layer, pl.ds(column + piece.start, _UNPACK_N)) for piece in pieces]
        offsets = [_SIGN - zero.astype(jnp.int32) * np.int32(0x01010101) for zero in zeros]

        def unpack(k: jax.Array) -> None:
            slot, place = lax.rem(before + k, stages), lax.rem(k, plan.ahead + 1)
            plgpu.barrier_wait(to.arrived.at[place])
            for piece, offset in zip(pieces, offsets, strict=True):
                for part, words in enumerate(_centered(load_words(to.packed, place, piece, slice(None)), offset)):
                    store_words(to.b, words, ring, slot, part, piece, slice(None))
            plgpu.commit_smem()
            plgpu.barrier_arrive(to.full.at[ring * stages + slot])

        def fetch_and_unpack(k: jax.Array) -> None:
            pl.when(k + plan.ahead < plan.steps)(lambda: fetch(k + plan.ahead))
            unpack(k)

        _loop(0, min(plan.ahead, plan.steps), fetch)
        _loop(0, plan.steps, fetch_and_unpack)
        return ()

    lax.fori_loop(0, count, feed_tile, ())
    for ring in range(plan.rings):  # a barrier may not go away while an arrival at it has not been seen
        done = (count - ring + plan.rings - 1) // plan.rings * plan.steps

        drain = lambda step, ring=ring: plgpu.barrier_wait(to.empty.at[ring * stages + lax.rem(step, stages)])
        _loop(lax.max(done - stages, 0), done, drain)


def _loop(low: Any, high: Any, body: Callable[[jax.Array], None]) -> None:
    def step(index: jax.Array, _: Any) -> Any:
        body(index)
        return ()

    lax.fori_loop(low, high, step, ())


def _centered(words: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two codes of each byte less the row's zero point, four bytes to a word: ``words`` (rows, columns) int32.

    ``offset`` (rows,) is 128 less the zero point in each byte: the sums stay above 0, and no byte borrows from the next.
    """
    words = plgpu.layout_cast(words, plgpu.Layout.WGMMA)
    offset = lax.broadcast_in_dim(offset, words.shape, (0,))
    center = lambda low: ((low & _LOW) + offset) ^ _SIGN
    return center(words), center(lax.shift_right_logical(words, 4))
