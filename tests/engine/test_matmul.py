"""Integer products against NumPy's in int64: exact, at every weight width, at the ends of the code range, for any shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4dit_jax.engine import matmul
from ptq4dit_jax.engine.matmul import xla
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.quantizers import QTensor

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
    weight = QTensor.from_codes(
        jnp.asarray(codes, jnp.float32), jnp.asarray(scale), jnp.asarray(zero_point, jnp.float32), bits
    )  # fmt: skip
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
    B=st.integers(1, 3), A=st.integers(1, 3), M=st.integers(1, 6), N=st.integers(1, 6), K=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_batched_products_are_exact_for_any_shape(B: int, A: int, M: int, N: int, K: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(LOW, HIGH + 1, (B, A, M, K)).astype(np.int8)
    b = rng.integers(LOW, HIGH + 1, (B, A, N, K)).astype(np.int8)
    out = matmul.batched(jnp.asarray(a), jnp.asarray(b))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.einsum("bamk,bank->bamn", a.astype(np.int64), b.astype(np.int64)))


def test_batched_products_are_exact_at_the_ends_of_the_range() -> None:
    rows = extreme_inputs(256)[None, None]
    out = jax.jit(matmul.batched)(jnp.asarray(rows), jnp.asarray(rows))
    np.testing.assert_array_equal(out[0, 0], rows[0, 0].astype(np.int64) @ rows[0, 0].astype(np.int64).T)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_the_epilogue_is_one_multiplication_and_one_addition(bits: int, lead: tuple[int, ...]) -> None:
    weight, centered = drawn_weight(bits, 5, 16)
    rng = np.random.default_rng(2)
    x = rng.integers(LOW, HIGH + 1, (*lead, 16)).astype(np.int8)
    scale, bias = rng.uniform(0.1, 1, 5).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    expected = (x.astype(np.int64) @ centered.T) * scale.astype(np.float64) + bias
    for linear in (matmul.linear, jax.jit(matmul.linear)):
        out = linear(jnp.asarray(x), weight, jnp.asarray(scale), jnp.asarray(bias))
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_lowered_product_takes_int8_and_gives_int32(bits: int) -> None:
    weight, _ = drawn_weight(bits, 5, 16)
    text = jax.jit(matmul.linear).lower(jnp.zeros((3, 16), jnp.int8), weight, jnp.ones(5), jnp.zeros(5)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert "(tensor<3x16xi8>, tensor<5x16xi8>) -> tensor<3x5xi32>" in dots[0]


def test_an_unknown_backend_is_named_with_the_ones_that_exist() -> None:
    weight, _ = drawn_weight(8, 5, 16)
    x = jnp.zeros((3, 16), jnp.int8)
    with pytest.raises(Ptq4ditError, match=r"^Unknown matmul backend 'cutlass'; the backends are xla\.$"):
        matmul.linear(x, weight, jnp.ones(5), jnp.zeros(5), backend="cutlass")
    with pytest.raises(Ptq4ditError, match="Unknown matmul backend"):
        matmul.batched(x[None, None], x[None, None], backend="cutlass")


def test_a_backend_runs_and_hands_over_what_it_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def linear(x: jax.Array, weight: QTensor, scale: jax.Array, bias: jax.Array) -> jax.Array:
        asked.append(weight.bits)
        if weight.packed:
            raise NotImplementedError
        return jnp.full((*x.shape[:-1], weight.shape[-2]), 42.0)

    def batched(a: jax.Array, b: jax.Array) -> jax.Array:
        raise NotImplementedError

    fake: Any = SimpleNamespace(linear=linear, batched=batched)
    monkeypatch.setitem(matmul._BACKENDS, "fake", fake)
    x = jnp.asarray(extreme_inputs(16))
    for bits in (8, 4):
        weight, _ = drawn_weight(bits, 5, 16)
        out = matmul.linear(x, weight, jnp.ones(5), jnp.zeros(5), backend="fake")
        expected = np.full((7, 5), 42.0) if bits == 8 else xla.linear(x, weight, jnp.ones(5), jnp.zeros(5))
        np.testing.assert_array_equal(out, expected)
    assert asked == [8, 4]
    pairs = x[None, None]
    np.testing.assert_array_equal(matmul.batched(pairs, pairs, backend="fake"), xla.batched(pairs, pairs))
