"""Integer codes against NumPy: packing, weights, activation quantizers, and the inputs that break careless ones."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import structure
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.quantizers import (
    ActQuantizer,
    ChannelScale,
    Encoded,
    QTensor,
    act_code_range,
    affine_parameters,
    check_bits,
    decode,
    encode_weight,
    pack_nibbles,
    unpack_nibbles,
    weight_code_range,
)

BITS = range(2, 9)
ROWS, TOKENS, WIDTH = 3, 2, 4

# The same examples every time: a suite that fails must fail for everybody. Few shapes, because each one compiles.
properties = settings(max_examples=20, deadline=None, derandomize=True, database=None)
every_width = pytest.mark.parametrize("bits", BITS)
finite = partial(st.floats, allow_nan=False, allow_infinity=False, width=32)
# Either zero or of a magnitude whose 127th part is still a normal float32.
magnitudes = finite(float(np.float32(1e-30)), 1000)
activations = hnp.arrays(np.float32, (ROWS, TOKENS, WIDTH), elements=magnitudes | magnitudes.map(lambda v: -v) | st.just(0.0))
# Ends of a range: its span is neither so small nor so large that float32 runs out.
ends = st.tuples(finite(-100, 100), finite(float(np.float32(1e-3)), 100)).map(lambda pair: (pair[0], pair[0] + pair[1]))

encode = jax.jit(lambda quantizer, x: quantizer.encode(x))
fake_quant = jax.jit(lambda quantizer, x: quantizer(x))


def quantizer_for(low: float, high: float, bits: int) -> ActQuantizer:
    """One scale and zero point for the range, computed in NumPy."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    bottom, top = np.float32(min(low, 0)), np.float32(max(high, 0))
    scale = (top - bottom) / np.float32(qmax - qmin) if top > bottom else np.float32(1)
    return ActQuantizer(scale=jnp.float32(scale), zero_point=jnp.int32(qmin + np.rint(-bottom / scale)), bits=bits)


def numpy_codes(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int, balance: np.ndarray | None = None
) -> np.ndarray:
    """Codes by the definition, in float32 as on a device."""
    inverse = np.float32(1) / scale if balance is None else balance / scale
    return np.clip(np.rint(x * inverse) + zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# --- widths and ranges of codes


@every_width
def test_code_ranges(bits: int) -> None:
    assert check_bits("weight_bits", bits) == bits
    low, high = act_code_range(bits)
    assert high - low == 2**bits - 1
    assert np.int8(low) == low
    assert np.int8(high) == high
    assert weight_code_range(bits) == ((-127, 127) if bits == 8 else (0, 2**bits - 1))


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "8", None, True])
def test_an_impossible_width_is_named(bits: object) -> None:
    with pytest.raises(Ptq4ditError, match=rf"act_bits must be an integer from 2 to 8, not {bits!r}\."):
        check_bits("act_bits", bits)  # type: ignore[arg-type]


