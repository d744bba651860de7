"""The kernels for TPUs, run by Pallas's interpreter, against NumPy in float64; which devices they are for; weights in int4."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, XLA, random_inputs, relative_error, tiny_model
from interpreters import tpu_kernels
from operation_contracts import attended, drawn_weight, modulated, sums_are_of_the_codes

import ptq4dit_jax as ptq
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import choice, tpu, xla
from ptq4dit_jax.engine.backends import NotCovered
from ptq4dit_jax.engine.tpu import row_wise
from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import ActQuantizer, Encoded
from ptq4dit_jax.tpu import attention
from ptq4dit_jax.tpu.generations import GENERATIONS

TPU = tpu.BACKEND
ROUND = ActQuantizer(jnp.float32(1), jnp.int32(-9))
PER_ROW = ActQuantizer(None, None, dynamic=True)
#: Images, tokens, heads and their width: blocks of queries that are all of them or some, tokens that fill no tile.
ATTENTION = [(2, 64, 2, 64), (1, 72, 3, 40), (1, 256, 4, 72), (2, 512, 2, 32), (1, 1024, 1, 128), (3, 8, 1, 8)]


def drawn(B: int, T: int, D: int, dtype: Any, size: float = 1.0) -> list[jax.Array]:
    """Queries, keys and values: some queries are far more certain than others, one column is large."""
    rng = np.random.default_rng(B * T * D)
    q, k, v = (rng.normal(size=(B, T, D)) for _ in range(3))
    q *= rng.choice([0.0, 1.0, 30.0], (B, T, 1))
    v[..., 3] *= 4
    return [jnp.asarray(x, dtype) for x in (q, k, v * size)]


@pytest.mark.makes_nan
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention(shape: tuple[int, int, int, int]) -> None:
    """Sums of bfloat16 probabilities are float32; float32 stays float32."""
    B, T, heads, d = shape
    for dtype, rtol, atol in ((jnp.bfloat16, 2**-8, 2**-8), (jnp.float32, 1e-5, 1e-5)):
        q, k, v = drawn(B, T, heads * d, dtype)
        with tpu_kernels():
            got = jax.jit(partial(TPU.attention, num_heads=heads, sites={}))(q, k, v)
        assert got.dtype == dtype
        spread = np.abs(np.asarray(v, np.float64)).max()
        np.testing.assert_allclose(np.asarray(got, np.float64), attended(q, k, v, heads), rtol=rtol, atol=atol * spread)


@pytest.mark.makes_nan
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_ends_in_codes(shape: tuple[int, int, int, int]) -> None:
    B, T, heads, d = shape
    q, k, v = drawn(B, T, heads * d, jnp.bfloat16, 30.0)
    with tpu_kernels():
        got = jax.jit(partial(TPU.attention_codes, num_heads=heads))(q, k, v, act=ROUND)
    assert got.values.dtype == jnp.int8
    assert got.sums is not None
    sums_are_of_the_codes(got)
    off = np.abs(np.asarray(got.values, int) - np.clip(np.round(attended(q, k, v, heads)) - 9, -128, 127))
    assert off.max() <= 1
    assert off.mean() < 0.1


def test_no_block_of_logits_is_large_and_all_queries_are_in_one() -> None:
    for tokens in range(8, 4097, 8):
        if (rows := attention.queries(tokens)) is not None:
            assert tokens % rows == 0
            assert rows == tokens or rows % 128 == 0
            assert rows * tokens <= max(attention._LOGITS, 128 * tokens)
    assert all(attention.queries(tokens) for tokens in (64, 256, 1024, 4096))


EXTREMES: dict[str, Any] = {
    "ordinary": lambda rng, shape: rng.standard_normal(shape),
    "large": lambda rng, shape: rng.standard_normal(shape) * 1e4,
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-4,
    "one channel": lambda rng, shape: rng.standard_normal(shape) * np.where(np.arange(shape[-1]) == 5, 1e3, 1),
    "constant rows": lambda rng, shape: np.broadcast_to(rng.standard_normal((*shape[:-1], 1)), shape),
}


@pytest.mark.makes_nan
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize(("B", "T", "D"), [(2, 256, 384), (1, 72, 192), (3, 8, 40)])
def test_norms_end_in_codes(B: int, T: int, D: int, kind: str) -> None:
    rng = np.random.default_rng(T * D)
    x = jnp.asarray(EXTREMES[kind](rng, (B, T, D)), jnp.float32)
    shift, scale = (jnp.asarray(rng.standard_normal((B, D)) * 0.5, jnp.float32) for _ in range(2))
    wide, by, times = (np.asarray(a, np.float64) for a in (x, shift, scale))
    for norm in (Norm(), Norm(1e-3, NormKind.RMS)):
        y = modulated(wide, by, times, norm)
        with tpu_kernels():
            got = jax.jit(partial(TPU.modulate_encode, act=PER_ROW, norm=norm))(x, shift, scale)
        # Where a row is constant, what float32 loses of its mean is divided by the root of eps.
        rtol = 1e-3 if kind == "constant rows" else 1e-5
        np.testing.assert_allclose(np.asarray(got.scale)[..., 0], np.abs(y).max(-1) / 127, rtol=rtol)
        assert got.sums is not None
        sums_are_of_the_codes(got)
        assert np.abs(np.asarray(got.values, int) - np.round(y / np.asarray(got.scale, np.float64))).max() <= 1


@pytest.mark.makes_nan
def test_rows_of_zeros_have_scale_one() -> None:
    x, none = jnp.zeros((1, 8, 40), jnp.bfloat16), jnp.zeros((1, 40), jnp.bfloat16)
    with tpu_kernels():
        got = TPU.modulate_encode(x, none, none, PER_ROW, Norm())
    np.testing.assert_array_equal(got.values, 0)
    np.testing.assert_array_equal(got.scale, 1)


@pytest.mark.parametrize("tokens", [8, 72, 128, 256, 1024, 4096])
def test_rows_are_cut_into_whole_tiles(tokens: int) -> None:
    rows = row_wise.rows_per_step(tokens)
    assert rows is not None
    assert tokens % rows == 0


def test_what_the_kernels_refuse_has_a_reason() -> None:
    S, dtype = jax.ShapeDtypeStruct, jnp.dtype(jnp.bfloat16)
    attend = lambda T, D, heads: jax.eval_shape(partial(TPU.attention, num_heads=heads, sites={}), *[S((1, T, D), dtype)] * 3)
    for (T, D, heads), reason in {
        (25, 64, 2): "25 tokens",
        (8192, 64, 2): "8192 tokens",
        (64, 300, 2): "width 150",
        (64, 24, 2): "width 12",
        (4096, 2304, 32): "MiB of vector memory",
    }.items():
        with described(DeviceKind("tpu", model="TPU v4")), pytest.raises(NotCovered, match=reason):
            attend(T, D, heads)
    assert attend(64, 64, 2).shape == (1, 64, 64)
    with pytest.raises(NotCovered, match="per token"):
        jax.eval_shape(partial(TPU.attention_codes, num_heads=2, act=PER_ROW), *[S((1, 64, 64), dtype)] * 3)
    x, row, tables = S((2, 64, 64), dtype), S((2, 64), dtype), dataclasses.replace(PER_ROW, nonnegative=True)
    wide = S((1, 256, 8192), dtype), *[S((1, 8192), dtype)] * 2
    with pytest.raises(NotCovered, match="rows of 8192 channels"):
        jax.eval_shape(partial(TPU.modulate_encode, act=PER_ROW, norm=Norm()), *wide)
    with pytest.raises(NotCovered, match="one sign"):
        jax.eval_shape(partial(TPU.modulate_encode, act=tables, norm=Norm()), x, row, row)


@pytest.mark.parametrize("model", GENERATIONS)
def test_it_is_chosen_on_the_tpus_that_it_was_compiled_for(model: str) -> None:
    with described(DeviceKind("tpu", model=model)):
        by, note = choice.resolve("auto", "bfloat16")
        assert by is TPU
        assert ("save memory, not time" in note) == (model in ("TPU v4", "TPU7x"))
        assert choice.resolve("auto", "float32") == (TPU, note)
        by, why = choice.resolve("auto", "float16")
        assert by is xla.BACKEND
        assert "float16" in why


@pytest.mark.parametrize("model", ["TPU v3", ""])
def test_on_other_tpus_it_says_why_not(model: str) -> None:
    with described(DeviceKind("tpu", model=model)):
        by, why = choice.resolve("auto", "bfloat16")
    assert by is xla.BACKEND
    assert (model or "tpu") in why
    assert "TPU v5 lite" in why


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("K", [7, 64])
def test_products_of_int4_are_those_of_packed_codes(bits: int, K: int) -> None:
    """Values are codes less 8; the sum of each row makes up for that and for the zero points, exactly."""
    rng = np.random.default_rng(bits)
    weight, _ = drawn_weight(10, K, bits, rng)
    narrow = weight.as_int4()
    assert narrow.values.dtype == jnp.int4
    assert not narrow.packed
    assert narrow.as_int4() is narrow
    np.testing.assert_array_equal(narrow.codes(), weight.codes())
    np.testing.assert_array_equal(narrow.rows(slice(2, 9)).codes(), np.asarray(weight.codes())[2:9])
    for x in (rng.integers(-128, 128, (2, 3, K)), np.full((2, 3, K), -128)):
        fed = Encoded(jnp.asarray(x, jnp.int8), jnp.float32(0.5), None)
        for linear in (XLA.linear, jax.jit(XLA.linear, static_argnames="dtype")):
            packed, int4 = (linear(fed, w, jnp.zeros(10, jnp.float32), dtype=jnp.float32) for w in (weight, narrow))
            np.testing.assert_array_equal(packed, int4)


@pytest.mark.makes_nan
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_on_a_tpu_is_the_reference_with_attention_in_floats(bits: int) -> None:
    settings = ptq.QuantConfig.of(weight_bits=bits, calib_steps=2, calib_rows=4, steps=2, range_search="minmax", **PLAIN)
    model = ptq.quantize(tiny_model(input_size=16), settings, key=jax.random.key(0), keep_poor=True)
    x, y = random_inputs(model.config, 2)
    t = jnp.asarray([300], jnp.int32)
    want = model.replace(backend="xla", sites={}).jitted()(x, t, y)
    with tpu_kernels(), described(DeviceKind("tpu", model="TPU v5 lite")):
        made = model.prepared()
        got = jax.jit(lambda model, *inputs: model.apply(*inputs))(made, x, t, y)
    assert {layer.weight.values.dtype for layer in made.linears.values()} == (
        {jnp.dtype(jnp.int8)} if bits == 8 else {jnp.dtype(jnp.int8), jnp.dtype(jnp.int4)}
    )
    assert relative_error(got, want) < 0.01


@pytest.mark.makes_nan
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prepared_float_model_has_attention_in_one_kernel(dtype: str) -> None:
    model = tiny_model(input_size=16).astype(dtype)
    x, y = random_inputs(model.config, 2)
    t = jnp.asarray([300], jnp.int32)
    want = model.astype("float32").jitted()(x, t, y)
    with tpu_kernels(), described(DeviceKind("tpu", model="TPU v5 lite")):
        got = jax.jit(lambda model, *inputs: model.prepared().apply(*inputs))(model, x, t, y)
    assert got.dtype == dtype
    assert relative_error(got.astype(jnp.float32), want) < (1e-5 if dtype == "float32" else 0.03)


def test_a_float_model_stays_where_there_are_no_such_kernels() -> None:
    model = tiny_model(depth=1)
    for device in (DeviceKind("cpu"), DeviceKind("gpu", (9, 0)), DeviceKind("tpu", model="TPU v3")):
        with described(device):
            assert model.prepared() is model


def test_watched_attention_and_what_the_kernel_does_not_take_are_in_plain_products() -> None:
    """Fake quantization and observers see q, k, v and the probabilities; 9 tokens fill no tile. The kernel, called, would fail
    here: nothing interprets it."""
    settings = ptq.QuantConfig.of(calib_steps=2, calib_rows=4, steps=2, range_search="minmax", **PLAIN)
    twin = ptq.reference(ptq.quantize(tiny_model(input_size=16), settings, key=jax.random.key(0), keep_poor=True))
    for model in (twin, tiny_model()):
        x, y = random_inputs(model.config, 2)
        t = jnp.asarray([300], jnp.int32)
        with described(DeviceKind("tpu", model="TPU v5 lite")):
            made = model.prepared()
            got = jax.jit(lambda model, *inputs: model.apply(*inputs))(made, x, t, y)
        assert made.fused is not None
        np.testing.assert_allclose(got, model.apply(x, t, y), rtol=1e-4, atol=1e-5)


@pytest.mark.makes_nan
def test_derivatives_of_the_kernel_are_those_of_plain_products() -> None:
    q, k, v = drawn(1, 16, 16, jnp.float32)

    def plain(*parts: jax.Array) -> jax.Array:
        q, k, v = (part.reshape(1, 16, 2, 8) for part in parts)
        logits = jnp.einsum("bqad,bkad->baqk", q, k, precision="highest") * 8**-0.5
        return jnp.einsum("baqk,bkad->bqad", jax.nn.softmax(logits), v, precision="highest").reshape(1, 16, 16)

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        found = attention.fused_attention(q, k, v, 2)
        assert found is not None
        return found

    with tpu_kernels():
        got = jax.jit(jax.grad(lambda *parts: jnp.square(fused(*parts)).sum(), argnums=(0, 1, 2)))(q, k, v)
    want = jax.grad(lambda *parts: jnp.square(plain(*parts)).sum(), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", jax.lax.Precision.HIGHEST), ("bfloat16", jax.lax.Precision.DEFAULT)]
)
def test_float32_stays_float32_inside_the_kernel(dtype: str, precision: jax.lax.Precision) -> None:
    """An interpreter on a CPU would not notice one pass in bfloat16."""
    q = jax.ShapeDtypeStruct((1, 64, 64), dtype)
    [call] = [
        each
        for each in jax.make_jaxpr(partial(attention.attention, heads=1))(q, q, q).eqns
        if each.primitive.name == "pallas_call"
    ]
    products = [each for each in call.params["jaxpr"].eqns if each.primitive.name == "dot_general"]
    assert len(products) == 2
    for product in products:
        assert product.params["precision"] == (precision, precision)
        assert product.params["preferred_element_type"] == jnp.float32


def test_the_kernel_takes_no_float64() -> None:
    assert attention.uncovered(64, 64, 2, jnp.float64) == "q, k and v are float64"
    assert not attention.uncovered(64, 64, 2, jnp.float32)
