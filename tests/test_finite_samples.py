"""Samples that are not finite: an error that names the image, the step and what to try, wherever they would have gone."""

from __future__ import annotations

import dataclasses
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers import PLAIN

import ptq4dit_jax as ptq
from ptq4dit_jax import calibration, sampling
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule
from ptq4dit_jax.vae import VAEConfig, VAEDecoder

pytestmark = pytest.mark.makes_nan

CONFIG = DiTConfig(
    input_size=4, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=2, num_classes=10, learn_sigma=False
)
KEY = jax.random.key(0)


@struct.dataclass
class Breaking:
    """Predicts half of its input, but ``value`` for the label ``label`` at noise levels of at most ``below``."""

    value: Any
    label: Any
    below: Any
    config: DiTConfig = struct.field(pytree_node=False, default=CONFIG)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    dtype: str = struct.field(pytree_node=False, default="bfloat16")

    def apply(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        breaks = (y == self.label) & (self.schedule.noise_level(t).astype(jnp.float32) <= self.below)
        return jnp.where(breaks[:, None, None, None], self.value, 0.5 * x)


def breaking(value: float, label: int, below: float, **others: Any) -> Breaking:
    return Breaking(value=jnp.float32(value), label=jnp.int32(label), below=jnp.float32(below), **others)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_sentence_names_image_step_and_remedy(value, batch_size, raises_sentence):
    """DDIM in 5 steps sees t = 800, 600, 400, 200, 0: at most 500 is the third."""
    model = breaking(value, 7, 500)
    options: dict[str, Any] = {"steps": 5, "sampler": "ddim", "batch_size": batch_size}
    with raises_sentence("Image 2 (label 7)", "from step 3 of 5 on (t = 400)", "bfloat16", "--dtype float32", "--cfg-scale"):
        ptq.sample(model, np.array([1, 3, 7, 5, 7]), key=KEY, cfg_scale=1.5, **options)
    assert np.isfinite(ptq.sample(model, np.array([1, 3, 5, 5]), key=KEY, **options)).all()


@pytest.mark.parametrize(("below", "step", "t"), [(2000, 1, "999"), (0, 4, "0")])
def test_the_first_and_the_last_step(below, step, t, raises_sentence):
    model = breaking(np.nan, 1, below, dtype="float32")
    with raises_sentence("Image 0 (label 1)", f"from step {step} of 4 on (t = {t})", "float32", "check the checkpoint"):
        ptq.sample(model, np.array([1]), key=KEY, steps=4, cfg_scale=1.0)


def test_flows_and_two_calls_a_step(raises_sentence):
    """Heun in 2 steps sees the noise levels 1, 1/2; 1/2, 0: at most 0.2 is the second call of the second step."""
    model = breaking(np.inf, 3, 0.2, schedule=FlowSchedule())
    with raises_sentence("Image 1 (label 3)", "step 2 of 2 on (t = 1)"):
        ptq.sample(model, np.array([2, 3]), key=KEY, steps=2, sampler="heun")


def test_images_before_a_fault_are_streamed_and_those_after_never_made(raises_sentence):
    model, labels = breaking(np.nan, 7, 10**4), np.array([1, 2, 3, 7, 4, 5])
    stream = sampling.sample_batches(model, labels, key=KEY, sampling=Sampling(steps=2), batch_size=2)
    start, images = next(stream)
    assert (start, len(images)) == (0, 2)
    with raises_sentence("Image 3 (label 7)"):
        next(stream)


def test_on_a_mesh(mesh8, raises_sentence):
    with raises_sentence("Image 9 (label 7)", "step 2 of 3"):
        labels = np.array([1] * 9 + [7])
        ptq.sample(
            breaking(np.nan, 7, 600),
            labels,
            key=KEY,
            steps=3,
            mesh=mesh8,
            noise=np.ones((10, 4, 4, 4)),
            step_noise=np.ones((3, 10, 4, 4, 4)),
        )


def test_latents_that_are_finite_and_pictures_that_are_not(raises_sentence):
    small = VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    shapes = jax.eval_shape(lambda: VAEDecoder.init(small, key=KEY))
    decoder = jax.tree.map(lambda a: np.full(a.shape, 0.1, a.dtype), shapes)
    params = dict(decoder.params["decoder"])
    params["conv_out"] = jax.tree.map(lambda a: np.full_like(a, 3e38), params["conv_out"])
    decoder = decoder.replace(params={**decoder.params, "decoder": params})
    model = breaking(0.0, 0, -1)
    with raises_sentence("Image 0 (label 2)", "latents are finite", "VAE", "float32"):
        ptq.sample(model, np.array([2, 3]), key=KEY, steps=2, decoder=decoder)
    with raises_sentence("Image 1 (label 7)", "step 1 of 2"):
        ptq.sample(
            breaking(np.nan, 7, 10**4),
            np.array([2, 7]),
            key=KEY,
            steps=2,
            decoder=decoder.replace(params=shapes_of_zeros(decoder)),
        )


def shapes_of_zeros(decoder: VAEDecoder) -> Any:
    return jax.tree.map(np.zeros_like, decoder.params)


# Calibration and comparison --------------------------------------------------------------------------


def overflowing(**overrides: Any) -> ptq.FloatDiT:
    """Float32 activations beyond 65504 in the first block, which LayerNorm and small weights behind bring back."""
    model = helpers.tiny_model(**overrides)
    blocks = jax.tree.map(np.array, model.params["blocks"])
    blocks["fc1"]["kernel"] *= 5e4
    blocks["fc2"]["kernel"] *= 2e-5
    return dataclasses.replace(model, params={**model.params, "blocks": blocks})


def test_calibration_rows_must_be_finite(raises_sentence):
    tiny = helpers.tiny_model()
    broken = dataclasses.replace(tiny, params=jax.tree.map(lambda a: a * np.float32(1e12), tiny.params))
    with raises_sentence("Calibration row 0 (label 0)", "step 1 of 3", "float32"):
        ptq.quantize(broken, ptq.QuantConfig.of(**PLAIN, steps=3, calib_rows=2), key=KEY)


def test_statistics_must_be_finite(raises_sentence):
    """Values beyond float32 are named with their step and site."""
    model = helpers.tiny_model()
    blocks = jax.tree.map(np.array, model.params["blocks"])
    blocks["fc1"]["kernel"][-1] *= np.float32(3e38)
    blocks["fc2"]["kernel"][-1] *= np.float32(3e-38)
    model = dataclasses.replace(model, params={**model.params, "blocks": blocks})
    rows = calibration.CalibrationData(
        x=np.random.default_rng(0).standard_normal((2, 2, *model.config.image_shape), np.float32),
        t=np.array([900, 100], np.int32),
        y=np.zeros((2, 2), np.int32),
    )
    with raises_sentence("blocks.fc2_in", "calibration step 1 of 2 (t = 900)"):
        ptq.quantize(model, ptq.QuantConfig.of(**PLAIN), key=KEY, calibration=rows)


@pytest.mark.parametrize("field", ["low", "high", "power"])
def test_the_site_and_the_first_step_of_any_statistic_are_named(field, raises_sentence):
    ones: dict[str, Any] = {name: np.ones((3, 2, 4), np.float32) for name in ("low", "high", "power")}
    statistics = {site: calibration.ChannelExtremes(**ones) for site in ("blocks.v", "final_in")}
    calibration.check_finite(statistics, np.array([5, 4, 3]))
    damaged = ones[field].copy()
    damaged[1, 0, 3] = np.nan
    changed: dict[str, Any] = {field: damaged}
    statistics["final_in"] = dataclasses.replace(statistics["final_in"], **changed)
    with raises_sentence("final_in", "step 2 of 3 (t = 4)"):
        calibration.check_finite(statistics, np.array([5, 4, 3]))


def test_a_comparison_names_the_model(raises_sentence):
    model = helpers.tiny_model()
    wild = dataclasses.replace(model, params=jax.tree.map(lambda a: a * np.float32(1e12), model.params))
    options: dict[str, Any] = {"labels": [0, 1], "key": KEY, "sampling": Sampling(steps=2)}
    with raises_sentence("wild's image 0", "step 1 of 2"):
        ptq.compare(model, {"wild": wild}, **options)
    with raises_sentence("The reference's image 0", "step 1 of 2"):
        ptq.compare(wild, {"tame": model}, **options)


# float16 ---------------------------------------------------------------------------------------------


def test_float16_is_a_way_to_store_not_to_compute(raises_sentence):
    model = overflowing()
    half = dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(np.float16), model.params))
    assert (half.param_dtype, half.dtype) == (np.float16, np.float32)
    widened = dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(np.float32), half.params))
    images = ptq.sample(half, np.array([0, 1]), key=KEY, steps=2)
    np.testing.assert_allclose(images, ptq.sample(widened, np.array([0, 1]), key=KEY, steps=2), rtol=1e-4, atol=1e-4)
    asked = half.astype("float16")
    assert (asked.param_dtype, asked.dtype) == (np.float16, np.float16)
    with raises_sentence("Image 0 (label 0)", "step 1 of 2", "float16", "--dtype float32"):
        ptq.sample(asked, np.array([0, 1]), key=KEY, steps=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_asked_for_is_the_type_computed_in(dtype):
    for stored in (np.float32, np.float16):
        model = jax.tree.map(lambda a, stored=stored: a.astype(stored), helpers.tiny_model())
        cast = model.astype(dtype)
        assert cast.dtype == cast.param_dtype == jnp.dtype(dtype)
        out = jax.eval_shape(cast.apply, jnp.zeros((1, *cast.config.image_shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
        assert out.dtype == jnp.dtype(dtype)
    assert helpers.tiny_model().astype("float32").compute is None, "one program for models that compute alike"


def test_what_is_stored_in_float16_stays_so_in_a_folder(tmp_path):
    half = jax.tree.map(lambda a: a.astype(np.float16), helpers.tiny_model())
    for model in (half, half.astype("float16")):
        ptq.save(model, tmp_path / "m", overwrite=True)
        again = helpers.load_float(tmp_path / "m")
        assert (again.param_dtype, again.dtype) == (np.float16, np.float32)


def test_a_decoder_stored_in_float16_computes_in_float32():
    decoder = VAEDecoder.init(VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4), key=KEY)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), decoder)
    assert (half.dtype, half.astype("float16").dtype, half.astype("bfloat16").dtype) == ("float32", "float16", "bfloat16")
