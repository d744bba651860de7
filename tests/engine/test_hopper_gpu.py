"""The kernels on a Hopper GPU, compared with NumPy and with the XLA reference."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER, PLAIN, XLA, num_programs
from hopper_helpers import STATIC, on_hopper, operands

import ptq4dit_jax as ptq
from ptq4dit_jax.engine.hopper import gemm, nibbles, tiles
from ptq4dit_jax.engine.hopper.plan import Tiles
from ptq4dit_jax.engine.stacks import OfLayer
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor, pack_nibbles

pytestmark = on_hopper


def every(table: dict[Any, tuple[Tiles, ...]], *more: Tiles) -> list[Tiles]:
    return sorted({cut for cuts in table.values() for cut in cuts} | {*more}, key=str)


ALL_TILES = every(tiles._CANDIDATES, Tiles(64, 128, 4, "n"))
PACKED = [tiles.choose_for_few_rows(256), tiles.choose_for_few_rows(128)]
DYNAMIC = ActQuantizer(None, None, dynamic=True)


def exact(x: Encoded, weight: QTensor, bias: jax.Array) -> np.ndarray:
    """The product in float64."""
    sums = np.asarray(x.values, np.int64) @ np.asarray(weight.codes(), np.int64).T
    return sums * np.asarray(x.scale, np.float64) * np.asarray(weight.scale, np.float64) + np.asarray(bias, np.float64)


def assert_within_one_ulp(got: jax.Array, want: np.ndarray) -> None:
    """Of bfloat16, whose ulp is at most 2^-7 of a value; near zero, where terms of order 1 cancel, of float32's noise."""
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("B", "T", "K", "N"),
    [
        (4, 256, 1152, 3456),
        (3, 64, 384, 1152),
        (1, 64, 4608, 1152),
        (2, 128, 400, 176),
        (5, 192, 768, 768),
        (3, 36, 128, 384),
        (2, 256, 1152, 4608),
        (4, 256, 1152, 4608),
        (2, 256, 4608, 1152),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [False, True])
def test_products_on_hopper(B: int, T: int, K: int, N: int, bits: int, rows: bool) -> None:
    x, weight, bias = operands(B, T, K, N, bits=bits, rows=rows)
    want = exact(x, weight, bias)
    run = jax.jit(partial(HOPPER.linear, dtype=jnp.bfloat16))
    assert_within_one_ulp(run(x, weight, bias), want)
    count = 3 if N % 3 == 0 else 2
    parts = jax.jit(partial(HOPPER.linear_parts, dtype=jnp.bfloat16, parts=count))(x, weight, bias)
    assert [part.shape[-1] for part in parts] == [N // count] * count
    assert_within_one_ulp(jnp.concatenate(parts, -1), want)
    rng = np.random.default_rng(3)
    residual, gate = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((B, T, N), (B, N)))
    got = jax.jit(HOPPER.linear_residual)(x, weight, bias, gate, residual)
    wide = [np.asarray(a, np.float64) for a in (residual, gate)]
    np.testing.assert_allclose(np.asarray(got, np.float64), wide[0] + wide[1][:, None] * want, rtol=2**-7, atol=2e-5)
    for act in (STATIC, dataclasses.replace(STATIC, balance=jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32))):
        got, reference = (
            np.asarray(jax.jit(dispatch.linear_gelu)(x, weight, bias, act).values, int) for dispatch in (HOPPER, XLA)
        )
        assert np.abs(got - reference).max() <= 1
        assert (got != reference).mean() < 1e-3  # those that lie at a tie, and tanh by its approximation


