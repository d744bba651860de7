"""Balancing by measurement against errors computed in NumPy, and what it may not do: err more than the paper's on its rows."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from helpers import Capture, random_inputs, same_bytes, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import balance_search
from ptq4dit_jax.calibration import CalibrationData, ChannelExtremes, channel_extremes
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import nest_sites
from ptq4dit_jax.ranges import quantize_weight

KEY = jax.random.key(0)
CONFIG = ptq.QuantConfig.of(weight_bits=4, balance="search", rounding="nearest", step_groups=2, calib_rows=8)
SITES = ("qkv_in", "proj_in", "fc1_in", "fc2_in")
DYNAMIC = ("blocks.qkv_in", "blocks.fc1_in")


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    """With a few channels 20 times as large as the others, some of which the weights do not make up for."""
    model = tiny_model()
    blocks = jax.tree.map(np.array, model.params["blocks"])
    D = model.config.hidden_size
    for chunk in (0, 1, 3, 4):
        for channel in (1, 5, 9):
            blocks["adaLN"]["kernel"][:, :, chunk * D + channel] *= 20
    blocks["qkv"]["kernel"][:, 1] /= 20
    blocks["fc1"]["kernel"][:, :, 3] *= 20
    return dataclasses.replace(model, params={**model.params, "blocks": blocks})


@pytest.fixture(scope="module")
def rows(model: FloatDiT) -> CalibrationData:
    x, y = random_inputs(model.config, 32, 3)
    t = np.array([999, 600, 300, 0], np.int32)
    return CalibrationData(x=x.reshape(4, 8, *x.shape[1:]), t=t, y=y.reshape(4, 8))


@pytest.fixture(scope="module")
def extremes(model: FloatDiT, rows: CalibrationData) -> dict[str, ChannelExtremes]:
    return channel_extremes(model, rows, sites=tuple(model.config.site_features))


@pytest.fixture(scope="module")
def inputs(model: FloatDiT, rows: CalibrationData) -> dict[str, np.ndarray]:
    """What the float layers are fed, (S, L, R, T, K)."""
    observers = nest_sites({f"blocks.{name}": Capture() for name in SITES})
    observe = jax.jit(lambda x, t, y: model.observe(observers, x, t, y)[1]["blocks"])
    steps = [observe(rows.x[step], rows.t[step : step + 1], rows.y[step]) for step in range(4)]
    return {name: np.stack([step[name].x for step in steps]).astype(np.float64) for name in SITES}


def dynamic_codes(x: np.ndarray) -> np.ndarray:
    """Each token by its own largest magnitude."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def static_codes(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = (max(high, 0) - min(low, 0)) / 255
    zero_point = -128 + np.round(-min(low, 0) / scale)
    return (np.clip(np.round(x / scale) + zero_point, -128, 127) - zero_point) * scale


def relative_error(kernel: np.ndarray, x_SRTK: np.ndarray, seen: ChannelExtremes, name: str, factor: Any, block: int) -> float:
    """Of the layer's output, the mean over steps."""
    factor = np.asarray(factor, np.float64)
    power = np.asarray(seen.power, np.float64).mean(0)[block] * factor**2
    rounded = quantize_weight((kernel / factor[:, None]).T.astype(np.float32), 4, "mse", power.astype(np.float32))
    weight = np.asarray(rounded.dequantize(), np.float64).T
    found = []
    for step, x in enumerate(x_SRTK):
        exact = x @ kernel
        if f"blocks.{name}" in DYNAMIC:
            tried = [dynamic_codes(x * factor)]
        else:
            group = slice(0, 2) if step < 2 else slice(2, 4)
            low = float((np.asarray(seen.low)[group, block] * factor).min())
            high = float((np.asarray(seen.high)[group, block] * factor).max())
            tried = [static_codes(x * factor, low * share, high * share) for share in (1, 0.8, 0.6, 0.4)]
        found.append(min(np.square(exact - codes @ weight).sum() for codes in tried) / np.square(exact).sum())
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_each_block_takes_what_errs_least(name, model, rows, extremes, inputs):
    seen = extremes[f"blocks.{name}"]
    kernel = model.params["blocks"][name.removesuffix("_in")]["kernel"]
    tried = balance_search.candidates(seen, kernel, 1.0)
    assert list(tried)[:3] == ["none", "csb", "csb+ssc"]
    assert len(tried) == 8
    [found] = balance_search.search(
        model,
        extremes,
        rows,
        np.array([0, 0, 1, 1]),
        {f"blocks.{name}": kernel},
        {f"blocks.{name}": 4},
        dynamic=DYNAMIC,
        act_bits=8,
        temperature=1.0,
        range_search="mse",
    ).values()
    for block in range(model.config.depth):
        of = lambda factors, block=block: relative_error(
            np.asarray(kernel[block], np.float64), inputs[name][:, block], seen, name, factors[block], block
        )
        errors = {which: of(factors) for which, factors in tried.items()}
        assert errors[found.names[block]] < 1.02 * min(errors.values())
        np.testing.assert_array_equal(found.factors[block], tried[found.names[block]][block])
        for ratio, which in ((found.to_none, "none"), (found.to_paper, "csb+ssc")):
            assert ratio[block] <= 1
            assert ratio[block] == pytest.approx(errors[found.names[block]] / errors[which], rel=0.05)


