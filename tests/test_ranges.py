"""Range search against NumPy: its error on the real values next to that of extremes, percentiles and brute force."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.ranges import activation_parameters, quantize_weight

BITS = range(2, 9)
BINS = 2048
#: Errors are float32 sums inside the search and float64 here.
TIE = 1 + 1e-4

every_width = pytest.mark.parametrize("bits", BITS)


def weights(outputs: int = 12, inputs: int = 257) -> np.ndarray:
    """Rows (N, K) of every shape that trained weights have: plain, heavy-tailed, one-sided, with outliers, offset."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(outputs, inputs))
    w[1] = rng.laplace(size=inputs)
    w[2] = rng.standard_t(2, size=inputs)
    w[3] = np.exp(rng.normal(size=inputs))
    w[4, 7] = 8.0
    w[5, :2] = (40.0, -30.0)
    w[6] = rng.uniform(2, 3, inputs)
    w[7] = rng.uniform(-1, 0, inputs)
    w[8] *= 1e-4
    return w.astype(np.float32)


def row_errors(q: QTensor, w: np.ndarray, importance: np.ndarray | float = 1.0) -> np.ndarray:
    """Squared error of each output channel, (..., N) float64."""
    return (importance * np.square(np.asarray(q.dequantize(), np.float64) - w)).sum(-1)


def brute_force_row(row: np.ndarray, bits: int) -> float:
    """Least squared error over all zero points and a fine grid of scales: what no search can beat by much."""
    levels = 2**bits - 1
    span = max(row.max(), 0) - min(row.min(), 0)
    best = np.inf
    for zero_point in range(levels + 1):
        for scale in span / levels * np.linspace(0.1, 1.2, 221):
            codes = np.clip(np.rint(row / scale) + zero_point, 0, levels)
            best = min(best, float(np.square((codes - zero_point) * scale - row).sum()))
    return best


# --- weights


@every_width
def test_the_search_is_never_worse_than_the_extremes(bits: int) -> None:
    w = weights()
    searched, extremes = row_errors(quantize_weight(w, bits, "mse"), w), row_errors(quantize_weight(w, bits, "minmax"), w)
    assert (searched <= extremes * TIE).all()
    assert searched.sum() < extremes.sum()


@pytest.mark.parametrize(("bits", "inputs"), [*((bits, 257) for bits in BITS), (4, 4608)])
def test_the_search_is_never_worse_than_the_percentiles(bits: int, inputs: int) -> None:
    w = weights(inputs=inputs)
    searched, percentile = row_errors(quantize_weight(w, bits, "mse"), w), row_errors(quantize_weight(w, bits, "percentile"), w)
    assert (searched <= percentile * TIE).all(), np.round(searched / percentile, 3)
    assert searched.sum() < percentile.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_comes_close_to_brute_force(bits: int) -> None:
    w = weights()
    searched = row_errors(quantize_weight(w, bits, "mse"), w)
    brute = np.array([brute_force_row(row.astype(np.float64), bits) for row in w])
    assert (searched >= brute * 0.97).all(), "brute force over a fine grid was beaten, so this test measures something else"
    assert (searched <= brute * 1.35).all(), np.round(searched / brute, 3)
    assert searched.sum() <= 1.15 * brute.sum()


@every_width
def test_the_extremes_cover_every_weight(bits: int) -> None:
    w = weights()
    q = quantize_weight(w, bits, "minmax")
    step = np.asarray(q.scale)[:, None]
    assert (np.abs(np.asarray(q.dequantize()) - w) <= step / 2 * (1 + 1e-4)).all()
    span = np.abs(w).max(1) / 127 if bits == 8 else (np.maximum(w.max(1), 0) - np.minimum(w.min(1), 0)) / (2**bits - 1)
    np.testing.assert_allclose(q.scale, span, rtol=1e-6)