@pytest.mark.parametrize(("cut", "packed"), [*((cut, False) for cut in ALL_TILES), *((cut, True) for cut in PACKED)], ids=str)
@pytest.mark.parametrize("value", ["lowest", "highest", "zeros", "one hot"])
def test_accumulators_are_exact_for_extreme_values(cut: Tiles, packed: bool, value: str) -> None:
    M, K, N = 328, 1152, 384
    a = {
        "lowest": np.full((M, K), -128),
        "highest": np.full((M, K), 127),
        "zeros": np.zeros((M, K)),
        "one hot": np.eye(M, K) * 127,
    }[value]
    rng = np.random.default_rng(0)
    b = rng.integers(0, 16, (N, K)) if packed else rng.integers(-127, 128, (N, K))
    zero = np.arange(N) % 16 if packed else np.zeros(N, int)
    sums = a.astype(np.int64) @ (b - zero[:, None]).T
    scale = jnp.full((1, N), 2.0**-24)  # a power of two: the only rounding is the one to bfloat16
    weight, weight_zero = (
        (pack_nibbles(jnp.asarray(b)), jnp.asarray(zero, jnp.int8)[None]) if packed else (jnp.asarray(b, jnp.int8), None)
    )
    [got] = jax.jit(partial(gemm.int8_matmul, tiles=cut))(
        jnp.asarray(a, jnp.int8),
        weight[None],
        jnp.ones(1),
        scale,
        jnp.zeros((1, N)),
        jnp.zeros(1, jnp.int32),
        weight_zero=weight_zero,
    )
    want = jnp.asarray(sums * 2.0**-24, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize(("L", "B", "K", "N"), [(28, 2, 1152, 6912), (3, 128, 384, 2304), (2, 1, 768, 4608), (5, 70, 128, 384)])
def test_all_layers_at_once_on_hopper(L: int, B: int, K: int, N: int) -> None:
    """The same sums as the reference's, with every layer's own rows, scales and zero points."""
    layers = [operands(1, B, K, N, seed=seed, bits=4) for seed in range(L)]
    stack = lambda *leaves: jnp.stack(leaves)
    x, weight, bias = jax.tree.map(stack, *layers)
    x = x._replace(values=x.values[:, 0])
    run = lambda dispatch: jax.jit(partial(dispatch.linear_each, dtype=jnp.bfloat16, parts=2))(x, weight, bias)
    for got, want in zip(run(HOPPER), run(XLA), strict=True):
        assert_within_one_ulp(got, np.asarray(want, np.float64))


@pytest.mark.parametrize(
    "shapes", [[(64, 128)], [(192, 128), (64, 384)], [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)]], ids=str
)
@pytest.mark.parametrize("alone", [False, True])
def test_unpacking_alone_on_hopper(shapes: list[tuple[int, int]], alone: bool) -> None:
    """Several weights by one kernel, every code with every zero point, of a layer among others that hold what would show."""
    rng, layers = np.random.default_rng(0), 1 if alone else 3
    codes = [rng.integers(0, 16, (layers, *shape)).astype(np.uint8) for shape in shapes]
    zeros = [((np.arange(layers * N) * 7) % 16).astype(np.int8).reshape(-1, N) for N, _ in shapes]
    unpack = jax.jit(lambda packed, zeros: nibbles.unpacked(packed, zeros, jnp.asarray([2]), after=jnp.zeros(8)))
    found = unpack([pack_nibbles(jnp.asarray(of)) for of in codes], [jnp.asarray(zero) for zero in zeros])
    for got, of, zero in zip(found, codes, zeros, strict=True):
        np.testing.assert_array_equal(np.asarray(got, int), of[-1].astype(int) - zero[-1][:, None])


def in_stack(tree: Any, index: int) -> Any:
    """The tree as layer ``index`` of stacks of three whose other layers hold NaN or the end of an integer type."""

    def stacked(leaf: jax.Array) -> OfLayer:
        poison = jnp.iinfo(leaf.dtype).max if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.nan
        return OfLayer(jnp.full((3, *leaf.shape), poison, leaf.dtype).at[index].set(leaf), jnp.int32(index))

    return jax.tree.map(stacked, tree)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K", [384, 400])
