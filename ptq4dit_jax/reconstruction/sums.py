"""A sum independent of the order of its terms, and so of how a program was compiled."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BIAS, _MANTISSA = 127, 23  # of float32


def order_free_sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns ``x.sum(axes, keepdims=True)`` of float32, with the same bits in whatever order terms are added.

    Programs associate float sums differently, and so do numbers of devices. Here each term is rounded to a multiple of a power
    of two, 2^-22 or more of the largest term's own (2^-18 for two million terms). The integers are then added up, high and low
    halves apart, so that int32 holds them.
    """
    terms = int(np.prod([x.shape[axis] for axis in axes]))
    half = min(11, 30 - max(terms - 1, 1).bit_length())
    if half < 1:
        raise ValueError(f"{terms} terms are too many for a sum in int32")
    largest = jnp.abs(x).max(axes, keepdims=True)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> _MANTISSA
    # 2^up times the largest lies below 2^(2 half), and both powers are normal numbers of float32.
    up = jnp.clip(2 * half - (exponent - _BIAS + 1), 1 - _BIAS, _BIAS - 1)
    units = jnp.round(x * _power_of_two(up)).astype(jnp.int32)
    high, low = units >> half, units & (2**half - 1)
    high, low = (part.sum(axes, dtype=jnp.int32, keepdims=True).astype(jnp.float32) for part in (high, low))
    return (high * 2**half + low) * _power_of_two(-up)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent in float32, exactly, for exponents of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA, jnp.float32)
