"""DiTs whose tables differ from the published ones: positions that are parameters, and no table of labels at all.

The expected outputs are NumPy's in float64, from the weights under Meta's names.
"""

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference_dit
from helpers import PLAIN, as_float64, random_inputs, relative_error, structure, tiny_config, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints
from ptq4dit_jax.calibration import stored_rows
from ptq4dit_jax.checkpoints.foreign import export_meta, open_tensors
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.hashing import flatten
from ptq4dit_jax.networks.dit import init_params
from ptq4dit_jax.sampling import check_labels

KEY = jax.random.key(4)
#: What each kind of network has instead of the published tables.
KINDS: dict[str, dict[str, Any]] = {
    "positions": {"position_table": True},
    "no classes": {"num_classes": 0, "null_class": False},
    "both": {"position_table": True, "num_classes": 0, "null_class": False},
}
SETTINGS = {"weight_bits": 4, "range_search": "minmax", "calib_steps": 2, "calib_rows": 4, "steps": 2, "step_groups": 2}

each_kind = pytest.mark.parametrize("kind", KINDS)
apply = jax.jit(lambda model, *args: model.apply(*args))


def float_model(kind):
    return tiny_model(frequency_size=256, **KINDS[kind])


def guidance(model):
    return 1.5 if model.config.null_class else 1.0


@cache
def quantized_model(kind):
    model = float_model(kind)
    config = ptq.QuantConfig.of(**PLAIN, **SETTINGS, cfg_scale=guidance(model))
    return ptq.quantize(jax.tree.map(jnp.asarray, model), config, key=KEY)


def labels_of(model, rows):
    return random_inputs(model.config, rows)[1] if model.config.num_labels else None


def numpy_forward(tensors, heads, x, t, y):
    """The network in float64, with the table of positions that is given, and labels only where there is a table."""
    ref, meta = reference_dit, {name: array.astype(np.float64) for name, array in tensors.items()}
    config = ref.Config(heads)
    hidden = ref.patch_embed(meta, x.transpose(0, 3, 1, 2)) + meta["positions"]
    time = ref.linear(meta, "t_embedder.mlp.0", ref.time_features(t))
    c = ref.linear(meta, "t_embedder.mlp.2", ref.silu(time))
    if "y_embedder.embedding_table.weight" in meta:
        c = c + meta["y_embedder.embedding_table.weight"][y]
    c = np.broadcast_to(c, (len(x), c.shape[1]))
    for index in range(2):
        hidden = ref.block(meta, config, index, hidden, c)
    shift, scale = np.split(ref.linear(meta, "final_layer.adaLN_modulation.1", ref.silu(c)), 2, axis=1)
    out = ref.linear(meta, "final_layer.linear", ref.modulate(ref.layer_norm(hidden, 1e-6), shift, scale))
    return ref.unpatchify(out, 2).transpose(0, 2, 3, 1)


def meta_tensors(model, tmp_path):
    return {name: tensor.read() for name, tensor in open_tensors(export_meta(model, tmp_path / "x.safetensors")).items()}


# The float network ------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("t", [[0, 300, 700, 999], [450]], ids=["each its own", "one for all"])
def test_the_float_network_is_numpys(kind, t, tmp_path):
    model = float_model(kind)
    table = model.params["position_embed"]["embedding"] if "position_embed" in model.params else reference_dit.pos_embed(32, 3)
    tensors = meta_tensors(model, tmp_path) | {"positions": np.asarray(table)}
    x, t, y = random_inputs(model.config, 4)[0], np.array(t), labels_of(model, 4)
    expected = numpy_forward(tensors, 4, x, t, y)
    assert relative_error(apply(model, x, t, y), expected) < 1e-5
    assert relative_error(model.apply(x, t, y), expected) < 1e-5, "without jit"
    if "position_embed" in model.params:
        fixed = numpy_forward(tensors | {"positions": reference_dit.pos_embed(32, 3)}, 4, x, t, y)
        assert relative_error(fixed, expected) > 1e-2, "the table matters"


