"""Fake quantization with a derivative: values are rounded, and derivatives pass through as if they were not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ptq4dit_jax.numerics import along_last
from ptq4dit_jax.quantizers import ActQuantizer, act_code_range, broadcast_rows


@jax.custom_jvp
def straight_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns ``quantized``, with the derivative of ``x``; both have one shape and type. ``x + (quantized - x)`` would round,
    and differently in different programs."""
    return quantized


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[1], tangents[0]


class StraightThrough(struct.PyTreeNode):
    """An :class:`~ptq4dit_jax.quantizers.ActQuantizer` with the same values and a derivative in x, forward and reverse.

    The derivative is the balancing factor (or 1) inside the range, and 0 where the value is clipped to an end of it. Dynamic
    ranges clip nothing, and the dependence of their scale on x is ignored. Scales and zero points are constants.
    """

    act: ActQuantizer

    def at_group(self, group: jax.Array) -> StraightThrough:
        """Does the same as :meth:`ActQuantizer.at_group`."""
        return StraightThrough(self.act.at_group(group))

    def __call__(self, x: jax.Array) -> jax.Array:
        act = self.act
        balanced = x
        if act.balance is not None:
            balanced = x * along_last(act.balance, x.ndim).astype(x.dtype)
        if not act.dynamic:
            scale, zero_point = (jax.lax.stop_gradient(broadcast_rows(a, x.ndim)) for a in act.static_range)
            ends = (end + 0.5 * side for end, side in zip(act_code_range(act.bits), (-1, 1), strict=True))
            low, high = ((scale * (end - zero_point.astype(scale.dtype))).astype(x.dtype) for end in ends)
            balanced = jnp.clip(balanced, low, high)  # beyond these ends the rounded code is clipped
        return straight_through(balanced, jax.lax.stop_gradient(act)(jax.lax.stop_gradient(x)))
