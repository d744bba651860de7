"""Products of e4m3 with float32 sums, by XLA. Scales and bias are applied to the sums."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ptq4dit_jax import float8
from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine.xla.linear import add_gated, by_parts, of_stack, product
from ptq4dit_jax.float8 import Float8Weight, ScaledFloat8, Weight
from ptq4dit_jax.numerics import FLOAT8, along_last, at_least_float32
from ptq4dit_jax.quantizers import ActQuantizer


def prepare(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.prepare`. Values of more than 4 bits are rounded.

    Behind a barrier, or the compiler for TPUs derives them anew in every step of the chain.
    """
    return jax.lax.optimization_barrier(_derived(weights))


def _derived(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: Float8Weight.of(weight) for name, weight in weights.items()}


def unpack_ahead(weights: Mapping[str, Weight], after: jax.Array) -> dict[str, Weight]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.unpack_ahead`. Derives what has not been prepared."""
    return _derived(weights)


def _sums(x: ScaledFloat8, values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiplies (..., K) by values (N, K), to (..., N) in ``dtype``: float32, or float64, for which there are no units."""
    if jnp.dtype(dtype) == jnp.float64:
        x, values = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, values))
    dims = (((x.values.ndim - 1,), (1,)), ((), ()))
    multiply = partial(product, dims=dims, precision=FLOAT8, dtype=dtype)
    if x.rest is None:
        return multiply(x.values, values)
    both = multiply(jnp.concatenate([x.values, x.rest]), values)  # reads the weight once
    first, second = jnp.split(both, 2)
    return first + second


def _exact(x: ScaledFloat8, weight: Weight, bias: jax.Array) -> jax.Array:
    """Returns the result in float32 at least."""
    weight = Float8Weight.of(weight)
    dtype = at_least_float32(x.scale.dtype, weight.scale.dtype, bias.dtype)
    out = _sums(x, weight.values, dtype)
    wide = lambda vector: along_last(vector, out.ndim).astype(dtype)
    offset = wide(bias)
    if x.shift is not None:
        offset = offset + x.shift.astype(dtype) * wide(weight.sums)
    return out * (x.scale.astype(dtype) * wide(weight.scale)) + offset


def linear(x: ScaledFloat8, weight: Weight, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear`."""
    return _exact(x, weight, bias).astype(dtype)


def linear_parts(x: ScaledFloat8, weight: Weight, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_parts`. On TPUs there is one product per part, as the backend for
    TPUs has it."""
    if default_kind().platform != "tpu":
        return jnp.split(linear(x, weight, bias, dtype), parts, axis=-1)
    return by_parts(partial(linear, dtype=dtype), x, Float8Weight.of(weight), bias, parts)


def linear_each(x: ScaledFloat8, weight: Weight, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_each`."""
    derived = isinstance(weight, Float8Weight)
    return of_stack(partial(linear, dtype=dtype), (x, weight, bias), parts, in_chunks=not derived)


def linear_gelu(x: ScaledFloat8, weight: Weight, bias: jax.Array, act: ActQuantizer) -> ScaledFloat8:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_gelu`."""
    return float8.encode(jax.nn.gelu(_exact(x, weight, bias), approximate=True), act)


def linear_residual(x: ScaledFloat8, weight: Weight, bias: jax.Array, gate_BD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_residual`."""
    return add_gated(x_BTD, gate_BD, _exact(x, weight, bias))