def test_labels_of_a_network_without_classes_are_ignored():
    model = float_model("no classes")
    x, t = random_inputs(model.config, 3)[0], np.array([5, 500, 900])
    expected = apply(model, x, t)
    for y in (None, np.zeros(3, np.int32), np.array([4, 8, 700])):
        np.testing.assert_array_equal(apply(model, x, t, y), expected)


@pytest.mark.parametrize("make", [tiny_model, lambda: quantized_model("positions")], ids=["float", "integer"])
def test_a_network_with_classes_needs_labels(make, raises_sentence):
    model = make()
    with raises_sentence("5 classes", "None"):
        model.apply(random_inputs(model.config, 2)[0], np.array([3]))


@each_kind
def test_parameters(kind):
    config = tiny_config(**KINDS[kind])
    params = flatten(jax.eval_shape(lambda: init_params(config, KEY)))
    assert ("position_embed/embedding" in params) == config.position_table
    assert ("label_embed/embedding" in params) == (config.num_labels > 0)
    if config.position_table:
        assert params["position_embed/embedding"].shape == (9, 32)
    plain, ours = (jax.eval_shape(lambda c=c: ptq.FloatDiT.init(c, key=KEY)).num_params for c in (tiny_config(), config))
    assert ours == plain + (9 * 32 if config.position_table else 0) - (0 if config.num_labels else 6 * 32)


def test_no_null_class_without_classes(raises_sentence):
    with raises_sentence("num_classes 0", "null_class=False"):
        tiny_config(num_classes=0)
    with raises_sentence("num_classes", "-1"):
        tiny_config(num_classes=-1, null_class=False)
    with raises_sentence("no classes", "cfg_scale 1"):
        _ = tiny_config(num_classes=0, null_class=False).null_label


# Quantization -----------------------------------------------------------------------------------------


@each_kind
def test_the_integer_network_is_its_fake_quant_twin(kind):
    model = quantized_model(kind)
    x, t, y = random_inputs(model.config, 4)[0].astype(np.float64), np.array([450]), labels_of(model, 4)
    with jax.enable_x64(True):
        engine = as_float64(model)
        ours, twin = apply(engine, x, t, y), apply(ptq.reference(engine), x, t, y)
        assert relative_error(ours, twin) < 1e-9
        if model.config.position_table:
            assert engine.position_embed is not None
            moved = dataclasses.replace(engine, position_embed=engine.position_embed[::-1])
            assert relative_error(apply(moved, x, t, y), ours) > 1e-2, "the table matters"


@each_kind
def test_the_quantized_model_carries_the_tables_as_they_are(kind):
    model, quantized = float_model(kind), quantized_model(kind)
    for name in ("position_embed", "label_embed"):
        table = getattr(quantized, name)
        if name in model.params:
            assert table.dtype == jnp.float32
            np.testing.assert_array_equal(table, model.params[name]["embedding"])
        else:
            assert table is None
    x, t, y = random_inputs(model.config, 4)[0], np.array([300]), labels_of(model, 4)
    assert relative_error(apply(quantized, x, t, y), apply(model, x, t, y)) < 0.5


@each_kind
def test_folding_leaves_the_function(kind):
    model = float_model(kind)
    rng = np.random.default_rng(3)
    factors = {f"{name}_in": jnp.asarray(np.exp(rng.normal(size=(2, 32))), jnp.float32) for name in ("qkv", "proj", "fc1")}
    folded = ptq.Balanced.by(model, factors).folded
    x, t, y = random_inputs(model.config, 4)[0], np.array([0, 300, 700, 999]), labels_of(model, 4)
    assert relative_error(apply(folded, x, t, y), apply(model, x, t, y)) < 1e-5


