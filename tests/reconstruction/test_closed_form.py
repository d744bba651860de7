"""Closed-form rounding of a small model from end to end: its moments, what it gains, what it may change, on any devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Capture, outputs_on, random_inputs, relative_error, same_but_for_ties, same_bytes, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import gptq, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.networks.spec import nest_sites
from ptq4dit_jax.reconstruction import closed_form, moments, round_closed_form, units
from ptq4dit_jax.reconstruction.closed_form import ClosedFormWalk
from ptq4dit_jax.reconstruction.moments import UnitInputs

KEY = jax.random.key(0)
CONFIG = ptq.QuantConfig.of(
    weight_bits=3, calib_steps=4, calib_rows=30, steps=4, step_groups=2, balance="none", equalize_v=False
)
#: Of the layers below those that are fed 9 tokens a row; the others are fed one vector, that of a time by all rows together.
TOKENWISE = ("blocks.qkv", "blocks.proj", "blocks.fc2", "patch_embed", "final")
TIMES = np.array([999, 600, 300, 0], np.int32)


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    return tiny_model()


def rows_of(model, seed):
    """30 rows at each of 4 steps, which 32 strata of 4 hold, some rows twice."""
    x, y = random_inputs(model.config, 120, seed)
    return CalibrationData(x=x.reshape(4, 30, *x.shape[1:]), t=TIMES, y=y.reshape(4, 30))


@pytest.fixture(scope="module")
def rows(model):
    return rows_of(model, 0)


def quantize(model, rows, rounding="gptq", config=CONFIG, **more):
    config = config.replace(rounding=rounding)
    return ptq.quantize(model, config, key=KEY, calibration=rows, keep_poor=True, **more)


@pytest.fixture(scope="module")
def nearest(model, rows):
    return quantize(model, rows, "nearest")


@pytest.fixture(scope="module")
def rounded(model, rows):
    return quantize(model, rows)


def error(model, q, rows):
    return relative_error(outputs_on(rows, q), outputs_on(rows, model))


def fed(model, site, rows):
    """What a layer of any block is fed, (S * R, [L,] [T,] K) in float64, one row after another."""
    seen = {site: Capture()}
    found = [model.observe(nest_sites(seen), rows.x[s], rows.t[s : s + 1], rows.y[s])[1] for s in range(rows.num_steps)]
    name = site.removeprefix("blocks.")
    values = [np.asarray((tree["blocks"] if site != name else tree)[name].x, np.float64) for tree in found]
    return np.concatenate([np.moveaxis(v, 0, 1) if site != name else v for v in values])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", ["blocks.qkv", "blocks.proj", "blocks.fc2", "blocks.adaLN", "patch_embed", "time_fc2", "final"]
)
def test_moments_are_those_of_what_the_two_networks_feed_the_layer(layer, model, rows, nearest):
    """Of the first block, where all before it is quantized to the nearest; each row counted once."""
    walk = ClosedFormWalk(model, nearest, rows, None)
    twin = ptq.reference(nearest)
    for unit in units(model.config):
        if layer in unit.layers.values():
            break
        outputs, _ = walk.outputs(unit, walk.nearest(unit), walk.rows(unit))
        walk.advance(unit, outputs, walk.rows(unit).target)
    name = next(inside for inside, full in unit.layers.items() if full == layer)
    found = UnitInputs(walk, unit).moments(name, walk.nearest(unit))
    of_block = (lambda a: a[:, 0]) if layer.startswith("blocks.") else (lambda a: a)
    K = model.config.linear_shapes[layer][0]
    x, exact = (of_block(fed(m, m.config.spec.site_of[layer], rows)).reshape(-1, K) for m in (twin, model))
    x, d = x - np.asarray(found.shift, np.float64), exact - x
    count = float(found.count)
    assert count == pytest.approx(120 * (9 if layer in TOKENWISE else 1), rel=1e-6)
    size = np.sqrt(np.square(x).mean(0) + 1e-12)
    for moment, expected in (
        (found.second, x.T @ x / len(x)),
        (found.cross, d.T @ x / len(x)),
        (found.first, x.mean(0)),
        (found.drift, d.mean(0)),
    ):
        scale = np.outer(size, size) if expected.ndim == 2 else size
        assert (np.abs(np.asarray(moment, np.float64) / count - expected) / scale).max() < 2e-3


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_parts_hold_each_row_once_on_the_device_that_sums_it(devices, mesh8):
    mesh = sharding.data_mesh(mesh8.devices.ravel()[:devices]) if devices > 1 else None
    strata = {1: 32, 2: 32, 3: 33, 8: 32}[devices]
    x = sharding.shard(mesh, np.arange(5 * strata, dtype=np.int32).reshape(5, strata), axis=1)
    parts = 8 if 8 % devices == 0 else devices
    lanes = moments._lanes(moments._Seen((x,), (x,), x, x.astype(jnp.float32)), parts)
    np.testing.assert_array_equal(np.concatenate([lane.group for lane in lanes.values()], axis=1), x)
    for item in range(parts):
        lane = lanes[moments._lane(item, devices, parts // devices)].group
        assert jnp.asarray(lane).devices() == {sharding.places_of(mesh)[item % devices] or jax.devices()[0]}


@pytest.mark.slow
def test_it_lowers_the_error_on_rows_that_it_has_not_seen(model, rows, nearest, rounded):
    held_out = rows_of(model, 1)
    assert error(model, rounded, held_out) < 0.8 * error(model, nearest, held_out)
    assert error(model, rounded, rows) < 0.75 * error(model, nearest, rows)


@pytest.mark.slow
def test_the_engine_runs_what_was_rounded(model, rows, rounded):
    assert same_but_for_ties(outputs_on(rows, rounded), outputs_on(rows, ptq.reference(rounded)))


@pytest.mark.slow
def test_activation_quantizers_and_the_range_of_codes_stay(nearest, rounded):
    for name, layer in rounded.linears.items():
        before = nearest.linears[name]
        assert same_bytes(layer.act, before.act)
        assert layer.weight.bits == before.weight.bits
        assert layer.weight.shape == before.weight.shape
    assert same_bytes(rounded.sites, nearest.sites)


@pytest.mark.slow
def test_it_says_what_each_unit_and_layer_gained(rounded):
    facts = rounded.provenance.facts["rounding"]
    assert list(facts) == ["embed image", "embed condition", "block 0", "block 1", "head"]
    assert set(facts["block 0"]["layers"]) == {"adaLN", "qkv", "proj", "fc1", "fc2"}
    for row in facts.values():
        assert row["after"] <= row["before"]
        assert all(0 <= gain <= 1.2 for gain in row["layers"].values())
    assert facts["block 0"]["after"] < 0.8 * facts["block 0"]["before"]
    assert facts["block 0"]["layers"]["fc1"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8])
def test_devices_change_no_number(devices, model, rows, rounded, mesh8):
    mesh = sharding.data_mesh(mesh8.devices.ravel()[:devices])
    assert same_bytes(quantize(model, rows, mesh=mesh), rounded)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_other_widths_balancing_and_dynamic_scales(bits, model, rows):
    config = ptq.QuantConfig.of(weight_bits=bits, calib_steps=4, calib_rows=30, steps=4, policy="uniform")
    nearest, rounded = (quantize(model, rows, how, config) for how in ("nearest", "gptq"))
    assert error(model, rounded, rows) < error(model, nearest, rows)


@pytest.mark.slow
def test_rows_on_the_host_change_last_bits_alone(model, rows, nearest):
    """One tipped code moves all that follow it, so codes are not compared but what decides them: every unit's moments and
    outputs, from the same hidden states. A last bit may tip codes of activations; a row that was left out is 1 of 120."""
    walks = here, there = [ClosedFormWalk(model, nearest, rows, None, where) for where in ("auto", "host")]
    assert [walk.plan.on_host for walk in walks] == [False, True]
    for unit in units(model.config):
        rounded = here.nearest(unit)
        inputs = [UnitInputs(walk, unit) for walk in walks]
        for layer in unit.layers:
            a, b = (found.moments(layer, rounded) for found in inputs)
            square, count = np.abs(a.second).max(), float(a.count)
            mean = (square * count) ** 0.5
            scales = {"second": square, "cross": square, "first": mean, "drift": mean, "count": count}
            scales["shift"] = np.abs(a.shift).max()
            for name, scale in scales.items():
                np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=0, atol=3e-4 * scale, err_msg=name)
        fed = [walk.rows(unit) for walk in walks]
        (out, error), (same, close) = (walk.outputs(unit, rounded, rows) for walk, rows in zip(walks, fed, strict=True))
        assert relative_error(np.asarray(same), np.asarray(out)) < 1e-3
        assert relative_error(np.asarray(fed[1].target), np.asarray(fed[0].target)) < 1e-5
        assert float(close) == pytest.approx(float(error), rel=1e-2)
        here.advance(unit, out, fed[0].target)
        there.advance(unit, np.asarray(out), np.asarray(fed[0].target))


@pytest.mark.slow
def test_a_walk_with_its_rows_on_the_host_says_so_and_gains_as_much(model, rows, nearest):
    told = []
    report = lambda stage, done, total, note="": told.append(note) if stage == "plan rounding" else None
    run = lambda **more: round_closed_form(model, nearest, rows, progress=report, **more)
    (_, facts), (_, same) = run(), run(rows_on="host")
    assert len(told) == 2
    assert "stay on the device" in told[0]
    assert "stream from the host" in told[1]
    for here, there in zip(facts, same, strict=True):
        assert there["part"] == here["part"]
        assert there["after"] == pytest.approx(here["after"], rel=0.1)


@pytest.mark.slow
def test_from_one_pass_it_gains_less(model, rows, nearest, rounded):
    held_out = rows_of(model, 1)
    at_once, facts = round_closed_form(model, nearest, rows, sequential=False)
    assert error(model, rounded, held_out) < error(model, at_once, held_out) < error(model, nearest, held_out)
    assert [row["part"] for row in facts] == [unit.name for unit in units(model.config)]


@pytest.mark.slow
def test_a_unit_that_comes_out_worse_stays_as_it_was(model, rows, nearest, monkeypatch):
    def spoiled(*arguments, **more):
        found = gptq.round_weight(*arguments, **more)
        return dataclasses.replace(found, bias=found.bias + 10.0)

    monkeypatch.setattr(closed_form, "round_weight", spoiled)
    kept, facts = round_closed_form(model, nearest, rows)
    for name, layer in kept.linears.items():
        np.testing.assert_array_equal(layer.stored.codes(), nearest.linears[name].stored.codes())
        np.testing.assert_allclose(layer.bias, nearest.linears[name].bias, rtol=1e-5, atol=1e-6)
    assert all(row["after"] == row["before"] for row in facts)


@pytest.mark.slow
def test_progress_is_told_layer_by_layer(model, rows):
    told = []
    quantize(model, rows, progress=lambda stage, done, total, note="": told.append((stage, done, total, note)))
    assert ("round block 0", 5, 5) in [row[:3] for row in told]
    assert any(stage == "plan rounding" and "GB per device" in note for stage, _, _, note in told)
    assert all("x nearest" in note for stage, _, _, note in told if stage.startswith("round "))


def test_settings_that_contradict_each_other(raises_sentence):
    with raises_sentence("rounding gptq", "reconstruction", "leave out one"):
        ptq.QuantConfig.of(rounding="gptq", reconstruction=Reconstruction())
    with raises_sentence("rounding", "nearest, gptq, adaround", "'best'"):
        ptq.QuantConfig.of(rounding="best")
    assert ptq.QuantConfig().rounding == "gptq"
    assert ptq.QuantConfig.of(rounding="adaround").learning == Reconstruction()
    assert ptq.QuantConfig.of(reconstruction=Reconstruction(iterations=3)).rounding == "adaround"
    assert ptq.QuantConfig.of(rounding="gptq").learning is None
    assert ptq.QuantConfig.paper().rounding == "nearest"


def test_the_paper_rounds_to_the_nearest_and_learns_from_there():
    paper = ptq.QuantConfig.paper
    assert (paper().rounding, paper().balancing.method, paper().learning) == ("nearest", "csb+ssc", None)
    choices: tuple[dict[str, Any], ...] = ({"rounding": "adaround"}, {"reconstruction": Reconstruction(iterations=7)})
    for settings in choices:
        learning = paper(**settings).learning
        assert learning is not None
        assert learning.start == "nearest"
        assert learning.iterations == (7 if "reconstruction" in settings else 2000)
    learning = paper(reconstruction=Reconstruction(start="gptq")).learning
    assert learning is not None
    assert learning.start == "gptq"  # what is said decides
    assert paper(rounding="gptq").rounding == "gptq"
