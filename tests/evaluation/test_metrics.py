"""Metrics against NumPy and SciPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import metrics


def _images(seed: int, shape: tuple[int, ...], noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.uniform(-1, 1, shape).astype(np.float32)
    return reference, (reference + noise * rng.standard_normal(shape)).astype(np.float32)


def _ssim_by_ndimage(reference: np.ndarray, image: np.ndarray, window: int) -> float:
    """SSIM of one channel (H, W) as 8-bit intensities, with SciPy's filters in float64, cropped to whole windows."""
    sigma, half = 1.5 * window / 11, window // 2

    def blur(x: np.ndarray) -> np.ndarray:
        full = scipy.ndimage.gaussian_filter(x, sigma, radius=half, mode="reflect")
        return full[half : x.shape[0] - half, half : x.shape[1] - half]

    r, i = (127.5 * (x.astype(np.float64) + 1) for x in (reference, image))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mr, mi = blur(r), blur(i)
    var_r, var_i, cov = blur(r**2) - mr**2, blur(i**2) - mi**2, blur(r * i) - mr * mi
    return float((((2 * mr * mi + c1) * (2 * cov + c2)) / ((mr**2 + mi**2 + c1) * (var_r + var_i + c2))).mean())


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("axis", [None, 1, (0, 2)])
def test_sqnr_is_the_power_ratio_in_decibels(axis, jit):
    reference, other = _images(0, (3, 4, 5), 0.1)
    expected = 10 * np.log10(
        (reference.astype(np.float64) ** 2).sum(axis) / ((reference - other).astype(np.float64) ** 2).sum(axis)
    )
    function = jax.jit(metrics.sqnr_db, static_argnames="axis") if jit else metrics.sqnr_db
    np.testing.assert_allclose(function(reference, other, axis=axis), expected, rtol=1e-5)


def test_sqnr_at_the_edges():
    ones, zeros = np.ones(4), np.zeros(4)
    assert metrics.sqnr_db(ones, ones) == np.inf
    assert metrics.sqnr_db(zeros, zeros) == np.inf
    assert metrics.sqnr_db(zeros, ones) == -np.inf
    assert np.isnan(metrics.sqnr_db(ones, np.full(4, np.nan)))
    np.testing.assert_allclose(metrics.sqnr_db(10 * ones, 9 * ones), 20.0, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_the_two_figures_over_steps_are_the_mean_of_decibels_and_the_ratio_of_sums(jit):
    """Of predictions whose power and error differ by step, as those of a sampler do."""
    rng = np.random.default_rng(8)
    reference = rng.normal(size=(4, 3, 5)) * np.array([1.0, 0.9, 0.6, 0.1])[:, None, None]
    other = reference + rng.normal(size=(4, 3, 5)) * np.array([0.001, 0.002, 0.01, 0.03])[:, None, None]
    power = np.array([sum(value**2 for value in step.ravel()) for step in reference])
    error = np.array([sum(value**2 for value in step.ravel()) for step in other - reference])
    decibels = [10 * np.log10(p / e) for p, e in zip(power, error, strict=True)]
    got = (jax.jit(metrics.steps_sqnr) if jit else metrics.steps_sqnr)(reference, other)
    np.testing.assert_allclose(got.step_db, decibels, rtol=1e-4)
    np.testing.assert_allclose(got.mean_db, sum(decibels) / 4, rtol=1e-4)
    np.testing.assert_allclose(got.pooled_db, 10 * np.log10(power.sum() / error.sum()), rtol=1e-4)
    assert abs(got.mean_db - got.pooled_db) > 5


def test_sqnr_of_half_precision_is_computed_in_float32():
    reference = jnp.full((4096,), 1.0, jnp.bfloat16)
    other = reference.at[0].set(1.5)
    np.testing.assert_allclose(metrics.sqnr_db(reference, other), 10 * np.log10(4096 / 0.25), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_psnr_per_image(jit):
    reference, other = _images(1, (5, 8, 8, 3), 0.2)
    other[2] = reference[2]
    mse = ((reference - other).astype(np.float64) ** 2).reshape(5, -1).mean(1)
    with np.errstate(divide="ignore"):
        expected = 10 * np.log10(4 / mse)
    function = jax.jit(metrics.psnr_db) if jit else metrics.psnr_db
    got = function(reference, other)
    assert got.shape == (5,)
    assert got[2] == np.inf
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("side", "window"), [(32, 11), (11, 11), (10, 9), (8, 7), (3, 3), (1, 1)])
def test_ssim_against_scipy(side, window, jit):
    reference, other = _images(2, (3, side, side, 2), 0.3)
    other[0] = reference[0]
    expected = [np.mean([_ssim_by_ndimage(reference[n, ..., c], other[n, ..., c], window) for c in range(2)]) for n in range(3)]
    got = (jax.jit(metrics.ssim) if jit else metrics.ssim)(reference, other)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(got[0], 1.0, atol=1e-6)


def test_ssim_of_images_that_are_not_square():
    reference, other = _images(3, (1, 8, 20, 1), 0.3)
    transposed = metrics.ssim(reference.transpose(0, 2, 1, 3), other.transpose(0, 2, 1, 3))
    np.testing.assert_allclose(metrics.ssim(reference, other), transposed, rtol=1e-5)


def test_ssim_of_opposite_images_is_negative():
    reference, _ = _images(4, (2, 16, 16, 1), 0.0)
    assert (metrics.ssim(reference, -reference) < 0).all()


def test_bootstrap_agrees_with_scipy_and_with_the_normal_law():
    values = np.random.default_rng(5).normal(30, 4, 400)
    mean, low, high = metrics.bootstrap_interval(values, 7, resamples=4000)
    reference = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=8).confidence_interval
    np.testing.assert_allclose(mean, values.mean())
    np.testing.assert_allclose([low, high], [reference.low, reference.high], atol=0.05)
    np.testing.assert_allclose((high - low) / 2, 1.96 * values.std() / 20, rtol=0.06)


