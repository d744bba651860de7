"""Exported samplers: the bytes of the traced ones, from any weights of the same form, and a sentence where they do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import ptq4dit_jax as ptq
from benchmarks import aot
from ptq4dit_jax import exported, sampling, vae
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.exported import ExportedSampler, export_sampler
from ptq4dit_jax.networks.dit import DiTConfig

KEY = jax.random.key(3)
LABELS = [0, 3, 1]
SHAPE: dict[str, Any] = {"depth": 1}


def model_of(seed: int = 0, **overrides: Any) -> ptq.FloatDiT:
    """A model on the device."""
    return jax.tree.map(jnp.asarray, helpers.tiny_model(seed, **{**SHAPE, **overrides}))


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    return model_of()


@pytest.fixture(scope="module")
def program(model: ptq.FloatDiT) -> ExportedSampler:
    """Two images a call, three guided steps of DDPM."""
    return export_sampler(model, 2, steps=3)


@pytest.fixture(scope="module")
def quantized() -> ptq.QuantizedDiT:
    """An integer model of 4-bit weights and two groups of steps, random but for its shape."""
    q = aot.quantized_model(helpers.tiny_config(**SHAPE), QuantConfig.of(weight_bits=4, step_groups=2), "float32")
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.01, 0.03, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.integers(0, 16, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, q).replace(group_edges=jnp.array([500], jnp.int32))


def tiny_decoder() -> ptq.VAEDecoder:
    """Decodes to pictures of the latents' size."""
    config = ptq.VAEConfig(
        latent_channels=3, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    params = jax.eval_shape(lambda: vae.init_params(config, jax.random.key(0)))
    return ptq.VAEDecoder(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), params), config)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_the_bytes_are_those_of_the_traced_sampler(model: Any, program: Any) -> None:
    """In two calls, the second one padded; and again for weights that were not there when it was exported."""
    for weights in (model, model_of(seed=1)):
        traced = ptq.sample(weights, LABELS, key=KEY, steps=3, batch_size=2)
        assert traced.std() > 0.1
        assert same(ptq.sample(weights, LABELS, key=KEY, program=program), traced)
    parts = dict(sampling.sample_batches(weights, LABELS, key=KEY, program=program))
    assert list(parts) == [0, 2]
    assert same(np.concatenate(list(parts.values())), traced)


def test_weights_are_not_in_it(model: Any, program: Any) -> None:
    kernel = np.asarray(model.params["blocks"]["fc1"]["kernel"]).tobytes()
    assert kernel[:16] not in program.module
    assert len(program.module) < model.nbytes
    assert export_sampler(jax.eval_shape(lambda: model), 2, steps=3) == program


def test_paths_of_this_machine_are_not_in_it(program: Any) -> None:
    for path in (exported.__file__, np.__file__):
        assert str(Path(path).parent).encode() not in program.module


def test_numbers_of_sampling_are_arguments(model: Any, program: Any) -> None:
    how: dict[str, Any] = {"cfg_scale": 3.0, "guidance_interval": (0.2, 1.0)}
    expected = ptq.sample(model, LABELS[:2], key=KEY, steps=3, **how)
    assert same(ptq.sample(model, LABELS[:2], key=KEY, program=program, **how), expected)
    assert same(ptq.sample(model, LABELS[:2], key=KEY, program=program, sampling=ptq.Sampling.of(steps=3, **how)), expected)
    assert program.sampling == ptq.Sampling("ddpm", 3, guidance=ptq.Guidance(1.5))


def test_a_mesh_of_eight(model: Any, mesh8: Any, raises_sentence: Any, program: Any) -> None:
    eight = export_sampler(model, 8, steps=2, devices=8)
    labels = np.arange(11) % 5
    traced = ptq.sample(model, labels, key=KEY, steps=2, batch_size=8, mesh=mesh8)
    assert same(ptq.sample(model, labels, key=KEY, program=eight, mesh=mesh8), traced)
    with raises_sentence("for batches over 8 devices", "one device would share"):
        ptq.sample(model, labels, key=KEY, program=eight)
    with raises_sentence("for batches over one device", "8 devices would share"):
        ptq.sample(model, labels, key=KEY, program=program, mesh=mesh8)
    square = jax.sharding.Mesh(mesh8.devices.reshape(4, 2), ("data", "model"))
    with raises_sentence("its number of devices is 4, and 8 is needed"):
        ptq.sample(model, labels, key=KEY, program=export_sampler(model, 8, steps=2, devices=4), mesh=square)
    alone = ptq.data_mesh(jax.devices()[:1])
    assert ptq.sample(model, LABELS, key=KEY, program=program, mesh=alone).shape == (3, 6, 6, 3)


