"""Exporting in Meta's layout: the same tensors that were imported, and the function of the quantized model's weights."""

import dataclasses

import foreign_files
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ptq4dit_jax as ptq
from benchmarks.salient import salient_model
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint, open_tensors
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.engine import QLinear, QuantizedDiT, reference
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.quantizers import ActQuantizer, ChannelScale, QTensor
from ptq4dit_jax.schedules import FlowSchedule


def test_round_trip_is_identical(tmp_path):
    model, _ = import_checkpoint(foreign_files.META, num_heads=3)
    path = export_meta(model, tmp_path / "x.safetensors")
    exported, source = open_tensors(path), open_tensors(foreign_files.META)
    assert {f"ema.{name}" for name in exported} == {name for name in source if name.startswith("ema.")}
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor.read(), source[f"ema.{name}"].read(), err_msg=name)
    again, _ = import_checkpoint(path, num_heads=3)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types(dtype, tmp_path):
    model = import_checkpoint(foreign_files.META, num_heads=3)[0].astype(dtype)
    path = export_meta(model, tmp_path / "x.safetensors")
    assert {tensor.dtype.name for tensor in open_tensors(path).values()} == {dtype}
    again, _ = import_checkpoint(path, num_heads=3)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def build() -> QuantizedDiT:
    """A quantized model of random integers, without compiling anything, with factors at the two sites that keep them."""
    config, rng = helpers.tiny_config(), np.random.default_rng(0)

    def uniform(low, high, *shape):
        return jnp.asarray(rng.uniform(low, high, shape), jnp.float32)

    def act(lead, K=None):
        balance = None if K is None else uniform(0.3, 3, *lead, K)
        return ActQuantizer(uniform(0.01, 0.02, *lead, 2), jnp.asarray(rng.integers(-3, 4, (*lead, 2)), jnp.int32), balance)

    def linear(name):
        lead = (config.depth,) if name.startswith("blocks.") else ()
        K, N = config.linear_shapes[name]
        values, scale = rng.integers(-127, 128, (*lead, N, K), np.int8), uniform(1, 2, *lead, N) * np.float32(K**-0.5 / 100)
        quantizer = act(lead, K if name in ("blocks.proj", "blocks.fc2") else None)
        return QLinear(QTensor(jnp.asarray(values), scale, None, 8), uniform(-0.2, 0.2, *lead, 2, N), quantizer)

    model = QuantizedDiT(
        linears={name: linear(name) for name in config.linear_shapes},
        sites={f"blocks.{name}": act((config.depth,)) for name in ("q", "k", "v", "probs")},
        label_embed=uniform(-1, 1, config.num_classes + 1, config.hidden_size),
        group_edges=jnp.array([500], jnp.int32),
        config=config,
    )
    return jax.tree.map(jnp.asarray, model)


def calibrated() -> QuantizedDiT:
    """A model that was quantized in earnest: factors are folded wherever they can be."""
    model = salient_model(helpers.tiny_model())
    config = QuantConfig.of(
        balance="csb+ssc",
        rounding="nearest",
        weight_bits=4,
        range_search="minmax",
        calib_steps=2,
        calib_rows=4,
        steps=2,
        step_groups=2,
    )
    return ptq.quantize(jax.tree.map(jnp.asarray, model), config, key=jax.random.key(0))


def without_quantizers(model):
    """The fake-quant twin whose sites only balance."""
    balances = {
        name: ChannelScale(quantizer.balance)
        for name, quantizer in flatten_sites(model.quantizers).items()
        if getattr(quantizer, "balance", None) is not None
    }
    assert {"blocks.proj_in", "blocks.fc2_in"} <= set(balances)
    return model.replace(quantizers=nest_sites(balances))


@pytest.mark.parametrize("make", [build, pytest.param(calibrated, marks=pytest.mark.slow)])
def test_a_quantized_model_without_its_activation_quantizers(make, tmp_path):
    quantized = make()
    expected = without_quantizers(reference(quantized))
    path = export_meta(quantized, tmp_path / "x.safetensors")
    exported, found = import_checkpoint(path, num_heads=quantized.config.num_heads)
    assert found.config == quantized.config
    x, y = helpers.random_inputs(quantized.config, 4)
    t = np.array([0, 300, 700, 999])
    wanted = expected.jitted()(x, t, y)
    assert helpers.relative_error(exported.jitted()(x, t, y), wanted) < 1e-5
    plain = expected.replace(quantizers={})
    assert helpers.relative_error(plain.jitted()(x, t, y), wanted) > 1e-2, "the factors matter"
    # A float model whose factors stand at its sites is exported the same.
    again = import_checkpoint(export_meta(expected, tmp_path / "y.safetensors"), num_heads=quantized.config.num_heads)[0]
    jax.tree.map(np.testing.assert_array_equal, again.params, exported.params)


def test_what_cannot_be_exported(tmp_path, raises_sentence):
    diffusers, _ = import_checkpoint(foreign_files.DIFFUSERS, as_diffusers=True)
    with raises_sentence("freq_shift 0", "this model has 1"):
        export_meta(diffusers, tmp_path / "x.safetensors")
    model = helpers.tiny_model()
    path = export_meta(model, tmp_path / "x.safetensors")
    with raises_sentence("exists already"):
        export_meta(model, path)
    before = path.read_bytes()
    assert export_meta(model, path, overwrite=True).read_bytes() == before
    with raises_sentence("is a folder"):
        export_meta(model, tmp_path, overwrite=True)
    params = {name: value for name, value in model.params.items() if name != "time_fc1"}
    with raises_sentence("missing: time_fc1/bias, time_fc1/kernel"):
        export_meta(dataclasses.replace(model, params=params), tmp_path / "y.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_quantized_flow_is_exported_as_sit(tmp_path):
    """Its variance channels, which nothing reads, go out as the zeros by which an import tells a SiT."""
    model = dataclasses.replace(build(), schedule=FlowSchedule())
    again, found = import_checkpoint(export_meta(model, tmp_path / "x.safetensors"), num_heads=4)
    assert (found.layout, again.schedule, again.config.learn_sigma) == ("SiT", FlowSchedule(), False)
    weights = reference(model).params["final"]["kernel"].reshape(-1, 4, 2, 3)[:, :, 0].reshape(-1, 12)
    np.testing.assert_array_equal(again.params["final"]["kernel"], weights)
