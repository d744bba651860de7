"""The integer linear layer and integer attention against NumPy: exact accumulators, and the fake-quant twin to an ulp or so."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import XLA, relative_error

from ptq4dit_jax.engine.layers import QLinear, in_unit_steps
from ptq4dit_jax.engine.xla.attend import attention_of_heads, centered_product
from ptq4dit_jax.quantizers import ActQuantizer, Encoded
from ptq4dit_jax.ranges import quantize_weight

B, T, K, N, G = 3, 4, 20, 6, 3
ULPS = 2e-6


def act(
    low: float = -1.5, high: float = 3.0, bits: int = 8, *, groups: int = 0, balance: np.ndarray | None = None
) -> ActQuantizer:
    """An activation quantizer for a range; with ``groups`` a table whose ranges grow from group to group."""
    grow = np.linspace(1, 2, groups) if groups else np.ones(())
    scale = ((high - low) * grow / (2**bits - 1)).astype(np.float32)
    zero_point = np.round(-low * grow / scale).astype(np.int32) - 2 ** (bits - 1)
    factor = None if balance is None else jnp.asarray(balance)
    return ActQuantizer(jnp.asarray(scale), jnp.asarray(zero_point), factor, bits=bits)


def dynamic(balance: np.ndarray | None = None) -> ActQuantizer:
    return ActQuantizer(None, None, None if balance is None else jnp.asarray(balance), dynamic=True)


def factors(seed: int = 5) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal(K)).astype(np.float32)


def layer(quantizer: ActQuantizer | None, bits: int = 8, seed: int = 0) -> tuple[QLinear, np.ndarray]:
    """A packed layer and its float bias (N,)."""
    rng = np.random.default_rng(seed)
    weight = quantize_weight(jnp.asarray(rng.standard_normal((N, K)) * K**-0.5, jnp.float32), bits)
    bias = rng.standard_normal(N).astype(np.float32)
    return QLinear.pack(weight, jnp.asarray(bias), quantizer), bias


def inputs(*lead: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*lead, K)).astype(np.float32)


def wide(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def fake_quantized(x: np.ndarray, quantizer: ActQuantizer) -> np.ndarray:
    """Fake quantization in float64, by the formulas alone; ranges (), or per row (B,)."""
    qmax = 2 ** (quantizer.bits - 1) - 1
    balanced = wide(x) * (1.0 if quantizer.balance is None else wide(quantizer.balance))
    if quantizer.dynamic:
        scale = np.abs(balanced).max(-1, keepdims=True) / qmax
        return np.round(balanced / scale) * scale
    per_row = lambda table: wide(table).reshape(-1, *[1] * (x.ndim - 1)) if np.ndim(table) else wide(table)
    scale, zero_point = per_row(quantizer.scale), per_row(quantizer.zero_point)
    return (np.clip(np.round(balanced / scale) + zero_point, -qmax - 1, qmax) - zero_point) * scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_layer_is_its_fake_quant_twin(bits: int, act_bits: int) -> None:
    quantizer = act(bits=act_bits)
    linear, bias = layer(
        quantizer.replace(scale=quantizer.static_range.scale[None], zero_point=quantizer.static_range.zero_point[None]), bits
    )
    x = inputs(B, T)
    chosen = linear.at_group(jnp.int32(0))
    expected = fake_quantized(x, quantizer) @ wide(linear.weight.dequantize()).T + bias
    for call in (lambda m, x: m(x, XLA), jax.jit(lambda m, x: m(x, XLA))):
        out = call(chosen, jnp.asarray(x))
        assert out.dtype == jnp.float32
        assert relative_error(out, expected) < ULPS


@pytest.mark.parametrize(
    ("quantizer", "integer"),
    [
        pytest.param(act(groups=1, balance=factors()), True, id="balanced"),
        pytest.param(dynamic(), True, id="dynamic"),
        pytest.param(dynamic(factors()), True, id="dynamic-balanced"),
        pytest.param(None, False, id="float"),
    ],
)
def test_every_kind_of_input_quantizer(quantizer: ActQuantizer | None, integer: bool) -> None:
    linear, bias = layer(quantizer, bits=4)
    assert linear.integer is integer
    x = inputs(B, T)
    seen = wide(x) if quantizer is None else fake_quantized(x, quantizer.at_group(jnp.int32(0)))
    out = linear.at_group(jnp.int32(0))(jnp.asarray(x), XLA)
    assert relative_error(out, seen @ wide(linear.weight.dequantize()).T + bias) < ULPS


def test_a_row_of_zeros_is_finite_under_dynamic_scales() -> None:
    linear, bias = layer(dynamic())
    np.testing.assert_array_equal(linear.at_group(jnp.int32(0))(jnp.zeros((2, K)), XLA), np.tile(bias, (2, 1)))


@pytest.mark.parametrize("lead", [(B,), (B, T)])
def test_a_table_over_groups_of_steps(lead: tuple[int, ...]) -> None:
    """One group for all rows, and a group for each row."""
    quantizer = act(groups=G)
    linear, bias = layer(quantizer)
    assert linear.bias.shape == (G, N)
    x = inputs(*lead)
    weight = wide(linear.weight.dequantize()).T
    apart = []
    for group in range(G):
        expected = fake_quantized(x, quantizer.at_group(jnp.int32(group))) @ weight + bias
        out = linear.at_group(jnp.int32(group))(jnp.asarray(x), XLA)
        assert relative_error(out, expected) < ULPS
        apart.append(np.asarray(out))
    assert relative_error(apart[0], apart[2]) > 1e-3  # the groups do differ
    rows = np.array([2, 0, 1])
    together = linear.at_group(jnp.asarray(rows, jnp.int32))(jnp.asarray(x), XLA)
    np.testing.assert_allclose(together, np.stack([apart[g][row] for row, g in enumerate(rows)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantizer", [act(groups=1), act(groups=G), act(groups=1, balance=factors()), dynamic(), None])
def test_the_float_bias_comes_back(quantizer: ActQuantizer | None) -> None:
    linear, bias = layer(quantizer, bits=4)
    np.testing.assert_allclose(linear.float_bias, bias, rtol=1e-5, atol=1e-5)


def test_the_packed_bias_holds_the_zero_point() -> None:
    quantizer = act(groups=G)
    linear, bias = layer(quantizer, bits=4)
    sums = np.asarray(linear.stored.codes(), np.int64).sum(-1)
    correction = np.outer(np.prod([wide(each) for each in quantizer.static_range], axis=0), wide(linear.weight.scale) * sums)
    np.testing.assert_allclose(linear.bias, bias - correction, rtol=1e-6, atol=1e-6)


def test_a_stack_of_layers_packs_like_each_alone() -> None:
    """Leaves with a leading depth axis, as the blocks have them."""
    singles = [layer(act(high=high, groups=G), bits=4, seed=seed)[0] for seed, high in ((0, 3.0), (1, 5.0))]
    stack = lambda *leaves: jnp.stack(leaves)
    weight = jax.tree.map(stack, *(single.weight for single in singles))
    quantizer = jax.tree.map(stack, *(single.act for single in singles))
    bias = jnp.stack([single.float_bias for single in singles])
    packed = QLinear.pack(weight, bias, quantizer)
    assert packed.bias.shape == (2, G, N)
    np.testing.assert_allclose(packed.bias, jnp.stack([single.bias for single in singles]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed.float_bias, bias, rtol=1e-5, atol=1e-5)


def test_bfloat16_in_bfloat16_out_with_an_epilogue_in_float32() -> None:
    quantizer = act(groups=1)
    linear, bias = layer(quantizer)
    x = jnp.asarray(inputs(B, T), jnp.bfloat16)
    out = linear.at_group(jnp.int32(0))(x, XLA)
    expected = fake_quantized(np.asarray(x, np.float32), act()) @ wide(linear.weight.dequantize()).T + bias
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2.0**-8)  # one rounding, at the end


def codes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("za", [None, np.int32(-128), np.int32(127), np.array([3, -7], np.int32).reshape(2, 1, 1, 1)])
@pytest.mark.parametrize("zb", [None, np.int32(5), np.array([-128, 127], np.int32).reshape(2, 1, 1, 1)])
def test_centered_products_are_exact(za: np.ndarray | None, zb: np.ndarray | None) -> None:
    a, b = codes(2, 3, 4, 8), codes(2, 3, 5, 8, seed=1)
    a[0, 0], b[0, 0] = -128, 127  # as far from the zero point as it gets
    as_jax = lambda z: None if z is None else jnp.asarray(z)
    encoded = (Encoded(jnp.asarray(v), jnp.float32(1), as_jax(z)) for v, z in ((a, za), (b, zb)))
    out = centered_product(*encoded)
    left, right = (v.astype(np.int64) - (0 if z is None else z) for v, z in ((a, za), (b, zb)))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.einsum("bamk,bank->bamn", left, right))


def test_attention_is_its_fake_quant_twin() -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 3, 5, 8)).astype(np.float32) for _ in range(3))
    sites = {"q": act(-2.5, 3), "k": act(-3, 2.5), "v": act(-2, 2), "probs": act(0, 0.9)}
    q_, k_, v_ = (fake_quantized(x, sites[name]) for name, x in (("q", q), ("k", k), ("v", v)))
    logits = np.einsum("bamd,band->bamn", q_, k_) * 8**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probs = fake_quantized(weights / weights.sum(-1, keepdims=True), sites["probs"])
    expected = np.einsum("bamn,band->bamd", probs, v_)
    for run in (attention_of_heads, jax.jit(attention_of_heads)):
        out = run(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), sites)
        assert relative_error(out, expected) < ULPS
    of_q, of_k, of_v = (jnp.asarray(x.transpose(0, 2, 1, 3).reshape(2, 5, 24)) for x in (q, k, v))
    assert relative_error(XLA.attention(of_q, of_k, of_v, 3, sites), expected.transpose(0, 2, 1, 3).reshape(2, 5, 24)) < ULPS


def test_attention_takes_ranges_per_row() -> None:
    """Rows of a batch at different timesteps may lie in different groups."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 2, 5, 8)).astype(np.float32)
    sites = {name: act(-2, 2, groups=2) for name in ("q", "k", "v")} | {"probs": act(0, 0.5, groups=2)}
    at = lambda group: {name: quantizer.at_group(group) for name, quantizer in sites.items()}
    rows = jnp.array([1, 0, 1], jnp.int32)
    together = attention_of_heads(jnp.asarray(x), jnp.asarray(x), jnp.asarray(x), at(rows))
    for row, group in enumerate(rows):
        alone = jnp.asarray(x[row : row + 1])
        np.testing.assert_allclose(together[row], attention_of_heads(alone, alone, alone, at(group))[0], rtol=1e-5, atol=1e-6)


