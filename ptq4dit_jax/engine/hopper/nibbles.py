"""4-bit weights in shared memory, and the kernel that unpacks the weights of a layer.

They are unpacked in words of four bytes. Of every 64 rows of a weight, the first 32 are the low halves of 32 rows of bytes, and
the others the high halves (:func:`ptq4dit_jax.quantizers.pack_nibbles`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from ptq4dit_jax.engine.hopper import common
from ptq4dit_jax.engine.hopper.common import At, Ref, bytes_of, load_of_layer, load_vector, load_words, store_words, swizzled
from ptq4dit_jax.engine.hopper.plan import TILE_K
from ptq4dit_jax.quantizers import PACKED_ROWS

_HALF = PACKED_ROWS // 2
#: Masks of the low half, and of the sign, of each byte of a word.
_LOW, _SIGN = np.int32(0x0F0F0F0F), np.int32(-0x7F7F7F80)


def bytes_and_words(shape: tuple[int, ...], dtype: DTypeLike) -> plgpu.RefUnion:
    """Returns shared memory that can be accessed as bytes and as words."""
    views = (shape, dtype), ((*shape[:-1], shape[-1] // 4), jnp.int32)
    return plgpu.RefUnion(*(plgpu.SMEM(view, kind, transforms=swizzled(view[-1], kind)) for view, kind in views))


def load(ref: Ref, rows: int, *at: At) -> list[jax.Array]:
    """Loads the packed words of ``rows`` rows of a weight, in blocks; 16 bytes per thread, so that every access is as wide as
    possible."""
    words = (load_words(ref, *at, pl.ds(row, _HALF)) for row in range(0, rows // 2, _HALF))
    return [plgpu.layout_cast(w, plgpu.Layout.SMEM_GMEM_COPY(w.shape, w.dtype, 4 * w.shape[1])) for w in words]


def offsets(zero_point: Ref, layer: jax.Array, first: jax.Array, rows: int) -> list[jax.Array]:
    """Returns 128 minus the zero points of a layer's rows from ``first`` on, in each byte of a word, in blocks."""
    blocks = (load_of_layer(zero_point, layer, pl.ds(first + row, _HALF)) for row in range(0, rows, _HALF))
    return [_SIGN - block.astype(jnp.int32) * np.int32(0x01010101) for block in blocks]


def store(ref: Ref, packed: list[jax.Array], of_rows: list[jax.Array], *at: At) -> None:
    """Writes the codes from :func:`load` minus the zero points of their rows, given by :func:`offsets`. Sums with the offsets
    stay above 0, so that no byte borrows from the next."""
    halves = [codes for words in packed for codes in (words, lax.shift_right_logical(words, 4))]
    for index, (words, offset) in enumerate(zip(halves, of_rows, strict=True)):
        centered = ((words & _LOW) + lax.broadcast_in_dim(offset, words.shape, (0,))) ^ _SIGN
        store_words(ref, centered, *at, pl.ds(index * _HALF, _HALF))


def unpacked(
    packed: Sequence[jax.Array], zero_points: Sequence[jax.Array], layer: jax.Array, after: jax.Array
) -> list[jax.Array]:
    """Unpacks several packed weights of one layer to centered codes, in one kernel.

    Args:
      packed: (S, N / 2, K) uint8 each, stacks as in :mod:`ptq4dit_jax.engine.hopper.gemm`; N a multiple of 64, K of 128.
      zero_points: (S, N) int8 each.
      layer: (1,) int32.
      after: an array that must be computed first. The kernel does not read it. Without it, XLA would unpack all layers of a
        model at once, before its loop over steps, and keep them.

    Returns:
      (N, K) int8 each.
    """
    shapes = [(zero_point.shape[-1], of.shape[-1]) for of, zero_point in zip(packed, zero_points, strict=True)]
    counts = [(N // PACKED_ROWS) * (K // TILE_K) for N, K in shapes]
    count = len(shapes)

    def body(layer_ref: Ref, _: Ref, *refs: Ref) -> None:
        given, made, arrived = refs[-3:]
        tile, chosen = lax.axis_index("tile"), load_vector(layer_ref, 0)

        def unpack(first: int, packed_ref: Ref, zero_ref: Ref, out_ref: Ref) -> None:
            N, K = out_ref.shape
            row, column = lax.div(tile - first, K // TILE_K), lax.rem(tile - first, K // TILE_K)
            above = chosen * (N // 2) if packed_ref.shape[0] > N // 2 else 0  # the layers before
            columns = pl.ds(column * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(packed_ref.at[pl.ds(above + row * _HALF, _HALF), columns], bytes_of(given), arrived)
            of_rows = offsets(zero_ref, chosen, row * PACKED_ROWS, PACKED_ROWS)
            plgpu.barrier_wait(arrived)
            store(made, load(given, PACKED_ROWS), of_rows)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(bytes_of(made), out_ref.at[pl.ds(row * PACKED_ROWS, PACKED_ROWS), columns])
            plgpu.wait_smem_to_gmem(0)

        for index, ends in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0))):
            mine = (tile >= ends[0]) & (tile < ends[1])
            of_weight = refs[index : 3 * count : count]  # packed codes, zero points, and output
            pl.when(mine)(partial(unpack, ends[0], *of_weight))

    kernel = common.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes],
        grid=(sum(counts),),
        grid_names=("tile",),
        kernel_name="unpack",
        scratch_types=[
            bytes_and_words((_HALF, TILE_K), jnp.uint8),
            bytes_and_words((PACKED_ROWS, TILE_K), jnp.int8),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    rows = (of.reshape(-1, of.shape[-1]) for of in packed)
    return list(kernel(layer, after, *rows, *zero_points))
