"""Integer products against NumPy's in int64: exact, at every weight width, at the ends of the code range, for any shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import XLA
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine.xla import linear as xla
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor

WIDTHS = range(2, 9)
LOW, HIGH = -128, 127


def drawn_weight(bits: int, N: int, K: int, seed: int = 0) -> tuple[QTensor, np.ndarray]:
    """A weight of random codes over the whole range of its width, and its centered codes (N, K) int64."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.1, N).astype(np.float32)
    if bits == 8:
        codes, zero_point = rng.integers(-127, 128, (N, K)), np.zeros(N, int)
    else:
        codes, zero_point = rng.integers(0, 2**bits, (N, K)), rng.integers(0, 2**bits, N)
    weight = QTensor.from_codes(jnp.asarray(codes, jnp.float32), jnp.asarray(scale), jnp.asarray(zero_point, jnp.float32), bits)
    return weight, codes - zero_point[:, None]


def extreme_inputs(K: int) -> np.ndarray:
    """Rows (7, K) int8 in which sums are as large as they get, vanish, or show a single product."""
    one_hot = np.zeros((2, K), np.int8)
    one_hot[0, 0], one_hot[1, -1] = HIGH, LOW
    alternating = np.where(np.arange(K) % 2, HIGH, LOW)
    return np.stack([np.full(K, LOW), np.full(K, HIGH), np.zeros(K), np.ones(K), alternating, *one_hot]).astype(np.int8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("K", [7, 64])
def test_accumulators_are_exact_at_every_weight_width(bits: int, K: int) -> None:
    weight, centered = drawn_weight(bits, 5, K)
    x = np.concatenate([extreme_inputs(K), np.random.default_rng(1).integers(LOW, HIGH + 1, (9, K)).astype(np.int8)])
    assert weight.packed == (bits <= 4)
    for accumulate in (xla.accumulate, jax.jit(xla.accumulate)):
        out = accumulate(jnp.asarray(x), weight.codes())
        assert out.dtype == jnp.int32
        np.testing.assert_array_equal(out, x.astype(np.int64) @ centered.T)


@pytest.mark.parametrize("K", [1, 5, 8, 25, 64, 72, 81, 256, 4608])
def test_products_on_gpus_stand_alone_unless_their_sums_are_whole_tiles(K: int) -> None:
    """XLA's kernels that fuse other sums of int8 are wrong on GPUs. cuBLAS takes products that stand alone, with sides of
    multiples of 4."""
    rng = np.random.default_rng(K)
    draw = lambda *shape: jnp.asarray(rng.integers(LOW, HIGH + 1, shape), jnp.int8)
    x, codes, heads, others = draw(2, 5, K), draw(9, K), draw(2, 3, 5, K), draw(2, 3, 7, K)
    for product, a, b in ((xla.accumulate, x, codes), (xla.accumulate, x[0, 0], codes), (xla.batched, heads, others)):
        with described(DeviceKind("gpu", (9, 0))):
            on_gpu = jax.make_jaxpr(lambda a, b, product=product: product(a, b))(a, b)
        eqns = on_gpu.jaxpr.eqns
        [at] = (index for index, eqn in enumerate(eqns) if eqn.primitive is jax.lax.dot_general_p)
        alone = [eqns[index].primitive.name for index in (at - 1, at + 1) if 0 <= index < len(eqns)]
        if K % 128:
            assert alone == ["optimization_barrier"] * 2
            assert all(size % 4 == 0 for operand in eqns[at].invars for size in operand.aval.shape[-2:])
        else:
            assert not alone
        [out] = jax.core.eval_jaxpr(on_gpu.jaxpr, on_gpu.consts, a, b)
        np.testing.assert_array_equal(out, product(a, b))


@pytest.mark.parametrize("value", [LOW, -127, HIGH, 0])
def test_the_largest_sums_of_the_widest_layer_are_exact(value: int) -> None:
    """fc2 of DiT-XL/2 adds 4608 products; 4608 * 128 * 128 has to fit."""
    x = np.full((1, 4608), LOW, np.int8)
    codes = np.full((2, 4608), value, np.int8)
    out = xla.accumulate(jnp.asarray(x), jnp.asarray(codes))
    np.testing.assert_array_equal(out, np.full((1, 2), 4608 * LOW * value))


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    N=st.integers(1, 9),
    K=st.integers(1, 40),
    bits=st.sampled_from(list(WIDTHS)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20, deadline=None)
def test_accumulators_are_exact_for_any_shape(lead: list[int], N: int, K: int, bits: int, seed: int) -> None:
    weight, centered = drawn_weight(bits, N, K, seed)
    x = np.random.default_rng(seed).integers(LOW, HIGH + 1, (*lead, K)).astype(np.int8)
    out = xla.accumulate(jnp.asarray(x), weight.codes())
    assert out.shape == (*lead, N)
    np.testing.assert_array_equal(out, x.astype(np.int64) @ centered.T)


@given(
    B=st.integers(1, 3),
    A=st.integers(1, 3),
    M=st.integers(1, 6),
    N=st.integers(1, 6),
    K=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_batched_products_are_exact_for_any_shape(B: int, A: int, M: int, N: int, K: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(LOW, HIGH + 1, (B, A, M, K)).astype(np.int8)
    b = rng.integers(LOW, HIGH + 1, (B, A, N, K)).astype(np.int8)
    out = XLA.batched(jnp.asarray(a), jnp.asarray(b))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.einsum("bamk,bank->bamn", a.astype(np.int64), b.astype(np.int64)))


def test_batched_products_are_exact_at_the_ends_of_the_range() -> None:
    rows = extreme_inputs(256)[None, None]
    out = jax.jit(XLA.batched)(jnp.asarray(rows), jnp.asarray(rows))
    np.testing.assert_array_equal(out[0, 0], rows[0, 0].astype(np.int64) @ rows[0, 0].astype(np.int64).T)


def product(x: np.ndarray | jax.Array, weight: QTensor, scale: np.ndarray, bias: np.ndarray) -> jax.Array:
    """The linear layer in float32, the activations' scale folded into the weights'."""
    encoded = Encoded(jnp.asarray(x), jnp.float32(1), None)
    weight = weight.replace(scale=jnp.asarray(scale))
    return XLA.linear(encoded, weight, jnp.asarray(bias), jnp.float32)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_the_epilogue_is_one_multiplication_and_one_addition(bits: int, lead: tuple[int, ...]) -> None:
    weight, centered = drawn_weight(bits, 5, 16)
    rng = np.random.default_rng(2)
    x = rng.integers(LOW, HIGH + 1, (*lead, 16)).astype(np.int8)
    scale, bias = rng.uniform(0.1, 1, 5).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    expected = (x.astype(np.int64) @ centered.T) * scale.astype(np.float64) + bias
    for linear in (product, jax.jit(product)):
        out = linear(x, weight, scale, bias)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_what_follows_a_product(bits: int) -> None:
    """Parts, GELU with codes, and gate with residual, against NumPy in float64; under jit too."""
    B, T, K, N = 2, 3, 16, 6
    weight, centered = drawn_weight(bits, N, K)
    rng = np.random.default_rng(4)
    values, row = rng.integers(LOW, HIGH + 1, (B, T, K)).astype(np.int8), rng.uniform(1e-3, 2e-3, (B, T, 1)).astype(np.float32)
    x, bias = Encoded(jnp.asarray(values), jnp.asarray(row), None), rng.standard_normal(N).astype(np.float32)
    y = (values.astype(np.int64) @ centered.T) * row.astype(np.float64) * np.asarray(weight.scale, np.float64) + bias
    gate, residual = rng.standard_normal((B, N)).astype(np.float32), rng.standard_normal((B, T, N)).astype(np.float32)
    act = ActQuantizer(jnp.float32(0.02), jnp.int32(-100), jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32))
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    codes = np.clip(np.round(gelu * np.asarray(act.balance, np.float64) / np.float64(np.float32(0.02))) - 100, LOW, HIGH)
    for wrap in (lambda f, **_: f, jax.jit):
        parts = wrap(XLA.linear_parts, static_argnames=("dtype", "parts"))(x, weight, bias, dtype=jnp.float32, parts=3)
        assert [part.shape for part in parts] == [(B, T, 2)] * 3
        np.testing.assert_allclose(np.concatenate(parts, -1), y, rtol=1e-5, atol=1e-5)
        got = wrap(XLA.linear_gelu)(x, weight, bias, act)
        assert got.values.dtype == jnp.int8
        assert np.abs(np.asarray(got.values, int) - codes).max() <= (np.abs(y).max() > 50)  # none lies at a tie here
        np.testing.assert_allclose(
            wrap(XLA.linear_residual)(x, weight, bias, gate, residual), residual + gate[:, None] * y, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_the_lowered_product_takes_int8_and_gives_int32(bits: int) -> None:
    weight, _ = drawn_weight(bits, 5, 16)
    text = (
        jax.jit(product).lower(jnp.zeros((3, 16), jnp.int8), weight, np.ones(5, np.float32), np.zeros(5, np.float32)).as_text()
    )
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert "(tensor<3x16xi8>, tensor<5x16xi8>) -> tensor<3x5xi32>" in dots[0]
