"""The sampler compiled for TPUs: integer where it is said to be, float32 where it is float32, on many chips without a word
between them, within memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_helpers
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tpu_helpers import ROWS, Compiled, Sizes, attention_products, compiled, network, products_of, sampler, sizes_of

from benchmarks import aot, hlo, hlo_schedule, tpu
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import QuantizedDiT, describe
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import Linear

pytestmark = tpu_helpers.MARKS

#: Images on one chip by which memory is judged.
MANY = 32
KIND = DeviceKind("tpu", model="TPU v5 lite")
W8A8, W4A8 = QuantConfig(), QuantConfig.of(weight_bits=4)


@pytest.fixture(scope="module")
def w8a8() -> QuantizedDiT:
    return aot.quantized_model(network(2), W8A8, "bfloat16")


@pytest.fixture(scope="module")
def w4a8() -> QuantizedDiT:
    return aot.quantized_model(network(2), W4A8, "bfloat16")


@pytest.fixture(scope="module")
def w8a8_on_16(w8a8: QuantizedDiT) -> Compiled:
    return sampler(w8a8, "v5e", 16)


@pytest.fixture(scope="module")
def w4a8_on_64(w4a8: QuantizedDiT) -> Compiled:
    return sampler(w4a8, "v6e", 64)


@pytest.fixture(scope="module")
def w8a8_in_float32() -> Compiled:
    return sampler(aot.quantized_model(network(1), W8A8, "float32"), "v5e", 1)


@pytest.fixture(scope="module")
def e4m3_on_ironwood() -> Compiled:
    return sampler(aot.quantized_model(network(1), W4A8, "bfloat16").replace(backend="fp8"), "tpu7x", 1)


@pytest.fixture(scope="module")
def float32() -> Compiled:
    return sampler(aot.float_model(network(1), "float32"), "v5e", 1)


@pytest.fixture(scope="module")
def whole() -> Compiled:
    """All 28 blocks."""
    return sampler(aot.quantized_model(network(), W8A8, "bfloat16"), "v5e", 1, MANY)


def parts_of(linear: Linear) -> int:
    """The number of products of a layer."""
    return 3 if linear.place.name == "qkv" else 1


def check_types(model: QuantizedDiT, module: hlo.Module) -> None:
    """Compares every product of the program with what ``describe`` says of it. No product is left over; those of attention are
    inside a kernel."""
    with described(KIND):
        reports = {report.layer: report for report in describe(model)}
    by_sizes: dict[frozenset[Sizes], list[str]] = {}
    for name, linear in model.config.spec.linears.items():
        parts = parts_of(linear)
        by_sizes.setdefault(frozenset(sizes_of(model.config, ROWS, linear, parts)), []).extend([name] * parts)
    found = []
    for sizes, names in by_sizes.items():
        products, integer = products_of(module, set(sizes)), {reports[name].integer for name in names}
        assert len(integer) == 1, names
        assert {product.integer for product in products} <= integer, names
        if integer == {True}:  # of a single row, floats are multiplied and added up without a product
            assert len(products) == len(names), names
        found += products
    assert sorted(found) == sorted(module.products)
    for product in ("blocks.q @ k", "blocks.probs @ v"):
        assert (reports[product].backend, reports[product].integer) == ("tpu", False)


def test_w8a8_multiplies_integers_where_it_says_so(w8a8: QuantizedDiT, w8a8_on_16: Compiled) -> None:
    check_types(w8a8, w8a8_on_16.module)
    assert sum(product.integer for product in w8a8_on_16.module.products) >= 7
    assert sum(not product.integer for product in w8a8_on_16.module.products) >= 3  # patch_embed, final_adaLN, final


def test_w4a8_multiplies_integers_where_it_says_so(w4a8: QuantizedDiT, w4a8_on_64: Compiled) -> None:
    check_types(w4a8, w4a8_on_64.module)
    assert sum(product.integer for product in w4a8_on_64.module.products) >= 7
    integer = [product for product in w4a8_on_64.module.products if product.integer]
    assert {product.types for product in integer} == {"s32 = s8 x s4"}  # and in no wider type


def test_float_fed_layers_of_a_float32_model_are_float32(w8a8_in_float32: Compiled) -> None:
    module = w8a8_in_float32.module
    floats = [product for product in module.products if not product.integer]
    assert len(floats) >= 3
    assert {product.types for product in floats} == {"f32 = f32 x f32 (highest)"}
    assert "bf16" not in module.kinds  # nor between layers, nor in sums without a product


def test_layers_multiply_e4m3_where_that_is_asked_for(e4m3_on_ironwood: Compiled) -> None:
    """Also the condition, in two terms of a product with twice the rows. Attention is inside a kernel."""
    module, config = e4m3_on_ironwood.module, network(1)
    narrow = [product for product in module.products if product.left.kind == "f8e4m3fn"]
    assert {product.types for product in narrow} == {"f32 = f8e4m3fn x f8e4m3fn (highest)"}
    for name, linear in config.spec.linears.items():
        if linear.place.stack is None:
            continue
        parts, rows = (3 if linear.place.name == "qkv" else 1), ROWS * (2 if linear.modulates else 1)
        found = products_of(module, sizes_of(config, rows, linear, parts))
        assert found, name
        assert set(found) <= set(narrow), name
    assert len(narrow) == 7  # qkv is three, as its parts are
    assert {product.types for product in module.products if product not in narrow} == {"bf16 = bf16 x bf16"}
    assert "f64" not in module.kinds


def test_e4m3_is_derived_before_the_loop_over_steps(e4m3_on_ironwood: Compiled) -> None:
    """Packed weights, which nothing else has in bytes without a sign, are read before it."""
    ran = hlo_schedule.operations(e4m3_on_ironwood.module)
    loop = hlo_schedule.longest_loop(ran)
    kinds = lambda inside: {
        array.kind for operation in ran if (operation.loops[:1] == (loop,)) is inside for array in operation.instruction.results
    }
    assert "u8" in kinds(False)
    assert "f8e4m3fn" in kinds(True)
    assert "u8" not in kinds(True)


def test_a_float32_model_is_float32(float32: Compiled) -> None:
    module, config = float32.module, network(1)
    assert {product.types for product in module.products} == {"f32 = f32 x f32 (highest)"}
    assert not attention_products(module, config, ROWS)  # it is a kernel, whose products tests/engine/test_tpu.py looks at
    for name, linear in config.spec.linears.items():
        assert products_of(module, sizes_of(config, ROWS, linear, parts_of(linear))) or name in ("time_fc1", "time_fc2"), name
    assert "bf16" not in module.kinds


@pytest.mark.parametrize(("precision", "one_pass"), [(None, True), ("highest", False)])
def test_a_float32_product_in_one_pass_would_be_seen(precision: str | None, one_pass: bool) -> None:
    """What the tests above would find if a product did not state its precision."""
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=SingleDeviceSharding(aot.devices("v5e", 1)[0]))
    with jax.default_matmul_precision("default"):
        product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision)).lower(shape, shape)
    assert {product.one_pass for product in compiled(product).module.products} == {one_pass}


def test_nothing_is_float64(w8a8_on_16: Compiled, w4a8_on_64: Compiled, w8a8_in_float32: Compiled, float32: Compiled) -> None:
    for program in (w8a8_on_16, w4a8_on_64, w8a8_in_float32, float32):
        assert "f32" in program.module.kinds
        assert not program.module.kinds & {"f64", "c128"}


def test_chips_say_nothing_to_each_other(w8a8_on_16: Compiled, w4a8_on_64: Compiled) -> None:
    """Products of ROWS rows (:func:`check_types`) say that each chip has its own share."""
    assert not w8a8_on_16.module.collectives
    assert not w4a8_on_64.module.collectives


@pytest.mark.parametrize(("generation", "chips"), [("v5e", 16), ("v6e", 64)])
def test_a_collective_would_be_seen(generation: str, chips: int) -> None:
    mesh = Mesh(np.asarray(aot.devices(generation, chips)), ("data",))
    assert mesh.size == chips
    rows = jax.ShapeDtypeStruct((chips, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    assert compiled(total.lower(rows)).module.collectives["all-reduce"] >= 1


@pytest.mark.parametrize(("generation", "most"), [("v5e", 0.8), ("v6e", 1.0)])
def test_w8a8_costs_less_than_bfloat16_by_the_estimate(generation: str, most: float) -> None:
    """One block, both models with attention in the same kernel, whose own time is its roofline's."""
    seconds = {}
    for name in ("bf16", "w8a8"):
        found = tpu.compiled(generation, 1, name, network(1), images=64, steps=50)
        assert found["kernels_step_s"] > 0
        seconds[name] = found["cycles_step"] / tpu.CLOCKS[generation] + found["kernels_step_s"]
    assert seconds["w8a8"] < most * seconds["bf16"]


def test_w8a8_of_xl_needs_less_than_1200_megabytes(whole: Compiled) -> None:
    weights = 28 * (3 + 1 + 4 + 4 + 6) * 1152**2
    assert weights < whole.argument_bytes < whole.peak_bytes < 1.2e9


def test_no_array_of_heads_by_tokens_by_tokens_is_in_hbm(whole: Compiled) -> None:
    assert logits_in_hbm(whole.module, network(), 2 * MANY) == []


def logits_in_hbm(module: hlo.Module, config: DiTConfig, rows: int) -> list[str]:
    """Arrays in HBM of as many numbers as attention has logits, with tokens along two sides."""
    size, tokens = rows * config.num_heads * config.num_tokens**2, config.num_tokens
    arrays = [array for operation in hlo_schedule.operations(module) for array in operation.instruction.results if array.in_hbm]
    assert max(array.size for array in arrays) >= rows * tokens * config.hidden_size  # hidden states are there
    return [str(array) for array in arrays if array.size >= size and array.sides.count(tokens) > 1]