def test_bootstrap_is_deterministic_and_follows_level_and_seed():
    values = np.random.default_rng(6).normal(size=50)
    first = metrics.bootstrap_interval(values, 1)
    assert first == metrics.bootstrap_interval(values, 1)
    assert first != metrics.bootstrap_interval(values, 2)
    narrow = metrics.bootstrap_interval(values, 1, level=0.5)
    assert first.low < narrow.low < narrow.mean < narrow.high < first.high


def test_bootstrap_in_chunks_is_the_same_as_at_once(monkeypatch):
    values = np.random.default_rng(7).normal(size=30)
    whole = metrics.bootstrap_interval(values, 1, resamples=100)
    monkeypatch.setattr(metrics, "_BOOTSTRAP_CHUNK", 210)
    assert metrics.bootstrap_interval(values, 1, resamples=100) == whole


def test_bootstrap_with_infinities():
    infinite: Any = [np.inf, np.inf]  # a list is taken too
    assert metrics.bootstrap_interval(infinite) == (np.inf, np.inf, np.inf)
    with_third = lambda value: metrics.bootstrap_interval(np.array([30.0, 40.0, value]), 3)
    assert with_third(np.inf) == with_third(40.0)
    assert with_third(-np.inf) == with_third(30.0)
    assert metrics.bootstrap_interval(np.array([35.0])) == (35.0, 35.0, 35.0)
    assert np.isnan(metrics.bootstrap_interval(np.array([1.0, np.nan]))).all()
    assert np.isnan(metrics.bootstrap_interval(np.array([np.inf, -np.inf]))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.sqnr_db(np.ones(3), np.ones((1, 3))), r"one shape, not \(3,\) and \(1, 3\)"),
        (lambda: metrics.psnr_db(np.ones((8, 8, 1)), np.ones((8, 8, 1))), r"\(N, H, W, C\), not \(8, 8, 1\)"),
        (lambda: metrics.ssim(np.ones((8, 8)), np.ones((8, 8))), r"\(N, H, W, C\)"),
        (lambda: metrics.bootstrap_interval(np.array([])), "at least one value"),
        (lambda: metrics.bootstrap_interval(np.array([1.0]), level=1.5), "not level 1.5"),
        (lambda: metrics.bootstrap_interval(np.array([1.0]), resamples=0), "and 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(Ptq4ditError, match=message):
        call()
