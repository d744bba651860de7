"""The integer linear layer (a packed weight with its input quantizer), and what happens between layers in a block."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ptq4dit_jax.engine.dispatch import Dispatch
from ptq4dit_jax.engine.stacks import Leaf, map_in_chunks, materialize
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.float8 import Operand, Weight
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.networks.parts import float_attention, in_heads, modulate, normalize
from ptq4dit_jax.numerics import along_last, product_precision
from ptq4dit_jax.quantizers import ActQuantizer, QTensor

#: The input of a layer's product: what the backend makes of it, or floats if it is not quantized.
Fed: TypeAlias = Operand | jax.Array


class QLinear(struct.PyTreeNode):
    """An integer linear layer, ``y_n = (sum_k xq_k w'_nk) (sx sw_n) + bias_n``.

    ``weight`` (..., N, K) is as the model stores it, or as a backend has prepared it. ``act`` quantizes the input; it is None
    if the layer multiplies floats by dequantized weights. ``bias`` (..., G, N) float32 holds, per group of steps, the float
    bias with the input's zero point folded in: ``b_n - sx sw_n zx sum_k w'_nk``. G is 1 if there is no table of ranges. Inside
    a block, leaves may be :class:`~ptq4dit_jax.engine.stacks.OfLayer`.
    """

    weight: Weight
    bias: Float[Array, "*lead N"]
    act: ActQuantizer | None = None

    @classmethod
    def pack(cls, weight: QTensor, bias: jax.Array, act: ActQuantizer | None) -> QLinear:
        """Returns a layer with the input's zero point folded into the float bias (..., N)."""
        table = bias[..., None, :]
        if act is not None and not act.dynamic:
            table = table - _zero_point_term(weight, act)
        return cls(weight=weight, bias=table, act=act)

    @property
    def integer(self) -> bool:
        """Whether both operands are quantized, so that the product is a backend's."""
        return self.act is not None

    @property
    def stored(self) -> QTensor:
        """The weight as the model stores it.

        Raises:
          Ptq4ditError: a backend has replaced it by other numbers.
        """
        if not isinstance(self.weight, QTensor):
            raise Ptq4ditError(
                "This model was prepared for e4m3 products and lacks its integers; use the model that it was prepared from."
            )
        return self.weight

    @property
    def float_bias(self) -> jax.Array:
        """The bias of the float layer (..., N)."""
        if self.act is None or self.act.dynamic:
            return self.bias[..., 0, :]
        return self.bias[..., 0, :] + _zero_point_term(self.stored, self.act)[..., 0, :]

    def at_group(self, group: jax.Array) -> QLinear:
        """Returns the layer for one group of steps (), or for one group per row (B,), in which case ``bias`` is (..., B, N)."""
        act = self.act if self.act is None else self.act.at_group(group)
        return self.replace(act=act, bias=jnp.take(self.bias, group, axis=-2, mode="clip"))

    def feed(self, x: jax.Array, dispatch: Dispatch) -> Fed:
        """Returns the input in the form that this layer takes: the backend's, or the floats themselves."""
        return x if self.act is None else dispatch.encode(x, self.act)

    def feed_modulated(self, x_BTD: jax.Array, shift_BD: Leaf | None, scale_BD: Leaf, norm: Norm, dispatch: Dispatch) -> Fed:
        """Returns :meth:`feed` of ``norm(x) * (1 + scale) + shift``."""
        if self.act is None:
            return modulate(normalize(x_BTD, norm), materialize(shift_BD), materialize(scale_BD))
        return dispatch.modulate_encode(x_BTD, shift_BD, scale_BD, self.act, norm)

    def __call__(self, x: jax.Array, dispatch: Dispatch) -> jax.Array:
        """Maps (B, [T,] K) floats to (B, [T,] N) of the same type; the epilogue is in float32 at least."""
        return self.product(self.feed(x, dispatch), x.dtype, dispatch)

    def product(self, fed: Fed, dtype: DTypeLike, dispatch: Dispatch) -> jax.Array:
        """Returns the layer's output for an input from :meth:`feed`."""
        if not isinstance(fed, Operand):
            return self._float_product(fed)
        return dispatch.linear(fed, self.weight, self._bias_for(fed.values), dtype)

    def product_parts(self, fed: Fed, parts: int, dtype: DTypeLike, dispatch: Dispatch) -> list[jax.Array]:
        """Returns :meth:`product`, with the columns split into ``parts`` arrays."""
        if not isinstance(fed, Operand):
            return jnp.split(self._float_product(fed), parts, axis=-1)
        return dispatch.linear_parts(fed, self.weight, self._bias_for(fed.values), dtype, parts)

    def product_each(self, x: jax.Array, parts: int, dispatch: Dispatch) -> list[jax.Array]:
        """Returns the outputs of a stack of layers with the same input ``x`` (B, K): ``parts`` stacks (L, B, N / parts)."""
        if not self.integer:
            return jnp.split(map_in_chunks(lambda layer: layer(x, dispatch), self), parts, axis=-1)
        fed = jax.vmap(lambda layer: layer.feed(x, dispatch))(self)
        return dispatch.linear_each(fed, self.weight, self.bias, x.dtype, parts)

    def product_gelu(self, fed: Fed, following: QLinear, dtype: DTypeLike, dispatch: Dispatch) -> Fed:
        """Returns GELU of the output, as input of the ``following`` layer."""
        if not isinstance(fed, Operand) or following.act is None:
            return following.feed(jax.nn.gelu(self.product(fed, dtype, dispatch), approximate=True), dispatch)
        return dispatch.linear_gelu(fed, self.weight, self._bias_for(fed.values), following.act)

    def product_residual(self, fed: Fed, gate_BD: Leaf, x_BTD: jax.Array, dispatch: Dispatch) -> jax.Array:
        """Returns ``x + gate * output``."""
        if not isinstance(fed, Operand):
            return x_BTD + materialize(gate_BD)[:, None] * self._float_product(fed)
        return dispatch.linear_residual(fed, self.weight, self._bias_for(fed.values), gate_BD, x_BTD)

    def _bias_for(self, x: jax.Array) -> Any:
        """Returns the bias so that it broadcasts against the output for ``x``: with one group per row, along the batch."""
        return materialize(self.bias)[:, None] if self.bias.ndim == 2 and x.ndim == 3 else self.bias

    def _float_product(self, x: jax.Array) -> jax.Array:
        weight, bias = materialize((self.weight, self._bias_for(x)))
        out = jnp.einsum("...k,nk->...n", x, weight.dequantize().astype(x.dtype), precision=product_precision(x.dtype))
        return out + along_last(bias, out.ndim).astype(x.dtype)


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer], dispatch: Dispatch
) -> jax.Array:
    """Computes softmax attention between the linears, (B, T, D); without ``sites``, as a float model does."""
    if sites:
        return dispatch.attention(q_BTD, k_BTD, v_BTD, num_heads, sites)
    return in_heads(float_attention, q_BTD, k_BTD, v_BTD, num_heads)


