"""The integer DiT on the trained digits model: against its fake-quant twin, against itself on other devices, and as a program.

In float32 the two forwards round differently in the last place. Now and then that moves a value across a rounding boundary of
a quantizer, and the moved code moves others behind it, so the outputs differ by a fraction of the quantization error whatever
the arithmetic of the products. In float64 such ties are out of reach and the two agree to the last digits, which shows that
they compute one function; float32 is held to that layer by layer, and end to end to stay far below the quantization error.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers import PLAIN, XLA, as_float64, lowered_sampler, relative_error, structure, tiny_model
from jax.sharding import Mesh

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.engine import QLinear
from ptq4dit_jax.engine.ops import IntegerOps, Layers
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.networks.spec import Stack, flatten_sites

DIGITS = Path(__file__).parents[2] / "models" / "digits"
STEPS = 10
LABELS = np.arange(16) % 10
EDGES = {"patch_embed", "time_fc1", "time_fc2", "final_adaLN", "final"}

Quantized = Callable[..., ptq.QuantizedDiT]
apply = jax.jit(lambda model, x, t, y: model.apply(x, t, y))


@pytest.fixture(scope="module")
def digits() -> FloatDiT:
    model = ptq.load(DIGITS)
    assert isinstance(model, FloatDiT)
    return model


@pytest.fixture(scope="module")
def rows(digits: FloatDiT) -> CalibrationData:
    """Inputs of the network as sampling meets them: 5 steps of 16 rows, half of them null twins."""
    return ptq.sample_trajectories(
        digits, ptq.Calibration(steps=5, rows=16, sampling=ptq.Sampling("ddpm", STEPS)), key=jax.random.key(5)
    )


@pytest.fixture(scope="module")
def quantized(digits: FloatDiT, rows: CalibrationData) -> Quantized:
    """``quantized(weight_bits, policy, ...)``: the digits model, quantized once for each combination of settings."""

    @cache
    def make(weight_bits: int, policy: str, **settings: Any) -> ptq.QuantizedDiT:
        config = ptq.QuantConfig.of(**PLAIN, weight_bits=weight_bits, policy=policy, **{"step_groups": 1, **settings})
        return ptq.quantize(digits, config, key=jax.random.key(0), calibration=rows)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_bits", "policy", "settings"),
    [
        pytest.param(8, "edges8", {}, id="w8a8"),
        pytest.param(4, "edges8", {}, id="w4a8"),
        pytest.param(4, "edges8-float", {"step_groups": 3}, id="float-fed-edges-and-groups-of-steps"),
        pytest.param(
            8,
            "uniform",
            {"dynamic_sites": ("blocks.qkv_in", "blocks.fc1_in", "blocks.fc2_in", "blocks.probs")},
            id="per-row-scales",
        ),
    ],
)
def test_float64_the_engine_is_the_fake_quant_model(
    quantized: Quantized, rows: CalibrationData, weight_bits: int, policy: str, settings: dict[str, Any]
) -> None:
    model = quantized(weight_bits, policy, **settings)
    with jax.enable_x64(True):
        engine = as_float64(model)
        twin = ptq.reference(engine)
        assert twin.dtype == jnp.float64
        for step in (0, 2, 4):
            x, y = np.asarray(rows.x[step, 4:12], np.float64), np.asarray(rows.y[step, 4:12])
            t = np.asarray(rows.t[step : step + 1])
            ours, theirs = apply(engine, x, t, y), apply(twin, x, t, y)
            assert ours.dtype == jnp.float64
            assert relative_error(ours, theirs) < 1e-9, f"t = {t[0]}"


@pytest.mark.slow
@pytest.mark.parametrize(("weight_bits", "least_db", "cost_db"), [(8, 36.0, 3.0), (4, 29.5, -0.5)])
def test_e4m3_costs_more_than_integers_but_not_the_model(
    quantized: Quantized, digits: FloatDiT, rows: CalibrationData, weight_bits: int, least_db: float, cost_db: float
) -> None:
    """SQNR of predictions, mean over steps; docs/fp8.md has it for models quantized as by default."""
    model = quantized(weight_bits, "edges8-float")

    def sqnr(model: Any) -> float:
        batches = [(rows.x[step], rows.t[step : step + 1], rows.y[step]) for step in range(rows.num_steps)]
        errors = [relative_error(*(apply(m, *batch)[..., :1] for m in (model, digits))) for batch in batches]
        return float(np.mean(-20 * np.log10(errors)))

    integers, e4m3 = sqnr(model), sqnr(model.replace(backend="fp8"))
    assert least_db < e4m3 < integers - cost_db


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["edges8", "edges8-float"])
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_float32_the_paths_part_by_far_less_than_quantization_costs(
    quantized: Quantized, digits: FloatDiT, rows: CalibrationData, weight_bits: int, policy: str
) -> None:
    model = quantized(weight_bits, policy)
    twin = ptq.reference(model)
    power = []
    for step in range(rows.num_steps):
        batch = rows.x[step], rows.t[step : step + 1], rows.y[step]
        exact, ours, theirs = (np.asarray(apply(m, *batch), np.float64)[..., :1] for m in (digits, model, twin))
        power.append([np.square(exact).sum(), np.square(theirs - exact).sum(), np.square(ours - theirs).sum()])
    signal, quantization, rounding = np.array(power).T
    margin = 10 * np.log10(quantization / rounding)
    assert margin.min() > 6
    assert margin.mean() > 12
    assert np.sqrt(rounding / signal).max() < 2e-2
    assert np.sqrt(rounding / signal).min() < 2e-3


@struct.dataclass
class Capture:
    """Observer that keeps the whole activation."""

    value: Any

    def observe(self, x: jax.Array) -> Capture:
        return Capture(x)


@jax.jit
def block_inputs(model: FloatDiT, x: jax.Array, t: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    empty = dict.fromkeys(("adaLN_in", "block_out"), Capture(jnp.zeros(model.config.depth)))
    _, seen = model.observe({"blocks": empty}, x, t, y)
    return {name: capture.value for name, capture in seen["blocks"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_float32_each_block_fed_the_same_hidden_state(quantized: Quantized, rows: CalibrationData, weight_bits: int) -> None:
    """Codes still move inside a block, but few: in most tokens none does, and then a block is exact to float32's rounding."""
    model = quantized(weight_bits, "edges8")
    batch = rows.x[2], jnp.asarray(rows.t[2:3]), rows.y[2]
    seen = block_inputs(ptq.reference(model), *batch)
    at = lambda part: {name.removeprefix("blocks."): leaf.at_group(jnp.int32(0)) for name, leaf in part if "blocks." in name}
    layers = at(model.linears.items()), at(model.sites.items())

    @jax.jit
    def run(block: Layers, x: jax.Array, c: jax.Array) -> jax.Array:
        """A stack of one block."""
        ops = IntegerOps(model.config, Layers({}, {}, {}), {"blocks": block}, {}, XLA, jnp.float32)
        return ops.blocks(Stack("blocks", 1), x, c)

    for depth in range(1, model.config.depth):
        x, expected = (np.asarray(seen["block_out"][index]) for index in (depth - 1, depth))
        block = jax.tree.map(lambda a, depth=depth: a[depth : depth + 1], Layers(*layers, {}))
        out = np.asarray(run(block, x, seen["adaLN_in"][depth]))
        per_token = np.linalg.norm(out - expected, axis=-1) / np.linalg.norm(expected - x, axis=-1)
        assert np.median(per_token) < 2e-3, f"block {depth}"
        assert relative_error(out - x, expected - x) < 1e-2, f"block {depth}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_bits", "policy", "settings"),
    [
        pytest.param(8, "edges8", {}, id="w8a8"),
        pytest.param(4, "edges8", {}, id="w4a8"),
        pytest.param(8, "edges8-float", {}, id="w8a8-float-fed-edges"),
        pytest.param(4, "edges8-float", {}, id="w4a8-float-fed-edges"),
        pytest.param(
            8,
            "uniform",
            {"dynamic_sites": ("blocks.qkv_in", "blocks.fc1_in", "blocks.fc2_in", "blocks.probs")},
            id="per-row-scales",
        ),
    ],
)
def test_one_and_eight_devices_give_the_same_bytes_and_so_does_a_second_run(
    quantized: Quantized, mesh8: Mesh, weight_bits: int, policy: str, settings: dict[str, Any]
) -> None:
    model = quantized(weight_bits, policy, **settings)
    for sampler in ("ddpm", "ddim"):
        draw = partial(ptq.sample, model, LABELS, key=jax.random.key(3), steps=STEPS, sampler=sampler, cfg_scale=1.5)
        once = draw()
        assert np.isfinite(once).all()
        assert once.std() > 0.1
        assert draw().tobytes() == once.tobytes(), sampler
        spread = draw(mesh=mesh8)
        moved = np.unique(np.nonzero(spread != once)[0])
        assert spread.tobytes() == once.tobytes(), f"{sampler}: samples {moved} differ"


