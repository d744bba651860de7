"""The VAE's decoder: parity with diffusers, bounded memory, scales of latents, and pictures inside the sampler."""

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax.vae import VAEConfig, VAEDecoder, init_params

GOLDEN = Path(__file__).resolve().parent / "golden"
decode = jax.jit(VAEDecoder.decode, static_argnames=("micro_batch", "queries"))


@pytest.fixture(scope="module")
def vae():
    return ptq.load_vae(GOLDEN / "vae")


@pytest.fixture(scope="module")
def golden():
    """Latents and diffusers' pictures of them, NHWC."""
    with np.load(GOLDEN / "vae.npz") as file:
        return {name: file[name].transpose(0, 2, 3, 1) for name in file}


@pytest.fixture(scope="module")
def pictures(vae, golden):
    return np.asarray(decode(vae, golden["latents"]))


# The function


def test_parity_with_diffusers(pictures, golden):
    assert pictures.dtype == np.float32
    assert pictures.shape == (2, 48, 80, 3)
    np.testing.assert_allclose(pictures, golden["images"], atol=1e-4)


def test_the_published_size():
    """140 tensors of 49,490,199 values, counted in diffusers' own."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init_params(VAEConfig(), jax.random.key(0))))
    assert (len(shapes), sum(leaf.size for leaf in shapes)) == (140, 49_490_199)
    assert VAEConfig().factor == 8


def test_random_parameters(vae):
    """Of the shapes alone: drawing them compiles for long."""
    drawn = jax.eval_shape(lambda: VAEDecoder.init(vae.config, key=jax.random.key(0)))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, vae)


def test_bfloat16_is_a_cast(vae, golden):
    half = vae.astype(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}
    made = decode(half, golden["latents"])
    assert made.dtype == jnp.float32
    assert helpers.relative_error(made, golden["images"]) < 0.05
    assert not np.array_equal(made, made.astype(jnp.bfloat16)), "the pictures themselves are not rounded to 8 bits"


def test_micro_batches_change_rounding_only(vae, golden):
    """Five pictures, two at a time."""
    latents = np.concatenate([golden["latents"]] * 2 + [golden["latents"][:1]])
    expected = np.concatenate([golden["images"]] * 2 + [golden["images"][:1]])
    np.testing.assert_allclose(decode(vae, latents, micro_batch=2), expected, atol=1e-4)


def test_a_picture_does_not_depend_on_the_others(vae, golden, pictures):
    for row in (0, 1):
        np.testing.assert_array_equal(decode(vae, golden["latents"][row : row + 1])[0], pictures[row])


def test_chunks_of_queries_change_rounding_only(vae, golden, pictures):
    """The latents have 6 * 10 positions, which are one chunk by default; 7 at a time leave a rest."""
    np.testing.assert_allclose(decode(vae, golden["latents"], queries=7), pictures, atol=1e-5)


def scratch_bytes(vae, shape, **options):
    lowered = decode.lower(vae, jax.ShapeDtypeStruct(shape, jnp.float32), **options)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_batch(vae):
    few, many = (scratch_bytes(vae, (rows, 8, 8, 4)) for rows in (2, 64))
    assert many - few < 2 * 62 * 8 * 8 * 4 * 4, "more than the latents themselves"


def test_logits_are_never_whole(vae):
    """The latents have 64 * 64 positions; on a wide decoder the pictures would take more, so they are small here."""
    config = dataclasses.replace(vae.config, block_out_channels=(4,), layers_per_block=1)
    small = jax.eval_shape(lambda: VAEDecoder.init(config, key=jax.random.key(0)))
    chunked, whole = (scratch_bytes(small, (1, 64, 64, 4), queries=queries) for queries in (256, 4096))
    assert whole > 4 * 4096**2
    assert chunked < whole / 8


# Scales


def test_latents_are_unscaled_by_the_config(vae, golden, pictures):
    scaled = vae.replace(config=dataclasses.replace(vae.config, scaling_factor=2.0, shift_factor=0.5))
    latents = (golden["latents"] / 0.18215 - 0.5) * 2
    np.testing.assert_allclose(decode(scaled, latents), pictures, atol=1e-4)


def test_latents_normalized_per_channel(vae, golden, pictures):
    mean, std = (0.5, -1.0, 2.0, 0.25), (4.0, 5.0, 3.0, 6.0)
    scaled = vae.replace(config=dataclasses.replace(vae.config, scaling_factor=0.5, latents_mean=mean, latents_std=std))
    latents = (golden["latents"] / 0.18215 - np.array(mean)) * 0.5 / np.array(std)
    np.testing.assert_allclose(decode(scaled, latents), pictures, atol=1e-4)


def test_a_decoder_without_the_first_convolution(vae, golden):
    """The same as with one that passes every channel on."""
    rest = {"decoder": vae.params["decoder"]}
    identity = {"kernel": jnp.eye(4)[None, None], "bias": jnp.zeros(4)}
    without = VAEDecoder(params=rest, config=dataclasses.replace(vae.config, use_post_quant_conv=False))
    passing = vae.replace(params={**rest, "post_quant_conv": identity})
    np.testing.assert_allclose(decode(without, golden["latents"]), decode(passing, golden["latents"]), atol=1e-5)


def test_a_decoder_without_attention(vae, golden):
    """The same as with one whose projection gives nothing."""
    params = jax.tree.map(lambda leaf: leaf, vae.params)
    attention = params["decoder"]["mid_block"]["attentions_0"]
    attention["proj_attn"] = jax.tree.map(jnp.zeros_like, attention["proj_attn"])
    mute = np.asarray(decode(vae.replace(params=params), golden["latents"]))
    del params["decoder"]["mid_block"]["attentions_0"]
    without = VAEDecoder(params=params, config=dataclasses.replace(vae.config, mid_block_add_attention=False))
    np.testing.assert_allclose(decode(without, golden["latents"]), mute, atol=1e-5)
    assert helpers.relative_error(mute, golden["images"]) > 0.05


# Mistakes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_out_channels": ()}, ("block_out_channels", "()")),
        ({"block_out_channels": (32, 0)}, ("block_out_channels", "(32, 0)")),
        ({"block_out_channels": (32, 40)}, ("(32, 40)", "norm_num_groups 32")),
        ({"block_out_channels": (10**30,)}, ("block_out_channels",)),
        ({"layers_per_block": 0}, ("layers_per_block", "not 0")),
        ({"latent_channels": 4.0}, ("latent_channels", "not 4.0")),
        ({"use_post_quant_conv": 1}, ("use_post_quant_conv", "not 1")),
        ({"scaling_factor": 0}, ("scaling_factor",)),
        ({"scaling_factor": float("nan")}, ("scaling_factor", "nan")),
        ({"shift_factor": "a"}, ("shift_factor", "'a'")),
        ({"latents_mean": (0.0, 1.0)}, ("latents_mean", "4 finite numbers", "(0.0, 1.0)")),
        ({"latents_std": (1.0, 1.0, 1.0, float("inf"))}, ("latents_std", "inf")),
        ({"latents_std": (1.0, 0.0, 1.0, 1.0)}, ("latents_std", "0.0")),
        ({"latents_mean": 0.5}, ("latents_mean", "0.5")),
    ],
)
def test_settings_that_make_no_decoder(settings, words, raises_sentence):
    with raises_sentence("VAE", *words):
        VAEConfig(**settings)


def test_latents_of_another_shape(vae, raises_sentence):
    with raises_sentence("(B, H, W, C)", "(6, 6, 4)"):
        vae.decode(np.zeros((6, 6, 4)))
    with raises_sentence("latents of 4 channels, not of 3"):
        decode(vae, np.zeros((1, 6, 6, 3)))
    with raises_sentence("micro_batch", "0"):
        vae.decode(np.zeros((1, 6, 6, 4)), micro_batch=0)


# Inside the sampler

LABELS = np.array([0, 3, 1, 4, 2])
WALK: dict[str, Any] = {"steps": 2, "cfg_scale": 1.5}


@pytest.fixture(scope="module")
def latent_model():
    return jax.tree.map(jnp.asarray, helpers.tiny_model(in_channels=4))


@pytest.fixture(scope="module")
def sampled(vae, latent_model):
    return ptq.sample(latent_model, LABELS, key=jax.random.key(0), decoder=vae, **WALK)


def test_the_sampler_decodes_its_latents(vae, latent_model, sampled):
    latents = ptq.sample(latent_model, LABELS, key=jax.random.key(0), **WALK)
    assert latents.shape == (5, 6, 6, 4)
    assert sampled.shape == (5, 48, 48, 3)
    np.testing.assert_allclose(sampled, decode(vae, latents), atol=1e-4)


def test_every_device_decodes_its_share(vae, latent_model, sampled, mesh8):
    made = ptq.sample(latent_model, LABELS, key=jax.random.key(0), decoder=vae, mesh=mesh8, **WALK)
    np.testing.assert_allclose(made, sampled, atol=1e-4)


def test_a_model_of_other_latents(vae, raises_sentence):
    with raises_sentence("latents of 4 channels, not of 3", "VAE"):
        ptq.sample(helpers.tiny_model(), LABELS, key=jax.random.key(0), decoder=vae, **WALK)