# --- packing


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 2), (3, 8, 4), (3, 9, 1), (2, 3, 5, 2), (64, 3), (2, 128, 2), (100, 2)])
@settings(properties, max_examples=10)
@given(data=st.data())
def test_packing_round_trip(shape: tuple[int, ...], data: st.DataObject) -> None:
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 15)))
    packed = pack_nibbles(jnp.asarray(codes))
    *lead, N, K = shape
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*lead, (N + 1) // 2, K)
    half = 32 if N % 64 == 0 else (N + 1) // 2
    want = np.zeros((*lead, (N + 1) // 2, K), np.uint8)
    for n in range(N):
        block, row = divmod(n, 2 * half)
        want[..., block * half + row % half, :] += codes[..., n, :] * np.uint8(16 if row >= half else 1)
    np.testing.assert_array_equal(packed, want)
    for fusible in (True, False):
        unpacked = unpack_nibbles(packed, N, fusible=fusible)
        assert unpacked.dtype == jnp.int8
        np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("N", [8, 9, 128])
def test_packing_under_jit_equals_plain(N: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (2, N, 3))
    packed = jax.jit(pack_nibbles)(codes)
    np.testing.assert_array_equal(packed, pack_nibbles(jnp.asarray(codes)))
    for fusible in (True, False):
        unpack = jax.jit(partial(unpack_nibbles, N=N, fusible=fusible))
        np.testing.assert_array_equal(unpack(packed), codes)


# --- weights


def weight_case(bits: int, shape: tuple[int, ...] = (2, 5, 9), seed: int = 0) -> tuple[np.ndarray, ...]:
    """Codes (L, N, K), scales and zero points (L, N) that use the whole code range."""
    rng = np.random.default_rng(seed)
    qmin, qmax = (-127, 127) if bits == 8 else (0, 2**bits - 1)
    codes = rng.integers(qmin, qmax + 1, shape)
    codes[..., 0], codes[..., 1] = qmin, qmax
    zero_point = np.zeros(shape[:-1], np.int32) if bits == 8 else rng.integers(0, qmax + 1, shape[:-1])
    if bits < 8:
        zero_point[..., 0], zero_point[..., 1] = 0, qmax
    return codes, np.exp(rng.normal(size=shape[:-1])).astype(np.float32), zero_point


@every_width
@pytest.mark.parametrize("N", [6, 5, 128], ids=["even", "odd", "blocks"])
def test_weights_dequantize_as_numpy_says(bits: int, N: int) -> None:
    codes, scale, zero_point = weight_case(bits, (2, N, 9))

    @jax.jit
    def both(codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> tuple[QTensor, jax.Array, jax.Array]:
        q = QTensor.from_codes(codes, scale, zero_point, bits)
        return q, q.codes(), q.dequantize()

    q, centered, weight = both(codes.astype(np.float32), scale, zero_point)
    expected = codes - zero_point[..., None]
    assert centered.dtype == jnp.int8
    np.testing.assert_array_equal(centered, expected)
    np.testing.assert_array_equal(weight, expected.astype(np.float32) * scale[..., None])
    assert weight.dtype == jnp.float32

    assert q.shape == codes.shape
    assert (q.bits, q.packed) == (bits, bits <= 4)
    assert q.values.nbytes == 2 * 9 * ((N + 1) // 2 if bits <= 4 else N)
    if bits <= 4:
        assert (q.values.dtype, q.zero_point.dtype) == (jnp.uint8, jnp.int8)
    else:
        assert q.values.dtype == jnp.int8
        assert q.zero_point is None


@every_width
def test_a_layer_of_a_stack_is_a_qtensor_too(bits: int) -> None:
    """Blocks are scanned, so a stacked weight is cut along its leading axis."""
    codes, scale, zero_point = weight_case(bits)
    stacked = QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(zero_point), bits)
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert one.shape == codes.shape[1:]
    np.testing.assert_array_equal(one.dequantize(), stacked.dequantize()[1])


@every_width
def test_weight_codes_equal_numpy_and_stay_in_range(bits: int) -> None:
    _, scale, zero_point = weight_case(bits)
    w = np.random.default_rng(1).normal(size=(2, 5, 9)).astype(np.float32) * 2.0**bits
    qmin, qmax = (-127, 127) if bits == 8 else (0, 2**bits - 1)
    codes = np.asarray(jax.jit(encode_weight, static_argnames="bits")(w, scale, zero_point, bits=bits))
    np.testing.assert_array_equal(codes, np.clip(np.rint(w / scale[..., None]) + zero_point[..., None], qmin, qmax))
    assert (codes.min(), codes.max()) == (qmin, qmax)  # the weights were made large enough to be clipped


# --- scales and zero points of activations


@every_width
def test_affine_parameters_equal_numpy(bits: int) -> None:
    rng = np.random.default_rng(bits)
    low = (rng.normal(size=(4, 3)) - 0.5).astype(np.float32)
    high = low + np.exp(rng.normal(size=(4, 3))).astype(np.float32)
    scale, zero_point = jax.jit(affine_parameters, static_argnames="bits")(low, high, bits=bits)
    wide_low, wide_high = np.minimum(low, 0), np.maximum(high, 0)
    expected = (wide_high - wide_low) / np.float32(2**bits - 1)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    np.testing.assert_array_equal(zero_point, -(2 ** (bits - 1)) + np.rint(-wide_low / expected))
    assert (scale.dtype, zero_point.dtype) == (jnp.float32, jnp.int32)


@every_width
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (2.0, 3.0), (-3.0, -2.0), (0.0, 5.0), (-5.0, 0.0), (-1e30, 1e30), (-1e-30, 2e-30)]
)
def test_every_range_holds_zero_and_fits_the_codes(low: float, high: float, bits: int) -> None:
    scale, zero_point = (np.asarray(p) for p in affine_parameters(jnp.float32(low), jnp.float32(high), bits))
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert np.isfinite(scale)
    assert scale > 0
    assert qmin <= zero_point <= qmax
    bottom, top = scale * (qmin - float(zero_point)), scale * (qmax - float(zero_point))
    assert bottom <= min(low, 0) + scale / 2 * 1.0001
    assert top >= max(high, 0) - scale / 2 * 1.0001


# --- activation quantizers


@every_width
@properties
@given(x=activations, span=ends)
def test_codes_equal_numpy(bits: int, x: np.ndarray, span: tuple[float, float]) -> None:
    quantizer = quantizer_for(*span, bits)
    encoded = encode(quantizer, x)
    scale, zero_point = map(np.asarray, quantizer.static_range)
    expected = numpy_codes(x, scale, zero_point, bits)
    assert encoded.values.dtype == jnp.int8
    np.testing.assert_array_equal(encoded.values, expected)
    np.testing.assert_array_equal(
        fake_quant(quantizer, x), scale * (expected.astype(np.float32) - zero_point.astype(np.float32))
    )


@every_width
@properties
@given(x=activations, span=ends)
def test_the_error_is_half_a_step_inside_the_range(bits: int, x: np.ndarray, span: tuple[float, float]) -> None:
    quantizer = quantizer_for(*span, bits)
    x = np.clip(x, min(span[0], 0), max(span[1], 0))
    error = np.abs(np.asarray(fake_quant(quantizer, x), np.float64) - x)
    assert error.max() <= float(quantizer.static_range.scale) / 2 * (1 + 1e-4)


@every_width
@properties
@given(x=activations, span=ends)
def test_zero_is_exact_and_quantizing_twice_changes_nothing(bits: int, x: np.ndarray, span: tuple[float, float]) -> None:
    quantizer = quantizer_for(*span, bits)
    x[0] = 0
    once = np.asarray(fake_quant(quantizer, x))
    assert (once[0] == 0).all()
    np.testing.assert_array_equal(fake_quant(quantizer, once), once)


@pytest.mark.parametrize("zero_point", [-3, 0, 1, 8])
def test_ties_go_to_the_even_step(zero_point: int) -> None:
    """Half to even before the zero point is added, so the same value rounds the same way under every zero point."""
    quantizer = ActQuantizer(scale=jnp.float32(0.5), zero_point=jnp.int32(zero_point), bits=8)
    x = np.array([0.25, 0.75, 1.25, 1.75, -0.25, -0.75, -1.25, -1.75], np.float32)
    np.testing.assert_array_equal(fake_quant(quantizer, x), [0, 1, 1, 2, 0, -1, -1, -2])


def quantizer_kinds() -> dict[str, ActQuantizer]:
    rng = np.random.default_rng(3)
    balance = jnp.asarray(np.exp(rng.normal(size=WIDTH)), jnp.float32)
    rows = jnp.asarray(np.exp(rng.normal(size=ROWS)).astype(np.float32) * np.float32(0.013))
    zeros = jnp.asarray(rng.integers(-100, 100, ROWS), jnp.int32)
    one = quantizer_for(-1.3, 2.9, 8)
    return {
        "static": one,
        "4 bits": quantizer_for(-1.3, 2.9, 4),
        "balanced": one.replace(balance=balance),
        "per row": one.replace(scale=rows, zero_point=zeros),
        "per row, balanced": one.replace(scale=rows, zero_point=zeros, balance=balance),
        "dynamic": ActQuantizer(None, None, dynamic=True),
        "dynamic, balanced": ActQuantizer(None, None, balance=balance, dynamic=True),
    }


@pytest.mark.parametrize("kind", quantizer_kinds())
def test_encode_under_jit_equals_eager_bit_for_bit(kind: str) -> None:
    quantizer = quantizer_kinds()[kind]
    x = np.random.default_rng(4).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    x[0, 0] = np.arange(WIDTH) * np.float32(0.5)
    eager, compiled = quantizer.encode(jnp.asarray(x)), encode(quantizer, x)
    constant = jax.jit(lambda x: quantizer.encode(x))(x)  # scales known when compiling: divisions may be folded
    for other in (compiled, constant):
        assert structure(other) == structure(eager)
        jax.tree.map(np.testing.assert_array_equal, other, eager)
    np.testing.assert_array_equal(fake_quant(quantizer, x), quantizer(jnp.asarray(x)))
    np.testing.assert_array_equal(quantizer(jnp.asarray(x)), decode(eager))


def test_fake_quantization_keeps_the_type_of_its_input() -> None:
    x = jnp.linspace(-1, 2, 16, dtype=jnp.bfloat16)
    quantizer = quantizer_for(-1, 2, 8)
    out = quantizer(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, quantizer(x.astype(jnp.float32)).astype(jnp.bfloat16))


@every_width
@properties
@given(x=activations, exponents=hnp.arrays(np.int32, WIDTH, elements=st.integers(-6, 6)))
def test_balance_multiplies_the_channels_first(bits: int, x: np.ndarray, exponents: np.ndarray) -> None:
    """Powers of two, with which the product is exact: codes must be those of the balanced input."""
    plain = quantizer_for(-31.0, 45.0, bits)
    balance = np.exp2(exponents).astype(np.float32)
    balanced = dataclasses.replace(plain, balance=balance)
    jax.tree.map(np.testing.assert_array_equal, encode(balanced, x), encode(plain, x * balance))


def test_any_balance_is_quantized_to_half_a_step() -> None:
    rng = np.random.default_rng(5)
    balance = np.exp(rng.normal(size=WIDTH)).astype(np.float32)
    x = rng.uniform(-1, 1, (ROWS, TOKENS, WIDTH)).astype(np.float32)
    quantizer = quantizer_for(float((x * balance).min()), float((x * balance).max()), 8).replace(balance=jnp.asarray(balance))
    assert np.abs(np.asarray(fake_quant(quantizer, x)) - x * balance).max() <= float(quantizer.static_range.scale) / 2 * (
        1 + 1e-4
    )
    scale, zero_point = map(np.asarray, quantizer.static_range)
    np.testing.assert_array_equal(encode(quantizer, x).values, numpy_codes(x, scale, zero_point, 8, balance))


def test_a_balance_alone_only_multiplies() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    factor = np.array([0.5, 1, 4], np.float32)
    np.testing.assert_array_equal(ChannelScale(jnp.asarray(factor))(jnp.asarray(x)), x * factor)
    assert ChannelScale(jnp.asarray(factor))(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


# --- groups of steps


def table_quantizer(groups: int = 4) -> ActQuantizer:
    rng = np.random.default_rng(6)
    scale = np.exp(rng.normal(size=groups)).astype(np.float32) * np.float32(0.02)
    return ActQuantizer(scale=jnp.asarray(scale), zero_point=jnp.asarray(rng.integers(-128, 128, groups), jnp.int32))


at_group = jax.jit(lambda quantizer, group: quantizer.at_group(group))


@pytest.mark.parametrize("group", range(4))
def test_one_group_for_all_rows_equals_indexing(group: int) -> None:
    table = table_quantizer()
    x = np.random.default_rng(7).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    chosen = at_group(table, np.int32(group))
    assert chosen.scale.shape == ()
    scale, zero_point = (np.asarray(column)[group] for column in table.static_range)
    np.testing.assert_array_equal(encode(chosen, x).values, numpy_codes(x, scale, zero_point, 8))


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS, TOKENS, WIDTH), (ROWS, TOKENS, 2, WIDTH)])
def test_a_group_per_row_equals_indexing(shape: tuple[int, ...]) -> None:
    table, groups = table_quantizer(), np.array([2, 0, 3], np.int32)
    x = np.random.default_rng(8).normal(size=shape).astype(np.float32)
    chosen = at_group(table, groups)
    assert chosen.scale.shape == (ROWS,)
    encoded = encode(chosen, x)
    values = fake_quant(chosen, x)
    for row, group in enumerate(groups):
        scale, zero_point = (np.asarray(column)[group] for column in table.static_range)
        codes = numpy_codes(x[row], scale, zero_point, 8)
        np.testing.assert_array_equal(encoded.values[row], codes)
        np.testing.assert_array_equal(values[row], scale * (codes - zero_point.astype(np.float32)).astype(np.float32))


