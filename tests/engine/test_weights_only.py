"""Models that quantize weights only, and attention left in float: what runs, what is stored, what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, random_inputs, relative_error, tiny_model
from store_helpers import seal

import ptq4dit_jax as ptq
from ptq4dit_jax import terminal
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.evaluation.probes import layer_sqnr

SETTINGS: dict[str, Any] = {"weight_bits": 4, "steps": 2, "calib_steps": 2, "calib_rows": 4}
T = jnp.array([500])


@pytest.fixture(scope="module")
def dit() -> ptq.FloatDiT:
    return jax.tree.map(jnp.asarray, tiny_model())


@pytest.fixture(scope="module")
def w4(dit: ptq.FloatDiT) -> ptq.QuantizedDiT:
    return ptq.quantize(dit, ptq.QuantConfig.of(**PLAIN, **SETTINGS, policy="weights-only"), key=jax.random.key(0))


def apply(model: Any) -> np.ndarray:
    x, y = random_inputs(model.config, 3)
    return np.asarray(model.apply(x, T, y))


def with_numpy_weights(dit: ptq.FloatDiT, q: ptq.QuantizedDiT) -> ptq.FloatDiT:
    """The float model with kernels de-quantized in NumPy: low halves of all bytes, then the high ones, minus zero points."""
    params = jax.tree.map(np.asarray, dit.params)
    for name, layer in q.linears.items():
        values, scale = np.asarray(layer.weight.values), np.asarray(layer.weight.scale)
        if layer.weight.bits == 4:
            N = scale.shape[-1]
            rows = 64 if N % 64 == 0 else N
            parts = values.reshape(*values.shape[:-2], -1, rows // 2, values.shape[-1])
            codes = np.concatenate([parts & 15, parts >> 4], -2).reshape(*scale.shape, values.shape[-1])
            codes = codes.astype(int) - np.asarray(layer.stored.zero_point)[..., None]
        else:
            codes = values.astype(int)
        tree = params
        for part in name.split("."):
            tree = tree[part]
        tree["kernel"] = np.swapaxes(codes * scale[..., None].astype(np.float64), -1, -2).astype(np.float32)
    return dit.replace(params=jax.tree.map(jnp.asarray, params))


def test_it_is_the_float_model_with_other_weights(dit: ptq.FloatDiT, w4: ptq.QuantizedDiT) -> None:
    """Nothing is balanced, so the kernels are those of the model given, up to their rounding."""
    assert {name: layer.weight.bits for name, layer in w4.linears.items() if layer.weight.bits != 4} == dict.fromkeys(
        ("patch_embed", "time_fc1", "time_fc2", "final_adaLN", "final"), 8
    )
    assert all(layer.act is None for layer in w4.linears.values())
    assert (w4.sites, w4.num_groups) == ({}, 1)
    expected = apply(with_numpy_weights(dit, w4))
    assert relative_error(apply(w4), expected) < 1e-5
    assert relative_error(apply(ptq.reference(w4)), expected) < 1e-5
    assert 0.01 < relative_error(apply(w4), apply(dit)) < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["xla", "hopper"])
def test_the_table_says_in_what_it_runs(w4: ptq.QuantizedDiT, dtype: str, backend: str) -> None:
    if (dtype, backend) == ("float32", "hopper"):
        pytest.skip("refused")
    rows = ptq.describe(w4.astype(dtype).replace(backend=backend))
    bits = {"float32": 32, "bfloat16": 16}[dtype]
    layers, products = rows[:-2], rows[-2:]
    assert {(row.runs, row.act_bits, row.ranges) for row in layers} == {(f"{dtype} on de-quantized weights", bits, None)}
    assert [(row.layer, row.runs, row.weight_bits, row.act_bits) for row in products] == [
        ("blocks.q @ k", dtype, bits, bits),
        ("blocks.probs @ v", dtype, bits, bits),
    ]
    assert not any(row.integer for row in rows)
    program = jax.jit(lambda q: q.apply(jnp.zeros((1, 6, 6, 3)), T, jnp.array([0]))).lower(w4.astype(dtype)).as_text()
    products_of = [line for line in program.splitlines() if "dot_general" in line]
    assert products_of
    assert not any("i8>" in line for line in products_of)


def test_the_line_promises_no_integer_products(w4: ptq.QuantizedDiT) -> None:
    assert terminal.runs_line(w4) == "in float32 on de-quantized weights"
    assert terminal.runs_line(w4.astype("bfloat16")) == "in bfloat16 on de-quantized weights"


def test_its_gradient_is_that_of_its_twin(w4: ptq.QuantizedDiT) -> None:
    x, y = random_inputs(w4.config, 2)
    ours, theirs = (jax.grad(lambda x, m=m: jnp.square(m.apply(x, T, y)).sum())(x) for m in (w4, ptq.reference(w4)))
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "policy", ["edges8-float,blocks.attention=float", "uniform,blocks.proj=8:float,blocks.attention=float"]
)
def test_attention_alone_in_float(dit: ptq.FloatDiT, policy: str) -> None:
    q = ptq.quantize(dit, ptq.QuantConfig.of(**PLAIN, **SETTINGS, policy=policy), key=jax.random.key(0))
    assert q.sites == {}
    assert q.linears["blocks.qkv"].integer
    rows = {row.layer: row for row in ptq.describe(q)}
    assert (rows["blocks.q @ k"].runs, rows["blocks.qkv"].runs) == ("float32", "int8 x int8 -> int32")
    assert relative_error(apply(q), apply(ptq.reference(q))) < 0.02
    assert np.isfinite(
        layer_sqnr(dit, q, *random_inputs(dit.config, 2)[:1], T, random_inputs(dit.config, 2)[1])["blocks.block_out"]
    ).all()


def test_it_is_saved_and_damage_is_seen(w4: ptq.QuantizedDiT, tmp_path: Path, raises_sentence: Any) -> None:
    ptq.save(w4, tmp_path / "q")
    again = ptq.load(tmp_path / "q")
    np.testing.assert_array_equal(apply(again), apply(w4))
    settings = json.loads((tmp_path / "q/config.json").read_text())
    assert settings["sites"] == {}, "which a version that needs them calls damaged"
    settings["sites"] = {"blocks.q": {"bits": 8, "dynamic": True, "balanced": False}}
    seal(tmp_path / "q", settings)
    with raises_sentence("damaged"):
        ptq.load(tmp_path / "q")


@pytest.mark.slow
def test_roundings_are_learned_without_scales(dit: ptq.FloatDiT) -> None:
    learn = Reconstruction(iterations=30, batch_size=4)
    config = ptq.QuantConfig.of(**SETTINGS, act_bits=16, reconstruction=learn)
    q = ptq.quantize(dit, config, key=jax.random.key(0))
    for unit in q.provenance.facts["reconstruction"].values():
        assert unit["after"] <= unit["before"]
    assert q.sites == {}
    assert any(unit["after"] < unit["before"] for unit in q.provenance.facts["reconstruction"].values())