def test_integers_and_a_decoder(quantized: Any) -> None:
    """A quantized model, whose latents a decoder turns into pictures in the same program."""
    decoder = tiny_decoder()
    program = export_sampler(quantized, 2, sampler="ddim", steps=2, decoder=decoder)
    assert program.form.settings["model/backend"] == "xla"
    how: dict[str, Any] = {"key": KEY, "decoder": decoder}
    traced = ptq.sample(quantized, LABELS[:2], sampler="ddim", steps=2, **how)
    assert same(ptq.sample(quantized, LABELS[:2], program=program, **how), traced)
    # Which backend it was asked to use does not matter, only which one runs.
    assert same(ptq.sample(quantized.replace(backend="xla"), LABELS[:2], program=program, **how), traced)


def test_it_compiles_without_running(model: Any, program: Any, compilations: Any) -> None:
    event = "/jax/core/compile/backend_compile_duration"
    fresh = dataclasses.replace(program)
    with jax.check_tracer_leaks(False):  # with that, JAX compiles at every call
        ptq.sample(model, LABELS, key=KEY, program=program)  # compiles what else there is
        start = compilations[event]
        sampling.compile_exported(fresh, model)
        compiled = compilations[event]
        ptq.sample(model, LABELS, key=KEY, program=fresh)
    assert compilations[event] == compiled > start


MODELS: dict[str, tuple[Any, str, str]] = {
    "depth": ({"depth": 2}, "its model/config/depth is 1, and 2 is needed", ""),
    "classes": ({"num_classes": 6}, "its model/config/num_classes is 5, and 6 is needed", ""),
    "type": ({}, "is float32 (1, 192), and bfloat16 (1, 192) is needed", "bfloat16"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_another_form(name: str, program: Any, raises_sentence: Any) -> None:
    overrides, words, dtype = MODELS[name]
    other = model_of(**overrides)
    with raises_sentence("The exported sampler does not fit", words, "ptq4dit compile"):
        ptq.sample(other.astype(dtype) if dtype else other, LABELS, key=KEY, program=program)


def test_another_schedule(model: Any, program: Any, raises_sentence: Any) -> None:
    with raises_sentence("its model/schedule/num_timesteps is 1000, and 500 is needed"):
        ptq.sample(model.replace(schedule=ptq.NoiseSchedule(num_timesteps=500)), LABELS, key=KEY, program=program)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 4}, "its number of calls of the network is 3, and 4 is needed"),
        ({"cfg_scale": 1}, "its guidance is first3, and none is needed"),
        ({"cfg_channels": "all"}, "its guidance is first3, and all is needed"),
        ({"sampler": "ddim"}, "its noise in steps is yes, and no is needed"),
        ({"sampler": "ddim", "eta": 1.0}, "its learned variance is yes, and no is needed"),
        ({"batch_size": 3}, "makes 2 images per call, not 3"),
        ({"noise": np.zeros((3, 6, 6, 3))}, "takes no noise or step_noise"),
        ({"step_noise": np.zeros((3, 3, 6, 6, 3))}, "takes no noise or step_noise"),
        ({"decoder": "a VAE"}, "its decoder is absent, and VAEDecoder is needed"),
    ],
)
def test_other_ways_to_sample(arguments: Any, words: str, model: Any, program: Any, raises_sentence: Any) -> None:
    if "decoder" in arguments:
        arguments = {"decoder": tiny_decoder()}
    with raises_sentence(words):
        ptq.sample(model, LABELS, key=KEY, program=program, **arguments)


def test_other_generators_of_noise(model: Any, program: Any, raises_sentence: Any) -> None:
    """A switch of JAX that changes what a key draws."""
    with jax.threefry_partitionable(False), raises_sentence("its jax_threefry_partitionable is yes, and no is needed"):
        ptq.sample(model, LABELS, key=KEY, program=program)


