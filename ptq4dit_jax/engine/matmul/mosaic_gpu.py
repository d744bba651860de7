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
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor, act_code_range


class _Operands(NamedTuple):
    """Arguments of the kernel, and the shape (B, T, N) of the result."""

    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
    layer: jax.Array | None
    shape: tuple[int, int, int]

    def columns(self, vector: jax.Array) -> jax.Array:
        """A vector (..., N) as wide as the padded product."""
        return _widened(vector, self.arrays[1].shape[-2])

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
    scale = jnp.broadcast_to(x.scale, (B, T, 1)).reshape(-1) if x.scale.ndim else x.scale[None]
    values = _widened(x.values.reshape(B * T, K), padded_K)
    if weight.layer is not None and not weight.packed and (padded_N, padded_K) == (N, K):
        codes, layer = weight.values, weight.layer[None]
    else:
        codes, layer = _widened(_widened(weight.codes(), padded_K), padded_N, axis=0), None
    arrays = (values, codes, scale, _widened(weight.scale, padded_N), _widened(bias.astype(jnp.float32), padded_N))
    return _Operands(arrays, layer, (B, T, N))


def _run(kind: tiles.Kind, operands: _Operands, **finish: Any) -> list[jax.Array]:
    a, b = operands.arrays[:2]
    cut = tiles.choose(kind, a.shape[0], *b.shape[-2:])
    return gemm.int8_matmul(*operands.arrays, tiles=cut, layer=operands.layer, **finish)


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
    balance = None if act.balance is None else operands.columns(act.balance)
    low, high = act_code_range(act.bits)
    finish = gemm.GeluRequantize(act.scale[None], act.zero_point[None], balance, low, high)
    [codes] = _run("gelu", operands, finish=finish)
    return Encoded(operands.rows(codes), act.scale, act.zero_point)


def linear_residual(x: Encoded, weight: QTensor, bias: jax.Array, gate_BD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """See :func:`ptq4dit_jax.engine.matmul.linear_residual`."""
    B, T, N = x_BTD.shape
    if x_BTD.dtype != jnp.bfloat16 or T % gemm.EPILOGUE_M or N % gemm.TILE_K:
        raise NotImplementedError
    finish = gemm.GatedResidual(x_BTD.reshape(B * T, N), gate_BD, T)
    operands = _operands(x, weight, bias)
    return operands.rows(_run("residual", operands, finish=finish)[0])