@pytest.mark.parametrize("edges", [[], [500.0], [900.0, 500.0, 100.0]])
def test_groups_of_steps_by_their_edges(edges: list[float]) -> None:
    """As many as edges lie above. Where there are none none are read: XLA of JAX 0.11.2 would crash for it on a mesh."""
    levels, given = np.array([999, 900, 500, 499, 0], np.float32), np.array(edges, np.float32)
    want = [sum(level < edge for edge in edges) for level in levels]
    for run in (step_group, jax.jit(step_group)):
        groups = run(jnp.asarray(given), jnp.asarray(levels))
        assert groups.dtype == jnp.int32
        np.testing.assert_array_equal(groups, want)
        assert int(run(jnp.asarray(given), jnp.asarray(levels[3:4]))) == want[3]
    program = jax.make_jaxpr(step_group)(given, levels).jaxpr
    assert any(program.invars[0] is read for equation in program.eqns for read in equation.invars) == bool(edges)


def dots(program: str) -> Counter[tuple[str, str, str]]:
    """Element types (left, right, result) of every product in a StableHLO program."""
    pattern = r"stablehlo\.dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
    element = lambda tensor: tensor.split("x")[-1]
    return Counter(tuple(map(element, found)) for found in re.findall(pattern, program))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_bits", "policy", "float_fed"),
    [
        (8, "edges8", set()),
        (4, "edges8", set()),
        (4, "edges8-float", EDGES),
        (4, "edges8,blocks.fc1=8:float", {"blocks.fc1"}),
    ],
)
def test_the_sampler_multiplies_integers_wherever_the_table_says_so(
    quantized: Quantized, weight_bits: int, policy: str, float_fed: set[str]
) -> None:
    model = quantized(weight_bits, policy)
    table = ptq.describe(model)
    assert {row.layer for row in table if not row.integer} == float_fed
    assert len(table) == 12
    expected = {("i8", "i8", "i32"): 12 - len(float_fed), ("f32", "f32", "f32"): len(float_fed)}
    program = lowered_sampler(model, STEPS).as_text()
    assert program.count("stablehlo.dot_general") + program.count("stablehlo.convolution") == 12
    assert dots(program) == Counter({kind: count for kind, count in expected.items() if count})


