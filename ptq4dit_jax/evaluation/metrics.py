"""Paired metrics: how far an approximation is from a reference that saw the same noise.

Distribution scores, such as FID, cannot rank nearly lossless quantizers: their own sampling error is larger than the
differences. Signal-to-noise ratios and image similarities of pairs can. Everything here is a pure function of arrays. The three
metrics run under ``jit``; the bootstrap runs on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.numerics import EXACT, at_least_float32, unit_exponent

#: Images in [-1, 1] span this range.
DATA_RANGE = 2.0
#: Names of the two figures of :class:`StepsSQNR` in tables. They differ by 10 dB or more, so each is shown with its name.
SQNR_MEAN, SQNR_POOLED = "SQNR, mean over steps (dB)", "SQNR, pooled over steps (dB)"
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_BOOTSTRAP_CHUNK = 1 << 20


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def power_ratio_db(signal: ArrayLike, error: ArrayLike) -> jax.Array:
    """Returns ``10 log10(signal / error)``: +inf without an error, -inf for an error without a signal; NaN stays NaN."""
    signal, error = jnp.asarray(signal), jnp.asarray(error)
    exact = error == 0
    # 1 replaces 0, because the logarithms of two zeros would give NaN in between.
    ratio_db = 10 * (jnp.log10(jnp.where(exact & (signal == 0), 1.0, signal)) - jnp.log10(jnp.where(exact, 1.0, error)))
    return jnp.where(exact & ~jnp.isnan(signal), jnp.inf, ratio_db)


class Powers(NamedTuple):
    """Sums of squares of a reference and of an error, in units of ``4**exponent``: float32 cannot hold the squares of values
    above 1.8e19 or below 1e-19."""

    signal: jax.Array
    error: jax.Array
    exponent: jax.Array


def powers(reference: ArrayLike, approximation: ArrayLike, axis: int | Sequence[int] | None = None) -> Powers:
    """Returns the powers of ``reference`` and of the error of ``approximation``, reduced over ``axis``, in float32 at least."""
    reference, approximation = _pair(reference, approximation)
    axes = axis if axis is None or isinstance(axis, int) else tuple(axis)
    exponent = jnp.maximum(unit_exponent(reference, axes), unit_exponent(approximation, axes))
    signal, error = jnp.ldexp(reference, -exponent), jnp.ldexp(approximation, -exponent)
    error = jnp.square(signal - error).sum(axes)
    return Powers(jnp.square(signal).sum(axes), error, exponent.reshape(error.shape))


def pooled_db(parts: Sequence[Powers]) -> np.ndarray:
    """Returns the SQNR in dB of powers summed over ``parts``, in the shape of their leaves; runs on the host."""
    exponents = np.stack([part.exponent for part in parts])
    scale = np.ldexp(np.float64(1), 2 * (exponents - exponents.max(0)))
    signal, error = ((scale * np.stack(leaves)).sum(0) for leaves in zip(*(part[:2] for part in parts), strict=True))
    return np.asarray(power_ratio_db(np.float32(signal), np.float32(error)))


def sqnr_db(reference: ArrayLike, approximation: ArrayLike, axis: int | Sequence[int] | None = None) -> jax.Array:
    """Returns the signal-to-quantization-noise ratio in dB: power of ``reference`` over power of the error.

    Args:
      reference: any shape; computed in float32 at least.
      approximation: the same shape.
      axis: the axes to reduce over; all by default.

    Returns:
      A float array of the remaining axes. Identical inputs give +inf.
    """
    found = powers(reference, approximation, axis)
    return power_ratio_db(found.signal, found.error)


class StepsSQNR(NamedTuple):
    """SQNR of predictions at S steps, in dB.

    Let P_s be the power of the reference at step s, and E_s the power of the error. ``step_db`` (S,) is
    ``10 log10(P_s / E_s)``. ``mean_db`` () is its mean ``1/S sum_s 10 log10(P_s / E_s)``, in which every step counts equally.
    ``pooled_db`` () is ``10 log10(sum_s P_s / sum_s E_s)``, which is dominated by the steps of the largest error.
    """

    step_db: jax.Array
    mean_db: jax.Array
    pooled_db: jax.Array


def steps_sqnr(reference: ArrayLike, approximation: ArrayLike) -> StepsSQNR:
    """Returns the SQNR of predictions (S, ...) at S steps: of each step, its mean over steps, and with powers pooled."""
    reference, approximation = _pair(reference, approximation)
    step_db = sqnr_db(reference, approximation, axis=range(1, reference.ndim))
    return StepsSQNR(step_db, step_db.mean(), sqnr_db(reference, approximation))


def psnr_db(reference: ArrayLike, images: ArrayLike, data_range: float = DATA_RANGE) -> jax.Array:
    """Returns the peak signal-to-noise ratio in dB of each image, (N,): ``10 log10(data_range^2 / MSE)``, +inf if identical.

    Args:
      reference: (N, H, W, C).
      images: the same shape.
      data_range: what the values span, 2 for images in [-1, 1].
    """
    reference, images = _images(reference, images)
    mse = jnp.square(reference - images).mean((1, 2, 3))
    return power_ratio_db(jnp.full_like(mse, data_range**2), mse)


def ssim(reference: ArrayLike, images: ArrayLike, data_range: float = DATA_RANGE) -> jax.Array:
    """Returns the structural similarity of each image, (N,), at most 1 (Wang et al., 2004).

    The window is Gaussian, of 11 pixels with sigma 1.5; K1 = 0.01, K2 = 0.03; moments are weighted population moments. The map
    is averaged over channels and over the windows that lie wholly inside the image. On a side shorter than 11 pixels, the
    window is the largest odd number that fits, and sigma shrinks in proportion (7 pixels and 0.95 for 8x8). SSIM is defined for
    intensities from zero on, so ``data_range / 2`` is added first, and the figures are those of the same images in 8 bits.

    Args:
      reference: (N, H, W, C), centered on zero.
      images: the same shape.
      data_range: what the values span, 2 for images in [-1, 1].
    """
    reference, images = _images(reference, images)
    _, height, width, _ = reference.shape
    rows_PH, columns_QW = (jnp.asarray(_window_means(size), reference.dtype) for size in (height, width))
    span = jnp.asarray(data_range, reference.dtype)

    def blur(x: jax.Array) -> jax.Array:
        return jnp.einsum("ph,qw,nhwc->npqc", rows_PH, columns_QW, x, precision=EXACT)

    mean_r, mean_i = blur(reference), blur(images)
    var_r = blur(reference * reference) - mean_r * mean_r
    var_i = blur(images * images) - mean_i * mean_i
    covariance = blur(reference * images) - mean_r * mean_i
    c1, c2 = (_SSIM_K1 * span) ** 2, (_SSIM_K2 * span) ** 2
    # Only the luminance term depends on where zero lies; the other moments are more exact around the middle.
    light_r, light_i = mean_r + span / 2, mean_i + span / 2
    luminance = (2 * light_r * light_i + c1) / (light_r * light_r + light_i * light_i + c1)
    structure = (2 * covariance + c2) / (var_r + var_i + c2)
    return (luminance * structure).mean((1, 2, 3))


def bootstrap_interval(values: ArrayLike, seed: int = 0, *, level: float = 0.95, resamples: int = 2000) -> Interval:
    """Returns the mean of ``values`` (N,) with its percentile-bootstrap interval. The same seed gives the same interval.

    Identical images score infinity in dB. An infinite value counts as the largest finite one (the smallest for -inf), so that a
    few perfect pairs neither hide the others nor vanish. If no value is finite, the interval is that infinity, or NaN if both
    infinities occur. NaN anywhere gives NaN.

    Args:
      values: (N,), one figure per sample.
      seed: of the resampling.
      level: coverage, between 0 and 1.
      resamples: the number of resamples.
    """
    array = np.asarray(values, np.float64).ravel()
    if array.size == 0:
        raise Ptq4ditError("A bootstrap interval needs at least one value, and none was given.")
    if not 0 < level < 1 or resamples < 1:
        raise Ptq4ditError(
            f"A bootstrap interval needs a level between 0 and 1 and at least one resample, not level {level} and {resamples}."
        )
    finite = array[np.isfinite(array)]
    if np.isnan(array).any() or (finite.size == 0 and np.unique(array).size > 1):
        return Interval(np.nan, np.nan, np.nan)
    if finite.size == 0:
        return Interval(*[float(array[0])] * 3)
    array = array.clip(finite.min(), finite.max())

    rng = np.random.default_rng(seed)
    chunk = max(1, _BOOTSTRAP_CHUNK // array.size)
    means = [
        array[rng.integers(array.size, size=(min(chunk, resamples - start), array.size))].mean(1)
        for start in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def _pair(reference: ArrayLike, approximation: ArrayLike) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.asarray(reference), jnp.asarray(approximation)
    if first.shape != second.shape:
        raise Ptq4ditError(f"Paired metrics need two arrays of one shape, not {first.shape} and {second.shape}.")
    dtype = at_least_float32(first.dtype, second.dtype)
    return first.astype(dtype), second.astype(dtype)


def _images(reference: ArrayLike, images: ArrayLike) -> tuple[jax.Array, jax.Array]:
    first, second = _pair(reference, images)
    if first.ndim != 4:
        raise Ptq4ditError(f"Image metrics need arrays (N, H, W, C), not {first.shape}.")
    return first, second


def _window_means(size: int) -> np.ndarray:
    """Returns a matrix (P, size) whose rows are the Gaussian window at each of its P positions inside ``size`` pixels."""
    window = min(_SSIM_WINDOW, size - 1 + size % 2)
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (offsets / (_SSIM_SIGMA * window / _SSIM_WINDOW)) ** 2)
    positions = size - window + 1
    matrix = np.zeros((positions, size))
    for position in range(positions):
        matrix[position, position : position + window] = weights / weights.sum()
    return matrix.astype(np.float32)
