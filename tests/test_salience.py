"""Salience, Spearman's rho, SSC and CSB against SciPy and NumPy, plain and compiled."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ptq4dit_jax import salience

STEPS, LAYERS, WIDTH = 5, 3, 48

both_ways = pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["plain", "jit"])
Compiled = Callable[[Callable], Callable]


def saliences(seed: int = 0, width: int = WIDTH, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Salience of activations (S, L, K), heavy-tailed as real ones are, and of weights (L, K)."""
    rng = np.random.default_rng(seed)
    activation = np.exp(rng.normal(size=(STEPS, LAYERS, width)))
    weight = np.exp(0.5 * rng.normal(size=(LAYERS, width)))
    if ties:
        activation, weight = np.ceil(2 * activation), np.ceil(2 * weight)
    return activation.astype(np.float32), weight.astype(np.float32)


def scipy_rho(activation: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spearman's rho of every step and layer, (S, L)."""
    rho = np.empty(activation.shape[:-1])
    for index in np.ndindex(*rho.shape):
        rho[index] = scipy.stats.spearmanr(activation[index], weight[index[1:]]).statistic
    return rho


@both_ways
def test_weight_salience_is_the_largest_magnitude_over_the_outputs(compiled: Compiled) -> None:
    kernel = np.random.default_rng(0).normal(size=(LAYERS, 7, 5)).astype(np.float32)
    expected = np.array([[max(abs(v) for v in row) for row in layer] for layer in kernel])
    np.testing.assert_array_equal(compiled(salience.weight_salience)(kernel), expected)


@both_ways
def test_ranks_equal_scipy(compiled: Compiled) -> None:
    activation, _ = saliences(ties=True)
    np.testing.assert_array_equal(compiled(salience.average_ranks)(activation), scipy.stats.rankdata(activation, axis=-1))


@pytest.mark.parametrize("width", [1, 2, 4608])
def test_ranks_equal_scipy_at_any_width(width: int) -> None:
    activation, _ = saliences(width=width, ties=True)
    np.testing.assert_array_equal(jax.jit(salience.average_ranks)(activation), scipy.stats.rankdata(activation, axis=-1))


@both_ways
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_spearman_equals_scipy(compiled: Compiled, ties: bool) -> None:
    activation, weight = saliences(1, ties=ties)
    rho = compiled(salience.spearman)(activation, np.broadcast_to(weight, activation.shape))
    np.testing.assert_allclose(rho, scipy_rho(activation, weight), atol=1e-6)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("width", [1152, 4608])
def test_spearman_equals_scipy_at_the_widths_of_dit_xl(ties: bool, width: int) -> None:
    activation, weight = saliences(1, width, ties)
    rho = jax.jit(salience.spearman)(activation, np.broadcast_to(weight, activation.shape))
    np.testing.assert_allclose(rho, scipy_rho(activation, weight), atol=1e-6)


@both_ways
def test_spearman_of_monotone_maps_is_one(compiled: Compiled) -> None:
    x, _ = saliences(2)
    np.testing.assert_allclose(compiled(salience.spearman)(x, x**3), 1.0, atol=1e-6)
    np.testing.assert_allclose(compiled(salience.spearman)(x, 1 / x), -1.0, atol=1e-6)


@both_ways
def test_spearman_of_a_constant_is_zero(compiled: Compiled) -> None:
    activation, _ = saliences()
    constant = np.full_like(activation, 3.0)
    for pair in ((constant, activation), (activation, constant), (constant, constant)):
        np.testing.assert_array_equal(compiled(salience.spearman)(*pair), np.zeros((STEPS, LAYERS)))


@both_ways
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_ssc_equals_numpy(compiled: Compiled, temperature: float, ties: bool) -> None:
    activation, weight = saliences(3, ties=ties)
    s_rho, eta, rho = compiled(salience.ssc_salience)(activation, weight, temperature)

    expected_rho = scipy_rho(activation, weight)
    expected_eta = scipy.special.softmax(-expected_rho / temperature, axis=0)
    np.testing.assert_allclose(rho, expected_rho, atol=1e-6)
    np.testing.assert_allclose(eta, expected_eta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(s_rho, np.einsum("sl,slk->lk", expected_eta, activation), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(eta).sum(0), 1.0, atol=1e-6)


def test_eta_is_within_1e_6_at_the_papers_temperature() -> None:
    activation, weight = saliences(3)
    _, eta, _ = salience.ssc_salience(jnp.asarray(activation), jnp.asarray(weight))
    np.testing.assert_allclose(eta, scipy.special.softmax(-scipy_rho(activation, weight), axis=0), atol=1e-6)


def test_the_step_that_agrees_least_counts_most() -> None:
    weight = np.arange(1, 9, dtype=np.float32)
    activation = np.stack([weight, weight[::-1], np.roll(weight, 4)])
    _, eta, rho = jax.jit(salience.ssc_salience)(activation, weight)
    assert rho[0] == pytest.approx(1)
    assert rho[1] == pytest.approx(-1)
    assert np.argmax(eta) == 1
    assert np.argmin(eta) == 0


def test_rows_weigh_as_steps_do() -> None:
    """The official code's mode: (R, K) per layer, softmax over the rows."""
    rng = np.random.default_rng(4)
    rows, weight = np.exp(rng.normal(size=(24, WIDTH))).astype(np.float32), saliences()[1][0]
    s_rho, eta, rho = jax.jit(salience.ssc_salience)(rows, weight)
    expected_rho = np.array([scipy.stats.spearmanr(row, weight).statistic for row in rows])
    expected_eta = scipy.special.softmax(-expected_rho)
    assert eta.shape == (24,)
    np.testing.assert_allclose(rho, expected_rho, atol=1e-6)
    np.testing.assert_allclose(eta, expected_eta, atol=1e-6)
    np.testing.assert_allclose(s_rho, expected_eta @ rows, rtol=1e-6)


@both_ways
@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
def test_balancing_factors_equal_numpy(compiled: Compiled, exponent: float) -> None:
    activation, weight = saliences(5)
    b = compiled(salience.balancing_factors)(activation[0], weight, exponent)
    expected = (weight.astype(np.float64) / activation[0]) ** exponent
    np.testing.assert_allclose(b, expected, rtol=1e-6)


@both_ways
@pytest.mark.parametrize("migration", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_factors_equal_numpy(compiled: Compiled, migration: float) -> None:
    activation, weight = saliences(5)
    b = compiled(salience.smoothing_factors)(activation[0], weight, migration)
    expected = weight.astype(np.float64) ** (1 - migration) / activation[0] ** migration
    np.testing.assert_allclose(b, expected / scipy.stats.gmean(expected, axis=-1, keepdims=True), rtol=1e-5)


@both_ways
@pytest.mark.parametrize("migration", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_undoes_what_makes_a_channel_salient(compiled: Compiled, migration: float) -> None:
    """A channel that is 30 times larger, whose weights take it back, is balanced to what it was, up to one factor for all."""
    activation, weight = saliences(6)
    gain = np.where(np.arange(WIDTH) % 17 == 3, np.float32(30), np.float32(1))
    before = activation[0] * compiled(salience.smoothing_factors)(activation[0], weight, migration)
    after = activation[0] * gain * compiled(salience.smoothing_factors)(activation[0] * gain, weight / gain, migration)
    ratio = np.asarray(after / before)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)


@both_ways
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-7], ids=["zero", "tiny", "below the floor"])
def test_smoothing_leaves_a_dead_channel_alone(compiled: Compiled, level: float) -> None:
    activation, weight = (a.copy() for a in saliences(7))
    activation[0, :, 5] *= level
    weight[:, 9] *= level
    activation[0, 1] = 0
    b = np.asarray(compiled(salience.smoothing_factors)(activation[0], weight, 0.25))
    assert np.isfinite(b).all()
    np.testing.assert_array_equal(b[:, [5, 9]], 1)
    np.testing.assert_array_equal(b[1], 1)
    alive = np.setdiff1d(np.arange(WIDTH), [5, 9])
    np.testing.assert_allclose(scipy.stats.gmean(b[0, alive]), 1, rtol=1e-5)


@both_ways
def test_balancing_makes_activations_and_weights_equally_salient(compiled: Compiled) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(200, WIDTH)).astype(np.float32) * np.exp(2 * rng.normal(size=WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, 30)).astype(np.float32)
    s_x, s_w = np.abs(x).max(0), np.abs(kernel).max(1)
    b = np.asarray(compiled(salience.balancing_factors)(s_x, s_w))

    balanced_x, balanced_w = np.abs(x * b).max(0), np.abs(kernel / b[:, None]).max(1)
    np.testing.assert_allclose(balanced_x, np.sqrt(s_x * s_w), rtol=1e-5)
    np.testing.assert_allclose(balanced_w, np.sqrt(s_x * s_w), rtol=1e-5)
    np.testing.assert_allclose((x * b) @ (kernel / b[:, None]), x @ kernel, rtol=1e-4, atol=1e-4)
    assert max(balanced_x.max(), balanced_w.max()) <= max(s_x.max(), s_w.max()), "eq. 8: the larger extreme cannot grow"