def test_a_layer_is_read_out_of_its_stack(index: int, bits: int, K: int) -> None:
    """Whatever a kernel takes of a layer, and whatever XLA has to cut out for it: the same as without a stack."""
    x, weight, bias = operands(2, 64, K, 768, bits=bits)
    rng = np.random.default_rng(3)
    residual, gate, shift = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 64, 768), (2, 768), (2, 768)))
    act = dataclasses.replace(STATIC, balance=jnp.asarray(rng.uniform(0.5, 2, 768), jnp.float32))

    @jax.jit
    def run(scale: Any, weight: QTensor, bias: Any, gate: Any, shift: Any, act: ActQuantizer, plain: ActQuantizer) -> Any:
        codes = x._replace(scale=scale)
        return (
            HOPPER.linear(codes, weight, bias, jnp.bfloat16),
            HOPPER.linear_parts(codes, weight, bias, jnp.bfloat16, 3),
            HOPPER.linear_residual(codes, weight, bias, gate, residual),
            HOPPER.linear_gelu(codes, weight, bias, act).values,
            HOPPER.encode(residual, act).values,
            HOPPER.modulate_encode(residual, shift, gate, plain, Norm()).values,
            HOPPER.modulate_encode(residual, shift, gate, DYNAMIC, Norm()).values,
        )

    of_layer = x.scale, weight, bias, gate, shift, act, STATIC
    for got, want in zip(*(jax.tree.leaves(run(*args)) for args in (in_stack(of_layer, index), of_layer)), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("D", [384, 1152, 64])
@pytest.mark.parametrize(
    "act", [STATIC, DYNAMIC, ActQuantizer(None, None, bits=6, dynamic=True)], ids=["static", "row", "row6"]
)
def test_norms_on_hopper(D: int, act: ActQuantizer) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 64, D)) * 3 + 1, jnp.bfloat16)
    shift, scale = (jnp.asarray(rng.normal(size=(3, D)), jnp.bfloat16) for _ in range(2))
    got, want = (jax.jit(partial(dispatch.modulate_encode, norm=Norm()))(x, shift, scale, act) for dispatch in (HOPPER, XLA))
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-5)
    codes = [np.asarray(encoded.values, int) for encoded in (got, want)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 1e-4


@pytest.mark.parametrize("balanced", [False, True])
def test_codes_on_hopper(balanced: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 64, 1152)), jnp.bfloat16)
    act = dataclasses.replace(STATIC, balance=jnp.asarray(rng.uniform(0.5, 2, 1152), jnp.float32)) if balanced else STATIC
    got, want = (jax.jit(dispatch.encode)(x, act) for dispatch in (HOPPER, XLA))
    codes = [np.asarray(encoded.values, int) for encoded in (got, want)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 1e-4


@cache
def medium_model(bits: int) -> tuple[ptq.FloatDiT, ptq.QuantizedDiT]:
    """As wide as DiT-S/2, and the same quantized."""
    config = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=3, num_heads=6, num_classes=10)
    dit = ptq.FloatDiT.init(config, key=jax.random.key(0))
    settings = ptq.QuantConfig.of(**PLAIN, weight_bits=bits, steps=4, calib_steps=4, calib_rows=8)
    return dit, ptq.quantize(dit, settings, key=jax.random.key(0)).astype(jnp.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_on_hopper_is_its_reference(bits: int) -> None:
    dit, q = medium_model(bits)
    assert q.backend_choice.name == "hopper"
    x, y = jax.random.normal(jax.random.key(1), (8, *q.config.image_shape), jnp.float32), jnp.arange(8)
    apply = jax.jit(lambda model: model.apply(x, jnp.array([400]), y).astype(jnp.float32))
    fast, slow, floats = (np.asarray(apply(m)) for m in (q, dataclasses.replace(q, backend="xla"), dit))
    noise = np.square(slow - floats).mean()
    assert np.square(fast - floats).mean() < 1.1 * noise  # as good as the reference ...
    assert np.square(fast - slow).mean() < noise  # ... and near it: attention is not quantized
    before = num_programs(apply)
    apply(q)
    assert num_programs(apply) == before


def test_weights_of_all_layers_are_not_held_unpacked() -> None:
    """Which XLA does where nothing ties the unpacking of one to its layer, in deep and wide models only."""
    config = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=16, num_heads=16, num_classes=10)
    settings = ptq.QuantConfig.of(
        **PLAIN, weight_bits=4, steps=2, calib_steps=2, calib_rows=2, step_groups=2, range_search="minmax"
    )
    q = ptq.quantize(ptq.FloatDiT.init(config, key=jax.random.key(0)), settings, key=jax.random.key(0)).astype(jnp.bfloat16)
    unpacked = config.depth * 12 * config.hidden_size**2
    program = helpers.lowered_sampler(q, 4).compile()
    assert program.memory_analysis().temp_size_in_bytes < unpacked / 2


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("bits", [8, 4])
def test_several_gpus_make_the_images_of_one(bits: int) -> None:
    """To the byte those of batches of one's share; of other batches XLA's float products at the edges may round otherwise."""
    dit, q = medium_model(bits)
    draw = partial(ptq.sample, labels=np.arange(8), key=jax.random.key(2), steps=8, cfg_scale=1.5)
    spread, once = draw(q, mesh=ptq.data_mesh(jax.devices()[:2])), draw(q)
    np.testing.assert_array_equal(spread, draw(q, batch_size=4))
    assert np.square(spread - once).mean() < 0.05 * np.square(draw(dit) - once).mean()
