"""Reconstruction of a small model from end to end: what it gains, what it may change, and that it can be interrupted."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fast_compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import outputs_on, random_inputs, relative_error, same_but_for_ties, same_bytes, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.hashing import source_hash
from ptq4dit_jax.numerics import threefry
from ptq4dit_jax.quantization import pipeline as quantization_pipeline
from ptq4dit_jax.quantization.journals import open_journal
from ptq4dit_jax.reconstruction import reconstruct
from ptq4dit_jax.reconstruction.learning import _compiled

pytestmark = pytest.mark.slow  # the programs of four kinds of units are compiled

KEY, SETTINGS = jax.random.key(0), Reconstruction(iterations=200, batch_size=8, start="nearest")
FROM_GPTQ = dataclasses.replace(SETTINGS, start="gptq")
STARTS = {settings.start: settings for settings in (SETTINGS, FROM_GPTQ)}
CONFIG = ptq.QuantConfig.of(
    weight_bits=3, balance="csb+ssc", calib_steps=4, calib_rows=30, steps=4, step_groups=2, reconstruction=SETTINGS
)


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    return tiny_model()


def rows_of(model: ptq.FloatDiT, seed: int) -> CalibrationData:
    """30 rows at each of 4 steps, which 8 strata of 15 hold."""
    x, y = random_inputs(model.config, 120, seed)
    return CalibrationData(x=x.reshape(4, 30, *x.shape[1:]), t=np.array([999, 600, 300, 0], np.int32), y=y.reshape(4, 30))


@pytest.fixture(scope="module")
def rows(model: ptq.FloatDiT) -> CalibrationData:
    return rows_of(model, 0)


def quantize(model: ptq.FloatDiT, rows: CalibrationData, settings: Reconstruction | None = SETTINGS, **more: Any) -> Any:
    config = CONFIG.replace(reconstruction=settings, rounding="nearest" if settings is None else None)
    return ptq.quantize(model, config, key=more.pop("key", KEY), calibration=rows, **more)


@pytest.fixture(scope="module", autouse=True)
def learned_as_users_compile() -> Iterator[None]:
    """By the tests' emitter, the program of eight devices differs from that of one in last bits."""
    with fast_compilation.as_users_compile():
        yield


@pytest.fixture(scope="module")
def nearest(model: ptq.FloatDiT, rows: CalibrationData) -> ptq.QuantizedDiT:
    return quantize(model, rows, None)


@pytest.fixture(scope="module")
def run(model: ptq.FloatDiT, rows: CalibrationData) -> SimpleNamespace:
    """The reconstruction that most tests look at: the ``model`` it made, what it ``told``, how many ``programs`` trained it."""
    _compiled.cache_clear()
    told: list[tuple[str, str]] = []
    made = quantize(model, rows, progress=lambda stage, done, total, note="": told.append((stage, note)))
    return SimpleNamespace(model=made, told=told, programs=_compiled.cache_info().misses)


@pytest.fixture(scope="module")
def learned(run: SimpleNamespace) -> ptq.QuantizedDiT:
    return run.model


@pytest.fixture(scope="module")
def rounded(model: ptq.FloatDiT, rows: CalibrationData) -> ptq.QuantizedDiT:
    """In closed form."""
    return ptq.quantize(model, CONFIG.replace(reconstruction=None, rounding="gptq"), key=KEY, calibration=rows)


@pytest.fixture(scope="module")
def learned_from_gptq(model: ptq.FloatDiT, rows: CalibrationData) -> ptq.QuantizedDiT:
    return quantize(model, rows, FROM_GPTQ)


def codes(q: ptq.QuantizedDiT) -> dict[str, np.ndarray]:
    return {name: np.asarray(layer.stored.codes()).astype(int) for name, layer in q.linears.items()}


def error(model: ptq.FloatDiT, q: Any, rows: CalibrationData) -> float:
    return relative_error(outputs_on(rows, q), outputs_on(rows, model))


def test_it_lowers_the_error_on_rows_that_it_has_not_seen(model, nearest, learned):
    held_out = rows_of(model, 1)
    assert error(model, learned, held_out) < 0.9 * error(model, nearest, held_out)


