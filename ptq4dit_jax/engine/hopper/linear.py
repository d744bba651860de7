"""Products on Hopper's tensor cores by :mod:`ptq4dit_jax.engine.hopper.gemm`: fits operands to the kernel and picks tiles.

Covers activations (B, T, K) and results in bfloat16 or int8, with one group of steps for all rows. Kernels read what they can
directly from the stacks of layers. Widths that are not multiples of 128 are padded with zeros, which change no sum. One kernel
unpacks 4-bit weights of a block before its products. Weights of all blocks' modulation are unpacked in their product, others
by XLA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.hopper import gemm, nibbles, tiles
from ptq4dit_jax.engine.hopper.common import widened
from ptq4dit_jax.engine.hopper.plan import EPILOGUE_M, TILE_K, GatedResidual, GeluRequantize
from ptq4dit_jax.engine.requirements import require_axes, require_bfloat16, require_one_group
from ptq4dit_jax.engine.stacks import Leaf, layer_of, materialize, stack_of
from ptq4dit_jax.quantizers import PACKED_ROWS, ActQuantizer, Encoded, QTensor, act_code_range


class _Operands(NamedTuple):
    """The kernel's arguments, and the shape (B, T, N) of the result."""

    arrays: tuple[jax.Array, ...]
    shape: tuple[int, int, int]

    @property
    def width(self) -> int:
        """N of the padded product."""
        return self.arrays[3].shape[-1]

    def columns(self, leaf: Leaf) -> jax.Array:
        """Returns the stack of a leaf (..., N), as wide as the padded product."""
        return _stack_widened(leaf, self.width)

    def padded(self, array: jax.Array) -> jax.Array:
        """Pads an array (M, N) to the width of the padded product."""
        return widened(array, self.width)

    def rows(self, array: jax.Array) -> jax.Array:
        """Returns a result (M, padded N) as (B, T, N)."""
        return array[:, : self.shape[-1]].reshape(self.shape)


def _stack_widened(leaf: Leaf, size: int) -> jax.Array:
    """Returns the stack of a leaf (..., N) with N = ``size``; if it must be padded, a stack of the layer alone."""
    return stack_of(leaf if leaf.shape[-1] == size else widened(materialize(leaf), size))


