"""The kernels for Hopper: lowered for CUDA anywhere, and on such a GPU compared with NumPy and with the XLA reference."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, partial
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax import terminal
from ptq4dit_jax.devices import DeviceKind
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.engine import backends, encode, matmul
from ptq4dit_jax.engine.hopper import gemm, nibbles, tiles
from ptq4dit_jax.engine.hopper.plan import GatedResidual, GeluRequantize, Tiles
from ptq4dit_jax.engine.stacks import OfLayer
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor, pack_nibbles

IS_HOPPER = backends.resolve("auto", "bfloat16").name == "mosaic_gpu"
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")


def every(table: dict[Any, tuple[Tiles, ...]], *more: Tiles) -> list[Tiles]:
    return sorted({cut for cuts in table.values() for cut in cuts} | {*more}, key=str)


ALL_TILES = every(tiles._CANDIDATES, Tiles(64, 128, 4, "n"))
PACKED = [tiles.choose_for_few_rows(256), tiles.choose_for_few_rows(128)]
STATIC = ActQuantizer(scale=jnp.float32(0.03), zero_point=jnp.int32(-90))
DYNAMIC = ActQuantizer(None, None, dynamic=True)


def operands(
    B: int, T: int, K: int, N: int, *, seed: int = 0, bits: int = 8, rows: bool = False
) -> tuple[Encoded, QTensor, Any]:
    """Random codes of the whole range, with results of the order of 1."""
    rng = np.random.default_rng(seed)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (B, T, 1) if rows else ()), jnp.float32)
    values = jnp.asarray(rng.integers(-128, 128, (B, T, K)), jnp.int8)
    low, high = (-127, 128) if bits == 8 else (0, 2**bits)
    zeros = np.zeros(N) if bits == 8 else rng.integers(low, high, N)
    column = jnp.asarray(rng.uniform(0.5, 1.5, N) / (5400 * K**0.5 / 2 ** (8 - bits)), jnp.float32)
    weight = QTensor.from_codes(
        jnp.asarray(rng.integers(low, high, (N, K)), jnp.float32), column, jnp.asarray(zeros, jnp.float32), bits
    )
    return Encoded(values, scale, None), weight, jnp.asarray(rng.normal(size=N), jnp.float32)


def exact(x: Encoded, weight: QTensor, bias: jax.Array) -> np.ndarray:
    """The product in float64."""
    sums = np.asarray(x.values, np.int64) @ np.asarray(weight.codes(), np.int64).T
    return sums * np.asarray(x.scale, np.float64) * np.asarray(weight.scale, np.float64) + np.asarray(bias, np.float64)


def assert_within_one_ulp(got: jax.Array, want: np.ndarray) -> None:
    """Of bfloat16, whose ulp is at most 2^-7 of a value; near zero, where terms of order 1 cancel, of float32's noise."""
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=1e-5)


# Lowering, anywhere.


def lowered(function: Any, *args: Any) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kind", tiles._CANDIDATES)
def test_every_choice_of_tiles_lowers(kind: tiles.Kind) -> None:
    """Which is refused where the rings would not fit shared memory."""
    shape = jax.ShapeDtypeStruct
    M, N, K = 1024, 1152, 384
    vector = shape((3, N), jnp.float32)
    arguments = shape((M, K), jnp.int8), *[vector] * 2, shape((M, 1), jnp.float32)
    finish: Any = {
        "store": None,
        "gelu": GeluRequantize(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones((1, N)), -128, 127),
        "residual": GatedResidual(jnp.zeros((M, N), jnp.bfloat16), jnp.ones((1, 4, N), jnp.bfloat16), 256),
    }[kind]

    for cut in tiles._CANDIDATES[kind]:

        def run(a: Any, scale: Any, bias: Any, row: Any, b: Any, cut: Tiles = cut) -> Any:
            return gemm.int8_matmul(a, b, row, scale, bias, jnp.zeros(1, jnp.int32), tiles=cut, finish=finish)

        assert lowered(run, *arguments, shape((3, N, K), jnp.int8)).count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("M", [1, 7, 12, 36, 130])
