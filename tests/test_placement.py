"""Models that several devices hold between them: what is cut, what it costs in words between devices, and the same results."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, random_inputs, tiny_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ptq4dit_jax as ptq
from ptq4dit_jax import placement, sampling, sharding
from ptq4dit_jax.chain import sample_batch
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.model import ModelFace
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.placement import Cut
from ptq4dit_jax.reconstruction import reconstruct, round_closed_form

KEY = jax.random.key(5)
LABELS = np.arange(8) % 5
SETTINGS: dict[str, Any] = {**PLAIN, "range_search": "minmax", "calib_steps": 2, "calib_rows": 12, "steps": 3}


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    """D = 32 and four heads, so that two and four devices can share it; N = 64 of fc1 is one block of packed rows."""
    return jax.tree.map(jnp.asarray, tiny_model(hidden_size=32, num_heads=4, depth=2, mlp_ratio=2.0))


@pytest.fixture(scope="module")
def quantized(model: ptq.FloatDiT) -> ptq.QuantizedDiT:
    return ptq.quantize(model, ptq.QuantConfig.of(**SETTINGS), key=KEY)


def mesh_of(data: int, model: int) -> Mesh:
    return ptq.data_mesh(jax.devices()[: data * model], model=model)


def specs_by_name(model: ModelFace, size: int, **rules: Any) -> dict[str, PartitionSpec]:
    found = jax.tree_util.tree_leaves_with_path(
        placement.specs(model, size, **rules), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in found}


def test_what_of_a_float_model_is_cut(model: ptq.FloatDiT) -> None:
    found = specs_by_name(model, 4)
    cut = {name.removeprefix("params/"): tuple(spec) for name, spec in found.items() if "model" in tuple(spec)}
    assert cut == {
        "blocks/qkv/kernel": (None, None, "model"),
        "blocks/qkv/bias": (None, "model"),
        "blocks/proj/kernel": (None, "model"),
        "blocks/fc1/kernel": (None, None, "model"),
        "blocks/fc1/bias": (None, "model"),
        "blocks/fc2/kernel": (None, "model"),
        "blocks/adaLN/kernel": (None, None, "model"),
        "blocks/adaLN/bias": (None, "model"),
        "time_fc1/kernel": (None, "model"),
        "time_fc1/bias": ("model",),
        "time_fc2/kernel": ("model",),
        "final_adaLN/kernel": (None, "model"),
        "final_adaLN/bias": ("model",),
    }
    assert len(found) == len(jax.tree.leaves(model))


def test_what_of_a_quantized_model_is_cut(quantized: ptq.QuantizedDiT) -> None:
    found = {name: tuple(spec) for name, spec in specs_by_name(quantized, 2).items()}
    assert found["linears/blocks.qkv/weight/values"] == (None, "model")
    assert found["linears/blocks.qkv/weight/scale"] == (None, "model")
    assert found["linears/blocks.qkv/bias"] == (None, None, "model")
    assert found["linears/blocks.proj/act/scale"] == ()
    assert found["linears/blocks.fc2/weight/values"] == (None, None, "model")
    assert found["linears/blocks.fc2/weight/scale"] == ()
    assert found["linears/blocks.fc2/bias"] == ()
    assert found["linears/blocks.proj/act/balance"] == (None, "model")
    assert found["linears/patch_embed/weight/values"] == ()


def test_packed_rows_are_cut_in_whole_blocks(model: ptq.FloatDiT) -> None:
    """Blocks of 64 rows of 4 bits: of 64 rows there is one, of 128 there are two; otherwise the contraction is cut."""
    packed = lambda width: jax.eval_shape(
        lambda: ptq.quantizers.QTensor.from_codes(
            jnp.zeros((width, 32), jnp.uint8), jnp.ones(width), jnp.zeros(width, jnp.uint8), 4
        )
    )
    fields = lambda weight: {"weight.values": weight.values, "weight.scale": weight.scale}
    assert placement._chosen(fields(packed(64)), 2, Cut.OUTPUT) is Cut.CONTRACTION
    assert placement._chosen(fields(packed(128)), 2, Cut.OUTPUT) is Cut.OUTPUT
    assert placement._chosen(fields(packed(96)), 2, Cut.OUTPUT) is Cut.CONTRACTION
    assert placement._chosen(fields(packed(96)), 3, Cut.CONTRACTION) is Cut.WHOLE


def test_own_rules(model: ptq.FloatDiT) -> None:
    """The first that matches the whole name decides; what none matches, or nothing divides, stays whole."""
    found = specs_by_name(model, 2, rules=((r"fc1", Cut.CONTRACTION), (r"fc.", Cut.WHOLE)))
    assert found["params/blocks/fc1/kernel"] == PartitionSpec(None, "model")
    assert set(found.values()) == {PartitionSpec(), PartitionSpec(None, "model")}
    assert {spec for name, spec in specs_by_name(model, 3).items() if "fc1" in name} == {PartitionSpec()}


def test_a_device_holds_its_part(quantized: ptq.QuantizedDiT) -> None:
    placed = placement.placed(mesh_of(2, 4), quantized)
    weights = lambda model: [layer.weight.values for layer in model.linears.values()]
    whole, held = (sum(map(sharding.bytes_per_device, weights(each))) for each in (quantized, placed))
    small = sum(quantized.linears[name].weight.values.nbytes for name in ("patch_embed", "final"))
    assert held == (whole - small) / 4 + small
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed.linears), sharding.to_host(quantized.linears))


@pytest.mark.parametrize("kind", ["float", "w8a8"])
@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_samples_are_those_of_one_device(kind: str, shape: tuple[int, int], request: pytest.FixtureRequest, mesh8: Any) -> None:
    """But for the order of float sums; sums of integers are exact."""
    model = request.getfixturevalue("model" if kind == "float" else "quantized")
    alone = ptq.sample(model, LABELS, key=KEY, steps=3)
    shared = ptq.sample(model, LABELS, key=KEY, steps=3, mesh=mesh_of(*shape))
    np.testing.assert_allclose(shared, alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_the_number_of_models_does_not_matter(quantized: ptq.QuantizedDiT, mesh8: Any) -> None:
    found = [ptq.sample(quantized, LABELS, key=KEY, steps=3, mesh=mesh_of(data, 2), batch_size=8) for data in (4, 2)]
    assert found[0].tobytes() == found[1].tobytes()


def test_devices_exchange_sums_of_integers_and_no_weights(quantized: ptq.QuantizedDiT, mesh8: Any) -> None:
    """One all-reduce of int32 in a block for each layer that is cut along its contraction."""
    resolved = ptq.Sampling(steps=1).resolve(quantized.schedule, quantized.config)
    request = sampling._prepare(quantized, LABELS, KEY, resolved, mesh=mesh_of(2, 4))
    arguments, program = request.call(np.arange(8))
    text = str(sample_batch.lower(*arguments, program=program).compile().as_text())
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", text)
    assert [kind for kind, _ in sums].count("s32") >= 2  # proj and fc2
    tokens, width = quantized.config.num_tokens, quantized.config.hidden_size
    assert {sides for kind, sides in sums if kind == "s32"} == {
        f"{len(LABELS)},{tokens},{width}"
    }  # guided, on two meshes of four
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    layers = [layer.weight.shape for layer in quantized.linears.values()]
    sizes = {int(np.prod(shape)) for shape in layers} | {int(np.prod(shape[-2:])) for shape in layers}
    assert not [sides for kind, sides in gathered if kind == "s8" and np.prod([*map(int, sides.split(","))]) in sizes]


def test_calibration_on_devices_that_share_the_model(model: ptq.FloatDiT, quantized: ptq.QuantizedDiT, mesh8: Any) -> None:
    """Codes differ by float sums in another order; how many models there are makes no difference at all."""
    config = ptq.QuantConfig.of(**SETTINGS)
    several, one = (ptq.quantize(model, config, key=KEY, mesh=mesh_of(data, 2)) for data in (4, 1))
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(several.linears), sharding.to_host(one.linears))
    for name, layer in quantized.linears.items():
        codes = np.asarray(several.linears[name].weight.values).astype(int) - np.asarray(layer.weight.values)
        assert np.abs(codes).max() <= 1, name
        assert np.mean(codes != 0) < 0.01, name
        np.testing.assert_allclose(several.linears[name].weight.scale, layer.weight.scale, rtol=1e-4)
    values = several.linears["blocks.fc1"].weight.values
    assert values.sharding.is_equivalent_to(NamedSharding(mesh_of(4, 2), PartitionSpec(None, "model")), values.ndim)
    shared, alone = (each.provenance.facts["quality"]["sqnr_mean_db"] for each in (several, quantized))
    assert shared == pytest.approx(alone, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["closed form", "learning"])
def test_rounding_takes_every_device_for_itself(
    method: str, model: ptq.FloatDiT, quantized: ptq.QuantizedDiT, mesh8: Any
) -> None:
    """A unit fits anywhere, so its rows go to all devices: the same bytes as on a mesh without an axis ``model``."""
    x, _ = random_inputs(model.config, 16)
    rows = ptq.CalibrationData(
        x=x.reshape(2, 8, *x.shape[1:]), t=np.array([900, 20], np.int32), y=np.arange(16, dtype=np.int32).reshape(2, 8) % 5
    )
    settings = Reconstruction(iterations=4, batch_size=8, start="nearest")
    found = []
    for mesh in (mesh_of(4, 2), mesh8):
        placed = placement.put((model, quantized), sharding.home(mesh))
        if method == "closed form":
            found.append(round_closed_form(*placed, rows, search="minmax", mesh=mesh)[0])
        else:
            found.append(reconstruct(*placed, rows, settings, key=KEY, mesh=mesh)[0])
    jax.tree.map(np.testing.assert_array_equal, *(sharding.to_host(each.linears) for each in found))


def test_a_lightning_dit(mesh8: Any) -> None:
    """Its gains and its gated MLP, whose two halves a cut of fc1 crosses."""
    config = LightningDiTConfig(input_size=4, patch_size=1, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=5)
    model = ptq.FloatDiT.init(config, key=KEY, schedule=ptq.FlowSchedule())
    alone = ptq.sample(model, LABELS, key=KEY, steps=2)
    shared = ptq.sample(model, LABELS, key=KEY, steps=2, mesh=mesh_of(2, 4))
    np.testing.assert_allclose(shared, alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_what_is_refused(quantized: ptq.QuantizedDiT, mesh8: Any, raises_sentence: Any) -> None:
    with raises_sentence("A model on 3 devices", "not 8", "--model-devices"):
        ptq.data_mesh(model=3)
    with raises_sentence("A model on 0 devices"):
        ptq.data_mesh(model=0)
    with raises_sentence("none named 'rows'"):
        ptq.sample(quantized, LABELS, key=KEY, mesh=Mesh(mesh8.devices.reshape(4, 2), ("data", "rows")))
    with raises_sentence("'fp8' run on one device each", "xla or auto"):
        ptq.sample(quantized.replace(backend="fp8"), LABELS, key=KEY, mesh=mesh_of(4, 2))


def test_axes_in_another_order(quantized: ptq.QuantizedDiT, mesh8: Any) -> None:
    mesh = Mesh(mesh_of(4, 2).devices.T, ("model", "data"))
    assert sharding.places_of(mesh) == sharding.places_of(mesh_of(4, 2))
    found = [ptq.sample(quantized, LABELS, key=KEY, steps=2, mesh=each) for each in (mesh, mesh_of(4, 2))]
    assert found[0].tobytes() == found[1].tobytes()


def test_batches_fit_by_the_bytes_of_a_device(quantized: ptq.QuantizedDiT, mesh8: Any) -> None:
    """A batch that is asked for is measured where the parts of the model are."""
    found = ptq.sample(quantized, np.arange(600) % 5, key=KEY, steps=1, mesh=mesh_of(2, 4), batch_size=600)
    assert found.shape[0] == 600
