"""What quantization says of its own result: the figure, the worst layers, and what is done about a poor one."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import PLAIN, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import quality
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.quality import LayerQuality, PoorQuality, Quality
from ptq4dit_jax.quantization import quantize as whole

KEY = jax.random.key(0)
apply = jax.jit(lambda model, x, t, y: model.apply(x, t, y))


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    return tiny_model()


@pytest.fixture(scope="module")
def rows(model: FloatDiT) -> ptq.CalibrationData:
    x = np.random.default_rng(7).standard_normal((3, 8, *model.config.image_shape)).astype(np.float32)
    y = np.tile(np.arange(8, dtype=np.int32) % 6, (3, 1))
    return ptq.CalibrationData(x=x, t=np.array([900, 400, 0], np.int32), y=y)


def quantize(model: FloatDiT, rows: ptq.CalibrationData, *, keep_poor: bool = False, **settings: Any) -> ptq.QuantizedDiT:
    return whole(  # the function itself: ptq.quantize is held against its annotations by another, which warnings would point at
        model,
        ptq.QuantConfig.of(**{**PLAIN, **settings}),
        key=KEY,
        calibration=rows,
        keep_poor=keep_poor,
    )


#: Of the tiny model: below 5 dB, and between 5 and 15.
BAD: dict[str, Any] = {"weight_bits": 2, "act_bits": 2, "policy": "uniform"}
POOR: dict[str, Any] = {"weight_bits": 8, "policy": "edges8-float,blocks.fc1=2"}


def test_the_figure_is_the_mean_over_steps_of_the_raw_prediction(model: FloatDiT, rows: ptq.CalibrationData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = quantize(model, rows)
    found = q.provenance.facts["quality"]
    expected = []
    for x, t, y in zip(rows.x, rows.t, rows.y, strict=True):
        exact, other = (np.asarray(apply(m, x, t[None], y), np.float64)[..., :3] for m in (model, q))
        expected.append(10 * np.log10(np.square(exact).sum() / np.square(exact - other).sum()))
    assert found == {"sqnr_mean_db": pytest.approx(np.mean(expected), abs=0.02), "steps": 3, "rows": 8}
    assert found["sqnr_mean_db"] > 30


def test_times_of_single_rows(model: FloatDiT, rows: ptq.CalibrationData) -> None:
    t = np.repeat(rows.t, 8).reshape(3, 8)
    own, shared = (quantize(model, dataclasses.replace(rows, t=times)) for times in (t, rows.t))
    found = [q.provenance.facts["quality"]["sqnr_mean_db"] for q in (own, shared)]
    assert found[0] == pytest.approx(found[1], abs=0.5)


@pytest.mark.parametrize(
    ("count", "wanted"), [(25, [1, 3, 6, 8, 11, 13, 16, 18, 21, 23]), (10, [*range(10)]), (2, [0, 1]), (1, [0])]
)
def test_the_steps_that_are_measured_are_spread(count: int, wanted: list[int]) -> None:
    x = np.arange(count * 40, dtype=np.float32).reshape(count, 40, 1, 1, 1)
    data = ptq.CalibrationData(x=x, t=np.arange(count), y=np.zeros((count, 40), np.int32))
    some = quality.some_rows(data)
    assert some.t.ravel().tolist() == wanted
    assert some.x.shape[1] == some.y.shape[1] == 8
    both_halves = some.x[0].ravel() % 40 < 20  # conditional rows and their twins
    assert both_halves.sum() == 4


@pytest.mark.slow
def test_a_bad_model_is_refused_and_says_how_to_keep_it(
    model: FloatDiT, rows: ptq.CalibrationData, raises_sentence: Any
) -> None:
    with raises_sentence("SQNR of", "below 5 dB", "worst in", " of block ", "--keep-poor (keep_poor=True)"):
        quantize(model, rows, **BAD)
    with pytest.warns(PoorQuality, match=r"SQNR of -?\d"):
        q = quantize(model, rows, keep_poor=True, **BAD)
    assert q.provenance.facts["quality"]["sqnr_mean_db"] < 5
    assert len(q.provenance.facts["quality"]["worst_layers"]) == 3
    json.dumps(q.provenance.facts, allow_nan=False)


@pytest.mark.slow
def test_a_poor_model_is_warned_of_and_the_culprit_is_named(model: FloatDiT, rows: ptq.CalibrationData) -> None:
    with pytest.warns(PoorQuality, match="worst in blocks.fc1 of block") as caught:
        q = quantize(model, rows, **POOR)
    assert Path(caught[0].filename) == Path(__file__), "the warning should point at the call of quantize"
    found = q.provenance.facts["quality"]
    assert 5 < found["sqnr_mean_db"] < 15
    assert [(layer["layer"], layer["block"]) for layer in found["worst_layers"][:2]] in (
        [("blocks.fc1", 0), ("blocks.fc1", 1)],
        [("blocks.fc1", 1), ("blocks.fc1", 0)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["final", "time_fc2", "blocks.qkv"])
def test_the_worst_layer_is_the_one_with_two_bits(layer: str, model: FloatDiT, rows: ptq.CalibrationData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = quantize(model, rows, keep_poor=True, policy=f"uniform,{layer}=2")
    worst = quality._worst_layers(model_folded(model, rows, f"uniform,{layer}=2"), q, quality.some_rows(rows))
    assert worst[0].layer == layer
    assert [layer.sqnr_db for layer in worst] == sorted(layer.sqnr_db for layer in worst)


def model_folded(model: FloatDiT, rows: ptq.CalibrationData, policy: str) -> FloatDiT:
    config = ptq.QuantConfig.of(**PLAIN, policy=policy)
    return ptq.balance(model, config, ptq.observe(model, rows), rows).folded


@pytest.mark.slow
def test_the_cost_of_a_layer_is_that_of_its_weights_where_its_input_is_float(
    model: FloatDiT, rows: ptq.CalibrationData
) -> None:
    """The final layer, in NumPy: the input that the float model feeds it, times both kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = quantize(model, rows, keep_poor=True, policy="edges8-float,final=2:float", balance="none", equalize_v=False)

    class Seen(list):
        def observe(self, x: Any) -> Any:
            self.append(np.asarray(x, np.float64))
            return x

    inputs = Seen()
    for x, t, y in zip(rows.x, rows.t, rows.y, strict=True):
        model.observe({"final_in": inputs}, x, t[None], y)
    exact = np.concatenate(inputs) @ np.asarray(model.params["final"]["kernel"], np.float64)
    other = np.concatenate(inputs) @ np.asarray(q.linears["final"].weight.dequantize(), np.float64).T
    worst = quality._worst_layers(model, q, quality.some_rows(rows))
    assert (worst[0].layer, worst[0].block) == ("final", None)
    assert worst[0].sqnr_db == pytest.approx(10 * np.log10(np.square(exact).sum() / np.square(exact - other).sum()), abs=0.01)