def test_from_closed_form_it_ends_better_than_either(model, rows, learned, rounded, learned_from_gptq):
    """Than learning from nearest rounding on rows that it has not seen; than its start on the few that it learns from."""
    held_out = rows_of(model, 1)
    assert error(model, learned_from_gptq, held_out) < 0.8 * error(model, learned, held_out)
    assert error(model, learned_from_gptq, rows) < 0.98 * error(model, rounded, rows)
    first, second = (q.provenance.facts["reconstruction"] for q in (learned, learned_from_gptq))
    assert second["block 0"]["before"] == pytest.approx(first["block 0"]["before"], rel=0.2)  # behind other embedders
    assert second["block 0"]["after"] < first["block 0"]["after"]
    assert all(row["after"] <= row["before"] for row in second.values())


def test_from_closed_form_the_first_layers_move_by_a_code_at_most(rounded, learned_from_gptq):
    """Those of the first unit; behind other units the others are rounded otherwise."""
    before, after = (q.linears["patch_embed"].weight for q in (rounded, learned_from_gptq))
    np.testing.assert_allclose(before.scale, after.scale, rtol=1e-5)  # moments of rows in another order
    assert np.abs(np.asarray(before.codes()).astype(int) - np.asarray(after.codes())).max() <= 1


def test_weights_move_to_a_neighbouring_code_at_most_and_weight_scales_stay(nearest, learned):
    codes_before, codes_after = codes(nearest), codes(learned)
    moved = {name: np.abs(codes_after[name] - codes_before[name]) for name in codes_before}
    assert max(m.max() for m in moved.values()) == 1
    for name in ("blocks.qkv", "blocks.fc2", "blocks.adaLN"):
        assert 0.02 < moved[name].mean() < 0.6, name
        np.testing.assert_array_equal(learned.linears[name].weight.scale, nearest.linears[name].weight.scale)
    for name in ("blocks.proj", "blocks.fc2", "blocks.adaLN"):
        np.testing.assert_array_equal(learned.linears[name].act.zero_point, nearest.linears[name].act.zero_point)
        before, after = (np.asarray(q.linears[name].act.scale, np.float64) for q in (nearest, learned))
        assert np.all(after != before)
        steps = np.log(after / before) * 2**14  # whole ones, so that no last bit of a step counts
        np.testing.assert_allclose(steps, np.round(steps), atol=0.05)


def test_the_engine_runs_what_was_learned(model, rows, learned):
    """Hard rounding in the training forward, the fake-quant twin and the engine are one function."""
    twin = ptq.reference(learned)
    assert same_but_for_ties(outputs_on(rows, learned), outputs_on(rows, twin))
    facts = learned.provenance.facts["reconstruction"]
    assert list(facts) == ["embed image", "embed condition", "block 0", "block 1", "head"]
    seen = twin.apply(rows.x[1], rows.t[1:2], rows.y[1])
    exact = model.apply(rows.x[1], rows.t[1:2], rows.y[1])
    of_step = np.square(np.asarray(seen) - np.asarray(exact)).mean()
    assert facts["head"]["after"] == pytest.approx(of_step, rel=0.5)


def test_a_unit_never_ends_worse_than_nearest_rounding(model, rows, nearest):
    wild = dataclasses.replace(SETTINGS, iterations=3, rounding_rate=1e3, scale_rate=3.0)
    kept = quantize(model, rows, wild)
    ratios = [facts["after"] / facts["before"] for facts in kept.provenance.facts["reconstruction"].values()]
    assert max(ratios) == 1.0
    assert same_bytes(kept.linears["blocks.fc1"], nearest.linears["blocks.fc1"])


def test_it_says_what_each_unit_gained(learned):
    for unit, row in learned.provenance.facts["reconstruction"].items():
        assert len(row["curve"]) == 50
        assert np.isfinite(row["curve"]).all()
        if unit.startswith("block"):
            assert row["after"] < 0.9 * row["before"]


def test_one_seed_one_result_another_seed_another(model, rows, learned):
    assert same_bytes(quantize(model, rows), learned)
    assert not same_bytes(quantize(model, rows, key=jax.random.key(1)), learned)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_learn_the_same_codes_and_scales(devices, model, rows, learned, mesh8):
    """Each takes as many of the eight parts of a batch. Bit for bit: an ulp would grow within these iterations."""
    spread = quantize(model, rows, mesh=sharding.data_mesh(mesh8.devices.ravel()[:devices]))
    assert same_bytes(spread, learned)


