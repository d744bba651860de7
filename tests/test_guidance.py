"""Guidance and sampling as values, the registry of samplers, and the guidance interval against a plain loop in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import pytest
from helpers import num_programs, relative_error, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import chain, samplers
from ptq4dit_jax.evaluation import predicted_noise
from ptq4dit_jax.guidance import MAX_GUIDANCE
from ptq4dit_jax.samplers import SAMPLERS
from ptq4dit_jax.sampling import sample_batches

Sentence = Callable[..., AbstractContextManager[None]]
KEY = jax.random.key(0)
LABELS = np.array([3, 0, 4])
FLOWS = [ptq.FlowSchedule(data_time=end) for end in (0, 1)]
#: Four steps begin at 1, 0.75, 0.5 and 0.25; the second and third lie inside, both on an end.
INTERVAL = (0.5, 0.75)


# Values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1001, -1e38, "2", [1.5]])
def test_scales_that_cannot_be(scale: Any, raises_sentence: Sentence) -> None:
    with raises_sentence("cfg_scale", str(MAX_GUIDANCE), "list" if isinstance(scale, list) else str(scale)):
        ptq.Guidance(scale)


@pytest.mark.parametrize("interval", [(0.7, 0.2), (-0.1, 0.5), (0, 1.5), (0.5,), (0, 0.5, 1), (0, float("nan")), ("a", 1), 0.7])
def test_intervals_that_cannot_be(interval: Any, raises_sentence: Sentence) -> None:
    shown = interval[-1] if isinstance(interval, tuple) else interval
    with raises_sentence("interval", "LOW,HIGH", str(shown)):
        ptq.Guidance(1.5, interval=interval)


def test_other_settings_that_cannot_be(raises_sentence: Sentence) -> None:
    with raises_sentence("cfg_channels", "first3, all", "'first4'"):
        ptq.Guidance(channels="first4")  # type: ignore[arg-type]
    with raises_sentence("'plms'", "auto", *SAMPLERS):
        ptq.Sampling("plms")
    for steps in (2.5, True):
        with raises_sentence("steps", str(steps), "whole number"):
            ptq.Sampling(steps=steps)  # type: ignore[arg-type]
    with raises_sentence("eta", "'much'"):
        ptq.Sampling(eta="much")  # type: ignore[arg-type]
    with raises_sentence("Guidance(1.5)", "not 4.0"):
        ptq.Sampling(guidance=4.0)  # type: ignore[arg-type]


def test_values_are_equal_by_what_they_say() -> None:
    assert ptq.Guidance(2, interval=[0, 1]) == ptq.Guidance(np.float32(2.0), interval=(0.0, 1.0))  # type: ignore[arg-type]
    assert len({ptq.Sampling(), ptq.Sampling("auto", None, 0.0, ptq.Guidance())}) == 1
    sampling = ptq.Sampling("ddim", 10, 0.5, ptq.Guidance(4.0, "all", (0.0, 0.7)))
    resolved = sampling.resolve(ptq.NoiseSchedule(), tiny_model().config)
    assert ptq.Sampling.of(**resolved.to_dict()) == sampling
    assert str(resolved) == "ddim, 10 steps, guidance 4 from time 0.7 to 0"


def test_loose_settings_and_a_sampling_give_the_same(tiny_model: ptq.FloatDiT, raises_sentence: Sentence) -> None:
    loose: dict[str, Any] = {"sampler": "ddim", "steps": 3, "eta": 0.5, "cfg_scale": 2.0, "cfg_channels": "all"}
    sampling = ptq.Sampling("ddim", 3, 0.5, ptq.Guidance(2.0, "all"))
    images = ptq.sample(tiny_model, LABELS, key=KEY, sampling=sampling)
    np.testing.assert_array_equal(images, ptq.sample(tiny_model, LABELS, key=KEY, **loose))
    np.testing.assert_array_equal(images, next(sample_batches(tiny_model, LABELS, key=KEY, sampling=sampling))[1])
    for name, value in loose.items():
        with raises_sentence("sampling", f"leave out {name}"):
            ptq.sample(tiny_model, LABELS, key=KEY, sampling=sampling, **{name: value})


# The registry ----------------------------------------------------------------------------------------


def test_names_and_help_come_from_the_registry(monkeypatch: pytest.MonkeyPatch, raises_sentence: Sentence) -> None:
    assert samplers.help_on_names() == (
        "ddpm, ddim or dpm++2m for a model that predicts noise, euler or heun for a model that predicts velocity; "
        "auto is the first of those."
    )
    assert "heun calls the network 2 times per step" in samplers.help_on_steps()
    assert samplers.help_on_eta() == "Noise of the ddim sampler, 0 to 1."
    coarse = dataclasses.replace(SAMPLERS["euler"], name="coarse")
    monkeypatch.setitem(SAMPLERS, "coarse", coarse)
    assert "euler, heun or coarse for a model that predicts velocity" in samplers.help_on_names()
    with raises_sentence("euler, heun, coarse"):
        ptq.Sampling("plms")
    assert ptq.Sampling("coarse").resolve(FLOWS[0], tiny_model().config).sampler is coarse
    with raises_sentence("'coarse'", "predicts noise", "use one of ddpm, ddim, dpm++2m"):
        ptq.Sampling("coarse").resolve(ptq.NoiseSchedule(), tiny_model().config)


# The interval ----------------------------------------------------------------------------------------


def loop(model: ptq.FloatDiT, x: np.ndarray, sampler: str, scales: list[float]) -> np.ndarray:
    """Euler's or Heun's method, or DDIM, in float64 around the network; step ``i`` is guided by ``scales[i]``."""
    apply, steps = model.jitted(), len(scales)
    null = np.full(len(x), model.config.null_label)

    def guided(x: np.ndarray, t: Any, scale: float) -> np.ndarray:
        times = np.full(len(x), t, model.schedule.time_dtype)
        c, u = (np.asarray(apply(x.astype(np.float32), times, y), np.float64)[..., :3] for y in (LABELS, null))
        return c if scale == 1 else u + scale * (c - u)

    if sampler == "ddim":
        abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        kept = np.arange(0, 1000, 1000 // steps)[::-1]
        for i, t in enumerate(kept):
            eps = guided(x, t, scales[i])
            x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
            x = x0 if i == steps - 1 else np.sqrt(abar[kept[i + 1]]) * x0 + np.sqrt(1 - abar[kept[i + 1]]) * eps
        return x
    assert isinstance(model.schedule, ptq.FlowSchedule)
    end = model.schedule.data_time
    for i, scale in enumerate(scales):
        t, t_next = (abs(end - (steps - j) / steps) for j in (i, i + 1))
        v = guided(x, t, scale)
        if sampler == "heun":
            v = (v + guided(x + (t_next - t) * v, t_next, scale)) / 2
        x = x + (t_next - t) * v
    return x


@pytest.mark.parametrize(
    ("sampler", "schedule", "interval", "scales"),
    [
        ("euler", FLOWS[0], INTERVAL, [1, 3, 3, 1]),
        ("euler", FLOWS[1], INTERVAL, [1, 3, 3, 1]),
        # Both calls of a step are guided alike, although the second is at the time of the next step.
        ("heun", FLOWS[0], INTERVAL, [1, 3, 3, 1]),
        ("heun", FLOWS[1], (0.0, 0.25), [1, 1, 1, 3]),
        # DDIM in four steps sees 750, 500, 250 and 0.
        ("ddim", ptq.NoiseSchedule(), (0.2, 0.5), [1, 3, 3, 1]),
        ("ddim", ptq.NoiseSchedule(), (0.0, 1.0), [3, 3, 3, 3]),
    ],
)
def test_the_interval_against_a_plain_loop(sampler: str, schedule: Any, interval: Any, scales: list[float]) -> None:
    model = dataclasses.replace(tiny_model(learn_sigma=False), schedule=schedule)
    noise = np.random.default_rng(1).standard_normal((3, *model.config.image_shape))
    sampling = ptq.Sampling(sampler, 4, guidance=ptq.Guidance(3.0, "all", interval))
    images = ptq.sample(model, LABELS, key=KEY, sampling=sampling, noise=noise)
    assert relative_error(images, loop(model, noise, sampler, scales)) < 2e-5
    assert relative_error(images, loop(model, noise, sampler, [3.0 if s == 1 else 1.0 for s in scales])) > 1e-3


@pytest.mark.parametrize("steps", [10, 30, 1000])
@pytest.mark.parametrize("flow", FLOWS)
def test_ends_of_the_interval_lie_inside(flow: ptq.FlowSchedule, steps: int) -> None:
    """REPA's low <= t <= high in float64, although the network's times are float32."""
    for low, high in ((0.0, 0.7), (0.1, 0.3), (0.7, 0.7)):
        guidance = ptq.Guidance(2.0, interval=(low, high))
        tables = ptq.Sampling(steps=steps, guidance=guidance).resolve(flow, tiny_model().config).tables()
        count = sum(low <= i / steps <= high for i in range(1, steps + 1))
        np.testing.assert_array_equal(tables.guidance == 2.0, [low <= i / steps <= high for i in range(steps, 0, -1)])
        assert 0 < count < steps


def test_an_interval_needs_no_program_of_its_own(tiny_model: ptq.FloatDiT) -> None:
    how = lambda interval: ptq.Sampling(steps=3, guidance=ptq.Guidance(2.0, interval=interval))
    whole = ptq.sample(tiny_model, LABELS, key=KEY, sampling=how(None))
    programs = num_programs(chain.sample_batch)
    np.testing.assert_array_equal(ptq.sample(tiny_model, LABELS, key=KEY, sampling=how((0, 1))), whole)
    assert relative_error(ptq.sample(tiny_model, LABELS, key=KEY, sampling=how((0, 0.6))), whole) > 1e-3
    assert num_programs(chain.sample_batch) == programs


def test_predictions_at_fixed_inputs_follow_the_interval(tiny_model: ptq.FloatDiT) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 3, *tiny_model.config.image_shape)).astype(np.float32)
    t = np.array([900, 600, 100], np.int32)
    found = predicted_noise(tiny_model, inputs, t, LABELS, ptq.Guidance(2.0, interval=(0.5, 0.8)))
    guided, alone = (predicted_noise(tiny_model, inputs, t, LABELS, ptq.Guidance(scale)) for scale in (2.0, 1.0))
    np.testing.assert_array_equal(found[1], guided[1])
    np.testing.assert_allclose(found[[0, 2]], alone[[0, 2]], atol=1e-5)
    assert np.abs(guided - alone).max() > 1e-2