def test_a_table_behind_the_depth_axis_keeps_its_depth() -> None:
    tables = [table_quantizer(3), table_quantizer(3).replace(zero_point=jnp.array([5, 6, 7], jnp.int32))]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tables)
    for group in (np.int32(1), np.array([2, 0, 1], np.int32)):
        chosen = at_group(stacked, group)
        for layer, table in enumerate(tables):
            for found, column in zip(chosen.static_range, table.static_range, strict=True):
                np.testing.assert_array_equal(found[layer], np.asarray(column)[group])


def test_a_dynamic_quantizer_has_no_groups() -> None:
    quantizer = ActQuantizer(None, None, dynamic=True)
    assert quantizer.at_group(jnp.int32(3)) is quantizer


# --- dynamic scales


@every_width
@properties
@given(x=activations)
def test_dynamic_scales_are_per_row_and_symmetric(bits: int, x: np.ndarray) -> None:
    quantizer = ActQuantizer(None, None, bits=bits, dynamic=True)
    x[0, 0] = 0
    values, scale, zero_point, _ = encode(quantizer, x)
    largest, qmax = np.abs(x).max(-1, keepdims=True), 2 ** (bits - 1) - 1
    assert zero_point is None
    np.testing.assert_allclose(scale, np.where(largest > 0, largest / np.float32(qmax), 1), rtol=1e-6)
    assert np.abs(np.asarray(values, int)).max() <= qmax
    back = np.asarray(fake_quant(quantizer, x), np.float64)
    assert (np.abs(back - x) <= np.asarray(scale) / 2 * (1 + 1e-4)).all()
    np.testing.assert_allclose(np.abs(back).max(-1, keepdims=True), largest, rtol=1e-6)


