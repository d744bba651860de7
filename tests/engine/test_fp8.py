"""Whole models whose layers multiply e4m3: against the twin of what is multiplied, whatever the network and its quantizers.

Models are the stored ones of ``tests/golden/quantized``, or have random codes: nothing is quantized here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_float64, load_quantized, random_inputs, relative_error, tiny_config, tiny_model
from operation_contracts import drawn_weight
from two_stacks import CONFIG as TWO_STACKS
from two_stacks import TwoStacks

import ptq4dit_jax as ptq
from benchmarks.aot import quantized_model
from ptq4dit_jax import terminal
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import QLinear, QuantizedDiT, choice, fp8, imitation
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.evaluation.probes import layer_sqnr
from ptq4dit_jax.float8 import Float8Weight
from ptq4dit_jax.networks import parts, registry
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.quantizers import ActQuantizer

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
FP8 = choice.resolve("fp8", "float32").dispatch
apply = jax.jit(lambda model, *inputs: model.apply(*inputs))


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def golden(request: pytest.FixtureRequest) -> QuantizedDiT:
    return load_quantized(GOLDEN / request.param).replace(backend="fp8")


def drawn(config: DiTConfig, settings: ptq.QuantConfig) -> QuantizedDiT:
    """A model of random codes, with ranges that its activations fill, to be run by ``fp8``."""
    rng = np.random.default_rng(0)
    skeleton = quantized_model(config, settings, "float32")
    normal = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    positive = lambda leaf, size: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) * size, leaf.dtype)

    def ranges(act: ActQuantizer) -> ActQuantizer:
        balance = None if act.balance is None else positive(act.balance, 1)
        if act.dynamic:
            return act.replace(balance=balance)
        scale, zero_point = act.static_range
        zeros = rng.integers(-128, 128, zero_point.shape)
        zeros.flat[0] = 0  # one among the others is null
        return act.replace(balance=balance, scale=positive(scale, 0.03), zero_point=jnp.asarray(zeros, jnp.int32))

    def layer(shapes: QLinear) -> QLinear:
        *lead, N, K = shapes.stored.shape
        weight, _ = drawn_weight(N, K, shapes.stored.bits, rng, tuple(lead))
        weight = weight.replace(scale=70 * weight.scale)  # variance 1 / K
        bias = jnp.asarray(rng.standard_normal((*lead, N)) / 4, jnp.float32)
        return QLinear.pack(weight, bias, None if shapes.act is None else ranges(shapes.act))

    edges = np.linspace(999, 0, skeleton.num_groups + 1)[1:-1]
    tables = skeleton.label_embed, skeleton.position_embed, skeleton.gains
    label_embed, position_embed, gains = jax.tree.map(normal, tables)
    return dataclasses.replace(
        skeleton,
        linears={name: layer(shapes) for name, shapes in skeleton.linears.items()},
        sites={name: ranges(act) for name, act in skeleton.sites.items()},
        label_embed=label_embed,
        position_embed=position_embed,
        gains=gains,
        group_edges=jnp.asarray(edges, skeleton.group_edges.dtype),
        backend="fp8",
    )


TINY = tiny_config()
LIGHTNING = LightningDiTConfig(input_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
MODELS: dict[str, tuple[DiTConfig, dict[str, Any]]] = {
    "w8-groups": (TINY, {"step_groups": 3}),
    "w6-everywhere": (TINY, {"policy": "uniform", "weight_bits": 6, "act_bits": 6}),
    "w4-w5-w7-static": (
        TINY,
        {
            "weight_bits": 4,
            "policy": "edges8,blocks.qkv=5,blocks.fc1=7,blocks.fc2=8:float",
            "dynamic_sites": (),
            "step_groups": 2,
        },
    ),
    "lightning": (LIGHTNING, {"weight_bits": 8}),
    "two-stacks": (TWO_STACKS, {"weight_bits": 4, "policy": "edges8-float,mlps.down=6"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_float64_a_model_is_the_twin_of_what_it_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.NETWORKS, "two_stacks", TwoStacks)
    config, settings = MODELS[name]
    model = drawn(config, ptq.QuantConfig.of(**settings))
    with jax.enable_x64(True):
        wide = as_float64(model)
        x, y = random_inputs(config, 3)
        inputs = np.asarray(x, np.float64), np.array([900, 10, 500]), y  # of several groups of steps
        twin = apply(imitation(wide), *inputs)
        assert relative_error(apply(wide.prepared(), *inputs), twin) < 1e-9


@pytest.mark.parametrize(("dtype", "least_db"), [("float32", 40), ("bfloat16", 20), ("float16", 28)])
def test_it_computes_in_any_type(golden: QuantizedDiT, dtype: str, least_db: float) -> None:
    x, y = random_inputs(golden.config, 4)
    got = apply(golden.astype(dtype), x, np.array([300]), y)
    twin = apply(imitation(golden), x, np.array([300]), y)
    assert got.dtype == dtype
    assert -20 * np.log10(relative_error(got, twin)) > least_db


def test_samples_are_near_those_of_the_integers_and_others(golden: QuantizedDiT) -> None:
    made = [
        ptq.sample(model, np.arange(4) % 5, key=jax.random.key(1), steps=3) for model in (golden, golden.replace(backend="xla"))
    ]
    assert np.isfinite(made[0]).all()
    assert 1e-3 < relative_error(*made) < 0.2


def test_layers_fed_by_floats_keep_their_weights(golden: QuantizedDiT) -> None:
    made = golden.prepared()
    for name, layer in golden.linears.items():
        if layer.integer:
            assert isinstance(made.linears[name].weight, Float8Weight), name
        else:
            assert made.linears[name].weight is layer.weight, name
    weights_only = golden.replace(linears={name: layer.replace(act=None) for name, layer in golden.linears.items()}, sites={})
    x, y = random_inputs(golden.config, 2)
    same = [apply(weights_only.replace(backend=backend), x, np.array([10]), y) for backend in ("fp8", "xla")]
    np.testing.assert_array_equal(*same)


@pytest.mark.slow
def test_layers_are_probed_in_the_twin_of_what_is_multiplied(golden: QuantizedDiT) -> None:
    float_model = jax.tree.map(jnp.asarray, tiny_model())
    x, y = random_inputs(golden.config, 2)
    probe = lambda model: layer_sqnr(float_model, model, x, np.array([300]), y)["blocks.block_out"]
    np.testing.assert_array_equal(probe(golden), probe(imitation(golden)))
    assert np.abs(probe(golden) - probe(golden.replace(backend="xla"))).min() > 0.05


def test_a_saved_folder_is_the_same(golden: QuantizedDiT, tmp_path: Path, raises_sentence: Any) -> None:
    stored = [
        store.read_config(ptq.save(model, tmp_path / name))
        for name, model in (("fp8", golden), ("auto", golden.replace(backend="auto")))
    ]
    for config in stored:  # what Orbax makes of the same arrays differs from run to run
        del config["files"], config["config_sha256"]
    assert stored[0] == stored[1]
    assert load_quantized(tmp_path / "fp8").backend == "auto"
    with raises_sentence("prepared for e4m3", "prepared from"):
        ptq.save(golden.prepared(), tmp_path / "prepared")


def test_the_table_and_the_line_say_what_is_multiplied(golden: QuantizedDiT) -> None:
    rows = {row.layer: row for row in ptq.describe(golden)}
    blocks = {name for name, layer in golden.linears.items() if layer.integer}
    assert {name for name, row in rows.items() if row.runs == "e4m3 x e4m3 -> float32"} == blocks
    assert {row.backend for name, row in rows.items() if name in blocks} == {"fp8"}
    assert not any(row.integer or row.words()["integer"] for row in rows.values())
    assert {rows[f"blocks.{product}"].runs for product in ("q @ k", "probs @ v")} == {"float32"}
    line = terminal.runs_line(golden)
    assert line.startswith("in float32, e4m3 x e4m3 -> float32 by fp8")
    assert "no units for e4m3" in line
    assert "e4m3" not in terminal.runs_line(golden.replace(backend="auto"))


DEVICES = [
    DeviceKind("cpu"),
    *(DeviceKind("gpu", capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0))),
    *(DeviceKind("tpu", model=model) for model in ("TPU v5 lite", "TPU v6 lite", "TPU7x")),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_never_chooses_it(device: DeviceKind, dtype: str) -> None:
    with described(device):
        chosen, asked = choice.resolve("auto", dtype), choice.resolve("fp8", dtype)
    assert chosen.backend.arithmetic is Arithmetic.INT8
    assert ("the backend fp8" in chosen.why) == (device.model == "TPU7x")
    assert asked.backend is fp8.BACKEND
    has_units = device.capability >= (8, 9) or device.model == "TPU7x"
    assert ("no units for e4m3" in asked.why) is not has_units


def test_no_backend_of_integers_is_behind_it() -> None:
    """None takes its operands, and none would allow for the zero points that biases hold."""
    assert FP8.chain == (fp8.BACKEND,)


@pytest.mark.parametrize(
    ("device", "by"),
    [(DeviceKind("gpu", (9, 0)), "cudnn"), (DeviceKind("tpu", model="TPU7x"), "tpu"), (DeviceKind("cpu"), "fp8")],
)
def test_attention_is_in_floats_by_the_kernel_of_the_device(
    device: DeviceKind, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "fused_attention", lambda q, k, v: q)  # of a library that is not here
    model = quantized_model(tiny_config(input_size=16), ptq.QuantConfig(), "bfloat16").replace(backend="fp8")
    with described(device):
        rows = {row.layer: row for row in ptq.describe(model)}
    for product in ("blocks.q @ k", "blocks.probs @ v"):
        assert (rows[product].backend, rows[product].runs) == (by, "bfloat16")
    assert rows["blocks.qkv"].runs == "e4m3 x e4m3 -> float32"


@pytest.mark.raises_in_trace
def test_derivatives_through_it_are_refused(golden: QuantizedDiT, raises_sentence: Any) -> None:
    x, y = random_inputs(golden.config, 1)
    with raises_sentence("reference(model, straight_through=True)"):
        jax.grad(lambda x: golden.apply(x, jnp.array([10]), y).sum())(jnp.asarray(x))


def test_a_float_model_is_refused_and_a_quantized_one_is_not(golden: QuantizedDiT, raises_sentence: Any) -> None:
    with raises_sentence("fp8 runs quantized models", "float"):
        terminal.to_run(imitation(golden), "auto", "fp8")
    assert terminal.to_run(golden.replace(backend="auto"), "bfloat16", "fp8").backend == "fp8"
