"""Operands of e4m3, against the rounding of ml_dtypes: weights from codes of every width, and inputs that no contract has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from operation_contracts import DYNAMIC, STATIC, drawn_weight

from ptq4dit_jax.float8 import Float8Quantizer, Float8Weight, decode, encode
from ptq4dit_jax.quantizers import ActQuantizer, QTensor


def as_float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def test_each_code_becomes_the_nearest_of_e4m3() -> None:
    codes = np.arange(-127, 128)
    weight = QTensor(jnp.asarray(codes[None], jnp.int8), jnp.ones(1), None, bits=8)
    values = as_float64(Float8Weight.of(weight).values)[0]
    np.testing.assert_array_equal(values, codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert np.all(np.abs(values - codes) <= np.abs(codes) / 16)
    significant = [f"{abs(code):b}".rstrip("0") for code in codes]
    np.testing.assert_array_equal(values == codes, [len(digits) <= 4 for digits in significant])


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_up_to_4_bits_are_the_same(bits: int) -> None:
    weight, stands_for = drawn_weight(10, 7, bits, np.random.default_rng(bits), (2,))
    derived = jax.jit(Float8Weight.of)(weight)
    exact = np.array_equal(derived.dequantize(), weight.dequantize())
    assert exact == (bits <= 4)
    assert derived.shape == weight.shape
    assert derived.bits == bits
    np.testing.assert_allclose(derived.sums, stands_for.sum(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(derived.dequantize(), stands_for, rtol=2**-4, atol=0)
    cut = derived.rows(slice(2, 9))
    np.testing.assert_array_equal(cut.dequantize(), np.asarray(derived.dequantize())[:, 2:9])
    np.testing.assert_array_equal(cut.sums, np.asarray(derived.sums)[:, 2:9])
    assert Float8Weight.of(derived) is derived


@pytest.mark.parametrize("jit", [False, True])
def test_values_beyond_a_range_are_its_end_and_no_nan(jit: bool) -> None:
    encoded = (jax.jit(encode) if jit else encode)(jnp.asarray([[[1e30, 5.0, -5.0, -1e30, jnp.inf]]]), STATIC)
    end = (127 + 20) * 0.03
    np.testing.assert_allclose(as_float64(decode(encoded)), [[[end, end, -end, -end, end]]], rtol=1e-6)


@pytest.mark.makes_nan
def test_a_value_that_is_no_number_stays_one_of_none() -> None:
    """It would be a code otherwise, and nobody would know."""
    x = jnp.asarray([[[jnp.nan, 1.0]], [[jnp.inf, 1.0]]])
    assert np.isnan(as_float64(decode(encode(x[:1], STATIC)))[0, 0, 0])
    assert np.isnan(as_float64(decode(encode(x, DYNAMIC)))[:, 0, 0]).all()


def test_rows_of_zeros_and_no_rows() -> None:
    zeros = encode(jnp.zeros((2, 3, 4)), DYNAMIC)
    np.testing.assert_array_equal(as_float64(decode(zeros)), 0)
    assert encode(jnp.zeros((0, 3, 4)), DYNAMIC).values.shape == (0, 3, 4)


def test_a_group_for_each_row() -> None:
    """The ranges of a table are chosen row by row, as are what a bias must allow for."""
    act = ActQuantizer(jnp.asarray([0.01, 0.04]), jnp.asarray([-20, 30], jnp.int32))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5)), jnp.float32)
    rows = [1, 0, 1]
    together = encode(x, act.at_group(jnp.asarray(rows)))
    for row, group in enumerate(rows):
        alone = encode(x[row : row + 1], act.at_group(jnp.int32(group)))
        np.testing.assert_array_equal(as_float64(together.values[row]), as_float64(alone.values[0]))
        assert together.shift is not None
        assert alone.shift is not None
        np.testing.assert_array_equal(together.shift[row, 0, 0], alone.shift)
        np.testing.assert_array_equal(together.scale[row, 0, 0], alone.scale)


def test_the_condition_is_kept_in_two_terms() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 100)), jnp.float32)
    condition, tokens = (as_float64(decode(encode(given, DYNAMIC))) for given in (x, x[:, None]))
    error = lambda got: np.linalg.norm(got - as_float64(x)) / np.linalg.norm(x)
    assert error(tokens[:, 0]) > 2**-6
    assert error(condition) < 2**-9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_twin_s_quantizer_gives_what_the_operand_stands_for(dtype: jax.typing.DTypeLike) -> None:
    act = ActQuantizer(jnp.asarray([0.01, 0.04]), jnp.asarray([-20, 30], jnp.int32))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, 5)), dtype)
    got = Float8Quantizer(act).at_group(jnp.int32(1))(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, decode(encode(x, act.at_group(jnp.int32(1)))).astype(dtype))