@pytest.mark.parametrize("platform", ["tpu", "v5e", "h200"])
def test_other_devices(platform: str, model: Any, program: Any, raises_sentence: Any) -> None:
    kind = exported.kind_named(platform)
    with raises_sentence(f"is for {kind}, and this device is {exported.kind_named(None)}"):
        ptq.sample(model, LABELS, key=KEY, program=dataclasses.replace(program, kind=kind))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "at most 1,048,576 times it, not 0"),
        ({"batch_size": 9, "devices": 2}, "multiple of its number of devices, 2"),
        ({"devices": 0}, "The number of devices must be 1 to"),
        ({"platform": "abacus"}, "not 'abacus'"),
        ({"sampler": "euler"}, "'euler' does not fit"),
        ({"sampling": ptq.Sampling(), "steps": 4}, "leave out steps"),
    ],
)
def test_what_cannot_be_exported(arguments: Any, words: str, model: Any, raises_sentence: Any) -> None:
    with raises_sentence(words):
        export_sampler(model, **{"batch_size": 2, **arguments})


def test_what_is_no_exported_sampler(model: Any, raises_sentence: Any) -> None:
    with raises_sentence("program must be an exported sampler", "load_sampler", "'a path'"):
        ptq.sample(model, LABELS, key=KEY, program="a path")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [b"", b"MLIR garbage"])
def test_what_this_jax_cannot_read(module: bytes, model: Any, program: Any, raises_sentence: Any) -> None:
    other = dataclasses.replace(program, module=module, jax_version="9.8.7")
    with raises_sentence(f"JAX {jax.__version__} cannot read a sampler that JAX 9.8.7 exported", "6 months older or 3 weeks"):
        ptq.sample(model, LABELS, key=KEY, program=other)


@pytest.mark.makes_nan
def test_a_sample_that_is_not_finite_is_reported_by_its_step(model: Any, program: Any, raises_sentence: Any) -> None:
    """The chain that looks for the step is traced."""
    bias = model.params["final"]["bias"].at[0].set(jnp.inf)
    broken = model.replace(params={**model.params, "final": {**model.params["final"], "bias": bias}})
    with raises_sentence("Image 0 (label 0) holds NaN or infinity", "from step 1 of 3"):
        ptq.sample(broken, LABELS, key=KEY, program=program)


#: A network for which the kernels of both platforms are made, but for its depth.
WIDE = DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6, num_classes=10)


@pytest.mark.parametrize(
    ("platform", "bits", "call"),
    [("h200", 8, b"mosaic_gpu_v2"), ("v5e", 4, b"tpu_custom_call"), ("cuda", 8, b""), ("tpu", 8, b"")],
)
def test_kernels_are_exported_for_devices_that_are_not_here(platform: str, bits: int, call: bytes) -> None:
    """For a platform at large there are none, since not all of its devices run them. Nothing of this is compiled."""
    model = aot.quantized_model(WIDE, QuantConfig.of(weight_bits=bits), "bfloat16")
    made = export_sampler(model, 4, steps=2, platform=platform, devices=2)
    assert made.kind == exported.kind_named(platform)
    found = {name for name in (b"mosaic_gpu_v2", b"tpu_custom_call") if name in made.module}
    assert found == ({call} if call else set())


def test_a_library_whose_calls_jax_does_not_promise_to_keep(monkeypatch: pytest.MonkeyPatch, raises_sentence: Any) -> None:
    model = aot.float_model(helpers.tiny_config(**SHAPE), "bfloat16")
    if jax.default_backend() == "cpu":
        with raises_sentence("cannot be exported here for a GPU of compute capability 9.0", "cuDNN"):
            export_sampler(model, 2, steps=2, platform="h200")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    assert b"__cudnn$fmhaSoftmax" in export_sampler(model, 2, steps=2, platform="h200").module
    monkeypatch.setattr(exported, "_UNSTABLE", ())
    with pytest.raises(ValueError, match="no compatibility guarantees"):  # so the exception is needed
        export_sampler(model, 2, steps=2, platform="h200")


def test_forms_of_quantized_models_tell_widths_apart() -> None:
    forms = [
        export_sampler(aot.quantized_model(helpers.tiny_config(**SHAPE), QuantConfig.of(weight_bits=bits), "float32"), 2).form
        for bits in (8, 4)
    ]
    difference = forms[0].difference(forms[1])
    assert difference is not None
    assert difference.what.endswith("/weight/bits")
    assert (difference.first, difference.second) == ("8", "4")