def in_unit_steps(qkv: QLinear, proj: QLinear) -> tuple[QLinear, QLinear]:
    """Returns layers of the same function with the input of ``proj``, whose ranges are static, in steps of 1.

    Attention's output is linear in v, so scale and balance of that input can move into v's columns of ``qkv``: the sums are
    then what is rounded. Both layers are for one group of steps, bias (..., N); leading axes (depth) are allowed.
    """
    act = proj.act
    assert act is not None
    scale = act.static_range.scale
    step = scale[..., None]
    D = proj.weight.shape[-1]
    of_v = jnp.broadcast_to((1.0 if act.balance is None else act.balance) / step, (*scale.shape, D))
    factor = jnp.concatenate([jnp.ones((*of_v.shape[:-1], 2 * D), of_v.dtype), of_v], axis=-1)
    scaled = lambda layer, by: layer.weight.replace(scale=layer.weight.scale * by)
    return (
        qkv.replace(weight=scaled(qkv, factor), bias=qkv.bias * factor),
        proj.replace(weight=scaled(proj, step), act=act.replace(scale=jnp.ones_like(scale), balance=None)),
    )


def _zero_point_term(weight: QTensor, act: ActQuantizer) -> jax.Array:
    """Returns ``sx zx sw_n sum_k w'_nk`` for every group, (..., G, N)."""
    sums = weight.sums()
    scale, zero_point = act.static_range
    shift = (scale * zero_point.astype(scale.dtype))[..., None]
    return along_last(shift, sums.ndim + 1) * sums[..., None, :]