@pytest.mark.slow
def test_reconstruction():
    model = float_model("both")
    learn = Reconstruction(iterations=3, batch_size=2)
    config = ptq.QuantConfig.of(**SETTINGS, cfg_scale=guidance(model), balance="csb+ssc", reconstruction=learn)
    learned = ptq.quantize(jax.tree.map(jnp.asarray, model), config, key=KEY)
    x, t = random_inputs(model.config, 4)[0], np.array([300])
    assert relative_error(apply(learned, x, t), apply(model, x, t)) < 0.5
    assert set(learned.provenance.facts["reconstruction"]) >= {"embed image", "embed condition"}


# Folders and files ------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("make", [float_model, quantized_model], ids=["float", "integer"])
def test_through_a_folder(make, kind, tmp_path):
    model = make(kind)
    again = checkpoints.load(checkpoints.save(model, tmp_path / "model"))
    assert again.config == model.config
    assert structure(again) == structure(jax.tree.map(jnp.asarray, model))
    jax.tree.map(np.testing.assert_array_equal, again, model)
    written = json.loads((tmp_path / "model/config.json").read_text())["config"]
    assert written.get("position_table", False) is model.config.position_table


@pytest.mark.parametrize("make", [tiny_model, lambda: quantized_model("no classes")], ids=["float", "integer"])
def test_folders_with_the_fixed_table_hold_no_setting_that_older_versions_refuse(make, tmp_path):
    checkpoints.save(make(), tmp_path / "model")
    assert "position_table" not in json.loads((tmp_path / "model/config.json").read_text())["config"]


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        ("positions", {"position_table": False}, ("unexpected: position_embed",)),
        ("no classes", {"position_table": True}, ("missing: position_embed",)),
        ("no classes", {"num_classes": 3}, ("missing: label_embed",)),
        ("positions", {"num_classes": 0, "null_class": False}, ("unexpected: label_embed",)),
    ],
)
@pytest.mark.parametrize("make", [float_model, quantized_model], ids=["float", "integer"])
def test_tables_that_do_not_fit_the_settings(make, kind, change, parts, tmp_path, raises_sentence):
    model = make(kind)
    _, meta = checkpoints.store.read(checkpoints.save(model, tmp_path / "model"))
    meta = {**meta, "config": {**meta["config"], **change}}
    flat = flatten(model.params) if isinstance(model, ptq.FloatDiT) else None
    load = checkpoints.float_dit.load_float if flat else checkpoints.quantized_dit.load_quantized
    with raises_sentence(*parts):
        load(flat or checkpoints.quantized_dit._flatten(model), meta)


@each_kind
@pytest.mark.parametrize("make", [float_model, quantized_model], ids=["float", "integer"])
def test_an_export_holds_the_tables_that_there_are(make, kind, tmp_path):
    model = make(kind)
    tensors = meta_tensors(model, tmp_path)
    expected = reference_dit.pos_embed(32, 3)
    if model.config.position_table:
        expected = model.params["position_embed"]["embedding"] if make is float_model else model.position_embed
    np.testing.assert_allclose(tensors["pos_embed"], np.asarray(expected)[None], rtol=0, atol=1e-7)
    assert ("y_embedder.embedding_table.weight" in tensors) == (model.config.num_labels > 0)


# Sampling, calibrating, comparing ---------------------------------------------------------------------


def test_what_stands_for_labels_without_classes():
    config = tiny_config(**KINDS["no classes"])
    labels: Any
    for labels, count in ((None, 1), (1, 1), (3, 3), (np.int64(2), 2), ([0], 1), (np.zeros(4, np.uint8), 4)):
        got = check_labels(labels, config)
        np.testing.assert_array_equal(got, np.zeros(count))
        assert got.dtype == np.int32


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ([0, 7, 3], "Label 7"),
        ([-1], "Label -1"),
        (0, "not 0"),
        (-2, "not -2"),
        (1.5, "1.5"),
        ([], "[]"),
        ([[0]], "[[0]]"),
        ("0-9", "'0-9'"),
        (True, "True"),
    ],
)
def test_labels_that_a_model_without_classes_refuses(labels, part, raises_sentence):
    with raises_sentence("no", "classes" if "Label" not in part else "number of images", part):
        check_labels(labels, tiny_config(**KINDS["no classes"]))


