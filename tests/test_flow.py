"""Flow models: their schedule, Euler's and Heun's method, and the way from calibration to integers and back from a folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tiny_model
from jax.sharding import Mesh

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints.float_dit import model_meta, read_model_meta
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.diffusion import denoise
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.samplers import SAMPLERS

Sentence = Callable[..., AbstractContextManager[None]]
KEY = jax.random.key(0)
LABELS = np.array([3, 0, 4])
FLOWS = [ptq.FlowSchedule(data_time=end) for end in (0, 1)]
#: Settings of a small quantization whose chain is Heun's: four steps, eight calls of the network.
CONFIG = ptq.QuantConfig.of(steps=4, sampler="heun", calib_steps=8, calib_rows=4, step_groups=3, cfg_channels="all")


def flow_model(schedule: ptq.FlowSchedule = FLOWS[1]) -> FloatDiT:
    return dataclasses.replace(tiny_model(learn_sigma=False), schedule=schedule)


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    return flow_model()


@pytest.fixture(scope="module")
def quantized(model: FloatDiT) -> ptq.QuantizedDiT:
    return ptq.quantize(model, CONFIG, key=KEY)


# Schedule ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_time", "times"), [(0, [1, 0.75, 0.5, 0.25, 0]), (1, [0, 0.25, 0.5, 0.75, 1])])
def test_times_run_from_noise_to_data(data_time: int, times: list[float]) -> None:
    flow = ptq.FlowSchedule(data_time=data_time)
    np.testing.assert_array_equal(flow.times("4"), times)
    np.testing.assert_array_equal(flow.noise_level(flow.times(4)), [1, 0.75, 0.5, 0.25, 0])
    x0, noise = np.full((3, 2, 2, 1), 8.0), np.full((3, 2, 2, 1), -4.0)
    x = flow.add_noise(jnp.asarray(x0), jnp.asarray(flow.times(2)), jnp.asarray(noise))
    np.testing.assert_array_equal(x[:, 0, 0, 0], [-4, 2, 8])


def test_what_a_schedule_cannot_be(raises_sentence: Sentence) -> None:
    with raises_sentence("data_time", "0 or 1", "2"):
        ptq.FlowSchedule(data_time=2)
    with raises_sentence("steps of a flow", "-1"):
        ptq.FlowSchedule(steps=-1)


@pytest.mark.parametrize("steps", [0, -1, 10_001, "ddim10", "", "ten", 2.5, "None", "\N{SUPERSCRIPT TWO}"])
def test_impossible_step_counts(steps: Any, raises_sentence: Sentence) -> None:
    with raises_sentence("steps of a flow", "1 to 10000", repr(steps)):
        SAMPLERS["euler"].tables(FLOWS[0], steps)


def test_samplers_and_objectives_that_do_not_fit(raises_sentence: Sentence) -> None:
    for name in ("ddpm", "ddim", "dpm++2m"):
        with raises_sentence(repr(name), "predicts velocity", "use one of euler, heun"):
            ptq.sample(flow_model(), LABELS, key=KEY, sampler=name)
    for name in ("euler", "heun"):
        with raises_sentence(repr(name), "predicts noise", "use one of ddpm, ddim, dpm++2m"):
            ptq.quantize(tiny_model(), ptq.QuantConfig.of(sampler=name), key=KEY)


def test_a_step_size_is_not_another(raises_sentence: Sentence) -> None:
    shortcut = ptq.FlowSchedule(steps=8)
    network = ptq.DiTConfig.preset("DiT-S/2")
    assert ptq.Sampling(steps=8).resolve(shortcut, network).tables().num_steps == 8
    assert ptq.Sampling().resolve(shortcut, network).tables().num_steps == 8
    with raises_sentence("imported for 8 steps", "use 8", "--flow-steps) 50"):
        SAMPLERS["euler"].tables(shortcut, 50)
    with raises_sentence("'heun'", "1/8", "use euler"):
        ptq.Sampling("heun", 8).resolve(shortcut, network)


def test_auto_is_what_the_model_asks_for() -> None:
    network = ptq.DiTConfig.preset("DiT-S/2")
    assert ptq.Sampling().resolve(ptq.NoiseSchedule(), network).sampler is SAMPLERS["ddpm"]
    resolved = ptq.Sampling(steps=7).resolve(FLOWS[0], network)
    assert (resolved.sampler, resolved.steps) == (SAMPLERS["euler"], 7)
    assert ptq.Sampling.of(**resolved.to_dict()).resolve(FLOWS[0], network) == resolved
    filled: dict[str, Any] = {"steps": 50, "cfg_scale": 1.5, "calib_steps": 25}
    assert ptq.QuantConfig.paper().resolve(FLOWS[0], network) == ptq.QuantConfig.paper(sampler="euler", **filled)
    ddim = ptq.QuantConfig.of(sampler="ddim")
    assert ddim.resolve(ptq.NoiseSchedule(), network) == ptq.QuantConfig.of(sampler="ddim", **filled)


# Samplers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("flow", FLOWS)
def test_order_of_convergence(name: Any, order: int, flow: ptq.FlowSchedule) -> None:
    """Data of deviation 3: at noise level s, x is normal of deviation d(s), and the flow's path is x(s) = x(1) d(s)."""
    data, start = 3.0, np.linspace(-2, 2, 5, dtype=np.float32).reshape(1, 5, 1, 1)

    def velocity(x: jax.Array, t: jax.Array, scale: jax.Array) -> jax.Array:
        s = t if flow.data_time == 0 else 1 - t
        v = x * (s - (1 - s) * data**2) / (s**2 + (1 - s) ** 2 * data**2)  # d'(s) / d(s)
        return v if flow.data_time == 0 else -v

    def error(steps: int) -> float:
        tables = SAMPLERS[name].tables(flow, steps)
        assert tables.num_steps == steps * order
        assert tables.t.dtype == np.float32
        x, _ = jax.jit(lambda x: denoise(velocity, tables, x, None, learned_variance=False))(start)
        return relative_error(x, data * start)

    errors = np.array([error(steps) for steps in (16, 32, 64)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.15)


def plain_chain(model: FloatDiT, x: np.ndarray, steps: int, heun: bool, cfg_scale: float, first: int) -> np.ndarray:
    """The textbook's loop in float64 around the network, guided on the ``first`` channels."""
    apply, flow = model.jitted(), model.schedule
    assert isinstance(flow, ptq.FlowSchedule)
    times = np.linspace(1 - flow.data_time, flow.data_time, steps + 1)

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        c, u = (
            np.asarray(apply(x.astype(np.float32), np.full(3, t, np.float32), y), np.float64)
            for y in (LABELS, np.full(3, model.config.null_label))
        )
        return np.concatenate([(u + cfg_scale * (c - u))[..., :first], c[..., first:]], axis=-1)

    for t, t_next in itertools.pairwise(times):
        v, dt = velocity(x, t), t_next - t
        if heun:
            v = (v + velocity(x + dt * v, t_next)) / 2
        x = x + dt * v
    return x


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize(("flow", "channels"), [(FLOWS[0], "all"), (FLOWS[1], "first3")])
def test_chain_against_a_plain_loop(name: Any, flow: ptq.FlowSchedule, channels: Any) -> None:
    model = dataclasses.replace(tiny_model(learn_sigma=False, in_channels=4), schedule=flow)
    noise = np.random.default_rng(1).standard_normal((3, *model.config.image_shape))
    images = ptq.sample(model, LABELS, key=KEY, sampler=name, steps=6, cfg_scale=2.0, cfg_channels=channels, noise=noise)
    expected = plain_chain(model, noise, 6, name == "heun", 2.0, 4 if channels == "all" else 3)
    assert np.abs(images - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_discarded_variance_half_is_never_read() -> None:
    model = dataclasses.replace(tiny_model(), schedule=FLOWS[1])
    kept = np.asarray(model.params["final"]["kernel"]).reshape(-1, 4, 2, 3)[:, :, 0].reshape(-1, 12)
    bias = np.asarray(model.params["final"]["bias"]).reshape(4, 2, 3)[:, 0].ravel()
    half = dataclasses.replace(flow_model(), params={**model.params, "final": {"kernel": kept, "bias": bias}})
    whole, images = (ptq.sample(m, LABELS, key=KEY, steps=3) for m in (model, half))
    np.testing.assert_allclose(whole, images, rtol=1e-5, atol=1e-5)


# Calibration and groups of steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
def test_calibration_rows_lie_on_the_chain(flow: ptq.FlowSchedule) -> None:
    data = ptq.sample_trajectories(
        flow_model(flow), ptq.Calibration(steps=8, rows=4, sampling=ptq.Sampling("heun", 4)), key=KEY
    )
    level = np.repeat([1, 0.75, 0.5, 0.25, 0], 2)[1:-1]
    np.testing.assert_array_equal(data.t, np.abs(flow.data_time - level).astype(np.float32))
    assert data.t.dtype == np.float32
    # The first rows are the noise, the second an Euler step away from it.
    x, t, y = (jnp.asarray(rows) for rows in (data.x[0, :2], data.t[:1], data.y[0, :2]))
    v = ptq.predict(flow_model(flow), x, t, y, 1.5, "first3")
    np.testing.assert_allclose(data.x[1, :2], data.x[0, :2] + (flow.data_time - 0.5) / 2 * v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flow", FLOWS)
def test_groups_of_steps_follow_the_noise(flow: ptq.FlowSchedule) -> None:
    """Both rows of Heun's that share a time share a group, and inside a chain groups are passed in order."""
    model = flow_model(flow)
    data = ptq.sample_trajectories(model, ptq.Calibration(steps=8, rows=2, sampling=ptq.Sampling("heun", 4)), key=KEY)
    edges = ptq.choose_ranges(ptq.Balanced.by(model, {}), CONFIG, ptq.observe(model, data), data).edges
    np.testing.assert_array_equal(edges, np.array([0.75, 0.25], np.float32))
    assert edges.dtype == jnp.float32
    groups = [int(step_group(edges, flow.noise_level(jnp.asarray(t)[None]))) for t in data.t]
    assert groups == [0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("flow", FLOWS)
def test_stored_rows(flow: ptq.FlowSchedule, raises_sentence: Sentence) -> None:
    model = flow_model(flow)
    x = np.arange(4.0).reshape(4, 1, 1, 1) * np.ones(model.config.image_shape)
    data = ptq.stored_rows(x, np.array([0.5, 0.25, 0.5, 0.25]), np.array([0, 1, 2, 3]), model.config, flow)
    order = [[0, 2], [1, 3]] if flow.data_time == 0 else [[1, 3], [0, 2]]
    np.testing.assert_array_equal(data.y, order)
    np.testing.assert_array_equal(data.x[..., 0, 0, 0], order)
    np.testing.assert_array_equal(data.t, [0.5, 0.25] if flow.data_time == 0 else [0.25, 0.5])
    for wrong in (1.5, -0.1, np.nan):
        with raises_sentence("times t of a flow", "between 0 and 1"):
            ptq.stored_rows(x, np.array([0.5, wrong, 0.5, 0.25]), np.array([0, 1, 2, 3]), model.config, flow)


# Quantized -----------------------------------------------------------------------------------------------------------------


def test_a_quantized_flow(quantized: ptq.QuantizedDiT, model: FloatDiT) -> None:
    assert quantized.schedule == model.schedule
    assert quantized.num_groups == 3
    settings: dict[str, Any] = {"sampler": "heun", "steps": 4, "cfg_channels": "all"}
    images, floats = (ptq.sample(m, LABELS, key=KEY, **settings) for m in (quantized, model))
    assert relative_error(images, floats) < 0.1


def test_ranges_follow_the_time_of_the_flow(quantized: ptq.QuantizedDiT) -> None:
    """Edges above every level leave the last group, whose ranges are those near the data."""
    x = np.random.default_rng(2).standard_normal((3, *quantized.config.image_shape)).astype(np.float32)
    apply = jax.jit(type(quantized).apply)
    last = dataclasses.replace(quantized, group_edges=jnp.full(2, 2.0))
    outs = {t: [apply(q, x, np.full(1, t, np.float32), LABELS) for q in (quantized, last)] for t in (0.95, 0.05)}
    np.testing.assert_array_equal(*outs[0.95])
    assert (outs[0.05][0] != outs[0.05][1]).any()


def test_the_engine_is_its_fake_quant_twin(quantized: ptq.QuantizedDiT, model: FloatDiT) -> None:
    twin = ptq.reference(quantized)
    x = ptq.sample(model, LABELS, key=KEY, steps=2)
    t = np.array([0.0, 0.5, 1.0], np.float32)
    assert relative_error(jax.jit(type(quantized).apply)(quantized, x, t, LABELS), twin.jitted()(x, t, LABELS)) < 2e-2


def test_saved_and_loaded(quantized: ptq.QuantizedDiT, model: FloatDiT, tmp_path: Path) -> None:
    shortcut = dataclasses.replace(model, schedule=ptq.FlowSchedule(steps=4))
    models: tuple[FloatDiT | ptq.QuantizedDiT, ...] = (model, quantized, shortcut)
    for index, each in enumerate(models):
        loaded = ptq.load(ptq.save(each, tmp_path / str(index)))
        assert loaded.schedule == each.schedule
        images, again = (ptq.sample(m, LABELS, key=KEY, steps=4) for m in (each, loaded))
        np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(ptq.load(tmp_path / "1").group_edges, quantized.group_edges)


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ({"objective": "score", "data_time": 1}, ("'score'", "noise and velocity", "upgrade")),
        ({"objective": "velocity", "data_time": 7}, ("data_time", "7")),
        ({"objective": "velocity", "kind": 1}, ("FlowSchedule", "unknown setting kind", "upgrade")),
        ({"objective": "velocity", "steps": "4"}, ("FlowSchedule", "steps = '4'")),
    ],
)
def test_schedules_that_cannot_be_read(schedule: dict[str, Any], parts: tuple[str, ...], raises_sentence: Sentence) -> None:
    meta = model_meta(tiny_model().config, FLOWS[0])
    assert read_model_meta(meta)[1] == FLOWS[0]
    with raises_sentence(*parts):
        read_model_meta({**meta, "schedule": schedule})


@pytest.mark.slow
def test_comparison(quantized: ptq.QuantizedDiT, model: FloatDiT, tmp_path: Path, raises_sentence: Sentence) -> None:
    sampling = ptq.Sampling(steps=4, guidance=ptq.Guidance(channels="all"))
    comparison = ptq.compare(model, {"w8a8": quantized}, labels=LABELS, key=KEY, sampling=sampling)
    assert comparison.settings["sampler"] == "euler"
    np.testing.assert_array_equal(comparison.timesteps, [0, 0.25, 0.5, 0.75])
    assert comparison.figures["w8a8"].sqnr_pooled_db > 20
    page = (ptq.write_report(tmp_path / "report", comparison, title="Flow", settings={}) / "report.md").read_text()
    assert "SQNR: of the guided predicted velocity" in page
    with raises_sentence("data_time (1 against 0)"):
        ptq.compare(model, {"x": flow_model(FLOWS[0])}, labels=LABELS, key=KEY)
    with raises_sentence("objective (velocity against noise)"):
        ptq.compare(model, {"x": tiny_model(learn_sigma=False)}, labels=LABELS, key=KEY)


def test_eight_devices_give_the_images_of_one(quantized: ptq.QuantizedDiT, mesh8: Mesh) -> None:
    labels = np.arange(16) % 5
    once = ptq.sample(quantized, labels, key=KEY, sampler="heun", steps=2, batch_size=2)
    np.testing.assert_array_equal(ptq.sample(quantized, labels, key=KEY, sampler="heun", steps=2, mesh=mesh8), once)


@pytest.mark.slow
def test_reconstruction(model: FloatDiT) -> None:
    config = CONFIG.replace(weight_bits=4, reconstruction=Reconstruction(iterations=20, batch_size=4))
    learned = ptq.quantize(model, config, key=KEY)
    facts = learned.provenance.facts
    assert facts["settings"]["sampler"] == "heun"
    assert facts["reconstruction"]
    assert np.isfinite(ptq.sample(learned, LABELS, key=KEY, steps=2)).all()