@pytest.mark.parametrize("grouped", [False, True])
def test_any_number_of_rows_lowers(M: int, grouped: bool) -> None:
    """Bulk copies want 8 or fewer, or a multiple."""
    a, b = jnp.zeros((3, M, 128) if grouped else (M, 128), jnp.int8), jnp.zeros((3, 128, 128), jnp.int8)
    vectors, layer = jnp.ones((3, 128)), None if grouped else jnp.zeros(1, jnp.int32)
    scale = jnp.ones(3) if grouped else jnp.ones((M, 1))
    run = lambda a, b: gemm.int8_matmul(a, b, scale, vectors, vectors, layer, tiles=Tiles(64, 64, 2))
    assert lowered(run, a, b).count("custom_call @mosaic_gpu") == 1
    assert [out.shape for out in jax.eval_shape(run, a, b)] == [(3, M, 128) if grouped else (M, 128)]


@pytest.mark.parametrize("N", [128, 768, 2304, 6912])
def test_all_layers_at_once_lower(N: int) -> None:
    shape = jax.ShapeDtypeStruct
    x = Encoded(shape((3, 2, 384), jnp.int8), shape((3,), jnp.float32), None)
    weight = QTensor(shape((3, N // 2, 384), jnp.uint8), shape((3, N), jnp.float32), shape((3, N), jnp.int8), 4)
    run = partial(matmul.linear_each, dtype=jnp.bfloat16, parts=2, backend="mosaic_gpu")
    assert lowered(run, x, weight, shape((3, N), jnp.float32)).count("custom_call @mosaic_gpu") == 1


@cache
def small_model(bits: int, width: int = 128, side: int = 16, **settings: Any) -> ptq.QuantizedDiT:
    """Depth 2, 64 tokens unless ``side`` says otherwise, to run on the kernels."""
    config = DiTConfig(input_size=side, patch_size=2, in_channels=4, hidden_size=width, depth=2, num_heads=2, num_classes=10)
    dit = jax.tree.map(jnp.asarray, helpers.tiny_model(**config.to_dict()))
    quant = ptq.QuantConfig(weight_bits=bits, steps=2, calib_steps=2, calib_rows=2, step_groups=2, **settings)
    return ptq.quantize(dit, quant, key=jax.random.key(0)).astype(jnp.bfloat16).replace(backend="mosaic_gpu")


def lowered_model(q: ptq.QuantizedDiT, t: tuple[int, ...] = (500,)) -> str:
    x, y = jnp.zeros((2, *q.config.image_shape)), jnp.array([1, 2])
    return lowered(lambda q: q.apply(x, jnp.array(t), y), q)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_model_lowers_with_its_blocks_as_kernels(bits: int) -> None:
    q = small_model(bits)
    text = lowered_model(q)
    # Two norms, qkv, codes for proj, proj, fc1, fc2, once for all blocks. Packed weights: also the one that unpacks those of a
    # block, and the modulation of all blocks.
    assert text.count("custom_call @mosaic_gpu") == (9 if bits == 4 else 7)
    rows = {row["layer"]: row for row in ptq.describe(q)}
    assert all(rows[f"blocks.{layer}"]["backend"] == "mosaic_gpu" for layer in ("qkv", "proj", "fc1", "fc2"))


def functions(program: str) -> dict[str, Counter[str]]:
    """The operations of each function of a StableHLO program, by name; calls with what they call."""
    program = re.sub(r'"(?:[^"\\]|\\.)*"', "", program)  # kernels lie in strings
    bodies = re.findall(r"^  func\.func \w+ @(\w+)\((.*?)^  \}", program, re.MULTILINE | re.DOTALL)
    operation = re.compile(r"^ *%[\w:]+ = (?:stablehlo\.)?(call @\w+|[\w.]+)", re.MULTILINE)
    return {name: Counter(operation.findall(body)) for name, body in bodies}


def the_block(found: dict[str, Counter[str]]) -> tuple[str, Counter[str]]:
    """The function that all blocks call, and its operations."""
    [block] = [(name, body) for name, body in found.items() if name != "main" and body["custom_call"]]
    return block


def blocks_run_kernels_alone(q: ptq.QuantizedDiT, kernels: int = 7) -> None:
    """The program has one function for a block, called for each, of nothing but kernels; and no loop."""
    found = functions(lowered_model(q))
    name, block = the_block(found)
    assert {kind: count for kind, count in block.items() if kind not in ("reshape", "constant")} == {"custom_call": kernels}
    assert found["main"][f"call @{name}"] == q.config.depth
    assert not any(body["while"] for body in found.values())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dynamic", [None, ()], ids=["per-token", "static"])
def test_blocks_are_kernels_alone(bits: int, dynamic: tuple[()] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut out of a stack, split or computed between the kernels; attention, which is cuDNN's, is left out here."""
    monkeypatch.setattr("ptq4dit_jax.engine.attention.mosaic_gpu.attention", lambda q, k, v, heads, sites: v)
    q = small_model(bits, **({} if dynamic is None else {"dynamic_sites": dynamic}))
    blocks_run_kernels_alone(q, kernels=8 if bits == 4 else 7)


def test_weights_are_unpacked_when_the_block_has_its_input() -> None:
    """The kernel takes that input, so XLA cannot move it out of the loop over steps."""
    program = lowered_model(small_model(4))
    [x] = re.findall(r"@block\(.*(%arg\d+): tensor<2x64x128xbf16>\) ->", program)
    [given] = re.findall(r"%\d+:4 = stablehlo\.custom_call @mosaic_gpu\w*\((.*?)\)", program)  # the one of four results
    assert x in given.split(", ")


@pytest.mark.parametrize(
    ("policy", "kernels", "shifts"), [("uniform,blocks.proj=8", 8, 0), ("uniform,blocks.proj=4:float", 6, 1)]
)
def test_of_mixed_widths_a_block_unpacks_what_its_kernels_read(policy: str, kernels: int, shifts: int) -> None:
    """A layer that is fed by floats is XLA's."""
    _, block = the_block(functions(lowered_model(small_model(4, policy=policy))))
    assert (block["custom_call"], block["shift_right_logical"]) == (kernels, shifts)


def test_weights_of_padded_widths_are_concatenated_from_halves() -> None:
    """By XLA, which merges shifts of all layers and holds the results."""
    _, block = the_block(functions(lowered_model(small_model(4, width=80))))
    assert block["shift_right_logical"] == 4  # the high halves alone
    assert block["concatenate"] == 4


def test_attention_is_a_kernel_that_gives_codes_where_it_covers_the_shape() -> None:
    q = small_model(8, side=32)
    blocks_run_kernels_alone(q)
    products = [row for row in ptq.describe(q) if row["layer"] in ("blocks.q @ k", "blocks.probs @ v")]
    assert [(row["backend"], row["runs"], row["integer"]) for row in products] == [("mosaic_gpu", "bfloat16", False)] * 2


def runs_on(q: ptq.QuantizedDiT) -> dict[str, str]:
    """What the table says of the layers of the blocks."""
    rows = {row["layer"].removeprefix("blocks."): row["backend"] for row in ptq.describe(q)}
    return {name: rows[name] for name in ("adaLN", "qkv", "proj", "fc1", "fc2")}


def test_the_table_says_what_is_lowered() -> None:
    """Not what was asked for: widths and tokens that a kernel does not cover, types, and the edges."""
    own, mixed = "mosaic_gpu", "mosaic_gpu, codes by xla"
    in_blocks = {"adaLN": "xla", "qkv": own, "proj": own, "fc1": own, "fc2": own}
    assert runs_on(small_model(8)) == in_blocks
    assert runs_on(small_model(4)) == in_blocks | {"adaLN": mixed}
    narrow = small_model(8, width=80)  # padded to 128 for the products; the norms want multiples of 64
    assert runs_on(narrow) == in_blocks | {"qkv": mixed, "proj": mixed, "fc1": mixed}
    assert lowered_model(narrow).count("custom_call @mosaic_gpu") == 4
    few = small_model(8, side=12)  # 36 tokens: no multiple of 8, for the norms, nor of 64, for the gates
    assert runs_on(few) == in_blocks | {"qkv": mixed, "proj": "xla", "fc1": mixed, "fc2": "xla"}
    assert lowered_model(few).count("custom_call @mosaic_gpu") == 2
    assert set(runs_on(small_model(8).astype(jnp.float32)).values()) == {"xla"}
    edges = {row["layer"]: row["backend"] for row in ptq.describe(small_model(8, policy="edges8"))}
    assert (edges["patch_embed"], edges["time_fc1"], edges["final"]) == (mixed, "xla", own)


def test_what_ran_is_noted_by_call() -> None:
    with backends.watched() as ran:
        matmul.linear(*operands(1, 4, 16, 8), jnp.float32, backend="mosaic_gpu")
        encode.encode(jnp.zeros((2, 3)), STATIC)
    matmul.linear(*operands(1, 4, 16, 8), jnp.float32)
    assert ran == [("matmul", "linear", "xla"), ("encode", "encode", "xla")]


@pytest.mark.parametrize(("bits", "kernels"), [(8, 0), (4, 1)])
def test_rows_in_groups_of_steps_of_their_own_fall_to_the_reference(bits: int, kernels: int) -> None:
    """With weights that the kernel unpacked: so they are not held for all layers at once there either."""
    text = lowered_model(small_model(bits, dynamic_sites=()), t=(900, 100))
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert "(tensor<2x64x128xi8>, tensor<384x128xi8>) -> tensor<2x64x384xi32>" in text  # qkv


# The choice.


def test_the_backend_is_chosen_by_device_and_an_unknown_one_is_named(raises_sentence: Any) -> None:
    if not IS_HOPPER and jax.default_backend() == "cpu":
        assert backends.resolve("auto", "bfloat16") == backends.Choice("xla")
    assert backends.resolve("mosaic_gpu", "bfloat16") == backends.Choice("mosaic_gpu")  # the device is the caller's business
    refused = backends.resolve("mosaic_gpu", "float32")
    assert refused.name == "xla"
    assert "bfloat16" in refused.why
    assert backends.resolve("xla", "float32") == backends.Choice("xla")
    with raises_sentence("'cutlass'", "mosaic_gpu"):
        backends.resolve("cutlass", "float32")


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "expected", "why"),
    [
        ("gpu", "9.0", "bfloat16", "mosaic_gpu", ""),
        ("gpu", "9.0", "float32", "xla", "float32"),
        ("gpu", "8.0", "bfloat16", "xla", "8.0"),
        ("tpu", "", "bfloat16", "xla", ""),
    ],
)
def test_what_auto_means(platform, capability, dtype, expected, why, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self) -> None:
            self.platform, self.compute_capability = platform, capability

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    choice = backends.resolve("auto", dtype)
    assert choice.name == expected
    assert why in choice.why
    assert bool(choice.why) == bool(why)


def test_the_kernels_are_refused_for_a_type_that_they_do_not_compute_in(
    monkeypatch: pytest.MonkeyPatch, raises_sentence: Any
) -> None:
    monkeypatch.setattr(terminal, "default_device", lambda: DeviceKind("gpu", (9, 0)))
    q = small_model(8).astype(jnp.float32)
    with raises_sentence("mosaic_gpu", "float32", "bfloat16"):
        terminal.to_run(q, "float32", "mosaic_gpu")
    assert terminal.runs_line(terminal.to_run(q, "auto", "mosaic_gpu")) == "in bfloat16, integer products by mosaic_gpu"
    assert terminal.to_run(q, "float32", "xla").backend == "xla"


@pytest.mark.parametrize("kind", ["store", "gelu", "residual"])
@pytest.mark.parametrize("N", [128, 384, 768, 1024, 1152, 3456, 4608])
def test_tiles_divide_the_width_and_keep_the_cores_busy(kind: tiles.Kind, N: int) -> None:
    choose = partial(tiles.choose, kind, N=N)
    for M in (1, 64, 512, 4096, 32768):
        assert N % choose(M=M).block[1] == 0
    few, many = (np.prod(choose(M=M).block) for M in (64, 10**6))
    assert few <= many


# On the GPU.


@on_hopper
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
    run = jax.jit(partial(matmul.linear, dtype=jnp.bfloat16, backend="mosaic_gpu"))
    assert_within_one_ulp(run(x, weight, bias), want)
    count = 3 if N % 3 == 0 else 2
    parts = jax.jit(partial(matmul.linear_parts, dtype=jnp.bfloat16, parts=count, backend="mosaic_gpu"))(x, weight, bias)
    assert [part.shape[-1] for part in parts] == [N // count] * count
    assert_within_one_ulp(jnp.concatenate(parts, -1), want)
    rng = np.random.default_rng(3)
    residual, gate = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((B, T, N), (B, N)))
    got = jax.jit(partial(matmul.linear_residual, backend="mosaic_gpu"))(x, weight, bias, gate, residual)
    wide = [np.asarray(a, np.float64) for a in (residual, gate)]
    np.testing.assert_allclose(np.asarray(got, np.float64), wide[0] + wide[1][:, None] * want, rtol=2**-7, atol=2e-5)
    for act in (STATIC, STATIC.replace(balance=jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32))):
        got, reference = (
            np.asarray(jax.jit(partial(matmul.linear_gelu, backend=backend))(x, weight, bias, act).values, int)
            for backend in ("mosaic_gpu", "xla")
        )
        assert np.abs(got - reference).max() <= 1
        assert (got != reference).mean() < 1e-3  # those that lie at a tie, and tanh by its approximation


@on_hopper
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


@on_hopper
@pytest.mark.parametrize(("L", "B", "K", "N"), [(28, 2, 1152, 6912), (3, 128, 384, 2304), (2, 1, 768, 4608), (5, 70, 128, 384)])
def test_all_layers_at_once_on_hopper(L: int, B: int, K: int, N: int) -> None:
    """The same sums as the reference's, with every layer's own rows, scales and zero points."""
    layers = [operands(1, B, K, N, seed=seed, bits=4) for seed in range(L)]
    stack = lambda *leaves: jnp.stack(leaves)
    x, weight, bias = jax.tree.map(stack, *layers)
    x = x._replace(values=x.values[:, 0])
    run = lambda backend: jax.jit(partial(matmul.linear_each, dtype=jnp.bfloat16, parts=2, backend=backend))(x, weight, bias)
    for got, want in zip(run("mosaic_gpu"), run("xla"), strict=True):
        assert_within_one_ulp(got, np.asarray(want, np.float64))


@on_hopper
@pytest.mark.parametrize(
    "shapes", [[(64, 128)], [(192, 128), (64, 384)], [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)]], ids=str
)
@pytest.mark.parametrize("alone", [False, True])
def test_unpacking_alone_on_hopper(shapes: list[tuple[int, int]], alone: bool) -> None:
    """Several weights by one kernel, every code with every zero point, of a layer among others that hold what would show."""
    rng, layers = np.random.default_rng(0), 1 if alone else 3
    codes = [rng.integers(0, 16, (layers, *shape)).astype(np.uint8) for shape in shapes]
    zeros = [((np.arange(layers * N) * 7) % 16).astype(np.int8).reshape(-1, N) for N, _ in shapes]
    unpack = jax.jit(lambda *stacks: nibbles.unpacked(*stacks, jnp.asarray([2]), after=jnp.zeros(8)))
    found = unpack([pack_nibbles(jnp.asarray(of)) for of in codes], [jnp.asarray(zero) for zero in zeros])
    for got, of, zero in zip(found, codes, zeros, strict=True):
        np.testing.assert_array_equal(np.asarray(got, int), of[-1].astype(int) - zero[-1][:, None])


