"""The reference implementation: XLA's own int8 products. Runs on CPU, GPU and TPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine.backends import OperandT, WeightT
from ptq4dit_jax.engine.stacks import map_in_chunks
from ptq4dit_jax.float8 import Weight
from ptq4dit_jax.numerics import INTEGER, along_last, at_least_float32
from ptq4dit_jax.quantizers import INT4_OFFSET, ActQuantizer, Encoded, QTensor

#: On GPUs XLA fuses a product with its neighbours into a Triton kernel. Its sums of int8 are wrong where its tiles of K, powers
#: of two, are left part empty (JAX 0.11.2, H200). Every tile divides a multiple of this, as far as is known. Sums of e4m3 were
#: not examined, so they are given no occasion either.
_TILE = 128
#: A product that stands alone goes to cuBLAS, if the sides of its matrices are multiples of this.
_SIDE = 4


def accumulate(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Multiplies int8 (..., K) by int8 or int4 (N, K) to int32 (..., N). Never asks for int8 results, which are a slow loop in
    XLA."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return product(x, codes, dims, INTEGER, jnp.int32)


def _accumulated(x: Encoded, weight: QTensor) -> jax.Array:
    """Multiplies codes (..., K) by a weight's centered codes, to int32 (..., N).

    4-bit codes are unpacked to int8 here, just before the product: XLA would widen both sides of an int8 x int4 product to
    int32, except on TPUs. There the product is by int4 itself, and the sum of each row makes up for the zero points.
    """
    if weight.values.dtype != jnp.int4:
        return accumulate(x.values, weight.codes())
    assert weight.zero_point is not None
    offset = INT4_OFFSET - weight.zero_point.astype(jnp.int32)
    sums = x.values.sum(-1, keepdims=True, dtype=jnp.int32) if x.sums is None else x.sums
    return accumulate(x.values, weight.values) + along_last(offset, sums.ndim) * sums


def product(
    a: jax.Array, b: jax.Array, dims: jax.lax.DotDimensionNumbers, precision: jax.lax.Precision, dtype: DTypeLike
) -> jax.Array:
    """Multiplies arrays of 8 bits (..., [M,] K) and (..., N, K) over their last axes, to sums (..., [M,] N) in ``dtype``."""
    multiply = partial(jax.lax.dot_general, dimension_numbers=dims, precision=precision, preferred_element_type=dtype)
    if default_kind().platform != "gpu" or a.shape[-1] % _TILE == 0:
        return multiply(a, b)
    rows, columns = a.shape[-2:-1], b.shape[-2]
    a, b = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -size % _SIDE) for size in x.shape[-2:]]) for x in (a, b))
    out = jax.lax.optimization_barrier(multiply(*jax.lax.optimization_barrier((a, b))))
    return out[..., : rows[0], :columns] if rows else out[:columns]


def _exact(x: Encoded, weight: QTensor, bias: jax.Array) -> jax.Array:
    """Returns the result in float32 at least."""
    out = _accumulated(x, weight)
    dtype = at_least_float32(x.scale.dtype, weight.scale.dtype, bias.dtype)
    scale = x.scale.astype(dtype) * along_last(weight.scale, out.ndim).astype(dtype)
    return out.astype(dtype) * scale + along_last(bias, out.ndim).astype(dtype)


def unpack_ahead(weights: Mapping[str, QTensor], after: jax.Array) -> dict[str, QTensor]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.unpack_ahead`. XLA unpacks just before each product."""
    return dict(weights)


def linear(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear`."""
    return _exact(x, weight, bias).astype(dtype)


def linear_parts(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_parts`."""
    return jnp.split(linear(x, weight, bias, dtype), parts, axis=-1)


def linear_each(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_each`."""
    return of_stack(partial(linear, dtype=dtype), (x, weight, bias), parts, in_chunks=weight.packed)


def of_stack(
    linear: Callable[[OperandT, WeightT, jax.Array], jax.Array],
    layers: tuple[OperandT, WeightT, jax.Array],
    parts: int,
    *,
    in_chunks: bool,
) -> list[jax.Array]:
    """Applies ``linear`` to each layer of a stack: ``parts`` arrays (L, ..., N / parts). A few layers at a time if
    ``in_chunks``, for weights that are unpacked here."""
    one = lambda layer: linear(*layer)
    return jnp.split(map_in_chunks(one, layers) if in_chunks else jax.vmap(one)(layers), parts, axis=-1)


def by_parts(
    linear: Callable[[OperandT, Any, jax.Array], jax.Array], x: OperandT, weight: Weight, bias: jax.Array, parts: int
) -> list[jax.Array]:
    """Applies ``linear`` to equal parts of the output channels, each a product of its own; the weight must not be packed."""
    width = weight.shape[-2] // parts
    cuts = [slice(start, start + width) for start in range(0, parts * width, width)]
    return [linear(x, weight.rows(cut), bias[..., cut]) for cut in cuts]


def linear_gelu(x: Encoded, weight: QTensor, bias: jax.Array, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_gelu`."""
    return act.encode(jax.nn.gelu(_exact(x, weight, bias), approximate=True))


def linear_residual(x: Encoded, weight: QTensor, bias: jax.Array, gate_BD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_residual`."""
    return add_gated(x_BTD, gate_BD, _exact(x, weight, bias))


def add_gated(x_BTD: jax.Array, gate_BD: jax.Array, out_BTD: jax.Array) -> jax.Array:
    """Returns ``x + gate * out``, computed in float32 at least, in the type of ``x_BTD``."""
    dtype = at_least_float32(x_BTD.dtype, gate_BD.dtype, out_BTD.dtype)
    gated = gate_BD[:, None].astype(dtype) * out_BTD.astype(dtype)
    return (x_BTD.astype(dtype) + gated).astype(x_BTD.dtype)


def batched(a: jax.Array, b: jax.Array) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.batched`."""
    return product(a, b, (((3,), (3,)), ((0, 1), (0, 1))), INTEGER, jnp.int32)