@pytest.mark.parametrize("devices", [8])
def test_devices_learn_the_same_from_closed_form(devices, model, rows, learned_from_gptq, mesh8):
    spread = quantize(model, rows, FROM_GPTQ, mesh=sharding.data_mesh(mesh8.devices.ravel()[:devices]))
    assert same_bytes(spread, learned_from_gptq)


@pytest.mark.parametrize(("batch_size", "parts"), [(32, 8), (8, 8), (12, 4), (2, 2), (5, 1)])
def test_a_batch_is_cut_into_eight_parts_on_cpus_if_it_can_be(batch_size, parts):
    assert Reconstruction(batch_size=batch_size).resolved_chunks("cpu") == parts
    assert Reconstruction(batch_size=batch_size).resolved_chunks("gpu") == 1
    assert Reconstruction(batch_size=batch_size).resolved_chunks("tpu") == 1
    for asked in (1, batch_size):
        assert {
            Reconstruction(batch_size=batch_size, accumulation_chunks=asked).resolved_chunks(where) for where in ("cpu", "gpu")
        } == {asked}


def test_without_parts_several_devices_give_a_good_model_too(model, rows, nearest):
    """Gradients are then sums in another order: a last bit, which in the end tips roundings that hardly matter."""
    few, held_out = dataclasses.replace(SETTINGS, iterations=40, accumulation_chunks=1), rows_of(model, 1)
    spread = quantize(model, rows, few, mesh=sharding.data_mesh(jax.devices()[:2]))
    assert error(model, spread, held_out) < 0.95 * error(model, nearest, held_out)


def test_rows_on_the_host_change_nothing(model, rows, learned):
    assert same_bytes(quantize(model, rows, dataclasses.replace(SETTINGS, rows_on="host")), learned)


def test_all_blocks_share_one_program(run):
    assert run.programs == 4  # one for each kind of unit


def test_the_plan_is_told_before_the_first_iteration(run):
    stages = [stage for stage, _ in run.told]
    note = dict(run.told)["plan reconstruction"]
    assert stages.index("plan reconstruction") < stages.index("reconstruct embed image")
    assert "GB per device" in note
    assert "stay on the device" in note


def test_row_weights_and_dynamic_sites(model, rows):
    settings = dataclasses.replace(SETTINGS, iterations=3, row_weights="steps")
    config = CONFIG.replace(reconstruction=settings, dynamic_sites=("blocks.qkv_in",), policy="uniform")
    q = ptq.quantize(model, config, key=KEY, calibration=rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(q) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert error(model, q, rows) < 1


# Interruptions.


class Stop(Exception):
    pass


def stop_at(unit: str, iteration: int) -> Any:
    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == f"reconstruct {unit}" and done >= iteration:
            raise Stop

    return report


@pytest.mark.parametrize("settings", STARTS.values(), ids=STARTS)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(settings, model, rows, learned, learned_from_gptq, tmp_path):
    for unit in ("block 0", "head"):
        with pytest.raises(Stop):
            quantize(model, rows, settings, state=tmp_path / "state", progress=stop_at(unit, 100))
    resumed = quantize(model, rows, settings, state=tmp_path / "state")
    assert same_bytes(resumed, learned if settings is SETTINGS else learned_from_gptq)
    assert (tmp_path / "state" / "part-004.npz").exists()


def saved_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves inside units, whose iterations are too few for that otherwise; more of them would be other programs."""
    monkeypatch.setattr(quantization_pipeline, "reconstruct", partial(reconstruct, save_every=60))


SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import pytest, test_pipeline as t
model = t.tiny_model()
def report(stage, done, total, note=""):
    if stage == "reconstruct block 1" and done >= 100:
        os.kill(os.getpid(), signal.SIGKILL)
with pytest.MonkeyPatch.context() as monkeypatch, t.fast_compilation.as_users_compile():
    t.saved_often(monkeypatch)
    t.quantize(model, t.rows_of(model, 0), t.STARTS[sys.argv.pop(1)], state=sys.argv[1], progress=report)
"""


@pytest.mark.parametrize("start", STARTS)
def test_a_run_killed_inside_a_block_goes_on_there_and_ends_with_the_same_bytes(
    start, model, rows, learned, learned_from_gptq, tmp_path, monkeypatch
):
    here = Path(__file__).parent
    paths = map(str, (here, here.parent, here.parent.parent))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, start, str(tmp_path / "state"), *paths],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "current.npz",
        "fingerprint.json",
        "part-000.npz",
        "part-001.npz",
        "part-002.npz",
    ]
    iterations: list[int] = []

    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "reconstruct block 1":
            iterations.append(done)

    saved_often(monkeypatch)
    resumed = quantize(model, rows, STARTS[start], state=tmp_path / "state", progress=watch)
    assert iterations == [100, 120, 180, 200]  # it went on from the save at 60
    assert same_bytes(resumed, {"nearest": learned, "gptq": learned_from_gptq}[start])