@every_width
@properties
@given(x=activations)
def test_dynamic_scales_of_nonnegative_values_use_all_codes(bits: int, x: np.ndarray) -> None:
    quantizer = ActQuantizer(None, None, bits=bits, dynamic=True, nonnegative=True)
    x = np.abs(x)
    x[0, 0] = 0
    values, scale, zero_point, _ = encode(quantizer, x)
    largest, (qmin, qmax) = x.max(-1, keepdims=True), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert int(zero_point) == qmin
    np.testing.assert_allclose(scale, np.where(largest > 0, largest / np.float32(qmax - qmin), 1), rtol=1e-6)
    assert (np.asarray(values).max(-1, keepdims=True)[largest > 0] == qmax).all()
    assert np.asarray(values).min() >= qmin
    back = np.asarray(fake_quant(quantizer, x), np.float64)
    assert (np.abs(back - x) <= np.asarray(scale) / 2 * (1 + 1e-4)).all()
    assert (back[x == 0] == 0).all()


def test_dynamic_rows_do_not_see_each_other() -> None:
    quantizer = ActQuantizer(None, None, dynamic=True)
    x = np.random.default_rng(9).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    louder = x.copy()
    louder[1, 1] *= 1000
    others = np.ones((ROWS, TOKENS), bool)
    others[1, 1] = False
    np.testing.assert_array_equal(
        np.asarray(fake_quant(quantizer, louder))[others], np.asarray(fake_quant(quantizer, x))[others]
    )


