"""Numbers that users type or files hold are refused by stated limits or by the memory that is free, with both numbers."""

import jax
import numpy as np
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax import chain, cli, memory, sampling
from ptq4dit_jax.config import MAX_ITERATIONS, MAX_ROWS, Reconstruction
from ptq4dit_jax.guidance import MAX_GUIDANCE
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.samplers import SAMPLERS
from ptq4dit_jax.sampling import MAX_SAMPLES
from ptq4dit_jax.schedules import MAX_TIMESTEPS, respace
from ptq4dit_jax.terminal import load_model, parse_labels
from ptq4dit_jax.vae import VAEConfig

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_timesteps": 0}, (f"1 to {MAX_TIMESTEPS} timesteps", "not 0")),
        ({"num_timesteps": 10**12}, (str(MAX_TIMESTEPS), str(10**12))),
        ({"num_timesteps": 1000.0}, ("1000.0",)),
        ({"num_timesteps": "1000"}, ("1000",)),
        ({"beta_start": 0.0}, ("beta_start", "0.0")),
        ({"beta_end": 1}, ("beta_end", "not 1")),
        ({"beta_end": float("nan")}, ("beta_end", "nan")),
        ({"beta_start": float("-inf")}, ("beta_start", "-inf")),
        ({"beta_end": "0.02"}, ("beta_end",)),
        ({"num_timesteps": 50_000}, ("50000 timesteps", "1e-60")),
        ({"beta_end": 0.99}, ("0.0001 to 0.99", "1e-60")),
    ],
)
def test_schedules_of_noise(settings, words, raises_sentence):
    with raises_sentence(*words):
        ptq.NoiseSchedule(**settings)


@pytest.mark.parametrize("settings", [{"num_timesteps": 4000}, {"num_timesteps": 1}, {"num_timesteps": 10, "beta_end": 0.9}])
def test_schedules_with_room(settings):
    schedule = ptq.NoiseSchedule(**settings)
    tables = SAMPLERS["ddim"].tables(schedule, 1)
    assert all(np.isfinite(column).all() for column in jax.tree.leaves(tables))


@pytest.mark.parametrize("steps", [1.0, 10_001, 10**40, True])
def test_flows(steps, raises_sentence):
    with raises_sentence("steps of a flow", "10000"):
        ptq.FlowSchedule(steps=steps)


@pytest.mark.parametrize("steps", ["9" * 5000, "ddim" + "9" * 5000, 10**4000, "1" * 20])
def test_steps_of_many_digits(steps, raises_sentence):
    with raises_sentence("Sampler steps must be 1 to 1000"):
        respace(1000, steps)
    with raises_sentence("Sampler steps of a flow must be 1 to 10000"):
        ptq.FlowSchedule().times(steps)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calib_rows": 10**18}, (str(MAX_ROWS), str(10**18))),
        ({"step_groups": 10**9}, (str(MAX_ROWS), str(10**9))),
        ({"temperature": 1e-30}, ("1e-06 to 1e+06", "1e-30")),
        ({"temperature": 1e30}, ("1e-06 to 1e+06", "1e+30")),
        ({"temperature": float("nan")}, ("nan",)),
        ({"cfg_scale": 1e38}, (str(MAX_GUIDANCE), "1e+38")),
        ({"cfg_scale": -1001.0}, (str(MAX_GUIDANCE), "-1001.0")),
        ({"cfg_scale": float("nan")}, (str(MAX_GUIDANCE), "nan")),
        ({"policy": "uniform,final=" + "8" * 5000}, ("final=8",)),
        ({"weight_bits": 10**20}, ("weight_bits", "2 to 8")),
        ({"exponent": float("nan")}, ("exponent", "nan")),
        ({"eta": float("nan")}, ("eta", "nan")),
    ],
)
def test_settings_of_quantization(settings, words, raises_sentence):
    with raises_sentence(*words):
        ptq.QuantConfig.of(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": 10**18}, (str(MAX_ITERATIONS), str(10**18))),
        ({"batch_size": 10**12}, (str(MAX_ROWS),)),
        ({"rounding_rate": 1e30}, ("1e+06", "1e+30")),
        ({"rounding_eps": float("inf")}, ("1e+06", "inf")),
        ({"regularizer": float("nan")}, ("nan",)),
        ({"exponents": (1e300, 2.0)}, ("1e+300",)),
    ],
)
def test_settings_of_reconstruction(settings, words, raises_sentence):
    with raises_sentence(*words):
        Reconstruction(**settings)


