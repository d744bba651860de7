"""Predicted noise and layer outputs of two models: against NumPy, and against errors made on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import probes
from ptq4dit_jax.guidance import Guidance
from ptq4dit_jax.model import FloatDiT


@struct.dataclass
class Keep:
    value: jax.Array

    def observe(self, x):
        return Keep(x)


@struct.dataclass
class Quantized:
    """Stands for a quantized model: no sites of its own, only a twin that has them."""

    twin: FloatDiT

    config = property(lambda self: self.twin.config)
    schedule = property(lambda self: self.twin.schedule)

    def apply(self, x, t, y):
        return self.twin.apply(x, t, y)


@pytest.fixture(scope="module")
def batch(config):
    x = jax.random.normal(jax.random.key(1), (5, *config.image_shape), jnp.float32)
    return x, jnp.array([0, 10, 500, 900, 999]), jnp.array([0, 1, 2, 3, 0])


@pytest.fixture(scope="module")
def chain(config):
    inputs = np.random.default_rng(2).standard_normal((3, 4, *config.image_shape)).astype(np.float32)
    return inputs, np.array([999, 500, 0]), np.array([0, 1, 2, 1])


def _scaled(model: FloatDiT, layer: str, factor, block: int | None = None) -> FloatDiT:
    """The model with kernel and bias of one layer (of one block) multiplied by ``factor``."""
    params = jax.tree.map(lambda a: a, model.params)
    where = params if block is None else params["blocks"]
    where[layer] = {
        name: a * jnp.broadcast_to(factor, a.shape).astype(a.dtype) if block is None else a.at[block].multiply(factor)
        for name, a in where[layer].items()
    }
    return dataclasses.replace(model, params=params)


def _rounded(model: FloatDiT) -> FloatDiT:
    return dataclasses.replace(model, params=jax.tree.map(lambda a: jnp.round(a * 64) / 64, model.params))


def test_layer_sqnr_is_the_power_ratio_of_what_observers_see(model, batch):
    other = _rounded(model)
    names = ("q", "k", "proj_out", "fc1_out", "fc2_out", "block_out")
    tree = {"blocks": {name: Keep(jnp.zeros(model.config.depth)) for name in names}}
    observe = jax.jit(lambda model: model.observe(tree, *batch)[1]["blocks"])
    seen = [observe(m) for m in (model, other)]
    got = probes.layer_sqnr(model, other, *batch)
    assert list(got) == [f"blocks.{name}" for name in names]
    for name in names:
        figures = got[f"blocks.{name}"]
        first, second = (np.asarray(s[name].value, np.float64).reshape(2, -1) for s in seen)
        expected = 10 * np.log10((first**2).sum(1) / ((first - second) ** 2).sum(1))
        np.testing.assert_allclose(figures, expected, atol=1e-3, err_msg=name)
        assert figures.shape == (model.config.depth,)


def test_layer_sqnr_finds_the_layer_that_is_wrong(model, batch):
    got = probes.layer_sqnr(model, _scaled(model, "proj", 1.01, block=1), *batch)
    np.testing.assert_allclose(got["blocks.proj_out"][1], 40.0, atol=1e-2)
    assert np.isposinf([got[name][0] for name in got]).all()
    assert np.isposinf([got["blocks.q"][1], got["blocks.k"][1]]).all()
    assert np.isfinite([got[f"blocks.{name}"][1] for name in ("fc1_out", "fc2_out", "block_out")]).all()


def test_layer_sqnr_observes_the_twin_of_a_quantized_model(model, batch, monkeypatch):
    monkeypatch.setattr(probes, "imitation", lambda quantized: quantized.twin)
    wrong = _scaled(model, "fc2", 1.1, block=0)
    got, expected = (probes.layer_sqnr(model, other, *batch) for other in (Quantized(wrong), wrong))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_allclose(got["blocks.fc2_out"][0], 20.0, atol=1e-2)


def test_layers_along_a_trajectory_sum_powers_over_steps(model, chain):
    inputs, t, labels = chain
    other = _rounded(model)
    got = probes.layer_sqnr_along(model, other, inputs, t, labels)
    flat = inputs.reshape(-1, *inputs.shape[2:])
    expected = probes.layer_sqnr(model, other, flat, t.repeat(4), np.tile(labels, 3))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_predicted_noise_is_guidance_of_separate_calls(model, chain, cfg_scale):
    inputs, t, labels = chain
    got = probes.predicted_noise(model, inputs, t, labels, Guidance(cfg_scale))
    apply = model.jitted()
    for step in range(3):
        rows = np.full(4, t[step])
        conditional, null = (np.asarray(apply(inputs[step], rows, y))[..., :1] for y in (labels, np.full(4, 3)))
        expected = null + cfg_scale * (conditional - null)
        np.testing.assert_allclose(got[step], expected, rtol=1e-4, atol=1e-5)


def test_step_sqnr_of_an_output_one_percent_too_large_is_40_db(model, chain):
    inputs, t, labels = chain
    got = probes.step_sqnr(model, _scaled(model, "final", 1.01), inputs, t, labels, Guidance(1.5))
    np.testing.assert_allclose(got, np.full(3, 40.0), atol=1e-2)


def test_step_sqnr_leaves_the_variance_channels_out(model, chain):
    inputs, t, labels = chain
    variance_columns = np.arange(2 * 2 * 2) % 2 == 1  # out channels run fastest: noise, variance
    other = _scaled(model, "final", np.where(variance_columns, 5.0, 1.0).astype(np.float32))
    assert np.isposinf(probes.step_sqnr(model, other, inputs, t, labels, Guidance(1.5))).all()


def test_labels_are_checked(model, chain):
    inputs, t, _ = chain
    with pytest.raises(Ptq4ditError, match="Label 7 is out of range"):
        probes.predicted_noise(model, inputs, t, np.array([0, 1, 2, 7]))
