"""Softmax attention in one kernel, with the quantization of its output for the next product.

Products are bfloat16 with float32 sums; probabilities never leave registers. There is one persistent block per multiprocessor.
One warpgroup copies keys and values into shared memory. Two multiply, each for 64 queries of the same head, or for the same
queries of two heads. While one computes the softmax, the other has the tensor cores.

Heads lie side by side, ``d`` columns each, and tiles in shared memory start at whole swizzles. So a head of 72 columns is
fetched as 80, from the multiple of 16 at or before its first column. The neighbours' columns among them are multiplied by zeros
in the queries and dropped from the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from ptq4dit_jax.engine.hopper import common
from ptq4dit_jax.engine.hopper.common import (
    At,
    Ref,
    core_count,
    load_of_layer,
    load_vector,
    swizzled,
    to_codes,
    transposed,
    wgmma,
)

#: Queries per warpgroup.
_QUERIES = 64
#: Keys whose scores a warpgroup holds at a time. Twice as many would leave too few registers.
_KEYS = 128
#: Stages of each ring: four hold both heads' keys of 256 tokens.
_STAGES = 4
#: Registers per thread of the copying and the multiplying warpgroups: 128 * (24 + 2 * 240) fit the register file.
_COPY_REGISTERS, _MATH_REGISTERS = 24, 240


class Round(NamedTuple):
    """``clip(round(out) + zero_point, low, high)`` as int8. ``zero_point`` int32 is a stack (S,), and ``layer`` (1,) int32 is
    the index of the layer in it, as in :mod:`ptq4dit_jax.engine.hopper.gemm`."""

    zero_point: jax.Array
    layer: jax.Array
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel's body needs to know; all static."""

    images: int
    tokens: int
    heads: int
    d: int
    codes: tuple[int, int] | None
    cores: int

    @property
    def steps(self) -> int:
        """Stages of keys per query."""
        return self.tokens // _KEYS

    @property
    def resident(self) -> bool:
        """Whether the rings hold all keys and values of two heads."""
        return 2 * self.steps <= _STAGES

    @property
    def by_head(self) -> bool:
        """Whether each warpgroup takes one head of the pair instead of half of a tile. If there are enough multiprocessors for
        tiles of half the size, that takes half the time."""
        return self.resident and self.images * self.heads // 2 * (self.tokens // _QUERIES) <= self.cores

    @property
    def tile(self) -> int:
        """Queries per tile."""
        return _QUERIES if self.by_head else 2 * _QUERIES

    @property
    def tiles(self) -> int:
        return self.tokens // self.tile

    @property
    def tiles_at_once(self) -> int:
        """Tiles per unit of work, which share keys and values in shared memory: all tiles, if the keys and values fit and there
        is work for all multiprocessors without cutting images; otherwise one."""
        whole = self.images * self.heads // 2 >= 0.75 * self.cores
        return self.tiles if self.resident and whole else 1

    @property
    def in_turns(self) -> bool:
        """Whether the warpgroups are made to take turns, so that one's softmax runs during the other's products. With many
        stages of keys in a row, that gains a tenth; with few, waiting costs as much."""
        return not self.resident

    @property
    def units(self) -> int:
        """Number of units of work: two neighbouring heads of an image, for one tile or all."""
        return self.images * (self.heads // 2) * (self.tiles // self.tiles_at_once)

    @property
    def blocks(self) -> int:
        return min(self.cores, self.units)

    @property
    def width(self) -> int:
        """Columns that are fetched for a head."""
        return -(-self.d // 16) * 16

    def lead(self, head: int) -> int:
        """Returns the number of foreign columns fetched before the first column of the first or second head of a pair."""
        return head * self.d % 16

    @property
    def aligned(self) -> int:
        """The greatest number of columns that divides the first column and the width of every fetch. A tile of a swizzle must
        divide them, too, because bulk copies are addressed by whole tiles."""
        return math.gcd(self.width, 2 * self.d, self.d - self.lead(1))

    @property
    def out_dtype(self) -> DTypeLike:
        return jnp.bfloat16 if self.codes is None else jnp.int8


def covers(tokens: int, heads: int, d: int) -> bool:
    """Returns whether the kernel runs for these numbers of tokens and heads, and heads of width ``d``."""
    return tokens % _KEYS == 0 and heads % 2 == 0 and d % 8 == 0 and 32 <= d <= 80


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, tokens: int, heads: int, finish: Round | None = None) -> jax.Array:
    """Computes ``softmax(q k^T / sqrt(d)) v`` for every head.

    Args:
      q, k, v: (M, D) bfloat16. Images of ``tokens`` rows are stacked, and heads of ``D / heads`` columns lie side by side.
      tokens: a multiple of 128.
      heads: an even number; their width is a multiple of 8, from 32 to 80.
      finish: quantizes the output, in steps of 1: scale and balance, if any, are already in ``v``.

    Returns:
      (M, D), int8 with ``finish`` and bfloat16 without.
    """
    M, D = q.shape
    plan = _Plan(
        images=M // tokens,
        tokens=tokens,
        heads=heads,
        d=D // heads,
        codes=None if finish is None else (finish.low, finish.high),
        cores=core_count(),
    )
    kernel = common.kernel(
        partial(_body, plan),
        out_type=jax.ShapeDtypeStruct((M, D), plan.out_dtype),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(q, k, v, *([] if finish is None else [finish.zero_point, finish.layer]))


class _Scratch(NamedTuple):
    """Shared memory: rings of keys and values, queries and output of each warpgroup, the barriers of the first three, and the
    barrier at which the warpgroups take turns."""

    k_ring: Ref
    v_ring: Ref
    queries: Ref
    staging: Ref
    full: Ref
    empty: Ref
    queries_full: Ref
    turns: Ref

    def take_turns(self) -> None:
        """Waits until the other warpgroup arrives here, too."""
        plgpu.barrier_arrive(self.turns)
        plgpu.barrier_wait(self.turns)

    def keys_at(self, stage: jax.Array) -> tuple[Ref, Ref, Ref]:
        """Returns the keys of a stage, the barrier that signals their arrival, and the barrier that signals their release."""
        slot = lax.rem(stage, _STAGES)
        return self.k_ring.at[slot], self.full.at[slot], self.empty.at[slot]

    def values_at(self, stage: jax.Array) -> tuple[Ref, Ref, Ref]:
        """Returns the same for values."""
        slot = lax.rem(stage, _STAGES)
        return self.v_ring.at[slot], self.full.at[_STAGES + slot], self.empty.at[_STAGES + slot]


class _Unit(NamedTuple):
    """The first row of the image, the unit's first tile in it, and the first column of the pair of heads."""

    row: jax.Array
    tile: jax.Array
    column: jax.Array

    @classmethod
    def at(cls, plan: _Plan, index: jax.Array) -> _Unit:
        cuts, pairs = plan.tiles // plan.tiles_at_once, plan.heads // 2
        image_and_pair = index // cuts
        return cls(
            image_and_pair // pairs * plan.tokens,
            lax.rem(index, cuts) * plan.tiles_at_once,
            lax.rem(image_and_pair, pairs) * 2 * plan.d,
        )

    def columns(self, plan: _Plan, head: int) -> At:
        """Returns the columns that are fetched for a head of the pair."""
        return pl.ds(pl.multiple_of(self.column + head * plan.d - plan.lead(head), 16), plan.width)


#: Returns the unit of work of a turn.
_UnitAt: TypeAlias = Callable[[jax.Array], _Unit]


def _body(plan: _Plan, q: Ref, k: Ref, v: Ref, *rest: Ref) -> None:
    """The body of the kernel: references in device memory, in the order of the call, the output last."""
    zero_point, out = rest[:-1], rest[-1]
    fetched = partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzled(plan.aligned, jnp.bfloat16))

    @partial(
        pl.run_scoped,
        k_ring=fetched((_STAGES, _KEYS, plan.width)),
        v_ring=fetched((_STAGES, _KEYS, plan.width)),
        queries=fetched((2, _QUERIES, plan.width)),
        staging=plgpu.SMEM((1 if plan.by_head else 2, _QUERIES, 2 * plan.d), plan.out_dtype),
        full=plgpu.Barrier(num_barriers=2 * _STAGES),
        empty=plgpu.Barrier(num_arrivals=1 if plan.by_head else 2, num_barriers=2 * _STAGES),
        queries_full=plgpu.Barrier(num_barriers=2),
        turns=plgpu.Barrier(num_arrivals=2),
        collective_axes="warpgroup",
    )
    def in_shared_memory(**references: Ref) -> None:
        scratch = _Scratch(**references)
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = (plan.units - block + plan.blocks - 1) // plan.blocks
        unit_at = lambda turn: _Unit.at(plan, block + turn * plan.blocks)

        @pl.when(warpgroup == 2)
        def copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            _copy(plan, k, v, scratch, unit_at, count)

        @pl.when(warpgroup < 2)
        def multiply() -> None:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
            _multiply(plan, q, zero_point, out, scratch, unit_at, count, warpgroup)


def _copy(plan: _Plan, k: Ref, v: Ref, scratch: _Scratch, unit_at: _UnitAt, count: jax.Array) -> None:
    """Fills the rings with the keys and values of both heads of every unit."""

    @pl.loop(0, count)
    def fetch_unit(turn: jax.Array) -> None:
        unit = unit_at(turn)
        for head in range(2):

            @pl.loop(0, plan.steps)
            def fetch(step: jax.Array, head: int = head) -> None:
                stage = (2 * turn + head) * plan.steps + step
                at = pl.ds(unit.row + step * _KEYS, _KEYS), unit.columns(plan, head)
                for source, (target, full, empty) in ((k, scratch.keys_at(stage)), (v, scratch.values_at(stage))):

                    @pl.when(stage >= _STAGES)
                    def wait_for_room(empty: Ref = empty) -> None:
                        plgpu.barrier_wait(empty)

                    plgpu.copy_gmem_to_smem(source.at[at], target, full)

    stages = 2 * count * plan.steps

    @pl.loop(lax.max(stages - _STAGES, 0), stages)
    def drain(stage: jax.Array) -> None:  # a barrier must not be freed before all arrivals at it have been waited for
        for _, _, empty in (scratch.keys_at(stage), scratch.values_at(stage)):
            plgpu.barrier_wait(empty)


def _multiply(
    plan: _Plan,
    q: Ref,
    zero_point: tuple[Ref, ...],
    out: Ref,
    scratch: _Scratch,
    unit_at: _UnitAt,
    count: jax.Array,
    warpgroup: jax.Array,
) -> None:
    """Computes one warpgroup's part of every unit."""
    queries, full = scratch.queries.at[warpgroup], scratch.queries_full.at[warpgroup]
    staging = scratch.staging.at[0 if plan.by_head else warpgroup]
    zero = load_of_layer(zero_point[0], load_vector(zero_point[1], 0)) if plan.codes else None

    # Tiles are counted over all units of this block.
    place = lambda index: (index // plan.tiles_at_once, lax.rem(index, plan.tiles_at_once))

    def rows(index: jax.Array) -> tuple[_Unit, At]:
        """Returns the unit of a tile, and this warpgroup's rows of the tile."""
        turn, tile = place(index)
        unit = unit_at(turn)
        first = unit.row + (unit.tile + tile) * plan.tile
        return unit, pl.ds(first if plan.by_head else first + warpgroup * _QUERIES, _QUERIES)

    def fetch_queries(index: jax.Array, head: int) -> None:
        unit, own = rows(index)
        plgpu.copy_gmem_to_smem(q.at[own, unit.columns(plan, head)], queries, full)

    def one_head(index: jax.Array, head: int, fetch_next: Callable[[], None]) -> None:
        """Computes attention and leaves the result in ``staging``."""
        plgpu.barrier_wait(full)
        x = _without_strangers(plan, queries[...], head)
        plgpu.commit_smem()  # all threads have read before the next queries arrive
        fetch_next()
        turn, tile = place(index)
        y = _attend(plan, x, scratch, (2 * turn + head) * plan.steps, tile)
        y = y[:, plan.lead(head) : plan.lead(head) + plan.d]
        if zero is not None and plan.codes is not None:
            y = to_codes(y, zero, *plan.codes)
        if head == 0 or plan.by_head:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[:, head * plan.d : (head + 1) * plan.d] = y.astype(plan.out_dtype)

    def store(index: jax.Array) -> None:
        unit, own = rows(index)
        plgpu.copy_smem_to_gmem(staging, out.at[own, pl.ds(unit.column, 2 * plan.d)])

    def both_heads(index: jax.Array) -> None:
        def fetch_next() -> None:
            pl.when(index + 1 < count * plan.tiles_at_once)(lambda: fetch_queries(index + 1, 0))

        one_head(index, 0, lambda: fetch_queries(index, 1))
        one_head(index, 1, fetch_next)
        plgpu.commit_smem()
        store(index)

    first = jnp.int32(0)
    if plan.by_head:  # there is one unit per block

        def own(head: int) -> None:
            fetch_queries(first, head)
            one_head(first, head, lambda: None)
            plgpu.commit_smem()

        for head in range(2):
            pl.when(warpgroup == head)(partial(own, head))
        scratch.take_turns()
        pl.when(warpgroup == 0)(lambda: store(first))
    else:
        fetch_queries(first, 0)
        if plan.in_turns:  # the second starts one turn behind
            pl.when(warpgroup == 1)(scratch.take_turns)
        pl.loop(0, count * plan.tiles_at_once)(both_heads)
        if plan.in_turns:
            pl.when(warpgroup == 0)(scratch.take_turns)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _without_strangers(plan: _Plan, x: jax.Array, head: int) -> jax.Array:
    """Returns queries (64, width) with zeros in the columns of other heads."""
    if plan.width == plan.d:
        return x
    column, lead = lax.broadcasted_iota(jnp.int32, x.shape, 1), plan.lead(head)
    return jnp.where((column >= lead) & (column < lead + plan.d), x, jnp.zeros_like(x))


def _attend(plan: _Plan, queries: jax.Array, scratch: _Scratch, first: jax.Array, tile: jax.Array) -> jax.Array:
    """Returns the attention of 64 queries to the keys of the stages from ``first`` on, (64, width) float32."""
    to_log2 = math.log2(math.e) / math.sqrt(plan.d)
    over_columns = lambda x, like: lax.broadcast_in_dim(x, like.shape, (0,))
    take_turns = scratch.take_turns if plan.in_turns else lambda: None

    def used(part: tuple[Ref, Ref, Ref], multiply: Callable[[Ref], jax.Array]) -> jax.Array:
        """Returns the product with keys or values. The first tile waits for their arrival, the last releases them."""
        reference, full, empty = part
        pl.when(tile == 0)(lambda: plgpu.barrier_wait(full))
        result = multiply(reference)
        pl.when(tile == plan.tiles_at_once - 1)(lambda: plgpu.barrier_arrive(empty))
        return result

    def weights(step: jax.Array | int, before: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns ``exp(scores - largest)`` in bfloat16, its sums, and the logarithm (base 2) of the largest so far."""
        scores = used(scratch.keys_at(first + step), lambda keys: product(queries, transposed(keys), then=take_turns))
        largest = scores.max(1) * to_log2
        largest = largest if before is None else jnp.maximum(before, largest)
        p = jnp.exp2(scores * to_log2 - over_columns(largest, scores))
        # Summed before the next product, so that registers are free for it.
        return *lax.optimization_barrier((p.astype(jnp.bfloat16), p.sum(1))), largest

    def weighed(step: jax.Array | int, p: jax.Array, before: jax.Array | None) -> jax.Array:
        take_turns()
        return used(scratch.values_at(first + step), lambda values: product(p, values, before))

    p, total, largest = weights(0, None)
    y = weighed(0, p, None)

    def further(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, total, before = carry
        p, own, largest = weights(step, before)
        shrink = jnp.exp2(before - largest)
        return weighed(step, p, y * over_columns(shrink, y)), total * shrink + own, largest

    if plan.steps > 1:
        y, total, _ = lax.fori_loop(1, plan.steps, further, (y, total, largest))
    return y * over_columns(1 / total, y)


def product(a: jax.Array, b: Ref, init: jax.Array | None = None, then: Callable[[], None] = lambda: None) -> jax.Array:
    """Returns ``init + a @ b`` in float32, with bfloat16 ``a`` in registers and ``b`` in shared memory. Without ``init``,
    ``then`` is called once the product has started."""

    def multiply(acc: Ref) -> None:
        wgmma(acc, a, b)

    def from_zero(acc: Ref) -> jax.Array:
        multiply(acc)
        then()
        return acc[...]

    if init is None:
        return pl.run_scoped(from_zero, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    return pl.run_state(multiply)(plgpu.ACC.init(init))
