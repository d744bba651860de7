"""AdaRound (Nagel et al., 2020): the choice between the two neighbouring codes of each weight as a continuous variable.

Kernels are in Flax's order (..., K, N), as the training forward multiplies them; :class:`QTensor` holds (..., N, K).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32, Int8

from ptq4dit_jax.quantizers import QTensor, weight_code_range

#: The stretched sigmoid reaches 0 and 1 at finite values.
GAMMA, ZETA = -0.1, 1.1
#: Share of the way from codes already decided to their targets at which soft weights start. At the targets themselves, the
#: nearest code would decide anew, which takes many iterations to become as good.
LEANING = 0.1


class RoundedKernel(struct.PyTreeNode):
    """The fixed part of a kernel whose rounding is learned.

    ``base`` (..., K, N) int8 is the centered code below the weight. Outside the range, ``base`` and ``base + 1`` clip to
    the same code, so that the weight cannot move. ``scale`` (..., N) float32; ``low`` and ``high`` (..., N) int8
    are the least and greatest centered code of each channel.
    """

    base: Int8[Array, "*lead K N"]
    scale: Float32[Array, "*lead N"]
    low: Int8[Array, "*lead N"]
    high: Int8[Array, "*lead N"]
    bits: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel: jax.Array, weight: QTensor) -> tuple[RoundedKernel, jax.Array]:
        """Returns the fixed part for the range of ``weight``, and the variables (..., K, N) float32 at which the soft kernel is
        the float ``kernel`` (..., K, N) itself."""
        low, high = (end.astype(jnp.float32) for end in weight.code_range)
        position = kernel / weight.scale[..., None, :]
        floor = jnp.floor(position)
        base = jnp.clip(floor, (low - 1)[..., None, :], high[..., None, :])
        return cls._between(base, weight), inverse_stretched_sigmoid(position - floor)

    @classmethod
    def around(cls, target: jax.Array, weight: QTensor) -> tuple[RoundedKernel, jax.Array]:
        """Returns the fixed part with which each weight may keep its code in ``weight`` or move to the neighbour on the side of
        ``target`` (..., K, N), and the variables (..., K, N) float32 that keep the codes but lean towards the target."""
        position = target / weight.scale[..., None, :]
        code = jnp.swapaxes(weight.codes(), -1, -2).astype(jnp.float32)
        base = jnp.where(position >= code, code, code - 1)
        part, upper = jnp.clip(position - base, 0.0, 1.0), code - base
        return cls._between(base, weight), inverse_stretched_sigmoid(upper + LEANING * (part - upper))

    @classmethod
    def _between(cls, base: jax.Array, weight: QTensor) -> RoundedKernel:
        low, high = weight.code_range
        return cls(
            base=base.astype(jnp.int8),
            scale=weight.scale,
            low=low.astype(jnp.int8),
            high=high.astype(jnp.int8),
            bits=weight.bits,
        )

    def soft(self, variables: jax.Array) -> jax.Array:
        """Returns the de-quantized kernel with fractional codes, differentiable in ``variables``."""
        return self._dequantize(stretched_sigmoid(variables))

    def codes(self, variables: jax.Array) -> jax.Array:
        """Returns the centered codes (..., K, N), int8."""
        return self._clip((variables >= 0).astype(jnp.float32)).astype(jnp.int8)

    def pack(self, variables: jax.Array) -> QTensor:
        """Returns the quantized weight."""
        zero_point = weight_code_range(self.bits)[0] - self.low.astype(jnp.int32)
        codes = jnp.swapaxes(self.codes(variables), -1, -2).astype(jnp.int32) + zero_point[..., None]
        return QTensor.from_codes(codes, self.scale, zero_point, self.bits)

    def _clip(self, up: jax.Array) -> jax.Array:
        # Not minimum and maximum, which split a tie's gradient: a code at the range's end is a tie, and may still move inward.
        low, high = (end[..., None, :].astype(jnp.float32) for end in (self.low, self.high))
        code = self.base.astype(jnp.float32) + up
        return jnp.where(code < low, low, jnp.where(code > high, high, code))

    def _dequantize(self, up: jax.Array) -> jax.Array:
        return self._clip(up) * self.scale[..., None, :]


def stretched_sigmoid(variables: jax.Array) -> jax.Array:
    """Returns ``h(V)``: the fraction of a step by which each weight is rounded up, 0 to 1."""
    return jnp.clip(jax.nn.sigmoid(variables) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_stretched_sigmoid(part: jax.Array) -> jax.Array:
    """Returns the ``V`` with ``h(V) = part``, for ``part`` in [0, 1]."""
    return -jnp.log((ZETA - GAMMA) / (part - GAMMA) - 1)


def indecision(variables: jax.Array, exponent: jax.Array) -> jax.Array:
    """AdaRound's regularizer ``sum (1 - |2 h - 1|^exponent)``: how many roundings are not yet decided, ()."""
    return (1 - jnp.abs(2 * stretched_sigmoid(variables) - 1) ** exponent).sum()
