"""Pieces of networks: norms, modulation, softmax attention, patches and time features. Plain functions of float arrays.

Dimension letters, used as name suffixes throughout the package:

    B batch    T tokens    D width (hidden size)    A attention heads    d head width    K/N in/out features of a linear
    H, W, C    height, width and channels of an image (NHWC)             L depth (stacked blocks)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.networks.ops import Norm, NormKind, Rotary
from ptq4dit_jax.numerics import EXACT, at_least_float32, product_precision


def timestep_frequencies(size: int, t_B: jax.Array, shift: float = 0.0) -> jax.Array:
    """Returns sinusoidal features (B, size) of the timestep, cosines first. ``shift`` makes the frequencies fall faster."""
    half = size // 2
    return time_waves(t_B, np.exp(-math.log(10000.0) * np.arange(half) / (half - shift)))


def time_waves(t_B: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Returns cosines, then sines, of the timestep times each frequency, in radians."""
    angles = t_B.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sine_cosine_positions(side: int, width: int) -> np.ndarray:
    """Returns the fixed 2-D table (side * side, width) float32. The first half of the width encodes the column, the second the
    row."""
    quarter = width // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(side)[:, None] * omega
    along = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return np.concatenate([np.tile(along, (side, 1)), np.repeat(along, side, axis=0)], axis=1)


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """Cuts (B, H, W, C) into tokens (B, T, P*P*C), row-major; a token is (row, column, channel), channel fastest."""
    return einops.rearrange(x_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x_BTK: jax.Array, patch: int, side: int) -> jax.Array:
    """Inverts :func:`patchify` for ``side`` rows of patches and any number of channels."""
    return einops.rearrange(x_BTK, "b (h w) (p q c) -> b (h p) (w q) c", h=side, w=side, p=patch, q=patch)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Applies LayerNorm without affine parameters over the last axis; statistics are in float32 at least."""
    wide = x.astype(at_least_float32(x.dtype))
    centered = wide - wide.mean(-1, keepdims=True)
    return (centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Applies RMSNorm (Zhang & Sennrich, 2019) without a gain over the last axis; statistics are in float32 at least."""
    wide = x.astype(at_least_float32(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def normalize(x: jax.Array, norm: Norm) -> jax.Array:
    """Applies the norm over the last axis."""
    return layer_norm(x, norm.eps) if norm.kind is NormKind.LAYER else rms_norm(x, norm.eps)


def head_norm(x_BTD: jax.Array, heads: int, norm: Norm, gain_d: jax.Array) -> jax.Array:
    """Applies the norm over the channels of each head, and multiplies by a gain."""
    of_heads = einops.rearrange(x_BTD, "b t (a d) -> b t a d", a=heads)
    return einops.rearrange(normalize(of_heads, norm) * gain_d.astype(x_BTD.dtype), "b t a d -> b t (a d)")


def modulate(x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array) -> jax.Array:
    """Applies adaLN's modulation, ``x * (1 + scale) + shift``; a shift of None is left out."""
    scaled = x_BTD * (1 + scale_BD[:, None])
    return scaled if shift_BD is None else scaled + shift_BD[:, None]


def rotary_angles(rotary: Rotary, width: int) -> np.ndarray:
    """Returns the angles (T, width) float32 by which the channels of a head are rotated; a pair of channels shares one."""
    frequencies = rotary.theta ** (-np.arange(0, width // 2, 2, dtype=np.float64) / (width // 2))
    along = np.repeat(np.arange(rotary.side)[:, None] * frequencies, 2, axis=1)
    rows, columns = np.repeat(along, rotary.side, axis=0), np.tile(along, (rotary.side, 1))
    return np.concatenate([rows, columns], axis=1).astype(np.float32)


def rotate(x_BTD: jax.Array, heads: int, rotary: Rotary) -> jax.Array:
    """Rotates queries or keys (B, T, D) by their positions, in float32 at least; returns the input's type."""
    dtype = at_least_float32(x_BTD.dtype)
    angles = rotary_angles(rotary, x_BTD.shape[-1] // heads)
    cosine, sine = (jnp.asarray(np.tile(f(angles), heads), dtype)[None] for f in (np.cos, np.sin))
    wide = x_BTD.astype(dtype)
    first, second = wide[..., ::2], wide[..., 1::2]
    turned = jnp.stack([-second, first], axis=-1).reshape(wide.shape)
    return (wide * cosine + turned * sine).astype(x_BTD.dtype)


def softmax(logits: jax.Array) -> jax.Array:
    """Computes softmax over the last axis in float32 at least; returns the input's type."""
    wide = logits.astype(at_least_float32(logits.dtype))
    # A product with the reciprocal: XLA compiles the gradient of a quotient differently for several devices than for one.
    exp = jnp.exp(wide - jax.lax.stop_gradient(wide.max(-1, keepdims=True)))
    return (exp * (1 / exp.sum(-1, keepdims=True))).astype(logits.dtype)


def in_heads(
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q_BTD: jax.Array,
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    heads: int,
) -> jax.Array:
    """Applies attention of arrays (B, T, A, d) to arrays (B, T, D)."""
    q, k, v = (einops.rearrange(x, "b t (a d) -> b t a d", a=heads) for x in (q_BTD, k_BTD, v_BTD))
    return einops.rearrange(attention(q, k, v), "b t a d -> b t (a d)")


def can_fuse_attention(dtype: DTypeLike, head_width: int) -> bool:
    """Returns whether :func:`fused_attention` runs on the default device: cuDNN's, for 16-bit types on GPUs since Ampere."""
    fitting = jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= 128
    return fitting and default_kind().capability >= (8, 0)


def fused_attention(q_BTAd: jax.Array, k_BTAd: jax.Array, v_BTAd: jax.Array) -> jax.Array:
    """Computes softmax attention (B, T, A, d) as one kernel of cuDNN, which stores no probabilities."""
    return jax.nn.dot_product_attention(q_BTAd, k_BTAd, v_BTAd, implementation="cudnn")


def float_attention(
    q_BTAd: jax.Array,
    k_BTAd: jax.Array,
    v_BTAd: jax.Array,
    watch: Callable[[jax.Array], jax.Array] | None = None,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """Computes softmax attention (B, T, A, d), by :func:`fused_attention` where that runs. ``watch`` is applied to the
    probabilities (B, A, T, T). ``precision`` applies to float32 products."""
    if watch is None and can_fuse_attention(q_BTAd.dtype, q_BTAd.shape[-1]):
        return fused_attention(q_BTAd, k_BTAd, v_BTAd)
    precision = product_precision(q_BTAd.dtype, precision)
    logits_BATT = jnp.einsum("bqad,bkad->baqk", q_BTAd, k_BTAd, precision=precision) * q_BTAd.shape[-1] ** -0.5
    probs_BATT = softmax(logits_BATT) if watch is None else watch(softmax(logits_BATT))
    return jnp.einsum("baqk,bkad->bqad", probs_BATT, v_BTAd, precision=precision)