def test_labels_of_a_model_with_classes_cannot_be_none(raises_sentence):
    with raises_sentence("non-empty list of integers", "None"):
        check_labels(None, tiny_config())


@pytest.mark.parametrize("make", [float_model, quantized_model], ids=["float", "integer"])
def test_sampling_without_classes(make, raises_sentence):
    model = make("both")
    run: dict[str, Any] = {"steps": 2, "cfg_scale": 1.0}
    images = ptq.sample(model, 3, key=KEY, **run)
    assert images.shape == (3, 6, 6, 3)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(ptq.sample(model, np.zeros(3, np.int32), key=KEY, **run), images)
    one = ptq.sample(model, None, key=KEY, **run)
    assert one.shape == (1, 6, 6, 3)
    with raises_sentence("no classes", "cfg_scale 1"):
        ptq.sample(model, 3, key=KEY, steps=2, cfg_scale=1.5)


def test_the_chain_without_classes_is_numpys(tmp_path):
    """Two steps of DDIM, written out."""
    model = float_model("both")
    tensors = meta_tensors(model, tmp_path) | {"positions": np.asarray(model.params["position_embed"]["embedding"])}
    noise = np.random.default_rng(2).normal(size=(3, 6, 6, 3))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = noise
    for t, before in ((500, 0), (0, None)):
        eps = numpy_forward(tensors, 4, x, np.array([t]), None)[..., :3]
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        x = x0 if before is None else np.sqrt(abar[before]) * x0 + np.sqrt(1 - abar[before]) * eps
    got = ptq.sample(model, 3, key=KEY, steps=2, sampler="ddim", cfg_scale=1.0, noise=noise)
    assert relative_error(got, x) < 1e-4


@each_kind
def test_eight_devices_give_the_images_of_one(kind, mesh8):
    model = quantized_model(kind)
    labels = np.arange(16) % 5 if model.config.num_labels else 16
    run: dict[str, Any] = {"steps": 2, "cfg_scale": guidance(model)}
    once = ptq.sample(model, labels, key=KEY, batch_size=2, **run)
    np.testing.assert_array_equal(ptq.sample(model, labels, key=KEY, mesh=mesh8, **run), once)


def test_eight_devices_sample_the_float_model_alike(mesh8):
    model = float_model("both")
    run: dict[str, Any] = {"steps": 2, "cfg_scale": 1.0}
    images = ptq.sample(model, 8, key=KEY, **run)
    assert relative_error(ptq.sample(model, 8, key=KEY, mesh=mesh8, **run), images) < 1e-4


def test_calibration_rows_without_labels(raises_sentence):
    config = tiny_config(**KINDS["no classes"])
    x, t = np.zeros((4, 6, 6, 3)), np.array([9, 9, 700, 700])
    for y in (None, np.zeros(4, np.int64)):
        rows = stored_rows(x, t, y, config)
        np.testing.assert_array_equal(rows.y, np.zeros((2, 2)))
    with raises_sentence("Label 2"):
        stored_rows(x, t, np.array([0, 2, 0, 0]), config)
    with raises_sentence("(4,)", "(3,)"):
        stored_rows(x, t, np.zeros(3, np.int64), config)
    with raises_sentence("None"):
        stored_rows(x, t, None, tiny_config())


@pytest.mark.slow
def test_comparison_without_classes():
    model = float_model("both")
    comparison = ptq.compare(model, {"q": quantized_model("both")}, labels=4, key=KEY, sampling=ptq.Sampling(steps=2))
    assert comparison.images["q"].shape == (4, 6, 6, 3)
    assert all(np.isfinite(layer).all() for layer in comparison.figures["q"].layer_sqnr_db.values())
    assert comparison.figures["q"].step_sqnr_db.min() > 3
