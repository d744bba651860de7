"""GPTQ (Frantar et al., 2023) on quantized inputs: closed-form rounding of a weight, from second moments of its input.

The quantized network feeds a layer ``x`` where the float network would feed it ``x + d``. With weights ``w`` (N, K) and codes
that stand for ``v`` (N, K), the layer's error is ``v x - w (x + d)`` up to a bias. Let ``A`` be the damped covariance of ``x``,
and ``D = cov(d, x)``. Then the error's variance for each output channel is ``(v - t) A (v - t)^T`` plus a constant, where

    t = w + w D A^-1

is the least-squares target; the bias corrects the means. Codes are decided one input channel at a time. Each is the code
nearest to the value that minimizes the error, given the codes before it. With ``A = M diag(s) M^T``, ``M`` unit upper
triangular, that value is ``t_k + sum_{j<k} (t_j - v_j) M_jk`` (Chee et al., 2023, show that this is GPTQ's update). So one
Cholesky factor suffices, and nothing is inverted. Pure functions of arrays; imports no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32

from ptq4dit_jax.numerics import EXACT
from ptq4dit_jax.quantizers import QTensor, weight_code_range
from ptq4dit_jax.ranges import RangeSearch, quantize_weight

#: The share of each input channel's variance that is added to it, so that the covariance can be factored. The square of
#: channels per token is added too: with as many tokens as channels, the target fits their noise; with a few times as many, not.
DAMPING = 0.01
#: Input channels whose codes are decided one after another before their errors reach the others.
_COLUMNS = 128
#: Columns that one turn of a loop decides. A GPU waits between turns: an H200 takes a quarter of the time that it takes with 1.
_UNROLLED = 8
#: A channel counts as constant if its variance is at most this share of the largest, or of the square of its own mean.
_CONSTANT = 1e-12


class Compensated(struct.PyTreeNode):
    """A float32 sum and what rounding lost of it (Knuth's two-sum), both of one shape."""

    total: Float32[Array, "*shape"]
    lost: Float32[Array, "*shape"]

    @classmethod
    def zeros(cls, *shape: int) -> Compensated:
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def add(self, term: jax.Array) -> Compensated:
        total = self.total + term
        part = total - self.total
        lost = (self.total - (total - part)) + (term - part)
        return Compensated(total, self.lost + lost)

    @property
    def value(self) -> jax.Array:
        return self.total + self.lost


_Sum = TypeVar("_Sum")


class InputMoments(struct.PyTreeNode, Generic[_Sum]):
    """Weighted sums over tokens, with ``x' = x - shift``: ``second`` (K, K) of ``x' x'^T``, ``cross`` (K, K) of ``d x'^T``,
    ``first`` (K,) of ``x'``, ``drift`` (K,) of ``d``, and ``count`` () of the weights, which are 1 unless rows are repeated.

    The sums are arrays, or :class:`Compensated` while they are summed. ``shift`` (K,) is a rough mean: without it, a channel
    that varies little about a large mean would leave differences of large numbers.
    """

    second: _Sum
    cross: _Sum
    first: _Sum
    drift: _Sum
    count: _Sum
    shift: Float[Array, " K"]

    @classmethod
    def start(cls, shift: jax.Array) -> InputMoments[Compensated]:
        """Returns the moments of no tokens yet."""
        K, zeros = shift.shape[0], Compensated.zeros
        return InputMoments(
            second=zeros(K, K),
            cross=zeros(K, K),
            first=zeros(K),
            drift=zeros(K),
            count=zeros(),
            shift=shift.astype(jnp.float32),
        )

    def about_mean(self: InputMoments[Compensated]) -> InputMoments[Compensated]:
        """Returns the moments of no tokens yet, about the mean of the tokens seen here."""
        return InputMoments.start(self.shift + self.first.value / _or_one(self.count.value))

    def observe(
        self: InputMoments[Compensated],
        x: jax.Array,
        exact: jax.Array,
        weight_B: jax.Array,
        precision: jax.lax.Precision = EXACT,
    ) -> InputMoments[Compensated]:
        """Adds a batch: the layer's inputs in the quantized and in the float network, (B, [T,] K), and the rows' weights."""
        K = x.shape[-1]
        x, exact = (jnp.asarray(a, jnp.float32).reshape(weight_B.shape[0], -1, K) for a in (x, exact))
        difference, weight = exact - x, weight_B.astype(jnp.float32)[:, None, None]
        x = x - self.shift[None, None]
        weighted = x * weight
        product = partial(jnp.einsum, "btk,btj->kj", precision=precision)
        return self.replace(
            second=self.second.add(product(x, weighted)),
            cross=self.cross.add(product(difference, weighted)),
            first=self.first.add(weighted.sum((0, 1))),
            drift=self.drift.add((difference * weight).sum((0, 1))),
            count=self.count.add(weight.sum() * x.shape[1]),
        )

    @classmethod
    def total(cls, parts: Sequence[InputMoments[Compensated]]) -> InputMoments[jax.Array]:
        """Adds up, in order, the moments of parts with one shift; returns arrays."""
        add = lambda total, part: total if not isinstance(total, Compensated) else total.add(part.total).add(part.lost)
        is_sum = lambda leaf: isinstance(leaf, Compensated)
        total = reduce(lambda a, b: jax.tree.map(add, a, b, is_leaf=is_sum), parts)
        return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Compensated) else leaf, total, is_leaf=is_sum)


