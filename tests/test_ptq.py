"""The pipeline: what it decides, what each setting does to the result, the law of salient channels, and its errors."""

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
from helpers import PLAIN, act_of, random_inputs, relative_error, same_bytes, tiny_model
from jax.sharding import Mesh

import ptq4dit_jax as ptq
from benchmarks.salient import salient_model
from ptq4dit_jax.calibration import CalibrationData, ChannelExtremes, channel_extremes
from ptq4dit_jax.hashing import source_hash
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig

DIGITS = Path(__file__).parents[1] / "models" / "digits"
KEY = jax.random.key(0)
LINEARS = DiTConfig.example().spec.linears
Sentence = Callable[..., AbstractContextManager[None]]

apply = jax.jit(lambda model, x, t, y: model.apply(x, t, y))
guided = jax.jit(lambda model, x, t, y: ptq.predict(model, x, t, y, 1.5, "first3"))


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    return tiny_model()


def three_steps(model: FloatDiT) -> CalibrationData:
    """Three steps of eight rows, different at each step."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((3, 8, *model.config.image_shape)) * np.array([1.0, 0.8, 0.6]).reshape(3, 1, 1, 1, 1)
    y = np.tile(np.arange(8, dtype=np.int32) % 6, (3, 1))
    return CalibrationData(x=x.astype(np.float32), t=np.array([900, 400, 0], np.int32), y=y)


@pytest.fixture(scope="module")
def rows(model: FloatDiT) -> CalibrationData:
    return three_steps(model)


@pytest.fixture(scope="module")
def extremes(model: FloatDiT, rows: CalibrationData) -> dict[str, ChannelExtremes]:
    return channel_extremes(model, rows, sites=tuple(model.config.site_features))


@pytest.fixture(scope="module")
def w4a8(model: FloatDiT, rows: CalibrationData) -> ptq.QuantizedDiT:
    return ptq.quantize(model, ptq.QuantConfig.of(**PLAIN, weight_bits=4), key=KEY, calibration=rows)


def error(model: FloatDiT, q: ptq.QuantizedDiT) -> float:
    x, y = random_inputs(model.config, 6)
    t = np.array([400])
    return relative_error(apply(q, x, t, y), apply(model, x, t, y))


# What comes out.


def test_the_result_says_where_it_comes_from(model: FloatDiT, w4a8: ptq.QuantizedDiT) -> None:
    facts = w4a8.provenance.facts
    assert facts["source_sha256"] == source_hash(model.params)
    assert facts["settings"] == ptq.QuantConfig.of(**PLAIN, weight_bits=4).for_network(model.config).to_dict()
    assert facts["settings"]["dynamic_sites"] == ("blocks.qkv_in", "blocks.probs", "blocks.fc1_in")
    assert facts["calibration"] == {"rows": "given", "steps": 3, "rows_per_step": 8}
    assert w4a8.config == model.config
    assert w4a8.schedule == model.schedule


def test_the_source_is_left_as_it_was(model: FloatDiT, w4a8: ptq.QuantizedDiT) -> None:
    assert w4a8.num_groups == 3
    assert same_bytes(model.params, tiny_model().params)


def test_the_default_feeds_the_edges_with_floats(w4a8: ptq.QuantizedDiT) -> None:
    table = {row.layer: row for row in ptq.describe(w4a8)}
    for name, linear in LINEARS.items():
        edge = linear.edge
        assert table[name].integer is not edge
        assert table[name].weight_bits == (8 if edge else 4)
        assert table[name].act_bits == (32 if edge else 8)
        assert table[name].runs == ("float32 on de-quantized weights" if edge else "int8 x int8 -> int32")


def test_a_policy_gives_each_layer_the_width_asked_for(model: FloatDiT, rows: CalibrationData) -> None:
    policy = "uniform,blocks.adaLN=6,final=8:float,blocks.fc2=3,blocks.qkv=4:float"
    q = ptq.quantize(model, ptq.QuantConfig.of(**PLAIN, weight_bits=4, policy=policy), key=KEY, calibration=rows)
    bits = {row.layer: row.weight_bits for row in ptq.describe(q)}
    expected = dict.fromkeys(LINEARS, 4) | {"blocks.adaLN": 6, "final": 8, "blocks.fc2": 3}
    assert {name: bits[name] for name in LINEARS} == expected
    assert {row.layer for row in ptq.describe(q) if not row.integer} == {"final", "blocks.qkv"}
    assert act_of(q, "blocks.fc2").balance is not None
    assert error(model, q) < 0.5


def test_weights_hold_codes_of_their_width(w4a8: ptq.QuantizedDiT) -> None:
    for name, layer in w4a8.linears.items():
        codes = np.asarray(layer.stored.codes(), int)
        spread = codes.max(-1) - codes.min(-1)
        assert spread.max() <= (15 if layer.weight.bits == 4 else 254), name
        assert np.median(spread) > (8 if layer.weight.bits == 4 else 128), name  # and use it


def test_dynamic_sites_keep_no_ranges(model: FloatDiT, rows: CalibrationData) -> None:
    q = ptq.quantize(
        model, ptq.QuantConfig.of(**PLAIN, dynamic_sites=("blocks.qkv_in", "blocks.fc2_in")), key=KEY, calibration=rows
    )
    for layer, dynamic in (("blocks.qkv", True), ("blocks.fc2", True), ("blocks.fc1", False)):
        act = act_of(q, layer)
        assert act.dynamic is dynamic
        assert (act.scale is None) is dynamic
    balance = act_of(q, "blocks.fc2").balance
    assert balance is not None
    assert balance.shape == (2, 128)
    assert error(model, q) < 0.05


# What the settings do.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ptq4dit_jax.quality.PoorQuality")
def test_every_width_runs_and_fewer_bits_cost_more() -> None:
    """Weights from 2 to 8 bits with 8-bit activations, then the other way round.

    Every width compiles the search for every shape of a kernel, so kernels share shapes: (32, 32) and (32, 64) at the edges,
    (32, 32), (32, 96) and (32, 192) in the blocks.
    """
    model = tiny_model(in_channels=8, frequency_size=32, mlp_ratio=1.0)
    rows = three_steps(model)

    def errors(setting: str) -> list[float]:
        configs = [ptq.QuantConfig.of(**PLAIN, policy="uniform", step_groups=1, **{setting: bits}) for bits in range(2, 9)]
        return [error(model, ptq.quantize(model, config, key=KEY, calibration=rows, keep_poor=True)) for config in configs]

    for setting in ("weight_bits", "act_bits"):
        found = errors(setting)
        assert all(fewer > more for fewer, more in itertools.pairwise(found)), (setting, found)
        assert found[0] > 5 * found[-1]
        assert found[-1] < 0.05


def test_one_key_one_result(model: FloatDiT) -> None:
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4, calib_steps=2, calib_rows=4, steps=4, sampler="ddim", step_groups=2)
    first, again, other = (ptq.quantize(model, config, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert same_bytes(first, again)
    assert not same_bytes(first, other)
    assert first.provenance.facts["calibration"] == {"rows": "sampled, key [0, 0]", "steps": 2, "rows_per_step": 4}


def test_stored_rows_stand_in_for_sampled_ones(model: FloatDiT) -> None:
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4, calib_steps=2, calib_rows=4, steps=4, sampler="ddim", step_groups=2)
    sampled = ptq.quantize(model, config, key=KEY)
    data = ptq.sample_trajectories(model, config.calibration, key=KEY)
    flat = ptq.stored_rows(data.x.reshape(-1, *data.x.shape[2:]), np.repeat(data.t, 4), data.y.ravel(), model.config)
    assert same_bytes(ptq.quantize(model, config, key=jax.random.key(9), calibration=flat), sampled)


def test_more_groups_than_calibration_steps_are_as_many_as_steps(model: FloatDiT, rows: CalibrationData) -> None:
    q = ptq.quantize(model, ptq.QuantConfig.of(**PLAIN, step_groups=20), key=KEY, calibration=rows)
    assert q.num_groups == 3
    np.testing.assert_array_equal(q.group_edges, [900, 400])


@pytest.mark.parametrize("row_batch", [1, 3, 4, 100])
def test_row_batches_change_nothing(model: FloatDiT, rows: CalibrationData, w4a8: ptq.QuantizedDiT, row_batch: int) -> None:
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4)
    assert same_bytes(ptq.quantize(model, config, key=KEY, calibration=rows, row_batch=row_batch), w4a8)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 6])
def test_calibration_over_eight_devices_gives_the_same_bytes(
    model: FloatDiT, rows: CalibrationData, w4a8: ptq.QuantizedDiT, mesh8: Mesh, count: int
) -> None:
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4)
    part = CalibrationData(x=rows.x[:, :count], t=rows.t, y=rows.y[:, :count])
    alone = w4a8 if count == 8 else ptq.quantize(model, config, key=KEY, calibration=part)
    assert same_bytes(ptq.quantize(model, config, key=KEY, calibration=part, mesh=mesh8), alone)


def test_progress_tells_each_stage_to_its_end(model: FloatDiT) -> None:
    seen: list[tuple[str, int, int]] = []
    config = ptq.QuantConfig.of(balance="search", rounding="nearest", calib_steps=2, calib_rows=4, steps=4, sampler="ddim")
    ptq.quantize(model, config, key=KEY, progress=lambda stage, done, total, note="": seen.append((stage, done, total)))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == [
        "sample calibration rows",
        "gather channel statistics",
        "try ways of balancing",
        "choose activation ranges",
        "choose weight ranges",
        "measure the result",
    ]
    for stage in stages:
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert counts[-1][0] == counts[-1][1]
        assert counts == sorted(counts)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_stages_one_by_one_make_what_quantize_makes(
    model: FloatDiT, rows: CalibrationData, w4a8: ptq.QuantizedDiT, rounding: str
) -> None:
    config = ptq.QuantConfig.of(**{**PLAIN, "rounding": rounding}, weight_bits=4)
    observed = ptq.observe(model, rows)
    balanced = ptq.balance(model, config, observed, rows)
    ranged = ptq.choose_ranges(balanced, config, observed, rows)
    packed = ptq.pack(balanced, ranged, config, observed)
    wanted = w4a8
    if rounding == "gptq":
        packed, facts = ptq.round_closed_form(balanced.folded, packed, rows)
        assert {row["part"] for row in facts} >= {"block 0", "head"}
        wanted = ptq.quantize(model, config, key=KEY, calibration=rows)
    assert same_bytes(packed, wanted)


def test_what_stages_return_passes_through_jit(model: FloatDiT, rows: CalibrationData) -> None:
    config = ptq.QuantConfig.of(**PLAIN)
    observed = ptq.observe(model, rows)
    balanced = ptq.balance(model, config, observed, rows)
    ranged = ptq.choose_ranges(balanced, config, observed, rows)
    for value in (observed, balanced, ranged):
        assert same_bytes(jax.jit(lambda tree: tree)(value), value)


# Balancing.


def test_csb_takes_the_middle_step(model: FloatDiT, rows: CalibrationData, extremes: dict[str, ChannelExtremes]) -> None:
    found = ptq.balance(model, ptq.QuantConfig.of(balance="csb"), ptq.Observed(extremes), rows)
    assert set(found.factors) == {f"blocks.{name}" for name in ("qkv_in", "proj_in", "fc1_in", "fc2_in", "v")}
    for name, layer in (("qkv_in", "qkv"), ("proj_in", "proj"), ("fc1_in", "fc1"), ("fc2_in", "fc2")):
        seen = extremes[f"blocks.{name}"]
        s_x = np.maximum(np.abs(seen.low[1]), np.abs(seen.high[1]))
        s_w = np.abs(model.params["blocks"][layer]["kernel"]).max(-1)
        np.testing.assert_allclose(found.factors[f"blocks.{name}"], np.sqrt(s_w / s_x), rtol=1e-5)
    assert found.eta == found.rho == {}


@pytest.mark.parametrize("ssc", ["steps", "rows"])
def test_ssc_weighs_steps_or_single_rows(
    model: FloatDiT, rows: CalibrationData, extremes: dict[str, ChannelExtremes], ssc: str
) -> None:
    config = ptq.QuantConfig.of(balance="csb+ssc", ssc=ssc, temperature=0.5)
    found = ptq.balance(model, config, ptq.Observed(extremes), rows)
    samples = 3 if ssc == "steps" else 3 * 8
    for name in ("blocks.qkv_in", "blocks.proj_in", "blocks.fc1_in", "blocks.fc2_in"):
        eta, rho = np.asarray(found.eta[name], np.float64), np.asarray(found.rho[name], np.float64)
        assert eta.shape == rho.shape == (samples, model.config.depth)
        assert found.activation_salience[name].shape[:2] == (3, model.config.depth)
        weights = np.exp(-rho / 0.5)
        np.testing.assert_allclose(eta, weights / weights.sum(0), rtol=1e-5)
        assert np.all(np.isfinite(found.factors[name]) & (np.asarray(found.factors[name]) > 0))


def test_what_is_not_balanced(model: FloatDiT, rows: CalibrationData, extremes: dict[str, ChannelExtremes]) -> None:
    def sites(**settings: Any) -> set[str]:
        found = ptq.balance(model, ptq.QuantConfig.of(**settings), ptq.Observed(extremes), rows).factors
        return {name.removeprefix("blocks.") for name in found}

    assert sites(balance="none", equalize_v=False) == set()
    assert sites(balance="none") == {"v"}
    assert sites(balance="csb", balance_fc2=False, equalize_v=False) == {"qkv_in", "proj_in", "fc1_in"}
    assert sites(balance="csb", policy="uniform,blocks.proj=8:float,blocks.fc1=8:float") == {"qkv_in", "fc2_in"}


def test_exponent_zero_is_no_balancing(model: FloatDiT, rows: CalibrationData, extremes: dict[str, ChannelExtremes]) -> None:
    config = ptq.QuantConfig.of(balance="csb+ssc", exponent=0.0, equalize_v=False)
    found = ptq.balance(model, config, ptq.Observed(extremes), rows)
    for factor in found.factors.values():
        np.testing.assert_array_equal(factor, np.ones_like(factor))


@pytest.mark.parametrize(
    "settings",
    [
        {"balance": "none"},
        {"balance": "csb"},
        {"balance": "csb+ssc"},
        {"balance": "csb+ssc", "ssc": "rows"},
        {"balance": "csb", "equalize_v": False, "exponent": 1.0},
        {"balance": "search"},
    ],
)
def test_folding_leaves_the_float_output_unchanged(rows: CalibrationData, settings: dict[str, Any]) -> None:
    model = salient_model(tiny_model(), share=0.05)
    folded = ptq.balance(model, ptq.QuantConfig.of(**settings), ptq.observe(model, rows), rows).folded
    for step in range(3):
        batch = rows.x[step], rows.t[step : step + 1], rows.y[step]
        assert relative_error(apply(folded, *batch), apply(model, *batch)) < 1e-5


# The law of salient channels, on the trained model.


@pytest.fixture(scope="module")
def digits() -> tuple[FloatDiT, FloatDiT]:
    """The trained model, and the same function with 2 % of the channels into qkv, fc1 and proj 30 times larger."""
    model = ptq.load(DIGITS)
    assert isinstance(model, FloatDiT)
    return model, salient_model(model)


def trajectories(model: FloatDiT, seed: int) -> CalibrationData:
    sampling = ptq.Sampling.of(sampler="ddpm", steps=10, cfg_scale=1.5)
    calibration = ptq.Calibration(steps=5, rows=20, sampling=sampling)
    return ptq.sample_trajectories(model, calibration, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def digit_rows(digits: tuple[FloatDiT, FloatDiT]) -> tuple[CalibrationData, CalibrationData]:
    """Rows to calibrate on, and others to measure on."""
    return trajectories(digits[0], 0), trajectories(digits[0], 5)


def sqnr(reference: FloatDiT, other: FloatDiT | ptq.QuantizedDiT, data: CalibrationData) -> float:
    """Of the guided predicted noise, in dB, the mean over the steps."""
    found = []
    for step in range(data.num_steps):
        half = data.num_rows // 2
        batch = data.x[step, :half], data.t[step : step + 1], data.y[step, :half]
        exact, seen = (np.asarray(guided(m, *batch), np.float64)[..., :1] for m in (reference, other))
        found.append(10 * np.log10(np.square(exact).sum() / np.square(seen - exact).sum()))
    return float(np.mean(found))


def test_the_salient_model_is_the_same_function(
    digits: tuple[FloatDiT, FloatDiT], digit_rows: tuple[CalibrationData, CalibrationData]
) -> None:
    assert sqnr(*digits, digit_rows[1]) > 110


def lost(models: tuple[FloatDiT, FloatDiT], rows: tuple[CalibrationData, CalibrationData], **settings: Any) -> float:
    """What the salient model is worse by at W4A8, in dB, on rows that it was not calibrated on."""
    config, (calibration, held_out) = ptq.QuantConfig.of(weight_bits=4, **settings), rows
    untouched, salient = (
        sqnr(models[0], ptq.quantize(model, config, key=KEY, calibration=calibration), held_out) for model in models
    )
    print(f"{settings}: {untouched:.2f} dB untouched, {salient:.2f} dB salient")
    return untouched - salient


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["edges8-float", "edges8"])
def test_salient_channels_ruin_the_unbalanced_model_and_not_the_balanced_one(
    digits: tuple[FloatDiT, FloatDiT], digit_rows: tuple[CalibrationData, CalibrationData], policy: str
) -> None:
    """W4A8, static ranges: without balancing at least 6 dB are lost; with it the salient model is as good as the untouched."""
    static: dict[str, Any] = {"rounding": "nearest", "policy": policy, "step_groups": 1, "dynamic_sites": ()}
    assert lost(digits, digit_rows, balance="none", **static) > 6
    for method in ("csb", "csb+ssc", "search"):
        assert abs(lost(digits, digit_rows, balance=method, **static)) < 0.5


@pytest.mark.slow
def test_nor_do_they_ruin_the_default(
    digits: tuple[FloatDiT, FloatDiT], digit_rows: tuple[CalibrationData, CalibrationData]
) -> None:
    """Of what was chosen by measurement, only what undoes salient channels may be better; else they would cost quality."""
    assert abs(lost(digits, digit_rows)) < 0.5


@pytest.mark.slow
def test_a_dead_channel_does_no_harm(rows: CalibrationData, model: FloatDiT) -> None:
    """A channel that no input or no weight uses: everything stays finite, and the others are quantized as well as before."""
    blocks = jax.tree.map(np.array, model.params["blocks"])
    blocks["fc2"]["kernel"][:, 3] = 0
    for chunk in (0, 1):  # shift 0, 1 + scale 0: the first channel of qkv_in is constant zero
        blocks["adaLN"]["kernel"][:, :, chunk * 32] = 0
        blocks["adaLN"]["bias"][:, chunk * 32] = -chunk
    dead = dataclasses.replace(model, params={**model.params, "blocks": blocks})
    q = ptq.quantize(dead, ptq.QuantConfig.of(**PLAIN), key=KEY, calibration=rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(q) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert error(dead, q) < 0.05


# Errors.


def with_value(model: FloatDiT, value: float) -> FloatDiT:
    blocks = jax.tree.map(np.array, model.params["blocks"])
    blocks["fc1"]["kernel"][1, 2, 3] = value
    return dataclasses.replace(model, params={**model.params, "blocks": blocks})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(model: FloatDiT, rows: CalibrationData, value: float, raises_sentence: Sentence) -> None:
    with raises_sentence("NaN or infinity", "blocks/fc1/kernel"):
        ptq.quantize(with_value(model, value), key=KEY, calibration=rows)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"calib_steps": 5, "steps": 4}, ("Calibration steps", "4 steps", "5")),
        ({"calib_steps": 0}, ("Calibration steps", "0")),
        ({"calib_rows": 3, "calib_steps": 2}, ("Calibration rows", "even", "3")),
        ({"calib_rows": 0, "calib_steps": 2}, ("Calibration rows", "0")),
        ({"steps": 1001}, ("Sampler steps", "1 to 1000", "1001")),
    ],
)
def test_calibration_that_cannot_be_sampled(
    model: FloatDiT, settings: dict[str, Any], parts: tuple[str, ...], raises_sentence: Sentence
) -> None:
    with raises_sentence(*parts):
        ptq.quantize(model, ptq.QuantConfig.of(**settings), key=KEY)


def test_guidance_needs_a_null_class(raises_sentence: Sentence) -> None:
    unguided = tiny_model(null_class=False)
    config = ptq.QuantConfig.of(**PLAIN, calib_steps=1, calib_rows=2, steps=2, cfg_scale=1.5)
    with raises_sentence("null class", "cfg_scale 1"):
        ptq.quantize(unguided, config, key=KEY)


def test_a_model_without_guidance_and_learned_variance() -> None:
    plain = tiny_model(null_class=False, learn_sigma=False)
    config = ptq.QuantConfig.of(**PLAIN, calib_steps=1, calib_rows=3, steps=2, cfg_scale=1.0)
    q = ptq.quantize(plain, config, key=KEY)
    x, _ = random_inputs(plain.config, 5)
    y, t = np.arange(5, dtype=np.int32), np.array([0])
    assert relative_error(apply(q, x, t, y), apply(plain, x, t, y)) < 0.1
