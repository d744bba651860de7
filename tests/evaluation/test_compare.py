"""The whole comparison on small random models."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax import sampling
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import compare, metrics, num_bytes, same_noise_images
from ptq4dit_jax.evaluation.compare import _full_scale, plain
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.schedules import NoiseSchedule

LABELS = np.array([0, 1, 2, 0, 1, 2])
SETTINGS: dict[str, Any] = {"sampling": Sampling.of(steps=4, cfg_scale=1.5)}


pytestmark = pytest.mark.slow  # a comparison compiles a dozen programs


def rounded(model: FloatDiT, step: float) -> FloatDiT:
    return dataclasses.replace(model, params=jax.tree.map(lambda a: jnp.round(a / step) * step, model.params))


@pytest.fixture(scope="module")
def result(model):
    """Micro-batches of two, and steps compared on two rows: every program is compiled for a batch of two."""
    others = {"fine": rounded(model, 2**-9), "coarse": rounded(model, 2**-4), "same": model}
    calls: list[tuple[Any, ...]] = []
    done = compare(
        model,
        others,
        labels=LABELS,
        key=jax.random.key(3),
        sqnr_steps=3,
        batch_size=2,
        progress=lambda *call: calls.append(call),
        **SETTINGS,
    )
    return done, others, calls


def test_images_are_the_samplers_clipped_to_what_is_written(result, model):
    comparison, others, _ = result
    assert list(comparison.images) == ["float32", "bfloat16", *others]
    for name, one in {"float32": model, **others}.items():
        expected = sampling.sample(one, LABELS, key=jax.random.key(3), batch_size=2, **SETTINGS)
        assert np.abs(expected).max() > 1
        np.testing.assert_array_equal(comparison.images[name], expected.clip(-1, 1))
    assert comparison.data_range == 2.0


def test_where_steps_are_compared_on_all_rows_nothing_is_sampled_twice(result, model):
    comparison, others, _ = result
    calls: list[tuple[Any, ...]] = []
    few = compare(
        model,
        {"fine": others["fine"]},
        labels=LABELS[:2],
        key=jax.random.key(3),
        sqnr_steps=3,
        progress=lambda *call: calls.append(call),
        **SETTINGS,
    )
    assert list(few.images) == ["float32", "bfloat16", "fine"]
    for name, images in few.images.items():
        np.testing.assert_allclose(images, comparison.images[name][:2], atol=1e-3)
    sampled = [call[1:] for call in calls if call[0] == "sample on the same noise"]
    assert sampled == [(2, 4), (4, 4)]


def test_figures_follow_from_the_images(result):
    comparison, _, _ = result
    for name, figures in comparison.figures.items():
        pair = comparison.images["float32"], comparison.images[name]
        np.testing.assert_allclose(figures.psnr_db, metrics.psnr_db(*pair), rtol=1e-5)
        np.testing.assert_allclose(figures.ssim, metrics.ssim(*pair), rtol=1e-5)
        assert figures.psnr_interval == metrics.bootstrap_interval(figures.psnr_db, 0)
        assert figures.ssim_interval == metrics.bootstrap_interval(figures.ssim, 0)


def test_rows_are_ordered_as_the_errors_made(result, model):
    comparison, others, _ = result
    figures = comparison.figures
    assert list(figures) == ["bfloat16", *others]
    assert figures["coarse"].sqnr_pooled_db < figures["fine"].sqnr_pooled_db - 20
    assert 25 < figures["bfloat16"].sqnr_pooled_db < 60
    for name in ("bfloat16", "fine", "coarse"):
        steps = figures[name].step_sqnr_db
        np.testing.assert_allclose(figures[name].sqnr_mean_db, steps.astype(np.float64).mean(), rtol=1e-6)
        assert steps.min() <= figures[name].sqnr_pooled_db <= steps.max()
        assert all(layer.shape == (model.config.depth,) for layer in figures[name].layer_sqnr_db.values())
    assert np.isposinf(figures["same"].step_sqnr_db).all()
    assert np.isposinf(figures["same"].layer_sqnr_db["blocks.block_out"]).all()


def test_sizes_count_every_array(result, model):
    comparison, _, _ = result
    assert comparison.reference_bytes == 4 * model.num_params
    assert comparison.figures["bfloat16"].num_bytes == 2 * model.num_params
    assert num_bytes({"packed": np.zeros((3, 5), np.uint8), "scale": np.zeros(3, np.float32)}) == 27


def test_steps_and_settings_are_recorded(result):
    comparison, _, calls = result
    assert comparison.timesteps.tolist() == [999, 333, 0]
    assert (comparison.settings["sqnr_steps"], comparison.settings["sqnr_rows"], comparison.settings["images"]) == (3, 2, 6)
    by_stage = {stage: [call[1:] for call in calls if call[0] == stage] for stage, *_ in calls}
    assert by_stage == {
        "sample trajectories of the reference": [(0, 2), (2, 2)],
        "sample on the same noise": [(done, 30) for done in range(2, 31, 2)],
        "measure": [(done, 4) for done in range(5)],
    }


def test_json_is_finite_and_complete(result):
    comparison, _, _ = result
    document = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert document["models"]["same"]["sqnr_pooled_db"] is None
    for figure in ("sqnr_mean_db", "sqnr_pooled_db"):
        assert document["models"]["coarse"][figure] == getattr(comparison.figures["coarse"], figure)
    assert document["models"]["coarse"]["psnr_interval"]["low"] == comparison.figures["coarse"].psnr_interval.low
    assert (
        document["models"]["fine"]["layer_sqnr_db"]["blocks.q"] == comparison.figures["fine"].layer_sqnr_db["blocks.q"].tolist()
    )


def test_latents_are_measured_as_they_are_on_their_own_range():
    latents = {"float32": np.array([-3.0, 2, 1, 0]).reshape(1, 1, 1, 4), "W8A8": np.full((1, 1, 1, 4), 9.0)}
    images, data_range = _full_scale(latents)
    assert data_range == 5.0
    np.testing.assert_array_equal(images["W8A8"], latents["W8A8"])


def test_same_noise_images_of_one_model_twice(model):
    images = same_noise_images({"a": model, "b": model}, np.array([0, 1]), jax.random.key(0), **SETTINGS)
    np.testing.assert_array_equal(images["a"], images["b"])


def test_plain_values():
    value = {"a": (1, np.float32(2)), "b": jnp.ones(2), "c": [float("nan"), -np.inf], "d": metrics.Interval(1, 2, 3), 5: True}
    expected = {"a": [1, 2.0], "b": [1.0, 1.0], "c": [None, None], "d": {"mean": 1, "low": 2, "high": 3}, "5": True}
    assert plain(value) == expected
    assert plain(jnp.dtype("int8")) == "int8"


def test_errors(model):
    run: dict[str, Any] = {"labels": [0], "key": jax.random.key(0), "sampling": Sampling(steps=2)}
    with pytest.raises(Ptq4ditError, match="cannot be named 'bfloat16'"):
        compare(model, {"bfloat16": model}, **run)
    shallow = model.replace(config=dataclasses.replace(model.config, depth=1))
    with pytest.raises(Ptq4ditError, match=r"'x' is not a quantization of the reference: they differ in depth \(2 against 1\)"):
        compare(model, {"x": shallow}, **run)
    with pytest.raises(Ptq4ditError, match="num_timesteps"):
        compare(model, {"x": model.replace(schedule=NoiseSchedule(num_timesteps=500))}, **run)
    with pytest.raises(Ptq4ditError, match="at least one step"):
        compare(model, {}, sqnr_steps=0, **run)
    with pytest.raises(Ptq4ditError, match="Label 9"):
        compare(model, {}, **{**run, "labels": [9]})