@pytest.mark.slow
def test_the_sampler_is_one_loop_over_the_steps_around_one_over_the_blocks(quantized: Quantized) -> None:
    model = quantized(8, "edges8")
    lowered = lowered_sampler(model, STEPS)
    assert lowered.as_text().count("stablehlo.while") == 2
    compiled = lowered.compile().as_text()
    trips = [int(n) for n in re.findall(r' while\(.*"known_trip_count":\{"n":"(\d+)"', compiled)]
    assert sorted(trips) == [model.config.depth, STEPS]
    assert not re.search(r" custom-call\(.*(callback|Callback)", compiled)


@pytest.mark.slow
def test_a_second_call_compiles_nothing_nor_does_another_model_of_the_same_shapes(
    quantized: Quantized, digits: FloatDiT, rows: CalibrationData, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantized(8, "edges8")
    other = ptq.quantize(
        digits,
        ptq.QuantConfig.of(**PLAIN, weight_bits=8, policy="edges8", step_groups=1),
        key=jax.random.key(1),
        calibration=CalibrationData(x=rows.x[:, ::-1] * 0.9, t=rows.t, y=rows.y[:, ::-1]),
    )
    assert other.provenance.facts is not model.provenance.facts

    def compiled(model: ptq.QuantizedDiT, labels: Any, key: int) -> tuple[np.ndarray, int]:
        caplog.clear()
        with jax.log_compiles(True):
            images = ptq.sample(model, labels, key=jax.random.key(key), steps=5, sampler="ddim")
        return images, sum("Compiling" in record.message for record in caplog.records)

    first, programs = compiled(model, [0, 1, 2], 0)
    assert programs > 0  # the log does tell
    second, programs = compiled(model, [7, 8, 9], 1)
    assert programs == 0
    third, programs = compiled(other, [7, 8, 9], 1)
    assert programs == 0
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


@pytest.fixture(scope="module")
def tiny() -> tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]:
    """A random model, rows at t = 900, 600, 300 and 0, and the model quantized in four groups of steps."""
    model = tiny_model()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6, *model.config.image_shape), np.float32) * np.array([1, 2, 3, 4])[:, None, None, None, None]
    data = CalibrationData(
        x=x.astype(np.float32), t=np.array([900, 600, 300, 0], np.int32), y=np.tile(np.arange(6, dtype=np.int32), (4, 1))
    )
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4, policy="edges8", step_groups=4, dynamic_sites=())
    return model, data, ptq.quantize(model, config, key=jax.random.key(0), calibration=data)


def test_groups_of_steps_part_at_the_last_timestep_of_each(tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]) -> None:
    _, data, model = tiny
    assert model.num_groups == 4
    np.testing.assert_array_equal(model.group_edges, [900, 600, 300])
    only = [
        jax.tree.map(lambda a: a, model).replace(
            linears={name: regroup(layer, group) for name, layer in model.linears.items()},
            sites={name: regroup(act, group) for name, act in model.sites.items()},
        )
        for group in range(4)
    ]
    x, y = data.x[1], data.y[1]
    outputs = [np.asarray(apply(single, x, np.array([450]), y)) for single in only]
    assert relative_error(outputs[0], outputs[3]) > 1e-3  # the groups do differ
    for t, group in ((999, 0), (900, 0), (899, 1), (600, 1), (599, 2), (300, 2), (299, 3), (0, 3)):
        expected = apply(only[group], x, np.array([t]), y)
        np.testing.assert_array_equal(apply(model, x, np.array([t]), y), expected, err_msg=f"t = {t}")


