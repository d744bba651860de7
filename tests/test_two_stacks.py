"""A network that the package has not heard of goes through the whole pipeline: its tables are all that is known of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import act_of, random_inputs, relative_error, same_bytes
from two_stacks import CONFIG, TwoStacks

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.networks import registry


@pytest.fixture(autouse=True)
def known(monkeypatch) -> None:
    monkeypatch.setitem(registry.NETWORKS, "two_stacks", TwoStacks)


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    return ptq.FloatDiT.init(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def rows() -> CalibrationData:
    x, y = random_inputs(CONFIG, 24)
    return CalibrationData(x=x.reshape(3, 8, *x.shape[1:]), t=np.array([900, 400, 10], np.int32), y=y.reshape(3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("learned", [None, ptq.Reconstruction(iterations=10, batch_size=8)], ids=["gptq", "adaround"])
def test_it_is_quantized_described_saved_loaded_and_sampled(learned, model, rows, tmp_path):
    config = ptq.QuantConfig.of(reconstruction=learned, policy="edges8-float,mlps.down=6")
    quantized = ptq.quantize(model, config, key=jax.random.key(0), calibration=rows)
    facts = quantized.provenance.facts["rounding" if learned is None else "reconstruction"]
    assert list(facts) == ["embed image", "embed condition", *(f"mixer {i}" for i in range(3)), "mlp 0", "mlp 1", "head"]
    assert quantized.provenance.facts["quality"]["sqnr_mean_db"] > 25
    described = {row.layer: row for row in ptq.describe(quantized)}
    assert described["mlps.down"].weight_bits == 6
    assert {described[f"mixers.{name}"].runs for name in ("qkv", "out", "q @ k")} == {"int8 x int8 -> int32"}
    assert act_of(quantized, "mlps.down").balance is None
    x, y = random_inputs(CONFIG, 4, seed=2)
    arguments = x, jnp.array([500]), y
    assert relative_error(quantized.apply(*arguments), ptq.reference(quantized).apply(*arguments)) < 1e-4
    loaded = ptq.load(ptq.save(quantized, tmp_path / "q"))
    assert type(loaded.config) is TwoStacks
    assert same_bytes(loaded, quantized)
    images = [ptq.sample(each, np.array([0, 1]), key=jax.random.key(1), steps=3) for each in (model, loaded)]
    assert relative_error(*reversed(images)) < 0.2


def test_a_policy_names_its_layers_and_no_others(model, rows, raises_sentence):
    with raises_sentence("Unknown layer 'blocks.fc1'", "mixers.qkv", "mlps.down"):
        ptq.quantize(model, ptq.QuantConfig.of(policy="uniform,blocks.fc1=4"), key=jax.random.key(0), calibration=rows)
