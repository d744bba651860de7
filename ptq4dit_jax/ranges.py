"""Choosing quantization ranges by error, not by extremes: weights per output channel, activations from histograms."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.numerics import unit_exponent
from ptq4dit_jax.quantizers import EMPTY_RANGE, QTensor, act_code_range, affine_parameters, encode_weight, weight_code_range

RangeSearch = Literal["mse", "percentile", "minmax"]

#: Quantiles that the official code tries at both ends of an activation's or a weight's distribution.
PERCENTILES = (0.999, 0.9999, 0.99999)
_WEIGHT_SHRINKS = tuple(float(x) for x in np.linspace(1.0, 0.4, 31))
_REFINEMENTS = 3


def _greatest(w: jax.Array, count: int) -> jax.Array:
    """Returns the ``count`` greatest values of the last axis, descending, in a handful of passes. For top_k, a CPU sorts the
    whole row, which takes ten times as long."""

    def take(rest: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        places = jax.lax.broadcasted_iota(jnp.int32, rest.shape, rest.ndim - 1)
        first = places == jax.lax.argmax(rest, rest.ndim - 1, jnp.int32)[..., None]
        return jnp.where(first, -jnp.inf, rest), rest.max(-1)

    return jnp.moveaxis(jax.lax.scan(take, w, length=count)[1], 0, -1)


def _upper_quantiles(w: jax.Array) -> jax.Array:
    """Returns the quantiles ``PERCENTILES`` along the last axis, linearly interpolated, on a new first axis."""
    last = w.shape[-1] - 1
    positions = [(1 - level) * last for level in PERCENTILES]  # counted from the greatest value
    top = _greatest(w, min(last, int(max(positions)) + 1) + 1)
    floors = [int(position) for position in positions]
    parts = [
        top[..., floor] + (position - floor) * (top[..., min(floor + 1, last)] - top[..., floor])
        for position, floor in zip(positions, floors, strict=True)
    ]
    return jnp.stack(parts)


#: Least error so far, and the scale and zero point that gave it; each (..., N).
_Best = tuple[jax.Array, jax.Array, jax.Array]


def _weight_parameters(low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and (float) zero point of weight ranges that contain 0."""
    qmin, qmax = weight_code_range(bits)
    if bits == 8:
        span, levels = jnp.maximum(-low, high), qmax
        zero_point = jnp.zeros_like(span)
        scale = jnp.where(span > 0, span / levels, 1.0)
    else:
        span = high - low
        scale = jnp.where(span > 0, span / (qmax - qmin), 1.0)
        zero_point = jnp.round(-low / scale)
    return scale, zero_point


@partial(jax.jit, static_argnames=("bits", "search"))
def quantize_weight(w: jax.Array, bits: int, search: RangeSearch = "mse", importance: jax.Array | None = None) -> QTensor:
    """Quantizes a weight (..., N, K) float32 per output channel.

    ``mse`` minimizes ``sum_k importance_k (w_nk - dequantized_nk)^2`` for each channel n: it tries a grid of shrunken
    ranges, then alternately refines codes and scale (each of which can only lower the error). ``importance`` (..., K), the mean
    square of the input channels, makes that the expected output error for uncorrelated inputs; without it, all inputs count
    alike. ``percentile`` tries the official code's three, ``minmax`` takes the extremes.
    """
    w = jnp.where(jnp.abs(w).max(-1, keepdims=True) > EMPTY_RANGE, w, 0.0)
    # Powers of two change no code. With a channel's largest weight and the importance near 1, squares stay within float32.
    exponent = unit_exponent(w)
    w = jnp.ldexp(w, -exponent)
    low, high = jnp.minimum(w.min(-1), 0.0), jnp.maximum(w.max(-1), 0.0)
    importance = jnp.ones(w.shape[-1:], w.dtype) if importance is None else importance.astype(w.dtype)
    importance = jnp.ldexp(importance, -unit_exponent(importance))

    def total(x: jax.Array) -> jax.Array:
        """Returns ``sum_k importance_k x_nk`` as a matrix product, which a CPU computes faster than a sum."""
        return jnp.einsum("...nk,...k->...n", x, importance, precision="highest")

    def error(scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        codes = encode_weight(w, scale, zero_point, bits)
        return total(jnp.square(w - (codes - zero_point[..., None]) * scale[..., None]))

    if search == "minmax":
        candidates = (low[None], high[None])
    else:
        candidates = (jnp.minimum(-_upper_quantiles(-w), 0), jnp.maximum(_upper_quantiles(w), 0))
    if search == "mse":
        shrinks = jnp.asarray(_WEIGHT_SHRINKS, w.dtype).reshape(-1, *[1] * low.ndim)
        lows, highs = candidates
        candidates = (jnp.concatenate([shrinks * low[None], lows]), jnp.concatenate([shrinks * high[None], highs]))

    def try_candidate(best: _Best, candidate: tuple[jax.Array, jax.Array]) -> tuple[_Best, None]:
        scale, zero_point = _weight_parameters(*candidate, bits)
        loss = error(scale, zero_point)
        better = loss < best[0]
        return (jnp.minimum(loss, best[0]), jnp.where(better, scale, best[1]), jnp.where(better, zero_point, best[2])), None

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low), jnp.zeros_like(low))
    (_, scale, zero_point), _ = jax.lax.scan(try_candidate, start, candidates)

    def refine(_: int, scale: jax.Array) -> jax.Array:
        centered = encode_weight(w, scale, zero_point, bits) - zero_point[..., None]
        power = total(jnp.square(centered))
        return jnp.where(power > 0, total(centered * w) / jnp.where(power > 0, power, 1.0), scale)

    if search == "mse":
        scale = jax.lax.fori_loop(0, _REFINEMENTS, refine, scale)
    codes = encode_weight(w, scale, zero_point, bits)
    # An empty channel keeps its scale of 1.
    return QTensor.from_codes(codes, jnp.ldexp(scale, exponent[..., 0]), zero_point, bits)


