"""Extreme but finite values: quantized as well as the widths allow, measured against searches in NumPy's float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import MOST_POWER, ChannelExtremes
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import unit_exponent
from ptq4dit_jax.ranges import activation_parameters, quantize_weight

KEY = jax.random.key(0)
#: Beyond 1.8e19 and below 1e-19, squares are none of float32's.
SIZES = (1e-30, 1e-22, 1e6, 3e20, 1e30)


def decibels(exact: np.ndarray, approximation: Any) -> float:
    exact = np.asarray(exact, np.float64)
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - np.asarray(approximation, np.float64)).sum())


# Arrays.


def best_symmetric(row: np.ndarray) -> np.ndarray:
    """The best of many scales of 8-bit symmetric codes, of one output channel (K,)."""
    scales = np.abs(row).max() / 127 * np.linspace(0.3, 1.1, 801)[:, None]
    tried = np.clip(np.rint(row / scales), -127, 127) * scales
    return tried[np.square(tried - row).sum(1).argmin()]


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_any_size_are_searched(size: float) -> None:
    """All rows large or small, and rows of all sizes in one weight."""
    w = np.random.default_rng(0).standard_normal((4, 96)) * np.array([size, 1.0, size, 1.0])[:, None]
    w[2, 5] *= 50
    w = w.astype(np.float32)
    found = quantize_weight(w, 8).dequantize()
    for row, approximation in zip(w.astype(np.float64), np.asarray(found), strict=True):
        assert decibels(row, approximation) > decibels(row, best_symmetric(row)) - 1


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("search", ["mse", "percentile", "minmax"])
def test_powers_of_two_change_no_code(bits: int, search: Any) -> None:
    w = np.random.default_rng(1).standard_normal((6, 70)).astype(np.float32)
    importance = np.random.default_rng(2).uniform(size=70).astype(np.float32)
    plain = quantize_weight(w, bits, search, importance)
    exponents = np.array([0, 90, -70, 3, 66, -66])
    scaled = quantize_weight(np.ldexp(w, exponents[:, None]), bits, search, np.ldexp(importance, 100))
    np.testing.assert_array_equal(scaled.values, plain.values)
    np.testing.assert_array_equal(scaled.scale, np.ldexp(plain.scale, exponents))


def test_importance_beyond_the_squares_of_float32_still_counts() -> None:
    w = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    importance = np.random.default_rng(4).uniform(0.1, 10, 64).astype(np.float32)
    values = [quantize_weight(w * 1e10, 4, importance=importance * np.float32(factor)).values for factor in (1, 2.0**120)]
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-40])
def test_empty_channels_become_zeros(bits: int, value: float) -> None:
    w = np.random.default_rng(5).standard_normal((3, 32)).astype(np.float32)
    w[1] = value
    found = quantize_weight(w, bits)
    assert (np.asarray(found.scale) > 0).all()
    np.testing.assert_array_equal(found.dequantize()[1], np.zeros(32))


def best_affine(x: np.ndarray) -> np.ndarray:
    """The best of many ranges of 8-bit codes for a tensor."""
    best, least = x, np.inf
    for low in min(x.min(), 0) * np.linspace(0.05, 1, 40):
        for high in max(x.max(), 0) * np.linspace(0.05, 1, 40):
            scale = (high - low) / 255
            zero = np.rint(-low / scale)
            tried = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
            if (error := np.square(tried - x).sum()) < least:
                best, least = tried, error
    return best


@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_activations_of_any_size_are_searched(size: float, outlier: float) -> None:
    x = np.random.default_rng(6).standard_normal(5000)
    x[:40] *= outlier
    x = (x * size / outlier).astype(np.float32)
    counts, edges = np.histogram(x.astype(np.float64), 2048)
    scale, zero_point = activation_parameters(
        jnp.float32(edges[0]), jnp.float32(edges[-1]), jnp.asarray(counts, jnp.float32), 8
    )
    scale, zero_point = float(scale), int(zero_point)
    wide = x.astype(np.float64)
    found = (np.clip(np.rint(wide / scale) + zero_point, -128, 127) - zero_point) * scale
    assert decibels(wide, found) > decibels(wide, best_affine(wide)) - 0.3


@pytest.mark.makes_nan
def test_a_mean_square_beyond_float32_counts_as_the_most() -> None:
    x = np.array([[[1e30, 3.0, np.nan, 0.0]]], np.float32)
    start = ChannelExtremes(low=jnp.full(4, jnp.inf), high=jnp.full(4, -jnp.inf), power=jnp.zeros(4))
    seen = start.observe(jnp.asarray(x))
    np.testing.assert_array_equal(seen.power, [MOST_POWER, 9.0, np.nan, 0.0])
    np.testing.assert_array_equal(seen.high, x[0, 0])


@pytest.mark.parametrize("axis", [None, -1, (0, 1)])
def test_units_keep_every_digit(axis: Any) -> None:
    x = np.random.default_rng(7).standard_normal((3, 4, 5)).astype(np.float32) * np.float32(1e-25)
    x[1] *= np.float32(1e33)
    exponent = np.asarray(unit_exponent(jnp.asarray(x), axis))
    unit = np.ldexp(x.astype(np.float64), -exponent)
    largest = np.abs(unit).max(axis)
    assert ((largest >= 0.5) & (largest < 1)).all()
    np.testing.assert_array_equal(unit_exponent(jnp.array([0.0, 0.0])), [0])
    np.testing.assert_array_equal(unit_exponent(jnp.array([1.0, jnp.inf])), [0])


@pytest.mark.parametrize("size", SIZES)
def test_metrics_of_values_of_any_size(size: float) -> None:
    rng = np.random.default_rng(8)
    exact = (rng.standard_normal((3, 50)) * size).astype(np.float32)
    other = (exact * (1 + 1e-2 * rng.standard_normal((3, 50)))).astype(np.float32)
    found = metrics.steps_sqnr(exact, other)
    np.testing.assert_allclose(found.step_db, [decibels(*pair) for pair in zip(exact, other, strict=True)], rtol=1e-4)
    np.testing.assert_allclose(found.pooled_db, decibels(exact, other), rtol=1e-4)
    pooled = metrics.pooled_db([metrics.powers(*pair) for pair in zip(exact, other, strict=True)])
    np.testing.assert_allclose(pooled, decibels(exact, other), rtol=1e-4)


# Models.


def three_steps(model: FloatDiT) -> ptq.CalibrationData:
    x = np.random.default_rng(9).standard_normal((3, 8, *model.config.image_shape)).astype(np.float32)
    y = np.tile(np.arange(8, dtype=np.int32) % 6, (3, 1))
    return ptq.CalibrationData(x=x, t=np.array([900, 400, 0], np.int32), y=y)


def changed(path: str, change: Callable[[np.ndarray], Any]) -> FloatDiT:
    model = tiny_model()
    params = jax.tree.map(np.array, model.params)
    *parents, last = path.split("/")
    tree = params
    for name in parents:
        tree = tree[name]
    tree[last] = np.asarray(change(tree[last]), np.float32)
    return dataclasses.replace(model, params=params)


def quality(model: FloatDiT, **settings: Any) -> float:
    q = ptq.quantize(
        model,
        ptq.QuantConfig.of(**PLAIN, **settings),
        key=KEY,
        calibration=three_steps(model),
        keep_poor=True,
    )
    value = q.provenance.facts["quality"]["sqnr_mean_db"]
    return np.inf if value is None else value


@pytest.fixture(scope="module")
def plain() -> float:
    return quality(tiny_model())


@pytest.mark.parametrize("size", [1e25, 1e30, 1e-25])
def test_a_last_layer_of_any_size_costs_nothing(size: float, plain: float) -> None:
    """The prediction is as much larger; its bias is left out, or a small one would be all there is."""
    model = changed("final/kernel", lambda w: w * size)
    final = {**model.params["final"], "bias": 0 * model.params["final"]["bias"]}
    assert quality(dataclasses.replace(model, params={**model.params, "final": final})) > plain - 1


@pytest.mark.parametrize("layer", ["proj", "fc1", "fc2"])
def test_layers_of_1e30_are_quantized(layer: str, plain: float) -> None:
    """What they add to the hidden state is all of it, and the norms behind overflow, in the float model too."""
    assert quality(changed(f"blocks/{layer}/kernel", lambda w: w * 1e30)) > plain - 1


@pytest.mark.parametrize(
    "layer", ["blocks/qkv", "blocks/proj", "blocks/fc1", "blocks/fc2", "blocks/adaLN", "time_fc2", "final"]
)
def test_layers_of_zeros_are_quantized(layer: str, plain: float) -> None:
    assert quality(changed(f"{layer}/kernel", np.zeros_like)) > plain - 3
