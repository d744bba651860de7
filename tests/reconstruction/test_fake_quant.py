"""Straight-through fake quantization: values against the quantizer of the engine, gradients against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.reconstruction.fake_quant import fake_quant, for_rows


def batch(shape: tuple[int, ...] = (4, 6, 8)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def table(bits: int = 8, balance: np.ndarray | None = None) -> ActQuantizer:
    """Two groups of steps whose ranges cut off part of the values."""
    return ActQuantizer(
        scale=jnp.float32([0.01, 0.02]) * 2 ** (8 - bits),
        zero_point=jnp.int32([3, -1]),
        balance=None if balance is None else jnp.asarray(balance),
        bits=bits,
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("balanced", [False, True])
def test_values_are_those_of_the_quantizer(bits, balanced):
    x = batch()
    act = table(bits, np.linspace(0.5, 2, 8).astype(np.float32) if balanced else None)
    group = jnp.array([0, 1, 1, 0])
    made = jax.jit(lambda x: for_rows({"s": act}, {"s": jnp.zeros(2, jnp.float32)}, group)["s"](x))(x)
    np.testing.assert_allclose(made, act.at_group(group)(jnp.asarray(x)), rtol=1e-6, atol=1e-7)


def test_learned_scales_multiply_the_table():
    x, act = batch(), table()
    log_scale = jnp.float32([0.3, -0.2])
    made = for_rows({"s": act}, {"s": log_scale}, jnp.array([1, 1, 0, 0]))["s"](x)
    wider = act.replace(scale=act.static_range.scale * np.exp([0.3, -0.2]).astype(np.float32))
    np.testing.assert_allclose(made, wider.at_group(jnp.array([1, 1, 0, 0]))(jnp.asarray(x)), rtol=1e-5, atol=1e-6)


def test_gradients_pass_straight_through_the_rounding():
    x, g = batch(), np.random.default_rng(1).standard_normal((4, 6, 8)).astype(np.float32)
    scale, zero_point = np.array([0.01, 0.02, 0.005, 0.03], np.float32), np.array([3, -1, 0, 100])
    rows = lambda a: jnp.asarray(a).reshape(4, 1, 1)
    value = lambda x, s: (fake_quant(x, s, rows(zero_point), 8) * g).sum()
    d_x, d_scale = jax.jit(jax.grad(value, argnums=(0, 1)))(x, rows(scale))

    position = x.astype(np.float64) / scale.reshape(4, 1, 1)
    code = np.round(position) + zero_point.reshape(4, 1, 1)
    inside = (code >= -128) & (code <= 127)
    assert 0.2 < inside.mean() < 0.99
    np.testing.assert_allclose(d_x, g * inside, rtol=1e-6)
    slope = np.clip(code, -128, 127) - zero_point.reshape(4, 1, 1) - np.where(inside, position, 0)
    np.testing.assert_allclose(d_scale.ravel(), (g * slope).sum((1, 2)), rtol=1e-5, atol=1e-3)


def test_bfloat16_stays_bfloat16():
    x = jnp.asarray(batch(), jnp.bfloat16)
    out, pull = jax.vjp(lambda x: fake_quant(x, jnp.full((4, 1, 1), 0.02), jnp.zeros((4, 1, 1), jnp.int32), 8), x)
    assert out.dtype == jnp.bfloat16
    assert pull(out)[0].dtype == jnp.bfloat16


def test_dynamic_sites_learn_nothing_and_pass_the_gradient():
    x = batch()
    act = ActQuantizer(scale=None, zero_point=None, dynamic=True)
    call = lambda x: for_rows({"s": act}, {}, jnp.zeros(4, jnp.int32))["s"](x)
    np.testing.assert_allclose(jax.jit(call)(x), act(jnp.asarray(x)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.grad(lambda x: call(x).sum())(x), np.ones_like(x))