def _operands(x: Encoded, weight: QTensor, bias: Leaf, *finish: Leaf | ActQuantizer) -> _Operands:
    """Returns the kernel's operands. ``finish``: other arrays of the layer that the kernel reads."""
    require_axes(x.values.shape)
    require(len(weight.shape) == 2, "the weight is a stack")
    require(bias.ndim == 1, "the bias differs by image")
    _require_float32_scales(x, weight)
    (B, T, K), N = x.values.shape, weight.shape[-2]
    padded_N, padded_K = (-(-size // TILE_K) * TILE_K for size in (N, K))
    if weight.packed or (padded_N, padded_K) != (N, K):
        codes = stack_of(widened(widened(materialize(weight).codes(fusible=False), padded_K), padded_N, axis=0))
    else:
        codes = stack_of(weight.values)
    scale = jnp.broadcast_to(x.scale, (B, T, 1)).reshape(-1, 1) if x.scale.ndim else stack_of(x.scale)
    vectors = _stack_widened(weight.scale, padded_N), _stack_widened(bias, padded_N).astype(jnp.float32)
    values = widened(x.values.reshape(B * T, K), padded_K)
    return _Operands((values, codes, scale, *vectors, layer_of(x, weight, bias, finish)), (B, T, N))


def _require_float32_scales(x: Encoded, weight: QTensor) -> None:
    types = {x.scale.dtype, weight.scale.dtype}
    require(types == {jnp.dtype("float32")}, f"scales are {', '.join(sorted(map(str, types)))}")


def _run(
    kind: tiles.Kind, operands: _Operands, finish: GeluRequantize | GatedResidual | None = None, outputs: int = 1
) -> list[jax.Array]:
    M = operands.arrays[0].shape[0]
    return gemm.int8_matmul(*operands.arrays, tiles=tiles.choose(kind, M, operands.width), finish=finish, outputs=outputs)


def unpack_ahead(weights: Mapping[str, QTensor], after: jax.Array) -> dict[str, QTensor]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.unpack_ahead`. Weights that the kernel does not cover stay packed."""
    covered = lambda N, K: N % PACKED_ROWS == K % TILE_K == 0 and min(N, K) > 0
    chosen = {
        name: weight for name, weight in weights.items() if weight.packed and len(weight.shape) == 2 and covered(*weight.shape)
    }
    if not chosen:
        return dict(weights)
    packed, zero_points = ([stack_of(getattr(w, leaf)) for w in chosen.values()] for leaf in ("values", "zero_point"))
    unpacked = zip(chosen.items(), nibbles.unpacked(packed, zero_points, layer_of(chosen), after), strict=True)
    return {**weights, **{name: QTensor(codes, weight.scale, None, bits=8) for (name, weight), codes in unpacked}}


def linear(x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear`."""
    require_bfloat16(dtype)
    operands = _operands(x, weight, bias)
    return operands.rows(_run("store", operands)[0])


def linear_parts(x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_parts`. Attention reads separate arrays without a copy."""
    each = weight.shape[-2] // parts
    if each % TILE_K:  # a piece of the epilogue would span two parts
        return jnp.split(linear(x, weight, bias, dtype), parts, axis=-1)
    require_bfloat16(dtype)
    operands = _operands(x, weight, bias)
    return [part.reshape(*operands.shape[:2], each) for part in _run("store", operands, outputs=parts)]


def linear_each(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_each`. Covers 4-bit weights only."""
    N, K = weight.shape[-2:]
    require(weight.packed, "weights of 8 bits are read by XLA as fast as memory can")
    whole = N % TILE_K == K % TILE_K == 0 and (N // parts) % EPILOGUE_M == 0
    require(whole, f"weights of {N} x {K} in {parts} parts are no multiple of the kernel's tiles")
    require_axes(x.values.shape, "(L, B, K)")
    require((len(weight.shape), x.scale.ndim, bias.ndim) == (3, 1, 2), "scales or biases differ by row")
    require_bfloat16(dtype)
    _require_float32_scales(x, weight)
    return gemm.int8_matmul(
        x.values,
        weight.values,
        x.scale,
        weight.scale,
        bias.astype(jnp.float32),
        None,
        tiles=tiles.choose_for_few_rows(N),
        weight_zero=weight.zero_point,
        outputs=parts,
    )


def linear_gelu(x: Encoded, weight: QTensor, bias: Leaf, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_gelu`."""
    require(not act.dynamic, "the next layer's codes are scaled per token")
    require_one_group(act)
    operands = _operands(x, weight, bias, act)
    balance = None if act.balance is None else operands.columns(act.balance)
    low, high = act_code_range(act.bits)
    finish = GeluRequantize(stack_of(act.static_range.scale), stack_of(act.static_range.zero_point), balance, low, high)
    [codes] = _run("gelu", operands, finish=finish)
    return Encoded(operands.rows(codes), *act.static_range)


def linear_residual(x: Encoded, weight: QTensor, bias: Leaf, gate_BD: Leaf, x_BTD: jax.Array) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_residual`."""
    operands = _operands(x, weight, bias, gate_BD)
    B, T, N = operands.shape
    require(x_BTD.shape == (B, T, N) and gate_BD.shape == (B, N), "gate or residual are not those of each image")
    require_bfloat16(x_BTD.dtype)
    require(T % EPILOGUE_M == 0, f"{T} tokens are no multiple of {EPILOGUE_M}")
    finish = GatedResidual(operands.padded(x_BTD.reshape(B * T, N)), operands.columns(gate_BD), T)
    return operands.rows(_run("residual", operands, finish=finish)[0])
