"""Integer codes of arrays: the quantized weight, the activation quantizer, and packing. Pure functions; imports no model.

Arithmetic (docs/design.md): ``x = sx (xq - zx)`` and ``w = sw_n (wq - zw_n)``. Codes are rounded half to even and clipped.
Activation codes use the signed range ``[-2^(b-1), 2^(b-1) - 1]``, so that they are int8 without conversion. Weights keep the
*centered* code ``wq - zw_n``, which fits int8 at every width: 8-bit weights are symmetric, and narrower ones lie within
``[-(2^b - 1), 2^b - 1]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int4, Int8, Int32, UInt8

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.numerics import along_last, at_least_float32

MIN_BITS, MAX_BITS = 2, 8
#: A range below this is empty: its scale would leave float32's normal numbers.
EMPTY_RANGE = 1e-35


def check_bits(name: str, bits: int) -> int:
    """Returns the width, or raises an error that names the setting."""
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise Ptq4ditError(f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, not {bits!r}.")
    return bits


def act_code_range(bits: int) -> tuple[int, int]:
    """Returns the lowest and highest activation code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def affine_parameters(low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns the scale (float32) and zero point (int32) that map ``[low, high]``, widened to include 0, onto all codes.

    An empty range (a constant zero) gets scale 1, so that nothing is divided by zero.
    """
    qmin, qmax = act_code_range(bits)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    span = high - low
    scale = jnp.where(span > EMPTY_RANGE, span / (qmax - qmin), 1.0)
    return scale, qmin + jnp.round(-low / scale).astype(jnp.int32)


class Encoded(NamedTuple):
    """Integer activations: ``values`` int8, and ``scale`` and ``zero_point`` (int32, or None for 0) that broadcast against
    them. ``sums`` are those of the values over the last axis, kept with size 1, where a kernel gives them as well."""

    values: Int8[Array, "*lead K"]
    scale: Float[Array, "*#lead #K"] | Float[Array, ""]
    zero_point: Int32[Array, "*#lead #K"] | Int32[Array, ""] | None
    sums: Int32[Array, "*lead 1"] | None = None


def broadcast_rows(per_row: jax.Array, ndim: int) -> jax.Array:
    """Reshapes (B,) to (B, 1, ..., 1); () stays."""
    return per_row.reshape(per_row.shape + (1,) * (ndim - 1)) if per_row.ndim else per_row


@jax.custom_jvp
def undifferentiable(tree: Any) -> Any:
    """Returns the tree itself and refuses derivatives: integers follow, which JAX would differentiate as constants.

    It costs nothing: the compiled program is the same without it.
    """
    return tree


@undifferentiable.defjvp
def _refuse_derivative(primals: Any, tangents: Any) -> Any:
    raise Ptq4ditError(
        "Quantization rounds to integer codes, which have no derivative, so a gradient through a quantized model would be"
        " wrong; differentiate ptq4dit_jax.reference(model, straight_through=True) instead."
    )


def reciprocal(scale: jax.Array) -> jax.Array:
    """Returns ``1 / scale`` behind a barrier. XLA would keep vector / scalar in the program of one device, but make it
    vector * (1 / scalar) in the program of several. The last bit would differ, and so would codes."""
    return jax.lax.optimization_barrier(1.0 / scale)


class StaticRange(NamedTuple):
    """A calibrated scale and zero point: (), or a table over groups of steps."""

    scale: Float[Array, "*lead"]
    zero_point: Int32[Array, "*lead"]


class ActQuantizer(struct.PyTreeNode):
    """An activation quantizer; calling it applies fake quantization.

    Invariants: ``scale`` is positive float32 and ``zero_point`` int32 within the code range. As stored, both are (..., G): a
    table over groups of steps, after the depth axis for block sites. :meth:`at_group` reduces them to () or, with a group per
    row, to (B,).

    ``balance`` (..., K) multiplies the channels before quantization (a scale vector ``scale / balance``). The layer's weights
    hold its inverse, so the result stays in the balanced domain. ``dynamic`` quantizers keep no table: ``scale`` and
    ``zero_point`` are None. Each row (along the last axis) is scaled by its own largest magnitude, symmetrically, or over all
    codes if values are ``nonnegative``.

    Codes have no derivative, and asking for one is an error (:class:`~ptq4dit_jax.straight_through.StraightThrough` has one).
    """

    scale: Float[Array, "*lead"] | None
    zero_point: Int32[Array, "*lead"] | None
    balance: Float[Array, "*of_balance K"] | None = None
    bits: int = struct.field(pytree_node=False, default=8)
    dynamic: bool = struct.field(pytree_node=False, default=False)
    nonnegative: bool = struct.field(pytree_node=False, default=False)

    @property
    def static_range(self) -> StaticRange:
        """Scale and zero point of a quantizer that is not ``dynamic``."""
        assert self.scale is not None
        assert self.zero_point is not None
        return StaticRange(self.scale, self.zero_point)

    def at_group(self, group: jax.Array) -> ActQuantizer:
        """Returns the quantizer for one group of steps, () int32, or for one group per row, (B,)."""
        if self.dynamic:
            return self
        scale, zero_point = (jnp.take(table, group, axis=-1) for table in self.static_range)
        return self.replace(scale=scale, zero_point=zero_point)

    def encode(self, x: jax.Array) -> Encoded:
        """Returns integer codes (int8, shape of ``x``) with the scale and zero point that restore ``balance * x``."""
        qmin, qmax = act_code_range(self.bits)
        x = x.astype(at_least_float32(x.dtype))
        balance = None if self.balance is None else along_last(self.balance, x.ndim).astype(x.dtype)
        if self.dynamic:
            x = x if balance is None else x * balance
            largest = jnp.abs(x).max(-1, keepdims=True)
            lowest = qmin if self.nonnegative else 0
            scale = jnp.where(largest > EMPTY_RANGE, largest / (qmax - lowest), 1.0)
            codes = jnp.round(undifferentiable(x * reciprocal(scale))) + lowest
            return Encoded(codes.astype(jnp.int8), scale, jnp.int32(qmin) if self.nonnegative else None)
        scale, zero_point = (broadcast_rows(table, x.ndim) for table in self.static_range)
        scale = scale.astype(x.dtype)
        inverse = reciprocal(scale) if balance is None else balance * reciprocal(scale)
        codes = jnp.clip(jnp.round(undifferentiable(x * inverse)) + zero_point.astype(x.dtype), qmin, qmax)
        return Encoded(codes.astype(jnp.int8), scale, zero_point)

    def __call__(self, x: jax.Array) -> jax.Array:
        return decode(self.encode(x)).astype(x.dtype)


def decode(encoded: Encoded) -> jax.Array:
    """Returns ``scale * (values - zero_point)`` in the scale's type."""
    centered = encoded.values.astype(encoded.scale.dtype)
    if encoded.zero_point is not None:
        centered = centered - encoded.zero_point.astype(centered.dtype)
    return encoded.scale * centered


class ChannelScale(struct.PyTreeNode):
    """A site that only multiplies its channels: the residual factor of balancing in a float model."""

    factor: Float[Array, "*lead K"]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * along_last(self.factor, x.ndim).astype(x.dtype)


#: Rows per independently packed block of a weight, if they divide its rows. A kernel's tiles consist of whole blocks.
PACKED_ROWS = 64


def _packed_rows(N: int) -> int:
    """Returns the rows per packed block: 64 if that divides N, otherwise N rounded up to an even number."""
    return PACKED_ROWS if N % PACKED_ROWS == 0 else N + N % 2


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Packs codes 0..15 (..., N, K) into bytes (..., ceil(N / 2), K), uint8.

    Rows are packed in blocks of 64, or in one block of all if 64 does not divide N. Byte row ``i`` of a block holds the codes
    of row ``i`` in the low halves, and those of row ``i`` of the block's second half (``i + 32`` of 64) in the high halves. So
    whole rows are unpacked, each with one zero point, and contiguous values stay contiguous.
    """
    *lead, N, K = codes.shape
    rows = _packed_rows(N)
    padding = [(0, 0)] * len(lead) + [(0, -N % rows), (0, 0)]
    blocks = jnp.pad(codes.astype(jnp.uint8), padding).reshape(*lead, -1, rows, K)
    low, high = jnp.split(blocks, 2, axis=-2)
    return (low | (high << 4)).reshape(*lead, -1, K)


def unpack_nibbles(packed: jax.Array, N: int, *, fusible: bool = True) -> jax.Array:
    """Inverts :func:`pack_nibbles`: returns (..., N, K) int8 codes 0..15.

    With ``fusible`` it uses shifts, which XLA fuses with elementwise work around them. If many weights are unpacked, each for
    a kernel of ours, XLA would fuse their shifts with one another and hold all weights at once. Without ``fusible`` it uses a
    concatenation, which stays in place.
    """
    *lead, half, K = packed.shape
    blocks = packed.reshape(*lead, -1, 1, _packed_rows(N) // 2, K)
    if fusible:
        codes = (blocks >> along_last(jnp.array([[[0]], [[4]]], jnp.uint8), blocks.ndim)) & 0xF
    else:
        codes = jnp.concatenate([blocks & 0xF, blocks >> 4], axis=-3)
    return codes.reshape(*lead, 2 * half, K)[..., :N, :].astype(jnp.int8)


#: What unsigned 4-bit codes lose to become int4.
INT4_OFFSET = 8


class QTensor(struct.PyTreeNode):
    """A quantized weight, output channels first: ``w_nk = scale_n (code_nk - zero_point_n)``.

    Invariants. ``bits > 4``: ``values`` is int8 (..., N, K) and holds centered codes; ``zero_point`` is None.
    ``bits <= 4``: ``values`` is uint8 (..., ceil(N / 2), K), with two codes ``0 .. 2^bits - 1`` per byte
    (:func:`pack_nibbles`), and ``zero_point`` is int8 (..., N). Inside programs ``values`` may be int4 (..., N, K) instead and
    hold the codes less :data:`INT4_OFFSET`. ``scale`` is positive float32 (..., N). Leading axes (depth) are allowed.

    The contraction axis K is last because integer matrix units need it last in both operands: on an H200, XLA's int8 product
    of DiT-XL/2's fc1 takes 340 us this way and 878 us with (K, N).
    """

    values: Int8[Array, "*lead N K"] | UInt8[Array, "*lead bytes K"] | Int4[Array, "*lead N K"]
    scale: Float[Array, "*lead N"]
    zero_point: Int8[Array, "*lead N"] | None
    bits: int = struct.field(pytree_node=False)

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.values.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (..., N, K) of the weight that this stands for."""
        return (*self.scale.shape, self.values.shape[-1])

    def codes(self, *, fusible: bool = True) -> jax.Array:
        """Returns centered codes (..., N, K), int8; ``fusible`` is as in :func:`unpack_nibbles`."""
        if self.values.dtype == jnp.int8:
            return self.values
        assert self.zero_point is not None
        if not self.packed:
            return self.values.astype(jnp.int8) + (INT4_OFFSET - self.zero_point)[..., None]
        return unpack_nibbles(self.values, self.scale.shape[-1], fusible=fusible) - self.zero_point[..., None]

    def as_int4(self) -> QTensor:
        """Returns a packed weight in int4, for devices that multiply by it; others stay."""
        if not self.packed:
            return self
        codes = unpack_nibbles(self.values, self.scale.shape[-1], fusible=False)
        return self.replace(values=(codes - INT4_OFFSET).astype(jnp.int4))

    def rows(self, chosen: slice) -> QTensor:
        """Returns the weight of some output channels; it must not be packed."""
        assert not self.packed
        of_rows = lambda leaf: None if leaf is None else leaf[..., chosen]
        return self.replace(
            values=self.values[..., chosen, :], scale=self.scale[..., chosen], zero_point=of_rows(self.zero_point)
        )

    def dequantize(self) -> jax.Array:
        """Returns the weight (..., N, K), in the scale's type."""
        return self.codes().astype(self.scale.dtype) * self.scale[..., None]

    def sums(self) -> jax.Array:
        """Returns the sums over K of what the weight stands for, (..., N) in the scale's type; sums of codes are exact."""
        return self.codes().sum(-1, dtype=jnp.int32).astype(self.scale.dtype) * self.scale

    @property
    def code_range(self) -> tuple[jax.Array, jax.Array]:
        """The least and greatest centered code of each output channel, (..., N) int32.

        With 5 to 7 bits no zero point is kept, so the range is that of the codes in use.
        """
        if 4 < self.bits < 8:
            codes = self.codes().astype(jnp.int32)
            return codes.min(-1), codes.max(-1)
        qmin, qmax = weight_code_range(self.bits)
        zero_point = jnp.zeros(self.scale.shape, jnp.int32) if self.zero_point is None else self.zero_point.astype(jnp.int32)
        return qmin - zero_point, qmax - zero_point

    @classmethod
    def from_codes(cls, codes: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> QTensor:
        """Builds a weight from unsigned codes ``0 .. 2^bits - 1`` and zero points of the same range. Codes of 8 bits are
        already centered, with zero point 0."""
        if bits <= 4:
            return cls(pack_nibbles(codes), scale, zero_point.astype(jnp.int8), bits)
        centered = (codes.astype(jnp.int32) - zero_point[..., None].astype(jnp.int32)).astype(jnp.int8)
        return cls(centered, scale, None, bits)


def weight_code_range(bits: int) -> tuple[int, int]:
    """Returns the lowest and highest weight code: symmetric at 8 bits, ``0 .. 2^bits - 1`` below."""
    return (-127, 127) if bits == 8 else (0, 2**bits - 1)


def encode_weight(w: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """Returns weight codes (..., N, K), as floats, for scales and zero points (..., N)."""
    qmin, qmax = weight_code_range(bits)
    return jnp.clip(jnp.round(w / scale[..., None]) + zero_point[..., None].astype(w.dtype), qmin, qmax)