def in_stack(tree: Any, index: int) -> Any:
    """The tree as layer ``index`` of stacks of three whose other layers hold NaN or the end of an integer type."""

    def stacked(leaf: jax.Array) -> OfLayer:
        poison = jnp.iinfo(leaf.dtype).max if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.nan
        return OfLayer(jnp.full((3, *leaf.shape), poison, leaf.dtype).at[index].set(leaf), jnp.int32(index))

    return jax.tree.map(stacked, tree)


@on_hopper
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K", [384, 400])
def test_a_layer_is_read_out_of_its_stack(index: int, bits: int, K: int) -> None:
    """Whatever a kernel takes of a layer, and whatever XLA has to cut out for it: the same as without a stack."""
    x, weight, bias = operands(2, 64, K, 768, bits=bits)
    rng = np.random.default_rng(3)
    residual, gate, shift = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 64, 768), (2, 768), (2, 768)))
    act = STATIC.replace(balance=jnp.asarray(rng.uniform(0.5, 2, 768), jnp.float32))

    @jax.jit
    def run(scale: Any, weight: QTensor, bias: Any, gate: Any, shift: Any, act: ActQuantizer, plain: ActQuantizer) -> Any:
        codes = x._replace(scale=scale)
        return (
            matmul.linear(codes, weight, bias, jnp.bfloat16, backend="mosaic_gpu"),
            matmul.linear_parts(codes, weight, bias, jnp.bfloat16, 3, backend="mosaic_gpu"),
            matmul.linear_residual(codes, weight, bias, gate, residual, backend="mosaic_gpu"),
            matmul.linear_gelu(codes, weight, bias, act, backend="mosaic_gpu").values,
            encode.encode(residual, act, backend="mosaic_gpu").values,
            encode.modulate_encode(residual, shift, gate, plain, 1e-6, backend="mosaic_gpu").values,
            encode.modulate_encode(residual, shift, gate, DYNAMIC, 1e-6, backend="mosaic_gpu").values,
        )

    of_layer = x.scale, weight, bias, gate, shift, act, STATIC
    for got, want in zip(*(jax.tree.leaves(run(*args)) for args in (in_stack(of_layer, index), of_layer)), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@on_hopper
@pytest.mark.parametrize("D", [384, 1152, 64])
@pytest.mark.parametrize(
    "act", [STATIC, DYNAMIC, ActQuantizer(None, None, bits=6, dynamic=True)], ids=["static", "row", "row6"]
)
def test_norms_on_hopper(D: int, act: ActQuantizer) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 64, D)) * 3 + 1, jnp.bfloat16)
    shift, scale = (jnp.asarray(rng.normal(size=(3, D)), jnp.bfloat16) for _ in range(2))
    got, want = (
        jax.jit(partial(encode.modulate_encode, eps=1e-6, backend=backend))(x, shift, scale, act)
        for backend in ("mosaic_gpu", "xla")
    )
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-5)
    codes = [np.asarray(encoded.values, int) for encoded in (got, want)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 1e-4


@on_hopper
@pytest.mark.parametrize("balanced", [False, True])
def test_codes_on_hopper(balanced: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 64, 1152)), jnp.bfloat16)
    act = STATIC.replace(balance=jnp.asarray(rng.uniform(0.5, 2, 1152), jnp.float32)) if balanced else STATIC
    got, want = (jax.jit(partial(encode.encode, backend=backend))(x, act) for backend in ("mosaic_gpu", "xla"))
    codes = [np.asarray(encoded.values, int) for encoded in (got, want)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 1e-4


@cache
def medium_model(bits: int) -> tuple[ptq.FloatDiT, ptq.QuantizedDiT]:
    """As wide as DiT-S/2, and the same quantized."""
    config = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=3, num_heads=6, num_classes=10)
    dit = ptq.FloatDiT.init(config, jax.random.key(0))
    settings = ptq.QuantConfig(weight_bits=bits, steps=4, calib_steps=4, calib_rows=8)
    return dit, ptq.quantize(dit, settings, key=jax.random.key(0)).astype(jnp.bfloat16)