class RoundedWeight(struct.PyTreeNode):
    """A weight rounded in closed form: the quantized ``weight`` (N, K), the ``target`` (N, K) float32 that its codes stand for,
    what is added to its ``bias`` (N,) float32, and the ``error`` () float32 on the rows of the moments, relative to that of
    rounding to the nearest. Both errors are counted from that of the target."""

    weight: QTensor
    target: Float32[Array, "N K"]
    bias: Float32[Array, " N"]
    error: Float32[Array, ""]


class _Codes(NamedTuple):
    """Centered codes (N, K), and the scale and the least and greatest code of each output channel (N,); float64."""

    codes: jax.Array
    scale: jax.Array
    low: jax.Array
    high: jax.Array

    @classmethod
    def of(cls, weight: QTensor, order: jax.Array) -> _Codes:
        wide = lambda a: a.astype(jnp.float64)
        low, high = weight.code_range
        return cls(wide(weight.codes())[:, order], wide(weight.scale), wide(low), wide(high))

    def values(self, size: jax.Array) -> jax.Array:
        """Returns what the codes stand for, as weights of channels that were divided by ``size``."""
        return self.codes * self.scale[:, None] * size[None]


def round_weight(
    kernel: jax.Array,
    nearest: QTensor,
    moments: InputMoments[jax.Array],
    *,
    search: RangeSearch = "mse",
    follow: bool = True,
) -> RoundedWeight:
    """Rounds a kernel (K, N) so that the layer's output error is least for inputs with these moments. Computes in float64.

    Ranges are searched anew for the target. Each output channel takes the best of three: GPTQ's codes, the target rounded to
    the nearest, and ``nearest``. So its error on these rows is never larger than that of ``nearest``.

    Args:
      kernel: the float weight, in Flax's order.
      nearest: the same weight rounded to the nearest, (N, K).
      moments: of the layer's input; leaves are arrays.
      search: how ranges are chosen.
      follow: aim at the layer's output in the float network, with the bias corrected. False aims at the float weight's output
        for the quantized network's input, and leaves the bias alone (GPTQ as published).
    """
    with jax.enable_x64(True):
        return _round_weight(kernel, nearest, moments, search=search, follow=follow)


@partial(jax.jit, static_argnames=("search", "follow"))
def _round_weight(
    kernel: jax.Array, nearest: QTensor, moments: InputMoments[jax.Array], *, search: RangeSearch, follow: bool
) -> RoundedWeight:
    original, moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (kernel.T, moments))
    count = _or_one(moments.count)
    second, cross, first, drift = (a / count for a in (moments.second, moments.cross, moments.first, moments.drift))
    mean = moments.shift + first
    covariance, square = second - jnp.outer(first, first), jnp.outer(mean, mean)
    power = jnp.diagonal(covariance + square)
    if follow:
        cross = cross - jnp.outer(drift, first)
    else:
        covariance, cross = covariance + square, jnp.zeros_like(cross)

    variance = jnp.maximum(jnp.diagonal(covariance), 0.0)
    constant = variance <= _CONSTANT * jnp.maximum(variance.max(), jnp.square(mean))
    order = jnp.argsort(-variance, stable=True)
    # Scaled to variance 1, so that neither damping nor the existence of a factor depends on the channels' sizes.
    size = jnp.where(constant, 1.0, jnp.sqrt(jnp.where(constant, 1.0, variance)))
    size, constant = size[order], constant[order]
    varies = ~constant[:, None] & ~constant[None]
    scaled = lambda matrix: jnp.where(varies, matrix[order][:, order] / (size[:, None] * size[None]), 0.0)
    A, D = scaled((covariance + covariance.T) / 2), scaled(cross)
    damped, factor = _factored(A, constant, DAMPING + jnp.square(len(size) / count))
    M = factor[::-1, ::-1] / jnp.diagonal(factor)[None, ::-1]

    w = original[:, order] * size[None]
    product = partial(jnp.matmul, precision=EXACT)
    target = w + jax.scipy.linalg.cho_solve((factor, True), product(w, D)[:, ::-1].T).T[:, ::-1]
    importance = power[order].astype(jnp.float32)
    unscaled = (target / size[None]).astype(jnp.float32)
    ranges = quantize_weight(unscaled, nearest.bits, search, importance)
    near, plain = _Codes.of(ranges, jnp.arange(len(size))), _Codes.of(nearest, order)
    found = near._replace(codes=_decide(target, M, size, near))

    wanted = product(w, A + D)
    squared = lambda v: (product(v, A) * v).sum(-1) - 2 * (wanted * v).sum(-1)  # the error's variance up to a constant
    candidates = [found, near, plain]
    errors = jnp.stack([squared(candidate.values(size)) for candidate in candidates])
    chosen = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors), axis=0)
    pick = lambda *leaves: jnp.stack(leaves)[chosen, jnp.arange(len(chosen))]
    best = _Codes(*map(pick, *candidates))

    back = jnp.argsort(order)
    values = best.values(size) / size[None]
    bias = product(original, mean + drift) - product(values[:, back], mean) if follow else jnp.zeros(len(chosen))
    excess = lambda v: (product(v - target, damped) * (v - target)).sum()
    before = excess(plain.values(size))
    error = jnp.where(before > 0, excess(best.values(size)) / jnp.where(before > 0, before, 1.0), 1.0)

    zero_point = (weight_code_range(nearest.bits)[0] - best.low).astype(jnp.int32)
    codes = best.codes[:, back].astype(jnp.int32) + zero_point[:, None]
    weight = QTensor.from_codes(codes, best.scale.astype(jnp.float32), zero_point, nearest.bits)
    return RoundedWeight(weight, unscaled[:, back], bias.astype(jnp.float32), error.astype(jnp.float32))