@pytest.mark.parametrize("change", ["key", "settings", "weights"])
def test_another_run_is_refused_and_says_what_differs(change, model, rows, tmp_path, raises_sentence):
    state = tmp_path / "state"
    with pytest.raises(Stop):
        quantize(model, rows, state=state, progress=stop_at("embed image", 100))
    other: dict[str, Any] = {"model": model, "rows": rows, "settings": SETTINGS, "key": KEY}
    if change == "key":
        other["key"] = jax.random.key(7)
    elif change == "settings":
        other["settings"] = dataclasses.replace(SETTINGS, iterations=201)
    else:
        other["model"] = tiny_model(seed=1)
    part = {"key": "key ([0, 0] there, [0, 7] here)", "settings": "iterations (200 there, 201 here)", "weights": "weights ("}
    before = sorted(path.name for path in state.iterdir())
    with raises_sentence(str(state), part[change], "--fresh"):
        quantize(other.pop("model"), other.pop("rows"), other.pop("settings"), state=state, **other)
    assert sorted(path.name for path in state.iterdir()) == before


def test_fresh_starts_over(model, rows, tmp_path):
    state = tmp_path / "state"
    for seed in (0, 7):
        with pytest.raises(Stop):
            quantize(
                model, rows, state=state, key=jax.random.key(seed), fresh=seed == 7, progress=stop_at("embed condition", 100)
            )
    key = threefry(jax.random.key(7))
    with open_journal(
        CONFIG.for_network(model.config), model, lambda: source_hash(model.params), key, rows, state, False
    ) as journal:
        assert journal is not None


def test_a_folder_of_something_else_is_left_alone(model, rows, tmp_path, raises_sentence):
    (tmp_path / "thesis.tex").write_text("")
    for fresh in (False, True):
        with raises_sentence(str(tmp_path), "fingerprint.json"):
            quantize(model, rows, state=tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_state_is_noticed(model, rows, tmp_path, raises_sentence):
    state = tmp_path / "state"
    with pytest.raises(Stop):
        quantize(model, rows, state=state, progress=stop_at("embed condition", 100))
    part = state / "part-000.npz"
    part.write_bytes(part.read_bytes()[:100])
    with raises_sentence("part-000.npz", "damaged", "--fresh"):
        quantize(model, rows, state=state)


@pytest.mark.parametrize(("change", "part"), [({"batch_size": 12}, "12 rows"), ({"accumulation_chunks": 2}, "2 chunks")])
def test_a_batch_that_devices_cannot_share_is_refused_before_any_work(
    change, part, model, nearest, rows, mesh8, tmp_path, raises_sentence
):
    wrong, told = dataclasses.replace(SETTINGS, **change), []
    with raises_sentence(part, "8 devices"):
        quantize(model, rows, wrong, mesh=mesh8, state=tmp_path / "state", progress=lambda *stage: told.append(stage))
    assert told == []
    assert list(tmp_path.iterdir()) == []
    with raises_sentence(part, "8 devices"):
        reconstruct(model, nearest, rows, wrong, key=KEY, mesh=mesh8)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"iterations": 0}, "iterations must be a positive integer, not 0"),
        ({"rounding_rate": -1.0}, "rounding_rate"),
        ({"rounding_eps": 0.0}, "rounding_eps"),
        ({"accumulation_chunks": 3}, "3 equal chunks"),
        ({"warmup": 1.0}, "warmup"),
        ({"exponents": (20.0,)}, "exponents"),
        ({"row_weights": "x"}, "row_weights"),
        ({"start": "best"}, "start must be one of nearest, gptq"),
        ({"dtype": "int8"}, "dtype"),
        ({"rows_on": "disk"}, "rows_on"),
    ],
)
def test_settings_are_checked(wrong, part, raises_sentence):
    with raises_sentence(part):
        Reconstruction(**wrong)
