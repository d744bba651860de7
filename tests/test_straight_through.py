"""Derivatives through quantization: refused by name, whoever asks in whatever way; and the straight-through ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER, PLAIN, XLA, random_inputs, relative_error, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import quantizers
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.straight_through import StraightThrough

Scalar = Callable[[Any], Any]
SETTINGS = {"steps": 4, "calib_steps": 2, "calib_rows": 4}
WAY_OUT = ("no derivative", "straight_through=True")


@pytest.fixture(scope="module")
def dit() -> ptq.FloatDiT:
    return jax.tree.map(jnp.asarray, tiny_model())


@pytest.fixture(scope="module")
def q(dit: ptq.FloatDiT) -> ptq.QuantizedDiT:
    return ptq.quantize(dit, ptq.QuantConfig.of(**PLAIN, **SETTINGS), key=jax.random.key(0))


def loss(model: Any) -> Scalar:
    """Of the image, at one timestep."""
    labels = random_inputs(model.config, 3)[1]
    return lambda x: jnp.square(model.apply(x, jnp.array([500]), labels)).sum()


ASKED: dict[str, Callable[[Scalar, Any], Any]] = {
    "grad": lambda f, x: jax.grad(f)(x),
    "grad of jit": lambda f, x: jax.grad(jax.jit(f))(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(f))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "vjp": lambda f, x: jax.vjp(f, x),
    "linearize": lambda f, x: jax.linearize(f, x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(f)(x),
    "remat": lambda f, x: jax.grad(jax.checkpoint(f))(x),
    "scan": lambda f, x: jax.grad(lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, length=2)[0])(x),
    "vmap": lambda f, x: jax.vmap(jax.grad(f))(x[None]),
    "eval_shape": lambda f, x: jax.eval_shape(jax.grad(f), x),
}


@pytest.mark.raises_in_trace
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("act", [ActQuantizer(jnp.float32(0.1), jnp.int32(3)), ActQuantizer(None, None, dynamic=True)])
def test_a_quantizer_refuses_derivatives(asked: str, act: ActQuantizer, raises_sentence: Any) -> None:
    with raises_sentence(*WAY_OUT):
        ASKED[asked](lambda x: jnp.square(act(x)).sum(), jnp.linspace(-1, 1, 12).reshape(3, 4))


@pytest.mark.raises_in_trace
@pytest.mark.parametrize("asked", ["grad", "grad of jit", "jvp"])
@pytest.mark.parametrize("twin", [False, True])
def test_a_model_and_its_twin_refuse_derivatives(q: ptq.QuantizedDiT, asked: str, twin: bool, raises_sentence: Any) -> None:
    with raises_sentence(*WAY_OUT):
        ASKED[asked](loss(ptq.reference(q) if twin else q), random_inputs(q.config, 3)[0])


@pytest.mark.raises_in_trace
def test_so_do_scales_of_ranges_and_time(q: ptq.QuantizedDiT, raises_sentence: Any) -> None:
    x, y = random_inputs(q.config, 2)
    with raises_sentence(*WAY_OUT):
        jax.grad(lambda s: ActQuantizer(s, jnp.int32(0))(jnp.asarray(x)).sum())(jnp.float32(0.1))
    with raises_sentence(*WAY_OUT):
        jax.grad(lambda t: q.apply(x, t, y).sum())(jnp.array([500.0]))


@pytest.mark.raises_in_trace
@pytest.mark.parametrize("policy", ["edges8-float", "uniform,blocks.qkv=8:float", "edges8-float,blocks.adaLN=8:float"])
def test_so_does_the_path_of_the_kernels(policy: str, raises_sentence: Any) -> None:
    """Traced, as it would be on Hopper; there JAX's own words for a kernel without a derivative would come first."""
    config = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=128, depth=1, num_heads=2, num_classes=10)
    dit = jax.tree.map(jnp.asarray, tiny_model(**config.to_dict()))
    quantized = ptq.quantize(dit, ptq.QuantConfig.of(**PLAIN, policy=policy, **SETTINGS), key=jax.random.key(0))
    q = quantized.astype(jnp.bfloat16).replace(backend="hopper")
    x, y = random_inputs(config, 2)
    with raises_sentence(*WAY_OUT):
        jax.eval_shape(jax.grad(lambda x: q.apply(x, jnp.array([5]), y).astype(jnp.float32).sum()), x)


@pytest.mark.raises_in_trace
def test_kernels_refuse_by_themselves(raises_sentence: Any) -> None:
    act = ActQuantizer(jnp.float32(0.1), jnp.int32(0))
    x, row = jnp.ones((2, 64, 128), jnp.bfloat16), jnp.ones((2, 128), jnp.bfloat16)

    def by_shift(shift: Any) -> Any:
        return HOPPER.modulate_encode(x, shift, row, act, Norm()).scale.sum()

    with raises_sentence(*WAY_OUT):
        jax.eval_shape(jax.grad(by_shift), row)
    codes = XLA.encode(x, act)
    weight = quantizers.QTensor(jnp.ones((128, 128), jnp.int8), jnp.ones(128), None, 8)

    def by_bias(bias: Any) -> Any:
        return HOPPER.linear(codes, weight, bias, jnp.bfloat16).astype(jnp.float32).sum()

    with raises_sentence(*WAY_OUT):
        jax.eval_shape(jax.grad(by_bias), jnp.ones(128))