def test_layers_are_pytrees_with_static_settings() -> None:
    linear, _ = layer(act(groups=1), bits=4)
    leaves, structure = jax.tree.flatten(linear)
    again = jax.tree.unflatten(structure, leaves)
    assert dataclasses.asdict(again.weight)["bits"] == 4
    assert again.act.bits == 8
    assert all(hasattr(leaf, "dtype") for leaf in leaves)


@pytest.mark.parametrize("balanced", [False, True])
def test_attention_in_unit_steps_is_attention_quantized_for_proj(balanced: bool) -> None:
    """Scale and balance of proj's input moved into v: the same codes but at ties, and the same output."""
    heads, D = 2, K
    rng = np.random.default_rng(7)
    balance = factors() if balanced else None
    quantizer = act(-2.0, 2.5, balance=balance)
    proj = QLinear.pack(
        quantize_weight(jnp.asarray(rng.standard_normal((D, D)) * D**-0.5, jnp.float32), 8), jnp.ones(D, jnp.float32), quantizer
    )
    qkv = QLinear.pack(
        quantize_weight(jnp.asarray(rng.standard_normal((3 * D, K)) * K**-0.5, jnp.float32), 8),
        jnp.zeros(3 * D, jnp.float32),
        act(),
    )
    qkv, proj = (dataclasses.replace(layer, bias=layer.bias[0]) for layer in (qkv, proj))
    x = jnp.asarray(inputs(B, T))
    moved_qkv, moved_proj = jax.jit(in_unit_steps)(qkv, proj)

    def floats(layer: QLinear) -> list[np.ndarray]:
        return [wide(part) for part in layer.product_parts(layer.feed(x, XLA), 3, jnp.float32, XLA)]

    q, k, v = floats(qkv)
    heads_of = lambda y: y.reshape(B, T, heads, D // heads).transpose(0, 2, 1, 3)
    scores = heads_of(q) @ heads_of(k).swapaxes(-1, -2) / np.sqrt(D // heads)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = (p / p.sum(-1, keepdims=True) @ heads_of(v)).transpose(0, 2, 1, 3).reshape(B, T, D)
    value = out * (1 if balance is None else balance) / float(quantizer.static_range.scale)
    want = np.clip(np.round(value) + int(quantizer.static_range.zero_point), -128, 127)

    got = jax.jit(lambda q, k, v, act: XLA.attention_codes(q, k, v, heads, act))(
        *(jnp.asarray(part, jnp.float32) for part in floats(moved_qkv)), moved_proj.act
    )
    differing = np.asarray(got.values, int) != want
    assert np.all(np.abs(value - np.floor(value) - 0.5)[differing] < 1e-4)
    expected = proj.product(Encoded(jnp.asarray(want, jnp.int8), *quantizer.static_range), jnp.float32, XLA)
    moved = moved_proj.product(Encoded(jnp.asarray(want, jnp.int8), got.scale, got.zero_point), jnp.float32, XLA)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)