def _factored(A: jax.Array, constant: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``A`` (K, K) damped, and the Cholesky factor of that matrix with both axes reversed.

    Reversed back, the factor is upper triangular: ``damped = R R^T``. Float32 sums may miss a variance by more than the
    damping, which then grows until there is a factor.
    """

    def damp(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        damping, *_ = state
        damped = A + jnp.diag(jnp.where(constant, 1.0, damping))
        factor = jnp.linalg.cholesky(damped[::-1, ::-1])
        return 10 * damping, damped, factor, jnp.isfinite(factor).all() | (damping > 2 * len(A))

    start = (damping, jnp.zeros_like(A), jnp.zeros_like(A), jnp.array(False))
    _, damped, factor, _ = jax.lax.while_loop(lambda state: ~state[-1], damp, start)
    return damped, factor


def _or_one(count: jax.Array) -> jax.Array:
    """Returns a number of tokens to divide by. It may be below 1: rows that a walk repeats count a share each."""
    return jnp.where(count > 0, count, 1.0)


def _decide(target: jax.Array, M: jax.Array, size: jax.Array, ranges: _Codes) -> jax.Array:
    """Returns GPTQ's codes (N, K) for targets (N, K) and the factor's unit upper triangle (K, K), in column order."""
    N, K = target.shape
    columns = min(_COLUMNS, K)
    padding = -K % columns
    M = jnp.pad(M, ((0, padding), (0, padding)))
    target = jnp.pad(target, ((0, 0), (0, padding)))
    steps = ranges.scale[:, None] * jnp.pad(size, (0, padding), constant_values=1.0)[None]

    def decide_columns(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``errors`` (N, K) are those of the earlier columns, and 0 from ``start`` on."""
        cut = lambda matrix: jax.lax.dynamic_slice_in_dim(matrix, start, columns, axis=1)
        wanted, step = cut(target), cut(steps)
        heard = wanted + jnp.matmul(errors, cut(M), precision=EXACT)
        among = jax.lax.dynamic_slice_in_dim(cut(M), start, columns)
        place = jnp.arange(columns)[None]
        low, high = ranges.low[:, None], ranges.high[:, None]

        def decide(k: jax.Array, state: jax.Array) -> jax.Array:
            """``state`` holds codes before column k, and what is wanted from k on. One elementwise operation decides each."""
            column = lambda matrix: jax.lax.dynamic_index_in_dim(matrix, k, axis=1)
            code = jnp.clip(jnp.round(column(state) / column(step)), low, high)
            error = column(wanted) - code * column(step)
            return jnp.where(place == k, code, state + error * jax.lax.dynamic_index_in_dim(among, k))

        codes = jax.lax.fori_loop(0, columns, decide, heard, unroll=_UNROLLED)
        return jax.lax.dynamic_update_slice_in_dim(errors, wanted - codes * step, start, axis=1), codes

    starts = jnp.arange(0, K + padding, columns)
    _, codes = jax.lax.scan(decide_columns, jnp.zeros_like(target), starts)
    return jnp.moveaxis(codes, 0, 1).reshape(N, -1)[:, :K]
