"""The reference implementation: both products of attention on integers. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp

from ptq4dit_jax.engine.xla.linear import batched
from ptq4dit_jax.networks import parts
from ptq4dit_jax.numerics import at_least_float32, product_precision
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention`."""
    q, k, v = (einops.rearrange(x, "b t (a d) -> b a t d", a=num_heads) for x in (q_BTD, k_BTD, v_BTD))
    return einops.rearrange(attention_of_heads(q, k, v, sites), "b a t d -> b t (a d)")


def attention_codes(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention_codes`. Computes in float32 at least."""
    q, k, v = (
        einops.rearrange(x.astype(at_least_float32(x.dtype)), "b t (a d) -> b a t d", a=num_heads)
        for x in (q_BTD, k_BTD, v_BTD)
    )
    precision = product_precision(q.dtype)
    probs = parts.softmax(jnp.einsum("baqd,bakd->baqk", q, k, precision=precision) * q.shape[-1] ** -0.5)
    out = jnp.einsum("baqk,bakd->baqd", probs, v, precision=precision)
    return act.encode(einops.rearrange(out, "b a t d -> b t (a d)"))


def centered_product(a: Encoded, b: Encoded) -> jax.Array:
    """Computes ``sum_k (a - za)(b - zb)`` exactly: values int8 (B, A, M, K) and (B, A, N, K) to int32 (B, A, M, N).

    The product itself is int8 x int8. Zero points, (), (B, 1, 1, 1) or None, enter through sums over K.
    """
    out = batched(a.values, b.values)
    if b.zero_point is not None:
        out = out - b.zero_point * a.values.sum(-1, dtype=jnp.int32)[..., :, None]
    if a.zero_point is not None:
        out = out - a.zero_point * b.values.sum(-1, dtype=jnp.int32)[..., None, :]
    if a.zero_point is not None and b.zero_point is not None:
        out = out + a.values.shape[-1] * a.zero_point * b.zero_point
    return out


def attention_of_heads(q_BATd: jax.Array, k_BATd: jax.Array, v_BATd: jax.Array, sites: dict[str, ActQuantizer]) -> jax.Array:
    """Computes softmax attention, (B, A, T, d), with both products on integers."""
    dtype = q_BATd.dtype
    q, k = sites["q"].encode(q_BATd), sites["k"].encode(k_BATd)
    logits_BATT = centered_product(q, k).astype(q.scale.dtype) * (q.scale * k.scale * q_BATd.shape[-1] ** -0.5)
    probs, v = sites["probs"].encode(parts.softmax(logits_BATT)), sites["v"].encode(v_BATd)
    v = v._replace(values=jnp.swapaxes(v.values, -1, -2))
    out_BATd = centered_product(probs, v).astype(v.scale.dtype) * (probs.scale * v.scale)
    return out_BATd.astype(dtype)