@pytest.mark.slow
def test_measuring_changes_no_integer(model: FloatDiT, rows: ptq.CalibrationData, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = quantize(model, rows, weight_bits=4)
    monkeypatch.setattr("ptq4dit_jax.quantization.pipeline.measure", lambda *_: Quality(20.0, 1, 1))
    for a, b in zip(*map(jax.tree.leaves, (measured, quantize(model, rows, weight_bits=4))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_was_learned_is_kept_for_the_next_run(
    model: FloatDiT, rows: ptq.CalibrationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal after reconstruction leaves its journal, and with ``keep_poor`` no iteration is run again."""
    state = tmp_path / "state"
    few = Reconstruction(iterations=20, batch_size=4, start="nearest")
    config = ptq.QuantConfig.of(balance="csb+ssc", reconstruction=few, **BAD)
    with pytest.raises(ptq.Ptq4ditError, match=f"what was learned is in {re.escape(str(state))}, so nothing is learned again"):
        ptq.quantize(model, config, key=KEY, calibration=rows, state=state)
    monkeypatch.setattr("ptq4dit_jax.reconstruction.learning.LearningWalk.train", lambda *_: pytest.fail("learned again"))
    with pytest.warns(PoorQuality):
        q = ptq.quantize(model, config, key=KEY, calibration=rows, state=state, keep_poor=True)
    assert "reconstruction" in q.provenance.facts


@pytest.mark.makes_nan
def test_a_prediction_that_is_not_finite_is_an_error(model: FloatDiT, rows: ptq.CalibrationData, raises_sentence: Any) -> None:
    """By a fault of ours, say: statistics and weights are finite then."""
    final = model.params["final"]
    bad = dataclasses.replace(model, params={**model.params, "final": {**final, "bias": np.full_like(final["bias"], np.nan)}})
    q = quantize(model, rows)
    with raises_sentence("prediction of the float model", "NaN or infinity", "t = 900"):
        quality.measure(bad, bad, q, quality.some_rows(rows))


@pytest.mark.parametrize(
    "found",
    [Quality(np.inf, 5, 16), Quality(12.25, 5, 16, (LayerQuality("final", None, 3.5), LayerQuality("blocks.q", 1, np.inf)))],
)
def test_json_and_back(found: Quality) -> None:
    assert Quality.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_a_model_of_zeros_is_identical(rows: ptq.CalibrationData) -> None:
    silent = jax.tree.map(np.zeros_like, tiny_model())
    q = quantize(silent, rows, **BAD)
    assert q.provenance.facts["quality"]["sqnr_mean_db"] is None
    assert str(Quality.from_dict(q.provenance.facts["quality"])) == "identical to the float model"
    assert metrics.sqnr_db(np.zeros(3), np.zeros(3)) == np.inf
