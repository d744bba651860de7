"""The kernels for Hopper run by Pallas' interpreter on a CPU, against NumPy in float64; needs JAX 0.11.

The interpreter also checks what a GPU does not: races between warpgroups and with copies, and barriers that are left with
arrivals nobody has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER, PLAIN, XLA
from hopper_helpers import HAS_INTERPRETER, interpreted_kernels
from jax.typing import ArrayLike, DTypeLike

import ptq4dit_jax as ptq
from ptq4dit_jax.engine import hopper
from ptq4dit_jax.engine.dispatch import watched
from ptq4dit_jax.engine.hopper import gemm, nibbles, row_wise, tiles
from ptq4dit_jax.engine.hopper.plan import GatedResidual, GeluRequantize, Tiles
from ptq4dit_jax.engine.stacks import OfLayer, lazy_layer, materialize
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor, pack_nibbles

#: Memory that nothing was written to holds NaN in the interpreter.
pytestmark = [pytest.mark.makes_nan, pytest.mark.skipif(not HAS_INTERPRETER, reason="needs Pallas' GPU interpreter")]

TILES = [
    Tiles(64, 64, 2),
    Tiles(64, 64, 2, "n"),
    Tiles(64, 128, 3, "ping-pong"),
    Tiles(64, 128, 2),
    Tiles(64, 192, 2),
    Tiles(128, 64, 3),
]
#: For packed weights: those in use, of which stages are unpacked one by one or three at a time, and one of two at a time.
PACKED_TILES = [tiles.choose_for_few_rows(256), tiles.choose_for_few_rows(128), Tiles(128, 64, 4)]
K, N = 256, 384
#: Of the layer that a kernel is to read among LAYERS; the others hold what would show.
LAYER, LAYERS = 2, 4


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpreted_kernels():
        yield


def stacked(layer: ArrayLike, *, alone: bool = False, dtype: DTypeLike | None = None) -> jax.Array:
    """A layer between others that hold NaN, or the ends of an integer type; or ``alone``, a stack of one."""
    array = np.asarray(layer, dtype or np.asarray(layer).dtype)
    if alone:
        return jnp.asarray(array)[None]
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    stack = np.full((LAYERS, *array.shape), np.iinfo(array.dtype).max if integer else np.nan, array.dtype)
    stack[LAYER] = array
    return jnp.asarray(stack)


def layer() -> jax.Array:
    return jnp.asarray([LAYER], jnp.int32)


def drawn(M: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Operands, row scales, column scales and biases; results are of the order of 1."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (M, K)).astype(np.int8), rng.integers(-127, 128, (N, K)).astype(np.int8)
    row, column = (rng.uniform(0.5, 1.5, size).astype(np.float32) for size in (M, N))
    return a, b, row, column / (5400 * np.float32(K) ** 0.5), rng.standard_normal(N).astype(np.float32)


def exact(a: np.ndarray, b: np.ndarray, row: np.ndarray, column: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (a.astype(np.int64) @ b.astype(np.int64).T) * np.asarray(row, np.float64)[:, None] * np.float64(column) + bias


def near(got: object, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8 * 1.01, atol=1e-5)


def assert_codes(got: object, value: np.ndarray, zero_point: int, low: int = -128, high: int = 127) -> None:
    """``got`` is the code of ``value`` (float64), or its neighbour where the value lies next to a tie."""
    want = np.clip(np.round(value) + zero_point, low, high)
    differing = np.asarray(got, int) != want
    to_tie = np.abs(np.abs(value - np.floor(value)) - 0.5)
    assert np.all(to_tie[differing] < 1e-3)
    assert np.abs(np.asarray(got, int) - want).max() <= 1


@pytest.mark.parametrize("cut", TILES, ids=str)
@pytest.mark.parametrize("M", [1, 130, 256])
@pytest.mark.parametrize("alone", [False, True])
def test_products(cut: Tiles, M: int, alone: bool) -> None:
    a, b, row, column, bias = drawn(M)
    columns, biases = (stacked(array, alone=alone) for array in (column, bias))
    [y] = gemm.int8_matmul(
        jnp.asarray(a), stacked(b, alone=alone), jnp.asarray(row)[:, None], columns, biases, layer(), tiles=cut
    )
    near(y, exact(a, b, row, column, bias))


@pytest.mark.parametrize("cut", PACKED_TILES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 256), (130, 384), (256, 128), (70, 1024)])
@pytest.mark.parametrize("alone", [False, True])
def test_packed_weights(cut: Tiles, M: int, K: int, alone: bool) -> None:
    """Every code with every zero point."""
    rng = np.random.default_rng(M)
    a, codes = rng.integers(-128, 128, (M, K)).astype(np.int8), rng.integers(0, 16, (N, K)).astype(np.uint8)
    zero = (np.arange(N) % 16).astype(np.int8)
    vectors = np.ones(N, np.float32) / 2**12, np.zeros(N, np.float32)
    columns, biases = (stacked(array, alone=alone) for array in vectors)
    packed = stacked(np.asarray(pack_nibbles(jnp.asarray(codes))), alone=alone)
    zeros = stacked(zero, alone=alone)
    [y] = gemm.int8_matmul(jnp.asarray(a), packed, jnp.ones((M, 1)), columns, biases, layer(), tiles=cut, weight_zero=zeros)
    near(y, exact(a, codes.astype(int) - zero[:, None], np.ones(M, np.float32), *vectors))


@pytest.mark.parametrize("alone", [False, True])
def test_unpacking_alone(alone: bool) -> None:
    """Several weights by one kernel, every code with every zero point."""
    rng, shapes = np.random.default_rng(0), [(384, 256), (64, 128), (128, 384), (192, 128)]
    codes = [rng.integers(0, 16, shape).astype(np.uint8) for shape in shapes]
    zeros = [(np.arange(N) % 16).astype(np.int8) for N, _ in shapes]
    packed = [stacked(np.asarray(pack_nibbles(jnp.asarray(of))), alone=alone) for of in codes]
    stacks = packed, [stacked(zero, alone=alone) for zero in zeros]
    unpack = lambda packed, zeros: nibbles.unpacked(packed, zeros, layer(), after=jnp.zeros((3, 5), jnp.int8))
    for run in (unpack, jax.jit(unpack)):
        for got, of, zero in zip(run(*stacks), codes, zeros, strict=True):
            assert got.dtype == jnp.int8
            np.testing.assert_array_equal(np.asarray(got, int), of.astype(int) - zero[:, None])


def test_packed_weights_of_a_block_become_int8() -> None:
    """Those that the kernel covers, out of their stacks; others stay what they are."""
    rng = np.random.default_rng(0)

    def weight(bits: int, N: int, K: int) -> QTensor:
        low, high = (-127, 128) if bits == 8 else (0, 16)
        codes = rng.integers(low, high, (LAYERS, N, K)).astype(np.float32)
        zero = rng.integers(0, high if bits == 4 else 1, (LAYERS, N)).astype(np.float32)
        return QTensor.from_codes(jnp.asarray(codes), jnp.ones((LAYERS, N)), jnp.asarray(zero), bits)

    stacks = {"qkv": weight(4, 384, 128), "proj": weight(8, 128, 128), "fc1": weight(4, 80, 128), "fc2": weight(4, 192, 256)}
    after, index = jnp.zeros((2, 3, 4)), jnp.int32(LAYER)
    given, cut_out = lazy_layer(stacks, index), jax.tree.map(lambda leaf: leaf[LAYER], stacks)
    for dispatch, changed in ((XLA, set()), (HOPPER, {"qkv", "fc2"})):
        got = jax.jit(dispatch.unpack_ahead)(given, after)
        assert {name for name in stacks if got[name].packed != stacks[name].packed} == changed
        for name, want in cut_out.items():
            found = materialize(got[name])
            np.testing.assert_array_equal(found.codes(), want.codes())
            np.testing.assert_array_equal(found.scale, want.scale)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cut", [tiles.choose_for_few_rows(384), Tiles(64, 64, 3), Tiles(64, 64, 3, "ping-pong")], ids=str)
def test_all_layers_at_once(bits: int, cut: Tiles) -> None:
    """Each with rows, scales, biases and zero points of its own."""
    L, M = 3, 70
    a, codes, _, column, bias = (np.stack(arrays) for arrays in zip(*(drawn(M, seed) for seed in range(L)), strict=True))
    zero = np.zeros((L, N), np.int8)
    if bits == 4:
        codes, zero = codes & 15, (np.arange(L * N).reshape(L, N) % 16).astype(np.int8)
    weights = pack_nibbles(jnp.asarray(codes, jnp.uint8)) if bits == 4 else jnp.asarray(codes)
    scale = np.asarray([0.5, 0.7, 1.1], np.float32)
    parts = gemm.int8_matmul(
        jnp.asarray(a),
        weights,
        jnp.asarray(scale),
        jnp.asarray(column),
        jnp.asarray(bias),
        None,
        tiles=cut,
        weight_zero=jnp.asarray(zero) if bits == 4 else None,
        outputs=2,
    )
    assert [part.shape for part in parts] == [(L, M, N // 2)] * 2
    for index, got in enumerate(np.concatenate([np.asarray(part, np.float64) for part in parts], -1)):
        centered = codes[index].astype(int) - zero[index][:, None]
        near(got, exact(a[index], centered, np.full(M, scale[index]), column[index], bias[index]))


@pytest.mark.parametrize("chosen", range(3))
def test_one_scale_several_outputs_and_every_layer_of_a_stack(chosen: int) -> None:
    a, b, _, column, bias = drawn(70)
    weights, scales = (0 * b, b, b[::-1]), (0.7, 0.3, 1.1)
    stack = lambda arrays: jnp.asarray(np.stack(arrays))
    vectors = stack([column, 2 * column, 3 * column]), stack([bias, -bias, 0 * bias]), jnp.asarray([chosen], jnp.int32)
    parts = gemm.int8_matmul(
        jnp.asarray(a), stack(weights), jnp.asarray(scales, jnp.float32), *vectors, tiles=Tiles(64, 64, 2), outputs=2
    )
    assert [part.shape for part in parts] == [(70, N // 2)] * 2
    of_layer = np.full(70, scales[chosen], np.float32), (chosen + 1) * column, (1, -1, 0)[chosen] * bias
    near(np.concatenate([np.asarray(p, np.float32) for p in parts], 1), exact(a, weights[chosen], *of_layer))


@pytest.mark.parametrize("cut", TILES, ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_gate_and_residual(cut: Tiles, alone: bool) -> None:
    a, b, row, column, bias = drawn(192)
    rng = np.random.default_rng(1)
    residual, gate = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((192, N), (3, N)))
    finish = GatedResidual(residual, stacked(gate, alone=alone), 64)
    columns, biases = (stacked(array, alone=alone) for array in (column, bias))
    [y] = gemm.int8_matmul(
        jnp.asarray(a), stacked(b, alone=alone), jnp.asarray(row)[:, None], columns, biases, layer(), tiles=cut, finish=finish
    )
    wide = np.asarray(residual, np.float64), np.repeat(np.asarray(gate, np.float64), 64, 0)
    near(y, wide[0] + wide[1] * exact(a, b, row, column, bias))


@pytest.mark.parametrize("cut", TILES, ids=str)
@pytest.mark.parametrize(("balanced", "bits", "alone"), [(True, 8, False), (False, 8, False), (True, 6, True)])
def test_gelu_and_codes(cut: Tiles, balanced: bool, bits: int, alone: bool) -> None:
    a, b, row, column, bias = drawn(130)
    balance = np.random.default_rng(2).uniform(0.5, 2, N).astype(np.float32) if balanced else np.ones(N, np.float32)
    low, high, zero_point = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -20
    finish = GeluRequantize(
        stacked(0.03, alone=alone, dtype=np.float32),
        stacked(zero_point, alone=alone, dtype=np.int32),
        stacked(balance, alone=alone) if balanced else None,
        low,
        high,
    )
    columns, biases = (stacked(array, alone=alone) for array in (column, bias))
    [codes] = gemm.int8_matmul(
        jnp.asarray(a), stacked(b, alone=alone), jnp.asarray(row)[:, None], columns, biases, layer(), tiles=cut, finish=finish
    )
    y = exact(a, b, row, column, bias)
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    assert codes.dtype == jnp.int8
    assert_codes(codes, gelu * balance / np.float64(np.float32(0.03)), zero_point, low, high)


@pytest.mark.parametrize("D", [64, 192])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("alone", [False, True])
def test_norm_modulation_and_codes(D: int, per_row: bool, alone: bool) -> None:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(32, D)) * 3 + 1, jnp.bfloat16)
    shift, scale = (jnp.asarray(rng.normal(size=(2, D)), jnp.bfloat16) for _ in range(2))
    ranges = stacked(0.04, alone=alone, dtype=np.float32), stacked(7, alone=alone, dtype=np.int32)
    codes, *own = row_wise.modulate_quantize(
        x,
        stacked(shift, alone=alone),
        stacked(scale, alone=alone),
        None if per_row else ranges,
        layer(),
        tokens=16,
        eps=1e-6,
        low=-128,
        high=127,
    )
    wide = np.asarray(x, np.float64)
    centered = wide - wide.mean(1, keepdims=True)
    y = centered / np.sqrt(np.square(centered).mean(1, keepdims=True) + 1e-6)
    y = y * (1 + np.repeat(np.asarray(scale, np.float64), 16, 0)) + np.repeat(np.asarray(shift, np.float64), 16, 0)
    if per_row:
        np.testing.assert_allclose(own[0], np.abs(y).max(1) / 127, rtol=1e-5)
        assert_codes(codes, y / np.asarray(own[0], np.float64)[:, None], 0)
    else:
        assert_codes(codes, y / np.float64(np.float32(0.04)), 7)


def test_a_constant_row_has_no_scale_and_codes_of_zero() -> None:
    x, zeros = jnp.ones((8, 64), jnp.bfloat16), jnp.zeros((1, 1, 64), jnp.bfloat16)
    codes, scale = row_wise.modulate_quantize(x, zeros, zeros, None, layer(), tokens=8, eps=1e-6, low=-128, high=127)
    np.testing.assert_array_equal(codes, 0)
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("alone", [False, True])
def test_codes(balanced: bool, alone: bool) -> None:
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(16, 192)), jnp.bfloat16)
    balance = rng.uniform(0.5, 2, 192).astype(np.float32)
    codes = row_wise.quantize(
        x,
        stacked(0.03, alone=alone, dtype=np.float32),
        stacked(-90, alone=alone, dtype=np.int32),
        stacked(balance, alone=alone) if balanced else None,
        layer(),
        low=-128,
        high=127,
    )
    value = np.asarray(x, np.float64) * (balance if balanced else 1) / np.float64(np.float32(0.03))
    assert_codes(codes, value, -90)


@pytest.mark.parametrize("in_stack", [True, False])
def test_widths_that_are_no_multiple_of_a_tile(in_stack: bool) -> None:
    """Padded on the way in, trimmed on the way out; a layer of a stack is cut out for it."""
    B, T, odd_K, odd_N = 2, 64, 80, 144
    a, b, _, column, bias = drawn(B * T)
    a, b, column, bias = a[:, :odd_K], b[:odd_N, :odd_K], column[:odd_N], bias[:odd_N]
    rng = np.random.default_rng(5)
    gate, residual = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((B, odd_N), (B, T, odd_N)))
    balance, scale, zero_point = rng.uniform(0.5, 2, odd_N).astype(np.float32), np.float32(0.03), np.int32(-20)

    def lie(array: ArrayLike) -> Any:
        return OfLayer(stacked(array), jnp.int32(LAYER)) if in_stack else jnp.asarray(array)

    x = Encoded(jnp.asarray(a).reshape(B, T, odd_K), lie(np.float32(0.7)), None)
    layer = x, QTensor(lie(b), lie(column), None, 8), lie(bias)
    act = ActQuantizer(lie(scale), lie(zero_point), lie(balance))
    with watched() as ran:
        parts = HOPPER.linear_parts(*layer, jnp.bfloat16, 3)
        gated = HOPPER.linear_residual(*layer, lie(gate), residual)
        codes = HOPPER.linear_gelu(*layer, act)
    assert {call.backend for call in ran} == {hopper.BACKEND}
    y = exact(a, b, np.full(B * T, 0.7, np.float32), column, bias).reshape(B, T, odd_N)
    assert [part.shape for part in parts] == [(B, T, odd_N // 3)] * 3
    near(jnp.concatenate(parts, -1), y)
    near(gated, np.asarray(residual, np.float64) + np.asarray(gate, np.float64)[:, None] * y)
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    assert_codes(codes.values, gelu * balance / np.float64(scale), -20)


@pytest.mark.slow
def test_a_whole_model_is_its_reference() -> None:
    """Every layer reads what is its own: nearer to the reference than that is to the float model, by far."""
    config = DiTConfig(
        input_size=16, patch_size=2, in_channels=4, hidden_size=128, depth=2, num_heads=2, num_classes=10, mlp_ratio=1.0
    )
    dit = jax.tree.map(jnp.asarray, helpers.tiny_model(**config.to_dict()))
    settings = ptq.QuantConfig.of(**PLAIN, steps=2, calib_steps=2, calib_rows=2, step_groups=2)
    q = ptq.quantize(dit, settings, key=jax.random.key(0)).astype(jnp.bfloat16)
    x, y = jax.random.normal(jax.random.key(1), (1, *config.image_shape), jnp.float32), jnp.array([2])
    apply = jax.jit(lambda model: model.apply(x, jnp.array([400]), y).astype(jnp.float32))
    fast, slow, floats = (
        np.asarray(apply(m)) for m in (dataclasses.replace(q, backend="hopper"), dataclasses.replace(q, backend="xla"), dit)
    )
    assert np.square(fast - slow).mean() < 0.05 * np.square(slow - floats).mean()