@pytest.mark.parametrize(
    ("text", "repeat", "words"),
    [
        ("0", 10**9, ("1,000,000,000 images", f"{MAX_SAMPLES:,}")),
        ("0-999", 10_001, ("10,001,000 images",)),
        (",".join(["0-1000000"] * 1000), 1, (f"{MAX_SAMPLES:,}",)),
        ("9" * 5000, 1, ("Label 999", "out of range")),
        (f"{10**7}-5", 1, (f"Label {10**7} ",)),
        ("0-" + "9" * 30, 1, ("Label " + "9" * 30,)),
        ("1" * 100 + "x", 1, ("numbers and ranges",)),
    ],
)
def test_labels(text, repeat, words, raises_sentence):
    with raises_sentence(*words):
        parse_labels(text, repeat)


def test_labels_within_the_limits():
    assert parse_labels("3, 0-2,07", 2).tolist() == [3, 0, 1, 2, 7] * 2
    assert parse_labels("0", MAX_SAMPLES).shape == (MAX_SAMPLES,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("random:DiT-S/2@1000000", ("input_size", "16384", "1000000")),
        ("random:DiT-S/2@20000", ("input_size", "16384", "20000")),
        ("random:DiT-S/2@10000", ("25,000,000 tokens", "65,536")),
        ("random:DiT-S/2@" + "9" * 5000, ("must be a number",)),
    ],
)
def test_models_that_are_typed(name, words, raises_sentence):
    with raises_sentence(*words):
        load_model(name)


def test_a_model_larger_than_the_memory(monkeypatch, raises_sentence):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 2_000_000_000)
    with raises_sentence("random:DiT-XL/2", "2.7 GB of memory", "2.0 GB are free"):
        load_model("random:DiT-XL/2")


def test_attention_larger_than_the_memory(tiny_model, monkeypatch, raises_sentence):
    config = DiTConfig(**{**tiny_model.config.to_dict(), "input_size": 512})  # 65,536 tokens
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 10**10)
    monkeypatch.setattr(chain, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    with raises_sentence("65,536 tokens", "2 images at once", "137.4 GB of memory, and 10.0 GB are free", "--batch-size"):
        sampling.sample(tiny_model.replace(config=config), np.array([0]), key=KEY, batch_size=1)


def test_a_batch_larger_than_the_memory(tiny_model, monkeypatch, raises_sentence):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 10**8)
    monkeypatch.setattr(chain.Request, "run", lambda *_, **__: pytest.fail("long work began"))
    with raises_sentence("A batch of 4,096 images", "0.1 GB are free", "--batch-size"):
        sampling.sample(tiny_model, np.zeros(5000, np.int32), key=KEY, batch_size=4096, steps=1)


def test_results_larger_than_the_memory(tiny_model, monkeypatch, raises_sentence):
    monkeypatch.setattr(memory, "free_on_host", lambda: 10**9)
    monkeypatch.setattr(chain, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    with raises_sentence("2,000,000 samples", "2.0 GB of memory, and 1.0 GB are free"):
        sampling.sample(tiny_model, np.zeros(2_000_000, np.int32), key=KEY, batch_size=8)
    with raises_sentence("500,000 samples", "13.3 GB of memory"):
        ptq.sample_trajectories(tiny_model, ptq.Calibration(steps=25, rows=1_000_000), key=KEY)


def test_the_number_of_images_of_a_model_without_classes(raises_sentence):
    config = DiTConfig.preset("DiT-S/2", num_classes=0, null_class=False)
    with raises_sentence(f"{10**15:,} images", f"{MAX_SAMPLES:,}"):
        sampling.check_labels(10**15, config)


@pytest.mark.parametrize("out", [".", "/", "..", "x/..", "./"])
@pytest.mark.parametrize("command", ["quantize random:DiT-S/8@8 --reconstruct", "quantize random:DiT-S/8@8", "convert x"])
def test_outputs_without_a_name(out, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    first, *rest = command.split()
    arguments = [first, *rest, out] if first == "convert" else [first, *rest, "--out", out]
    assert cli.main([*arguments, "--overwrite"]) == 1
    assert "has no name of its own" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("scale", [1e38, -1e38, 1e-38, float("nan"), 10**80])
def test_scales_of_latents(scale, raises_sentence):
    with raises_sentence("scaling_factor", "either way"):
        VAEConfig(scaling_factor=scale)