def test_dynamic_scales_see_the_balanced_channels() -> None:
    rng = np.random.default_rng(10)
    balance = np.exp(rng.normal(size=WIDTH)).astype(np.float32)
    x = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    plain = ActQuantizer(None, None, dynamic=True)
    jax.tree.map(
        np.testing.assert_array_equal, encode(plain.replace(balance=jnp.asarray(balance)), x), encode(plain, x * balance)
    )


# --- degenerate inputs


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((1, 4)),
        np.full((1, 4), 3.0),
        np.full((1, 4), -3.0),
        np.full((1, 1), 0.7),
        np.zeros((1, 1)),
        np.array([[-1e30, 1e30, 0, 1]]),
        np.array([[-1e-30, 2e-30, 0, 1e-31]]),
    ],
    ids=["zeros", "constant", "negative constant", "single channel", "single zero", "huge", "tiny"],
)
def test_degenerate_inputs_are_quantized_to_half_a_step(x: np.ndarray, dynamic: bool, bits: int) -> None:
    x = x.astype(np.float32)
    if dynamic:
        quantizer = ActQuantizer(None, None, bits=bits, dynamic=True)
    else:
        scale, zero_point = affine_parameters(jnp.asarray(x.min()), jnp.asarray(x.max()), bits)
        quantizer = ActQuantizer(scale, zero_point, bits=bits)
    encoded: Encoded = encode(quantizer, x)
    back = np.asarray(fake_quant(quantizer, x), np.float64)
    assert np.isfinite(back).all()
    assert (np.abs(back - x) <= np.asarray(encoded.scale, np.float64) / 2 * (1 + 1e-4)).all()
    assert (back[x == 0] == 0).all()