@on_hopper
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_on_hopper_is_its_reference(bits: int) -> None:
    dit, q = medium_model(bits)
    assert q.backend_choice.name == "mosaic_gpu"
    x, y = jax.random.normal(jax.random.key(1), (8, *q.config.image_shape)), jnp.arange(8)
    apply = jax.jit(lambda model: model.apply(x, jnp.array([400]), y).astype(jnp.float32))
    fast, slow, floats = (np.asarray(apply(m)) for m in (q, q.replace(backend="xla"), dit))
    noise = np.square(slow - floats).mean()
    assert np.square(fast - floats).mean() < 1.1 * noise  # as good as the reference ...
    assert np.square(fast - slow).mean() < noise  # ... and near it: attention is not quantized
    before = apply._cache_size()
    apply(q)
    assert apply._cache_size() == before


@on_hopper
def test_weights_of_all_layers_are_not_held_unpacked() -> None:
    """Which XLA does where nothing ties the unpacking of one to its layer, in deep and wide models only."""
    config = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=16, num_heads=16, num_classes=10)
    settings = ptq.QuantConfig(weight_bits=4, steps=2, calib_steps=2, calib_rows=2, step_groups=2, range_search="minmax")
    q = ptq.quantize(ptq.FloatDiT.init(config, jax.random.key(0)), settings, key=jax.random.key(0)).astype(jnp.bfloat16)
    unpacked = config.depth * 12 * config.hidden_size**2
    program = helpers.lowered_sampler(q, 4).compile()
    assert program.memory_analysis().temp_size_in_bytes < unpacked / 2


@on_hopper
@pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("bits", [8, 4])
def test_several_gpus_make_the_images_of_one(bits: int) -> None:
    """To the byte those of batches of one's share; of other batches XLA's float products at the edges may round otherwise."""
    dit, q = medium_model(bits)
    draw = partial(ptq.sample, labels=np.arange(8), key=jax.random.key(2), steps=8, cfg_scale=1.5)
    spread, once = draw(q, mesh=ptq.data_mesh(jax.devices()[:2])), draw(q)
    np.testing.assert_array_equal(spread, draw(q, batch_size=4))
    assert np.square(spread - once).mean() < 0.05 * np.square(draw(dit) - once).mean()


def test_an_unknown_backend_is_refused_by_operations_too(raises_sentence: Any) -> None:
    with raises_sentence("'cutlass'"):
        matmul.linear(*operands(1, 4, 16, 8), jnp.float32, backend="cutlass")
