"""The kernels for Hopper lowered for CUDA, on any machine, and when they are chosen."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from functools import cache, partial
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER, XLA
from hopper_helpers import IS_HOPPER, STATIC, operands

import ptq4dit_jax as ptq
from ptq4dit_jax import terminal
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import choice, hopper, xla
from ptq4dit_jax.engine.dispatch import Kind, Ran, Refusal, watched
from ptq4dit_jax.engine.hopper import gemm, tiles
from ptq4dit_jax.engine.hopper.plan import GatedResidual, GeluRequantize, Tiles
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.quantizers import Encoded, QTensor


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
    shape: Any = jax.ShapeDtypeStruct  # in the place of arrays
    x = Encoded(shape((3, 2, 384), jnp.int8), shape((3,), jnp.float32), None)
    weight = QTensor(shape((3, N // 2, 384), jnp.uint8), shape((3, N), jnp.float32), shape((3, N), jnp.int8), 4)
    run = partial(HOPPER.linear_each, dtype=jnp.bfloat16, parts=2)
    assert lowered(run, x, weight, shape((3, N), jnp.float32)).count("custom_call @mosaic_gpu") == 1


@cache
def small_model(bits: int, width: int = 128, side: int = 16, **settings: Any) -> ptq.QuantizedDiT:
    """Depth 2, 64 tokens unless ``side`` says otherwise, to run on the kernels."""
    config = DiTConfig(input_size=side, patch_size=2, in_channels=4, hidden_size=width, depth=2, num_heads=2, num_classes=10)
    dit = jax.tree.map(jnp.asarray, helpers.tiny_model(**config.to_dict()))
    quant = ptq.QuantConfig.of(
        **helpers.PLAIN, weight_bits=bits, steps=2, calib_steps=2, calib_rows=2, step_groups=2, **settings
    )
    return dataclasses.replace(ptq.quantize(dit, quant, key=jax.random.key(0)).astype(jnp.bfloat16), backend="hopper")


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
    rows = {row.layer: row for row in ptq.describe(q)}
    assert all(rows[f"blocks.{layer}"].backend == "hopper" for layer in ("qkv", "proj", "fc1", "fc2"))


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
    monkeypatch.setattr("ptq4dit_jax.engine.hopper.attend.attention", lambda q, k, v, heads, sites: v)
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


@pytest.mark.slow
def test_weights_of_padded_widths_are_concatenated_from_halves() -> None:
    """By XLA, which merges shifts of all layers and holds the results."""
    _, block = the_block(functions(lowered_model(small_model(4, width=80))))
    assert block["shift_right_logical"] == 4  # the high halves alone
    assert block["concatenate"] == 4


def test_attention_is_a_kernel_that_gives_codes_where_it_covers_the_shape() -> None:
    q = small_model(8, side=32)
    blocks_run_kernels_alone(q)
    products = [row for row in ptq.describe(q) if row.layer in ("blocks.q @ k", "blocks.probs @ v")]
    assert [(row.backend, row.runs, row.integer) for row in products] == [("hopper", "bfloat16", False)] * 2


def runs_on(q: ptq.QuantizedDiT) -> dict[str, str]:
    """What the table says of the layers of the blocks."""
    rows = {row.layer.removeprefix("blocks."): row.backend for row in ptq.describe(q)}
    return {name: rows[name] for name in ("adaLN", "qkv", "proj", "fc1", "fc2")}


def test_the_table_says_what_is_lowered() -> None:
    """Not what was asked for: widths and tokens that a kernel does not cover, types, and the edges."""
    own, mixed = "hopper", "hopper, codes by xla"
    in_blocks = {"adaLN": "xla", "qkv": own, "proj": own, "fc1": own, "fc2": own}
    assert runs_on(small_model(8)) == in_blocks
    assert runs_on(small_model(4)) == in_blocks | {"adaLN": mixed}
    narrow = small_model(8, width=80)  # padded to 128 for the products; the norms want multiples of 64
    assert runs_on(narrow) == in_blocks | {"qkv": mixed, "proj": mixed, "fc1": mixed}
    assert lowered_model(narrow).count("custom_call @mosaic_gpu") == 4
    few = small_model(8, side=12)  # 36 tokens: no multiple of 8, for the norms, nor of 64, for the gates
    assert runs_on(few) == in_blocks | {"qkv": mixed, "proj": "xla", "fc1": mixed, "fc2": "xla"}
    assert lowered_model(few).count("custom_call @mosaic_gpu") == 2
    with pytest.raises(ptq.Ptq4ditError, match="hopper computes in bfloat16, not in float32"):
        runs_on(small_model(8).astype(jnp.float32))
    assert set(runs_on(dataclasses.replace(small_model(8).astype(jnp.float32), backend="auto")).values()) == {"xla"}
    edges = {row.layer: row.backend for row in ptq.describe(small_model(8, policy="edges8"))}
    assert (edges["patch_embed"], edges["time_fc1"], edges["final"]) == (mixed, "xla", own)


def test_it_says_why_what_is_not_covered_is_not() -> None:
    why = lambda q: {row.layer.removeprefix("blocks."): row.why for row in ptq.describe(q)}
    covered = why(small_model(8))
    assert covered["adaLN"].endswith("weights of 8 bits are read by XLA as fast as memory can")
    assert [covered[layer] for layer in ("qkv", "proj", "fc1", "fc2")] == [""] * 4
    narrow = why(small_model(8, width=80))
    assert narrow["qkv"] == narrow["fc1"] == "80 channels are no multiple of 64"
    few = why(small_model(8, side=12))
    assert few["qkv"] == "36 tokens are no multiple of 8"
    assert few["proj"] == "36 tokens are no multiple of 8; 36 tokens are no multiple of 64"
    # Where XLA was chosen for all, `info` says why in a line of its own.
    assert set(why(dataclasses.replace(small_model(8).astype(jnp.float32), backend="auto")).values()) == {""}


def test_what_ran_is_noted_by_call() -> None:
    with watched() as ran:
        HOPPER.linear(*operands(1, 4, 16, 8), jnp.float32)
        XLA.encode(jnp.zeros((2, 3)), STATIC)
    XLA.linear(*operands(1, 4, 16, 8), jnp.float32)
    assert ran == [
        Ran(Kind.LINEAR, "linear", xla.BACKEND, (Refusal(hopper.BACKEND, "it computes in float32"),)),
        Ran(Kind.CODES, "encode", xla.BACKEND),
    ]
    assert [call.why for call in ran] == ["it computes in float32", ""]


@pytest.mark.parametrize(("bits", "kernels"), [(8, 0), (4, 1)])
def test_rows_in_groups_of_steps_of_their_own_fall_to_the_reference(bits: int, kernels: int) -> None:
    """With weights that the kernel unpacked: so they are not held for all layers at once there either."""
    text = lowered_model(small_model(bits, dynamic_sites=()), t=(900, 100))
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert "(tensor<2x64x128xi8>, tensor<384x128xi8>) -> tensor<2x64x384xi32>" in text  # qkv


# The choice.


def test_the_backend_is_chosen_by_device_and_an_unknown_one_is_named(raises_sentence: Any) -> None:
    if not IS_HOPPER and jax.default_backend() == "cpu":
        assert choice.resolve("auto", "bfloat16") == choice.Choice(xla.BACKEND)
    assert choice.resolve("hopper", "bfloat16") == choice.Choice(hopper.BACKEND)  # the device is the caller's business
    for dtype in ("float32", "float16", "float64"):
        with raises_sentence("hopper", "bfloat16", dtype):
            choice.resolve("hopper", dtype)
    assert choice.resolve("xla", "float32") == choice.Choice(xla.BACKEND)
    with raises_sentence("'cutlass'", "auto, xla, tpu, hopper"):
        choice.resolve("cutlass", "float32")


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "expected", "why"),
    [
        ("gpu", "9.0", "bfloat16", "hopper", ""),
        ("gpu", "9.0", "float32", "xla", "float32"),
        ("gpu", "8.0", "bfloat16", "xla", "8.0"),
        ("tpu", "", "bfloat16", "xla", "this is tpu"),
    ],
)
def test_what_auto_means(platform, capability, dtype, expected, why, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self) -> None:
            self.platform, self.compute_capability, self.process_index = platform, capability, 0

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    found = choice.resolve("auto", dtype)
    assert found.name == expected
    assert why in found.why
    assert bool(found.why) == bool(why)


def test_the_kernels_are_refused_for_a_type_that_they_do_not_compute_in(raises_sentence: Any) -> None:
    q = small_model(8).astype(jnp.float32)
    with described(DeviceKind("gpu", (9, 0))):
        with raises_sentence("hopper", "float32", "bfloat16"):
            terminal.to_run(q, "float32", "hopper")
        assert terminal.runs_line(terminal.to_run(q, "auto", "hopper")) == "in bfloat16, integer products by hopper"
        assert terminal.to_run(q, "float32", "xla").backend == "xla"
        floats = helpers.tiny_model()
        for type_asked in ("auto", "float32", "bfloat16"):
            with raises_sentence("hopper", "float", "auto or xla"):
                terminal.to_run(floats, type_asked, "hopper")
    for asked in (
        lambda: ptq.describe(q),
        lambda: q.apply(jnp.zeros((1, *q.config.image_shape)), jnp.array([1]), jnp.array([1])),
    ):
        with raises_sentence("hopper", "float32"):
            asked()


@pytest.mark.parametrize("kind", ["store", "gelu", "residual"])
@pytest.mark.parametrize("N", [128, 384, 768, 1024, 1152, 3456, 4608])
def test_tiles_divide_the_width_and_keep_the_cores_busy(kind: tiles.Kind, N: int) -> None:
    choose = partial(tiles.choose, kind, N=N)
    for M in (1, 64, 512, 4096, 32768):
        assert N % choose(M=M).block[1] == 0
    few, many = (np.prod(choose(M=M).block) for M in (64, 10**6))
    assert few <= many
