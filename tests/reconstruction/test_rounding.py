"""AdaRound's variables against NumPy: where they start, what they decide, and that no weight moves further than one code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.ranges import quantize_weight
from ptq4dit_jax.reconstruction import rounding
from ptq4dit_jax.reconstruction.rounding import RoundedKernel

BITS = range(2, 9)


def kernel_of(seed: int = 0, shape: tuple[int, ...] = (24, 10)) -> np.ndarray:
    kernel = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    kernel[..., 3, 4] = 9.0  # outside the range that the search chooses
    kernel[..., 5] = 0.0  # a dead output channel
    return kernel


def rounded(bits: int, seed: int = 0) -> tuple[np.ndarray, RoundedKernel, jax.Array, np.ndarray]:
    """The kernel, its fixed part, its variables, and the centered codes (K, N) that the range search chose."""
    kernel = kernel_of(seed)
    weight = jax.jit(quantize_weight, static_argnums=1)(kernel.T, bits)
    fixed, variables = jax.jit(RoundedKernel.of)(kernel, weight)
    return kernel, fixed, variables, np.asarray(weight.codes()).T.astype(int)


@pytest.mark.parametrize("bits", BITS)
def test_at_the_start_the_soft_kernel_is_the_float_kernel_within_the_range(bits):
    kernel, fixed, variables, _ = rounded(bits)
    scale, low, high = (np.asarray(a, np.float64) for a in (fixed.scale, fixed.low, fixed.high))
    expected = scale * np.clip(kernel / scale, low, high)
    np.testing.assert_allclose(fixed.soft(variables), expected, atol=2e-6 * 9)


@pytest.mark.parametrize("bits", BITS)
def test_at_the_start_the_decision_is_the_nearest_code(bits):
    kernel, fixed, variables, codes = rounded(bits)
    position = kernel.astype(np.float64) / np.asarray(fixed.scale, np.float64)
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-4
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(np.asarray(fixed.codes(variables))[clear], codes[clear])


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_were_decided_for_a_target_may_move_towards_it(bits):
    """Codes that are up to two steps from the nearest, as closed-form rounding chooses them."""
    kernel, fixed, _, codes = rounded(bits)
    low, high, scale = (np.asarray(a, np.float64) for a in (fixed.low, fixed.high, fixed.scale))
    decided = np.clip(codes + np.random.default_rng(1).integers(-2, 3, codes.shape), low, high).astype(int)
    if 4 < bits < 8:  # there the codes in use are the range
        decided[0], decided[1] = low, high
    zero_point = np.zeros(10, np.int32) if bits == 8 else -low.astype(np.int32)
    weight = QTensor.from_codes(jnp.asarray(decided.T + zero_point[:, None]), fixed.scale, jnp.asarray(zero_point), bits)
    around, variables = jax.jit(RoundedKernel.around)(kernel, weight)
    np.testing.assert_array_equal(around.codes(variables), decided)
    position = kernel / scale
    towards = np.clip(decided + np.sign(position - decided), low, high)
    soft = np.asarray(around.soft(variables), np.float64) / scale
    expected = decided + rounding.LEANING * np.clip(position - decided, -1, 1) * (towards != decided)
    np.testing.assert_allclose(soft, expected, atol=1e-5 * 2**bits)
    moved = around.codes(jnp.where(variables >= 0, -1.0, 1.0).astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(moved)[position != decided], towards[position != decided])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_weight_moves_to_a_neighbouring_code_at_most(bits, seed):
    kernel, fixed, _, codes = rounded(bits, seed)
    variables = 3 * np.random.default_rng(seed + 10).standard_normal(kernel.shape).astype(np.float32)
    moved = np.asarray(jax.jit(RoundedKernel.codes)(fixed, variables)).astype(int)
    assert np.abs(moved - codes).max() == 1
    assert np.all((moved >= np.asarray(fixed.low)) & (moved <= np.asarray(fixed.high)))
    position = kernel / np.asarray(fixed.scale)
    inside = (position >= np.asarray(fixed.low)) & (position <= np.asarray(fixed.high))
    assert np.abs(moved - position)[inside].max() < 1 + 1e-5
    assert moved[3, 4] == np.asarray(fixed.high)[4]  # far outside: stays at the end


@pytest.mark.parametrize("bits", BITS)
def test_what_is_packed_is_what_was_decided(bits):
    kernel, fixed, _, _ = rounded(bits)
    variables = np.random.default_rng(3).standard_normal(kernel.shape).astype(np.float32)
    packed = jax.jit(RoundedKernel.pack)(fixed, variables)
    assert packed.bits == bits
    assert packed.packed == (bits <= 4)
    np.testing.assert_array_equal(packed.codes().T, fixed.codes(jnp.asarray(variables)))
    expected = np.asarray(fixed.codes(jnp.asarray(variables))) * np.asarray(fixed.scale, np.float64)
    np.testing.assert_allclose(packed.dequantize().T, expected, rtol=1e-6)


def test_the_stretched_sigmoid_and_its_inverse():
    variables = np.linspace(-6, 6, 101)
    expected = np.clip(1.2 / (1 + np.exp(-variables)) - 0.1, 0, 1)
    np.testing.assert_allclose(jax.jit(rounding.stretched_sigmoid)(variables), expected, atol=1e-6)
    part = np.linspace(0, 1, 51).astype(np.float32)
    np.testing.assert_allclose(
        rounding.stretched_sigmoid(rounding.inverse_stretched_sigmoid(jnp.asarray(part))), part, atol=1e-6
    )


@pytest.mark.parametrize("exponent", [2.0, 20.0])
def test_indecision(exponent):
    variables = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    h = np.clip(1.2 / (1 + np.exp(-variables)) - 0.1, 0, 1)
    expected = (1 - np.abs(2 * h - 1) ** exponent).sum()
    assert float(jax.jit(rounding.indecision)(variables, jnp.float32(exponent))) == pytest.approx(expected, rel=1e-5)
    decided = jnp.where(variables > 0, jnp.float32(5), jnp.float32(-5))
    assert float(rounding.indecision(decided, jnp.float32(exponent))) == 0
    gradient = jax.grad(lambda v: rounding.indecision(v, jnp.float32(exponent)))(jnp.zeros(3, jnp.float32))
    assert np.isfinite(gradient).all()  # at h = 1/2, where |2 h - 1| has a corner


def test_the_gradient_reaches_weights_that_may_move_and_no_others():
    _, fixed, variables, _ = rounded(4)
    gradient = np.asarray(jax.grad(lambda v: fixed.soft(v).sum())(variables))
    assert gradient[3, 4] == 0
    others = np.delete(gradient, [4, 5], axis=1)
    assert (others > 0).mean() > 0.9
