"""Operands of e4m3 products, derived from what a model stores as integers. Arrays only; imports no model.

e4m3 (``float8_e4m3fn``) has 4 significant bits from 2^-6 to 448, the whole numbers up to 16 among them, and no infinity: beyond
464 a conversion gives NaN, so values are clipped first. Operands stand for ``scale * values``, without a zero point. These are
other numbers than those of the codes (:mod:`ptq4dit_jax.quantizers`), but for weights of up to 4 bits, which are the same.

Float64 is rounded to float32 first, as JAX and ml_dtypes do.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float8e4m3fn

from ptq4dit_jax.numerics import along_last, at_least_float32
from ptq4dit_jax.quantizers import (
    EMPTY_RANGE,
    ActQuantizer,
    Encoded,
    QTensor,
    act_code_range,
    broadcast_rows,
    reciprocal,
    undifferentiable,
)

E4M3 = jnp.float8_e4m3fn
#: The largest number of e4m3, where the end of a range comes to lie. Ends at 4 to 416 give the same quality (docs/fp8.md).
LARGEST = 448.0
#: A factor, because XLA makes factors of some divisions by a constant, and not of others: see ``quantizers.reciprocal``.
_TO_LARGEST = 1 / LARGEST


class ScaledFloat8(NamedTuple):
    """Activations in e4m3: ``scale * (values + rest)``.

    ``scale`` broadcasts against them. ``rest`` is what rounding took from ``values``, itself rounded; None stands for 0.
    ``shift`` is the scale times the zero point of the codes in whose stead these values are: a layer's bias allows for it
    (:class:`~ptq4dit_jax.engine.layers.QLinear`). None stands for 0.
    """

    values: Float8e4m3fn[Array, "*lead K"]
    scale: Float[Array, "*#lead #K"] | Float[Array, ""]
    shift: Float[Array, "*#lead #K"] | Float[Array, ""] | None = None
    rest: Float8e4m3fn[Array, "*lead K"] | None = None


class Float8Weight(struct.PyTreeNode):
    """A weight in e4m3, output channels first: ``w_nk = scale_n value_nk``.

    ``values`` (..., N, K) are the centered codes of a :class:`~ptq4dit_jax.quantizers.QTensor`, rounded: exact up to 4 bits and
    up to 2^-4 off above. ``scale`` (..., N) is that of the codes. ``sums`` (..., N) are the sums over K of what the codes stand
    for, before they were rounded: a layer's bias has them times the zero point of the input. ``bits`` is the codes' width.
    """

    values: Float8e4m3fn[Array, "*lead N K"]
    scale: Float[Array, "*lead N"]
    sums: Float[Array, "*lead N"]
    bits: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, weight: Weight) -> Float8Weight:
        """Derives the weight from codes; one that is derived already stays."""
        if isinstance(weight, Float8Weight):
            return weight
        codes = weight.codes(fusible=False)
        return cls(_rounded(codes), weight.scale, weight.sums(), weight.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (..., N, K)."""
        return self.values.shape

    def rows(self, chosen: slice) -> Float8Weight:
        """Returns the weight of some output channels."""
        of_rows = lambda leaf: leaf[..., chosen]
        return self.replace(values=self.values[..., chosen, :], scale=of_rows(self.scale), sums=of_rows(self.sums))

    def dequantize(self) -> jax.Array:
        """Returns the weight (..., N, K), in the scale's type."""
        return self.values.astype(self.scale.dtype) * self.scale[..., None]


#: The input of a product, and its weight.
Operand: TypeAlias = Encoded | ScaledFloat8
Weight: TypeAlias = QTensor | Float8Weight


def _rounded(x: jax.Array) -> jax.Array:
    """Rounds to e4m3 behind a barrier. XLA for GPUs would leave out a conversion that is converted back."""
    return jax.lax.optimization_barrier(x.astype(E4M3))


def encode(x: jax.Array, act: ActQuantizer) -> ScaledFloat8:
    """Returns ``balance * x`` in e4m3, in the quantizer's range: (..., K).

    With static ranges the farther end of the codes' range becomes 448, and what lies beyond it is clipped; dynamic ranges make
    it each row's own largest magnitude. An input with one row per image, (B, K), is the condition: its error would be that of
    every token. So it is kept in two terms, which makes the error 2^-8 of a value instead of 2^-4.
    """
    x = x.astype(at_least_float32(x.dtype))
    if act.balance is not None:
        x = x * along_last(act.balance, x.ndim).astype(x.dtype)
    if act.dynamic:
        largest = jnp.abs(x).max(-1, keepdims=True)
        scale, shift = jnp.where(largest > EMPTY_RANGE, largest * _TO_LARGEST, 1.0), None
    else:
        step, zero_point = (broadcast_rows(table, x.ndim).astype(x.dtype) for table in act.static_range)
        low, high = act_code_range(act.bits)
        scale, shift = step * (jnp.maximum(zero_point - low, high - zero_point) * _TO_LARGEST), step * zero_point
    scaled = jnp.clip(undifferentiable(x * reciprocal(scale)), -LARGEST, LARGEST)
    values = _rounded(scaled)
    rest = _rounded(scaled - values.astype(scaled.dtype)) if x.ndim == 2 else None
    return ScaledFloat8(values, scale, shift, rest)


def decode(encoded: ScaledFloat8) -> jax.Array:
    """Returns what the operand stands for, in the scale's type."""
    values = encoded.values.astype(encoded.scale.dtype)
    if encoded.rest is not None:
        values = values + encoded.rest.astype(values.dtype)
    return encoded.scale * values


class Float8Quantizer(struct.PyTreeNode):
    """Rounds as :func:`encode` does, as a function of floats: the counterpart of an activation quantizer that is called."""

    act: ActQuantizer

    def at_group(self, group: jax.Array) -> Float8Quantizer:
        """Does the same as :meth:`ActQuantizer.at_group`."""
        return Float8Quantizer(self.act.at_group(group))

    def __call__(self, x: jax.Array) -> jax.Array:
        return decode(encode(x, self.act)).astype(x.dtype)