@both_ways
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-7], ids=["zero", "tiny", "below the floor"])
@pytest.mark.parametrize("dead", ["activation", "weight", "both"])
def test_a_dead_channel_is_left_alone(compiled: Compiled, level: float, dead: str) -> None:
    activation, weight = (a.copy() for a in saliences(7))
    activation[:, 0, 5] *= level if dead != "weight" else 1
    weight[0, 5] *= level if dead != "activation" else 1

    s_rho, eta, rho = compiled(salience.ssc_salience)(activation, weight)
    b = np.asarray(compiled(salience.balancing_factors)(s_rho, weight))
    assert b[0, 5] == 1
    assert all(np.isfinite(array).all() for array in (s_rho, eta, rho, b))
    others = np.arange(WIDTH) != 5
    np.testing.assert_allclose(b[0, others], np.sqrt(weight[0, others] / np.asarray(s_rho)[0, others]), rtol=1e-6)
    np.testing.assert_allclose(b[1:], np.sqrt(weight[1:] / np.asarray(s_rho)[1:]), rtol=1e-6)


@both_ways
@pytest.mark.parametrize("value", [0.0, 2.0], ids=["all dead", "constant"])
def test_constant_channels_give_finite_results(compiled: Compiled, value: float) -> None:
    _, weight = saliences(8)
    activation = np.full((STEPS, LAYERS, WIDTH), value, np.float32)
    s_rho, eta, rho = compiled(salience.ssc_salience)(activation, weight)
    b = compiled(salience.balancing_factors)(s_rho, weight)
    np.testing.assert_array_equal(rho, np.zeros((STEPS, LAYERS)))
    np.testing.assert_allclose(eta, 1 / STEPS, rtol=1e-6)
    np.testing.assert_allclose(s_rho, value, rtol=1e-6)
    np.testing.assert_allclose(b, np.sqrt(weight / value) if value else 1.0, rtol=1e-6)


def test_a_single_channel_and_extreme_magnitudes_stay_finite() -> None:
    for activation, weight in ((1e15, 1e-15), (1e-15, 1e15), (0.0, 1.0)):
        x, w = np.full((STEPS, 1), activation, np.float32), np.full((1,), weight, np.float32)
        s_rho, eta, rho = jax.jit(salience.ssc_salience)(x, w)
        b = jax.jit(salience.balancing_factors)(s_rho, w)
        assert all(np.isfinite(array).all() for array in (s_rho, eta, rho, b))
        np.testing.assert_allclose(b, np.sqrt(weight / activation) if activation else 1.0, rtol=1e-5)


@both_ways
def test_equalizing_gives_every_channel_the_same_extreme(compiled: Compiled) -> None:
    _, s = saliences(9)
    s = s.copy()
    s[1, 3] = 0
    factor = np.asarray(compiled(salience.equalizing_factors)(s))
    alive = s > 0
    np.testing.assert_allclose((s * factor)[alive], np.broadcast_to(s.mean(-1, keepdims=True), s.shape)[alive], rtol=1e-6)
    assert factor[1, 3] == 1
    np.testing.assert_array_equal(compiled(salience.equalizing_factors)(jnp.zeros_like(s)), np.ones_like(s))