def test_candidates_are_powers_of_saliences(model, extremes):
    seen = extremes["blocks.fc1_in"]
    kernel = np.asarray(model.params["blocks"]["fc1"]["kernel"], np.float64)
    tried = jax.jit(balance_search.candidates)(seen, model.params["blocks"]["fc1"]["kernel"], 1.0)
    s_w = np.abs(kernel).max(-1)
    largest = np.maximum(np.abs(seen.low), np.abs(seen.high)).max(0)
    np.testing.assert_array_equal(tried["none"], 1)
    normal = lambda b: b / scipy.stats.gmean(b, axis=-1, keepdims=True)
    np.testing.assert_allclose(tried["largest 0.25"], normal(s_w**0.75 / largest**0.25), rtol=1e-5)
    rms_x, rms_w = np.sqrt(np.asarray(seen.power, np.float64).mean(0)), np.sqrt(np.square(kernel).mean(-1))
    np.testing.assert_allclose(tried["rms 0.75"], normal(rms_w**0.25 / rms_x**0.75), rtol=1e-5)
    np.testing.assert_allclose(tried["rms 0"], normal(rms_w), rtol=1e-5)
    middle = np.maximum(np.abs(seen.low), np.abs(seen.high))[2]
    np.testing.assert_allclose(tried["csb"], np.sqrt(s_w / middle), rtol=1e-5)


@pytest.fixture(scope="module")
def searched(model, rows):
    return ptq.quantize(model, CONFIG, key=KEY, calibration=rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ptq4dit_jax.quality.PoorQuality")
def test_it_is_better_than_none_and_says_what_it_chose(model, rows, searched):
    none = ptq.quantize(model, CONFIG.replace(balance="none"), key=KEY, calibration=rows)
    quality = lambda q: q.provenance.facts["quality"]["sqnr_mean_db"]
    assert quality(searched) > quality(none) + 0.5
    facts = searched.provenance.facts["balancing"]
    assert set(facts) == {f"blocks.{name}" for name in SITES}
    for row in facts.values():
        assert len(row["chosen"]) == len(row["to_none"]) == len(row["to_paper"]) == model.config.depth
        assert max(row["to_none"] + row["to_paper"]) <= 1
    assert "none" not in facts["blocks.qkv_in"]["chosen"]


@pytest.mark.slow
def test_devices_change_no_number(model, rows, searched, mesh8):
    assert same_bytes(ptq.quantize(model, CONFIG, key=KEY, calibration=rows, mesh=mesh8), searched)


def test_folding_it_leaves_the_float_output_unchanged(model, rows, extremes):
    folded = ptq.balance(model, CONFIG, ptq.Observed(extremes), rows).folded
    batch = rows.x[1], rows.t[1:2], rows.y[1]
    np.testing.assert_allclose(folded.apply(*batch), model.apply(*batch), atol=2e-4)


def test_the_paper_s_balancing_stays_what_it_is(model, rows, extremes):
    """What is chosen by measurement is told apart from it."""
    config = CONFIG.replace(balance="csb+ssc")
    assert ptq.balance(model, config, ptq.Observed(extremes), rows).chosen == {}
