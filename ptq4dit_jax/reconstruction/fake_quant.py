"""Activation quantizers whose step sizes are learned: fake quantization with straight-through gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int32

from ptq4dit_jax.numerics import EXACT, along_last
from ptq4dit_jax.quantizers import ActQuantizer, act_code_range, reciprocal
from ptq4dit_jax.reconstruction.sums import order_free_sum
from ptq4dit_jax.straight_through import StraightThrough


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fake_quant(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """Returns ``scale (clip(round(x / scale) + zero_point) - zero_point)`` in the dtype of ``x``, computed in float32.

    ``scale`` float32 and ``zero_point`` int32 broadcast against ``x`` with axes of size 1. Gradients pass straight through the
    rounding (LSQ, Esser et al., 2020). That of ``x`` is 1 inside the range. That of ``scale`` is the rounding error inside, and
    the end of the range outside.
    """
    return _codes(x, scale, zero_point, bits)[0].astype(x.dtype)


def _codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the fake-quantized value, ``d value / d scale``, and whether the value is inside the range; float32."""
    qmin, qmax = act_code_range(bits)
    position = x.astype(jnp.float32) * reciprocal(scale)
    zero_point = zero_point.astype(jnp.float32)
    rounded = jnp.round(position) + zero_point
    inside = (rounded >= qmin) & (rounded <= qmax)
    centered = jnp.clip(rounded, qmin, qmax) - zero_point
    return scale * centered, centered - jnp.where(inside, position, 0.0), inside


def _forward(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return fake_quant(x, scale, zero_point, bits), (x, scale, zero_point)


def _backward(bits: int, saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, scale, zero_point = saved
    _, slope, inside = _codes(x, scale, zero_point, bits)
    over = tuple(axis for axis in range(x.ndim) if scale.ndim == 0 or scale.shape[axis] == 1)
    # Its last bit moves the scale, and so the codes. For devices to agree, it must not depend on the program.
    d_scale = order_free_sum(g.astype(jnp.float32) * slope, over).reshape(scale.shape)
    return jnp.where(inside, g, 0).astype(x.dtype), d_scale, None


fake_quant.defvjp(_forward, _backward)


class LearnedQuantizer(struct.PyTreeNode):
    """A site's quantizer during training. ``scale`` and ``zero_point`` (B,) are those of each row's group of steps."""

    scale: Float32[Array, " B"]
    zero_point: Int32[Array, " B"]
    balance: Float[Array, " K"] | None
    bits: int = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.balance is None else x * along_last(self.balance, x.ndim).astype(x.dtype)
        rows = (-1,) + (1,) * (x.ndim - 1)
        return fake_quant(x, self.scale.reshape(rows), self.zero_point.reshape(rows), self.bits)


def scaled(act: ActQuantizer, log_scale: jax.Array) -> ActQuantizer:
    """Returns ``act`` with its table of scales multiplied by ``exp(log_scale)``, both (G,)."""
    return act.replace(scale=act.static_range.scale * jnp.exp(log_scale))


def for_rows(acts: Mapping[str, ActQuantizer], log_scales: Mapping[str, jax.Array], group_B: jax.Array) -> dict[str, Any]:
    """Returns the quantizers of a batch whose rows fall into the groups of steps ``group_B`` (B,)."""
    made: dict[str, Any] = {}
    for name, act in acts.items():
        if act.dynamic:
            made[name] = StraightThrough(act)  # it has nothing to learn
            continue
        # A product with one-hot rows, not a gather: its gradient is summed in a fixed order, on a GPU too.
        pick = jax.nn.one_hot(group_B, act.static_range.scale.shape[-1], dtype=jnp.float32)
        scale = jnp.einsum("bg,g->b", pick, scaled(act, log_scales[name]).scale, precision=EXACT)
        made[name] = LearnedQuantizer(scale, jnp.take(act.static_range.zero_point, group_B), act.balance, act.bits)
    return made