def test_what_no_quantizer_lies_behind_is_differentiated(q: ptq.QuantizedDiT) -> None:
    """The last bias of a model whose last layer is fed by floats, and all of one whose every layer is."""
    x, y = random_inputs(q.config, 3)
    layer = q.linears["final"]

    def by_bias(bias: jax.Array) -> jax.Array:
        changed = q.replace(linears={**q.linears, "final": layer.replace(bias=bias)})
        return changed.apply(x, jnp.array([500]), y).sum()

    tokens = 3 * q.config.num_tokens
    np.testing.assert_allclose(jax.grad(by_bias)(layer.bias), np.full(layer.bias.shape, tokens), rtol=1e-5)


def test_nothing_else_changes() -> None:
    """No operation of a program, and none of jit, vmap, scan, remat and shapes."""
    act = ActQuantizer(jnp.float32(0.1), jnp.int32(3), balance=jnp.linspace(1, 2, 8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 8)), jnp.float32)
    program = lambda: jax.jit(lambda x: act.encode(x)).lower(x).as_text()
    guarded = program()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizers, "undifferentiable", lambda tree: tree)
        assert program() == guarded
    want = act(x)
    np.testing.assert_array_equal(jax.jit(act.__call__)(x), want)
    np.testing.assert_array_equal(jax.vmap(act.__call__)(x), want)
    np.testing.assert_array_equal(jax.checkpoint(act.__call__)(x), want)
    np.testing.assert_array_equal(jax.lax.map(act.__call__, x), want)
    assert jax.eval_shape(act.__call__, x).shape == x.shape


# Straight through.


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_derivative_of_one_quantizer(bits: int, balanced: bool, grouped: bool) -> None:
    """Against NumPy: the balancing factor where the code is none of the clipped ones, else 0; forward and reverse alike."""
    rng = np.random.default_rng(bits)
    x, g = (rng.normal(size=(4, 6, 8)).astype(np.float32) for _ in range(2))
    balance = rng.uniform(0.5, 2, 8).astype(np.float32) if balanced else None
    scale, zero_point = np.array([0.01, 0.02], np.float32) * 2 ** (8 - bits), np.array([1, -1], np.int32)
    group = np.array([0, 1, 1, 0]) if grouped else np.array(1)
    act = ActQuantizer(
        jnp.asarray(scale), jnp.asarray(zero_point), None if balance is None else jnp.asarray(balance), bits=bits
    )
    through = StraightThrough(act).at_group(jnp.asarray(group))
    np.testing.assert_array_equal(through(jnp.asarray(x)), act.at_group(jnp.asarray(group))(jnp.asarray(x)))

    s, z = (a[group].reshape(-1, 1, 1).astype(np.float64) for a in (scale, zero_point))
    factor = np.ones(8) if balance is None else balance.astype(np.float64)
    code = np.round(x * factor / s) + z
    inside = (code >= -(2 ** (bits - 1))) & (code < 2 ** (bits - 1))
    assert 0.1 < inside.mean() < 1
    out, pull = jax.vjp(through, jnp.asarray(x))
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], g * inside * factor, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(through, (jnp.asarray(x),), (jnp.asarray(g),))[1], g * inside * factor, rtol=1e-6)
    assert out.dtype == np.float32


def test_a_dynamic_quantizer_passes_everything() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.bfloat16)
    act = ActQuantizer(None, None, balance=jnp.linspace(1, 2, 8), dynamic=True)
    out, pull = jax.vjp(StraightThrough(act), x)
    np.testing.assert_array_equal(out, act(x))
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], np.broadcast_to(np.linspace(1, 2, 8), (3, 8)).astype(jnp.bfloat16))


def compare(dit: ptq.FloatDiT, q: ptq.QuantizedDiT, x: Any) -> tuple[float, float]:
    """Cosine between the gradients of the straight-through twin and of the float model, and the ratio of their norms."""
    ours, exact = (
        np.asarray(jax.jit(jax.grad(loss(m)))(x), np.float64) for m in (ptq.reference(q, straight_through=True), dit)
    )
    norms = np.linalg.norm(ours), np.linalg.norm(exact)
    return float(np.vdot(ours, exact) / norms[0] / norms[1]), float(norms[0] / norms[1])


def test_the_straight_through_twin_of_a_model(dit: ptq.FloatDiT, q: ptq.QuantizedDiT) -> None:
    x, y = random_inputs(dit.config, 3)
    twin = ptq.reference(q, straight_through=True)
    t = jnp.array([500])
    assert relative_error(twin.apply(x, t, y), ptq.reference(q).apply(x, t, y)) < 1e-6
    cosine, ratio = compare(dit, q, x)
    assert cosine > 0.99
    assert 0.97 < ratio < 1.03
    forward = jax.jvp(loss(twin), (jnp.asarray(x),), (jnp.asarray(x),))[1]
    np.testing.assert_allclose(forward, np.vdot(jax.grad(loss(twin))(x), x), rtol=1e-3)
    by_params = jax.grad(lambda params: twin.replace(params=params).apply(x, t, y).sum())(twin.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_params))


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_the_gradient_of_the_digits_model(weight_bits: int) -> None:
    dit = ptq.load(Path(__file__).parents[1] / "models" / "digits")
    assert isinstance(dit, ptq.FloatDiT)
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=weight_bits, steps=4, calib_steps=4, calib_rows=8)
    q = ptq.quantize(dit, config, key=jax.random.key(0))
    cosine, ratio = compare(dit, q, random_inputs(dit.config, 3)[0])
    print(f"W{weight_bits}A8: cosine {cosine:.4f}, norm {ratio:.3f} of the float model's")
    assert cosine > (0.99 if weight_bits == 8 else 0.95)
    assert 0.9 < ratio < 1.1
