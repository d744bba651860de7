"""A network that the package has not heard of goes through the whole pipeline: its tables are all that is known of it.

It has two stacks of blocks with other layers than a DiT's: the first is attention alone, the second an MLP behind a norm that
is scaled and not shifted. Only its settings are those of a DiT.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import act_of, random_inputs, relative_error, same_bytes

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.networks import registry
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Activation, Norm, NormKind
from ptq4dit_jax.networks.spec import Columns, Linear, Modulation, NetworkSpec, Place, Residual, Role, Site, Stack, UnitKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStacks(DiTConfig):
    """``depth`` blocks of attention, then as many of an MLP with one block less."""

    def _make_spec(self) -> NetworkSpec:
        D, plain = self.hidden_size, super()._make_spec()
        image, condition, _, head = plain.kinds
        mixers, mlps = Stack("mixers", self.depth), Stack("mlps", self.depth - 1)
        at = lambda linear, name, **more: Site(linear.place.beside(name), (linear.K,), feeds=linear, **more)
        of_mixers = lambda name, K, N, **more: Linear(Place(name, mixers), K, N, **more)
        of_mlps = lambda name, K, N, **more: Linear(Place(name, mlps), K, N, **more)
        scales = of_mixers("scales", D, 2 * D, modulates=2)
        qkv, out = of_mixers("qkv", D, 3 * D), of_mixers("out", D, D)
        scale, up, down = of_mlps("scale", D, 2 * D, modulates=2), of_mlps("up", D, 4 * D), of_mlps("down", 2 * D, D)
        heads, inner = (self.num_heads, self.head_width), lambda name: Place(name, mixers)
        mixer_sites = (
            at(scales, "scales_in"),
            at(qkv, "qkv_in", home=Modulation("scales", shift=None, scale=0, of=2), reduced=True),
            *(Site(inner(name), heads) for name in "qk"),
            Site(inner("v"), heads, home=Columns("qkv", part=2, of=3, undone="out_in")),
            Site(inner("probs"), (self.num_tokens,), nonnegative=True),
            at(out, "out_in", home=Residual()),
        )
        mlp_sites = (
            at(scale, "scale_in"),
            at(up, "up_in", home=Modulation("scale", shift=None, scale=0, of=2)),
            at(down, "down_in", home=Columns("up", part=1, of=2)),
        )
        kinds = (
            image,
            condition,
            UnitKind(Role.BLOCK, (scales, qkv, out), mixer_sites, stack=mixers),
            UnitKind(Role.BLOCK, (scale, up, down), mlp_sites, stack=mlps),
            head,
        )
        outputs = (Place("q", mixers), Place("out_out", mixers), Place("down_out", mlps))
        return NetworkSpec.of(kinds, plain.tables, outputs)

    def block(self, ops, stack, x_BTD, c_BD):
        if stack.name == "mixers":
            scale, gate = ops.modulation("scales", c_BD, 2)
            q, k, v = ops.split("qkv", ops.normed("qkv", x_BTD, None, scale, Norm()), 3)
            return ops.gated("out", ops.attend(q, k, v, self.num_heads, "out"), gate, x_BTD)
        scale, gate = ops.modulation("scale", c_BD, 2)
        fed = ops.normed("up", x_BTD, None, scale, Norm(kind=NormKind.RMS))
        return ops.gated("down", ops.activated("up", fed, Activation.SWIGLU, "down"), gate, x_BTD)


CONFIG = TwoStacks(
    input_size=6, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5, frequency_size=16
)


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
