"""Products on Hopper's tensor cores by :mod:`ptq4dit_jax.engine.hopper.gemm`: fits operands to the kernel and picks tiles.

Covers activations (B, T, K) that become bfloat16 or int8, with one group of steps for all rows. Widths that are no multiple of
128 are padded with zeros, which change no sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ptq4dit_jax.engine.hopper import gemm, tiles
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor, act_code_range, reciprocal


class _Operands(NamedTuple):
    """Arguments of the kernel, and the shape (B, T, N) of the result."""

    arrays: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]
    shape: tuple[int, int, int]

    def columns(self, vector: jax.Array) -> jax.Array:
        """A vector (..., N) as wide as the padded product."""
        return _widened(vector, self.arrays[1].shape[0])

    def rows(self, array: jax.Array) -> jax.Array:
        """A result (M, padded N) as (B, T, N)."""
        return array[:, : self.shape[-1]].reshape(self.shape)


def _widened(array: jax.Array, size: int, axis: int = -1) -> jax.Array:
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _operands(x: Encoded, weight: QTensor, bias: jax.Array) -> _Operands:
    if x.values.ndim != 3 or bias.ndim != 1 or x.scale.dtype != jnp.float32:
        raise NotImplementedError
    (B, T, K), N = x.values.shape, weight.shape[-2]
    padded_N, padded_K = (-(-size // gemm.TILE_K) * gemm.TILE_K for size in (N, K))
    row_scale, column_scale = None, weight.scale
    if x.scale.ndim:
        row_scale = jnp.broadcast_to(x.scale, (B, T, 1)).reshape(-1)
    else:
        column_scale = column_scale * x.scale
    values = _widened(x.values.reshape(B * T, K), padded_K)
    codes = _widened(_widened(weight.codes(), padded_K), padded_N, axis=0)
    arrays = (values, codes, row_scale, _widened(column_scale, padded_N), _widened(bias.astype(jnp.float32), padded_N))
    return _Operands(arrays, (B, T, N))


def _run(kind: tiles.Kind, operands: _Operands, **finish: Any) -> list[jax.Array]:
    a, b = operands.arrays[:2]
    return gemm.int8_matmul(*operands.arrays, tiles=tiles.choose(kind, a.shape[0], *b.shape), **finish)


def linear(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.matmul.linear`."""
    if dtype != jnp.bfloat16:
        raise NotImplementedError
    operands = _operands(x, weight, bias)
    return operands.rows(_run("store", operands)[0])


def linear_parts(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :func:`ptq4dit_jax.engine.matmul.linear_parts`. Arrays of their own are what attention reads without a copy."""
    B, T, _ = x.values.shape
    each = weight.shape[-2] // parts
    if dtype != jnp.bfloat16 or each % gemm.TILE_K:
        raise NotImplementedError
    return [part.reshape(B, T, each) for part in _run("store", _operands(x, weight, bias), outputs=parts)]


def linear_gelu(x: Encoded, weight: QTensor, bias: jax.Array, act: ActQuantizer) -> Encoded:
    """See :func:`ptq4dit_jax.engine.matmul.linear_gelu`."""
    if act.dynamic or np.ndim(act.scale):
        raise NotImplementedError
    operands = _operands(x, weight, bias)
    N = operands.shape[-1]
    inverse = reciprocal(act.scale) * (1.0 if act.balance is None else act.balance)
    inverse = operands.columns(jnp.broadcast_to(inverse, (N,)))
    low, high = act_code_range(act.bits)
    [codes] = _run("gelu", operands, finish=gemm.GeluRequantize(inverse, act.zero_point[None], low, high))
    return Encoded(operands.rows(codes), act.scale, act.zero_point)


def linear_residual(x: Encoded, weight: QTensor, bias: jax.Array, gate_BD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.matmul.linear_residual`."""
    B, T, N = x_BTD.shape
    if x_BTD.dtype != jnp.bfloat16 or T % gemm.EPILOGUE_M or N % gemm.TILE_K:
        raise NotImplementedError
    finish = gemm.GatedResidual(x_BTD.reshape(B * T, N), gate_BD, T)
    operands = _operands(x, weight, bias)
    return operands.rows(_run("residual", operands, finish=finish)[0])
