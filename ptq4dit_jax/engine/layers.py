"""The integer layers: a linear with its input quantizer, and the two products of attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ptq4dit_jax.engine import matmul
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor


@struct.dataclass
class QLinear:
    """A linear layer of integers, ``y_n = (sum_k xq_k w'_nk) (sx sw_n) + bias_n``.

    ``weight`` (..., N, K); ``act`` quantizes the input, or is None where the layer is fed by floats and multiplies de-quantized
    weights; ``bias`` (..., G, N) float32 holds, per group of steps, the float bias with the input's zero point folded in:
    ``b_n - sx sw_n zx sum_k w'_nk``. G is 1 where there is no table of ranges.
    """

    weight: QTensor
    bias: Any
    act: ActQuantizer | None = None

    @classmethod
    def pack(cls, weight: QTensor, bias: jax.Array, act: ActQuantizer | None) -> QLinear:
        """Folds the zero point into the float bias (..., N)."""
        table = bias[..., None, :]
        if act is not None and not act.dynamic:
            table = table - _zero_point_term(weight, act)
        return cls(weight=weight, bias=table, act=act)

    @property
    def integer(self) -> bool:
        """Whether the product runs on integers."""
        return self.act is not None

    @property
    def float_bias(self) -> jax.Array:
        """The bias of the float layer (..., N)."""
        if self.act is None or self.act.dynamic:
            return self.bias[..., 0, :]
        return self.bias[..., 0, :] + _zero_point_term(self.weight, self.act)[..., 0, :]

    def at_group(self, group: jax.Array) -> QLinear:
        """The layer for one group of steps (), or for one group per row (B,): then ``bias`` is (..., B, N)."""
        act = self.act if self.act is None else self.act.at_group(group)
        return self.replace(act=act, bias=jnp.take(self.bias, group, axis=-2, mode="clip"))  # type: ignore[attr-defined]

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """(B, [T,] K) float to (B, [T,] N), the same type; the epilogue is in float32 at least."""
        bias = self.bias[:, None] if self.bias.ndim == 2 and x.ndim == 3 else self.bias
        if self.act is None:
            return jnp.einsum("...k,nk->...n", x, self.weight.dequantize().astype(x.dtype)) + bias.astype(x.dtype)
        encoded = self.act.encode(x)
        scale = encoded.scale * self.weight.scale
        return matmul.linear(encoded.values, self.weight, scale, bias, backend=backend).astype(x.dtype)


def _zero_point_term(weight: QTensor, act: ActQuantizer) -> jax.Array:
    """``sx zx sw_n sum_k w'_nk`` for every group, (..., G, N)."""
    sums = weight.codes().astype(jnp.int32).sum(-1).astype(weight.scale.dtype) * weight.scale
    return (act.scale * act.zero_point)[..., None] * sums[..., None, :]


def centered_product(a: Encoded, b: Encoded, backend: str) -> jax.Array:
    """``sum_k (a - za)(b - zb)`` over the last axes, exact: values int8 (B, A, M, K) and (B, A, N, K) to int32 (B, A, M, N).

    The product itself is int8 x int8; zero points, (), (B, 1, 1, 1) or None, enter by sums over K.
    """
    out = matmul.batched(a.values, b.values, backend=backend)
    if b.zero_point is not None:
        out = out - b.zero_point * a.values.astype(jnp.int32).sum(-1)[..., :, None]
    if a.zero_point is not None:
        out = out - a.zero_point * b.values.astype(jnp.int32).sum(-1)[..., None, :]
    if a.zero_point is not None and b.zero_point is not None:
        out = out + a.values.shape[-1] * a.zero_point * b.zero_point
    return out


def attention(
    q_BATd: jax.Array, k_BATd: jax.Array, v_BATd: jax.Array, sites: dict[str, ActQuantizer], softmax: Any, backend: str
) -> jax.Array:
    """Softmax attention whose two products run on integers, (B, A, T, d)."""
    dtype = q_BATd.dtype
    q, k = sites["q"].encode(q_BATd), sites["k"].encode(k_BATd)
    logits_BATT = centered_product(q, k, backend).astype(q.scale.dtype) * (q.scale * k.scale * q_BATd.shape[-1] ** -0.5)
    probs, v = sites["probs"].encode(softmax(logits_BATT)), sites["v"].encode(v_BATd)
    v = v._replace(values=jnp.swapaxes(v.values, -1, -2))
    out_BATd = centered_product(probs, v, backend).astype(v.scale.dtype) * (probs.scale * v.scale)
    return out_BATd.astype(dtype)