def _histogram_error(centers: jax.Array, counts: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    """Expected squared error of quantizing the histogram's mass with the range ``[low, high]``."""
    qmin, qmax = act_code_range(bits)
    scale, zero_point = affine_parameters(low, high, bits)
    zero_point = zero_point.astype(centers.dtype)
    codes = jnp.clip(jnp.round(centers / scale) + zero_point, qmin, qmax)
    return (counts * jnp.square(centers - scale * (codes - zero_point))).sum()


def _search_one(
    low: jax.Array, high: jax.Array, counts: jax.Array, bits: int, search: RangeSearch
) -> tuple[jax.Array, jax.Array]:
    # As for weights, the errors must stay within float32.
    exponent = unit_exponent(jnp.stack([low, high]))[0]
    low, high = jnp.ldexp(low, -exponent), jnp.ldexp(high, -exponent)
    low, high = _search_units(low, high, counts / jnp.maximum(counts.sum(), 1.0), bits, search)
    return jnp.ldexp(low, exponent), jnp.ldexp(high, exponent)


def _search_units(
    low: jax.Array, high: jax.Array, counts: jax.Array, bits: int, search: RangeSearch
) -> tuple[jax.Array, jax.Array]:
    """Returns the range for a histogram whose edges lie within +-1; ``counts`` (bins,) are shares."""
    bins = counts.shape[-1]
    centers = low + (jnp.arange(bins, dtype=low.dtype) + 0.5) * (high - low) / bins

    def best(lows: jax.Array, highs: jax.Array) -> tuple[jax.Array, jax.Array]:
        errors = jax.vmap(lambda a, b: _histogram_error(centers, counts, a, b, bits))(lows, highs)
        winner = jnp.argmin(errors)
        return lows[winner], highs[winner]

    if search == "minmax":
        return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    cumulative = jnp.cumsum(counts)
    levels = jnp.asarray(PERCENTILES, low.dtype)
    edge = lambda level: low + (jnp.searchsorted(cumulative, level).astype(low.dtype) + 1.0) * (high - low) / bins
    lows, highs = jnp.minimum(jax.vmap(edge)(1 - levels), 0), jnp.maximum(jax.vmap(edge)(levels), 0)
    if search == "percentile":
        return best(lows, highs)

    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    for ends in ((0.1, 1.0, 19), (0.95, 1.05, 11)):
        a, b = jnp.meshgrid(*[jnp.linspace(*ends, dtype=low.dtype)] * 2)
        lows, highs = jnp.append(low * a.ravel(), lows), jnp.append(high * b.ravel(), highs)
        low, high = best(lows, highs)
        lows, highs = low[None], high[None]
    return low, high


@partial(jax.jit, static_argnames=("bits", "search"))
def activation_parameters(
    low: jax.Array, high: jax.Array, counts: jax.Array, bits: int, search: RangeSearch = "mse"
) -> tuple[jax.Array, jax.Array]:
    """Returns scale (float32) and zero point (int32), shape (...), from histograms.

    Args:
      low, high: outer edges of the histograms, (...).
      counts: (..., bins), equal bins between them.
      bits: width of the codes.
      search: ``mse`` searches both ends on a grid, coarse then fine, for the least squared error; ``percentile`` is the
        official code's choice among three; ``minmax`` keeps the edges.
    """
    flat = (low.ravel(), high.ravel(), counts.reshape(-1, counts.shape[-1]))
    low_best, high_best = jax.lax.map(lambda row: _search_one(row[0], row[1], row[2], bits, search), flat)
    return affine_parameters(low_best.reshape(low.shape), high_best.reshape(low.shape), bits)