@every_width
def test_the_percentile_is_the_best_of_three(bits: int) -> None:
    w = weights()[:3]
    levels = 2**bits - 1
    qmin, qmax = (-127, 127) if bits == 8 else (0, levels)
    best = np.full(3, np.inf)
    for level in (0.999, 0.9999, 0.99999):
        low, high = np.minimum(np.quantile(w, 1 - level, axis=1), 0), np.maximum(np.quantile(w, level, axis=1), 0)
        scale = (np.maximum(-low, high) / 127 if bits == 8 else (high - low) / levels)[:, None]
        zero_point = 0 if bits == 8 else np.rint(-low[:, None] / scale)
        codes = np.clip(np.rint(w / scale) + zero_point, qmin, qmax)
        best = np.minimum(best, np.square((codes - zero_point) * scale - w).sum(1))
    np.testing.assert_allclose(row_errors(quantize_weight(w, bits, "percentile"), w), best, rtol=2e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_importance_lowers_the_error_that_it_weighs(bits: int) -> None:
    w = weights()
    importance = np.exp(2 * np.random.default_rng(1).normal(size=w.shape[1])).astype(np.float32)
    alike, weighed = quantize_weight(w, bits), quantize_weight(w, bits, importance=jnp.asarray(importance))
    assert row_errors(weighed, w, importance).sum() < row_errors(alike, w, importance).sum()
    extremes = row_errors(quantize_weight(w, bits, "minmax"), w, importance)
    assert (row_errors(weighed, w, importance) <= extremes * TIE).all()


def test_equal_importance_changes_nothing_and_none_is_harmless() -> None:
    w = weights()
    alike = quantize_weight(w, 4)
    jax.tree.map(np.testing.assert_array_equal, quantize_weight(w, 4, importance=jnp.ones(w.shape[1])), alike)
    unused = quantize_weight(w, 4, importance=jnp.zeros(w.shape[1]))
    assert np.isfinite(unused.dequantize()).all()


def test_importance_belongs_to_its_layer() -> None:
    """Stacked weights (L, N, K) with importance (L, K) are L separate problems."""
    w = np.stack([weights(), weights()[::-1]])
    importance = np.exp(np.random.default_rng(2).normal(size=(2, w.shape[-1]))).astype(np.float32)
    stacked = quantize_weight(w, 4, importance=importance)
    for layer in range(2):
        alone = quantize_weight(w[layer], 4, importance=importance[layer])
        np.testing.assert_allclose(stacked.dequantize()[layer], alone.dequantize(), rtol=1e-5, atol=1e-7)


@every_width
@pytest.mark.parametrize("search", ["mse", "percentile", "minmax"])
def test_degenerate_output_channels(bits: int, search: str) -> None:
    w = weights()
    w[0] = 0
    w[1], w[2] = 0.3, -0.3
    w[4:6] = w[3] * np.array([[1e15], [1e-15]], np.float32)
    q = quantize_weight(w, bits, search)
    scale, back = np.asarray(q.scale), np.asarray(q.dequantize())
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.isfinite(back).all()
    assert (back[0] == 0).all(), "a dead output channel stays zero"
    np.testing.assert_allclose(back[1:3], w[1:3], rtol=1e-5)
    relative = np.sqrt(row_errors(q, w)[3:6] / np.square(w[3:6].astype(np.float64)).sum(1))
    np.testing.assert_allclose(relative, relative[0], rtol=0.01)  # the magnitude of a channel does not matter


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_single_input_is_exact(bits: int) -> None:
    w = np.array([[0.7], [-1.9], [0.0]], np.float32)
    np.testing.assert_allclose(quantize_weight(w, bits).dequantize(), w, rtol=1e-5)


# --- activations


def activation_samples(count: int = 60_000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    normal = rng.normal(size=count)
    logits = 2 * rng.normal(size=(count // 60, 60))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    samples = {
        "normal": normal,
        "laplace": rng.laplace(size=count),
        "heavy": rng.standard_t(3, size=count),
        "after GELU": normal / (1 + np.exp(-1.702 * normal)),
        "softmax": probs.ravel(),
        "far from zero": rng.uniform(2, 3, count),
        "negative": -np.exp(rng.normal(size=count)),
        "one outlier": np.append(normal, 30.0),
        "one far outlier": np.append(normal, 1000.0),
    }
    return {name: values.astype(np.float32) for name, values in samples.items()}


SAMPLES = activation_samples()
every_sample = pytest.mark.parametrize("name", SAMPLES)


def histogram(x: np.ndarray) -> tuple[np.float32, np.float32, np.ndarray]:
    low, high = x.min(), x.max()
    return low, high, np.histogram(x, BINS, (low, high))[0].astype(np.float32)


def mean_square_error(x: np.ndarray, mass: np.ndarray | None, scale: float, zero_point: int, bits: int) -> float:
    """Mean squared error of quantizing ``x`` with these parameters, float64."""
    codes = np.clip(np.rint(x.astype(np.float64) / scale) + zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.average(np.square(scale * (codes - zero_point) - x), weights=mass))


def centers(low: float | np.float32, high: float | np.float32) -> np.ndarray:
    return np.float64(low) + (np.arange(BINS) + 0.5) * (np.float64(high) - low) / BINS


@functools.cache
def all_parameters(bits: int, search: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of all samples, (len(SAMPLES),) each."""
    low, high, counts = (np.stack(part) for part in zip(*map(histogram, SAMPLES.values()), strict=True))
    scale, zero_point = activation_parameters(low, high, counts, bits, search)
    return np.asarray(scale), np.asarray(zero_point)


def parameters(name: str, bits: int, search: str) -> tuple[float, int]:
    index = list(SAMPLES).index(name)
    scale, zero_point = all_parameters(bits, search)
    return float(scale[index]), int(zero_point[index])


@every_width
@every_sample
@pytest.mark.parametrize("other", ["minmax", "percentile"])
def test_the_activation_search_is_never_worse(name: str, bits: int, other: str) -> None:
    x = SAMPLES[name]
    low, high, counts = histogram(x)
    found, given = parameters(name, bits, "mse"), parameters(name, bits, other)
    on_histogram = [mean_square_error(centers(low, high), counts, *p, bits) for p in (found, given)]
    assert on_histogram[0] <= on_histogram[1] * TIE
    on_values = [mean_square_error(x, None, *p, bits) for p in (found, given)]
    within_a_bin = np.square((float(high) - float(low)) / BINS) / 12  # what the histogram cannot tell apart
    assert on_values[0] <= on_values[1] * TIE + within_a_bin


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@every_sample
def test_the_activation_search_comes_close_to_brute_force(name: str, bits: int) -> None:
    x = SAMPLES[name]
    low, high, counts = histogram(x)
    middle = centers(low, high)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = np.inf
    for a in np.linspace(0.05, 1.0, 25) * min(float(low), 0) if low < 0 else [0.0]:
        for b in np.linspace(0.05, 1.0, 25) * max(float(high), 0) if high > 0 else [0.0]:
            scale = (b - a) / (qmax - qmin)
            best = min(best, mean_square_error(middle, counts, scale, qmin + int(np.rint(-a / scale)), bits))
    found = mean_square_error(middle, counts, *parameters(name, bits, "mse"), bits)
    assert found <= 1.08 * best


@every_width
def test_activation_extremes_cover_the_histogram(bits: int) -> None:
    for name, x in SAMPLES.items():
        scale, zero_point = parameters(name, bits, "minmax")
        low, high = min(float(x.min()), 0), max(float(x.max()), 0)
        assert scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-6)
        assert zero_point == -(2 ** (bits - 1)) + round(-low / scale)


@every_sample
def test_the_activation_percentile_is_the_best_of_three(name: str) -> None:
    x = SAMPLES[name]
    best = np.inf
    for level in (0.999, 0.9999, 0.99999):
        low, high = np.quantile(x, [1 - level, level], method="inverted_cdf").astype(np.float64)
        a, b = min(low, 0), max(high, 0)
        scale = (b - a) / 15
        best = min(best, mean_square_error(x, None, scale, -8 + int(np.rint(-a / scale)), 4))
    bin_width = (float(x.max()) - float(x.min())) / BINS
    found = mean_square_error(x, None, *parameters(name, 4, "percentile"), 4)
    assert found == pytest.approx(best, rel=0.1, abs=bin_width**2)


def test_tables_of_histograms_are_searched_one_by_one() -> None:
    """(G, L) histograms give (G, L) parameters, each the same as alone, under jit inside a larger program too."""
    names = ["normal", "softmax", "after GELU", "one outlier", "negative", "heavy"]
    low, high, counts = (np.stack(part) for part in zip(*(histogram(SAMPLES[name]) for name in names), strict=True))
    shaped = low.reshape(3, 2), high.reshape(3, 2), counts.reshape(3, 2, BINS)
    scale, zero_point = jax.jit(lambda *h: activation_parameters(*h, 4))(*shaped)
    assert scale.shape == zero_point.shape == (3, 2)
    assert (scale.dtype, zero_point.dtype) == (jnp.float32, jnp.int32)
    for index, name in enumerate(names):
        alone = parameters(name, 4, "mse")
        assert float(scale.ravel()[index]) == pytest.approx(alone[0], rel=1e-6)
        assert int(zero_point.ravel()[index]) == alone[1]


@pytest.mark.parametrize("search", ["mse", "percentile", "minmax"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_histograms_give_usable_parameters(search: str, bits: int) -> None:
    low = np.array([0.0, 3.0, -3.0, 0.0, -1.0, -1e15, -1e-15, 0.0, -5.0], np.float32)
    high = np.array([0.0, 3.0, -3.0, 2.0, 1.0, 2e15, 2e-15, 1e-15, 0.0], np.float32)
    counts = np.zeros((9, BINS), np.float32)  # as many rows as samples, for which the search is compiled already
    counts[:3, 0] = 50.0  # a constant falls into the first bin
    counts[3, :] = 1.0
    counts[5:] = 1.0  # row 4 saw nothing
    scale, zero_point = (np.asarray(p) for p in activation_parameters(low, high, counts, bits, search))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert (zero_point >= -(2 ** (bits - 1))).all()
    assert (zero_point <= 2 ** (bits - 1) - 1).all()
    assert mean_square_error(np.zeros(1), None, scale[0], zero_point[0], bits) == 0
    for row, value in ((1, 3.0), (2, -3.0)):  # clipping a constant away would be the worst choice
        assert mean_square_error(np.array([value]), None, scale[row], zero_point[row], bits) < 0.01