def regroup(part: Any, group: int) -> Any:
    """A layer or quantizer whose table holds one group's entry everywhere."""
    everywhere = lambda table, axis: jnp.repeat(jnp.take(table, jnp.array([group]), axis), table.shape[axis], axis)
    if isinstance(part, QLinear):
        return dataclasses.replace(part, bias=everywhere(part.bias, -2), act=regroup(part.act, group))
    return part.replace(scale=everywhere(part.scale, -1), zero_point=everywhere(part.zero_point, -1))


def test_rows_at_timesteps_of_their_own(tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]) -> None:
    """(B,) timesteps give what each row gives alone; (1,) is the same as all rows sharing one."""
    _, data, model = tiny
    x, y = data.x[1], data.y[1]
    t = np.array([999, 600, 599, 300, 10, 0])
    together = np.asarray(apply(model, x, t, y))
    for row in range(6):
        alone = np.asarray(apply(model, x[row : row + 1], t[row : row + 1], y[row : row + 1]))
        assert relative_error(together[row], alone[0]) < 2e-2
    shared, spread = apply(model, x, np.array([450]), y), apply(model, x, np.full(6, 450), y)
    assert relative_error(shared, spread) < 2e-2


def test_the_output_is_the_raw_network_output_in_the_models_type(
    tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT],
) -> None:
    model, data, q = tiny
    out = apply(q, data.x[0], np.array([900]), data.y[0])
    assert out.shape == (6, *model.config.image_shape[:2], model.config.out_channels)
    assert out.dtype == jnp.float32
    assert apply(q.astype("bfloat16"), data.x[0], np.array([900]), data.y[0]).dtype == jnp.bfloat16


def test_bytes_are_those_of_the_integers_scales_and_biases(
    tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT],
) -> None:
    model, _, q = tiny
    depth, groups, needed = model.config.depth, 4, 0
    for name, (K, N) in model.config.linear_shapes.items():
        block = name.startswith("blocks.")
        weights = N * -(-K // 2) + N if block else N * K  # two codes a byte and a zero point a channel, or a byte each
        needed += (depth if block else 1) * (weights + 4 * N + 4 * groups * N + (4 + 4) * groups)  # scales, biases, ranges
    needed += depth * (4 * groups * (4 + 4) + 4 * (32 + 128))  # q, k, v, probs; balancing vectors of proj and fc2
    needed += 4 * (model.config.num_classes + 1) * model.config.hidden_size + 4 * (groups - 1)
    assert q.nbytes == needed


def test_the_table_of_what_runs(tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]) -> None:
    model, _, q = tiny
    table = {row.layer: row for row in ptq.describe(q)}
    assert set(table) == {*q.linears, "blocks.q @ k", "blocks.probs @ v"}
    assert set(q.linears) == set(model.config.linear_shapes)
    for name, (K, N) in model.config.linear_shapes.items():
        row = table[name]
        assert row.shape == (f"2 x {K} -> {N}" if name.startswith("blocks.") else f"{K} -> {N}")
        assert (row.weight_bits, row.act_bits) == (4 if name.startswith("blocks.") else 8, 8)
        assert row.runs == "int8 x int8 -> int32"
    assert table["blocks.q @ k"].shape == "2 x 4 heads"
    assert str(table["blocks.qkv"].ranges) == "per tensor, 4 groups of steps"
    assert str(table["blocks.fc2"].ranges) == "per tensor, 4 groups of steps, balanced"


def test_the_table_keeps_its_order(tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]) -> None:
    """JAX sorts the names of a pytree it rebuilds, as loading a checkpoint does; the table is the same before and after."""
    _, _, q = tiny
    assert ptq.describe(jax.tree.map(lambda leaf: leaf, q)) == ptq.describe(q)


def test_the_twin_is_a_float_model_with_quantizers(tiny: tuple[FloatDiT, CalibrationData, ptq.QuantizedDiT]) -> None:
    model, _, q = tiny
    twin = ptq.reference(q)
    assert structure(twin.params) == structure(model.params)
    assert set(flatten_sites(twin.quantizers)) == set(model.config.site_features)
    np.testing.assert_allclose(twin.params["final"]["bias"], model.params["final"]["bias"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(twin.params["final"]["kernel"], model.params["final"]["kernel"], atol=0.01)
