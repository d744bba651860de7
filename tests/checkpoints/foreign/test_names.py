"""Names in their normal form, and which set of weights is taken."""

import flax
import foreign_files
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from foreign_files import META, OUTPUTS, save_safetensors, write_pickle

from ptq4dit_jax.checkpoints.foreign import import_checkpoint, open_tensors
from ptq4dit_jax.checkpoints.foreign.names import normal_name, normal_names, says_average


@pytest.fixture(scope="module")
def meta():
    return {name.removeprefix("ema."): t.read() for name, t in open_tensors(META).items() if name.startswith("ema.")}


@pytest.fixture(scope="module")
def other(meta):
    """Weights of the same network that are not the ones wanted."""
    return {name: array if name == "pos_embed" else array + 1 for name, array in meta.items()}


def assert_is_meta_ema(model):
    x, out = (OUTPUTS[name].transpose(0, 2, 3, 1) for name in ("x", "meta_ema"))
    ours = np.asarray(model.jitted()(x, OUTPUTS["t"], OUTPUTS["y"]))
    assert np.abs(ours - out).max() <= 2e-5 * np.abs(out).max()


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("blocks.0._orig_mod.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("_orig_mod.module.blocks.0.x", "blocks.0.x"),
        ("_forward_module.blocks.1.module.x", "blocks.1.x"),
        ("_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.x", "blocks.0.x"),
        ("_fpw_module.x.y", "x.y"),
        ("_modules.blocks._modules.0._parameters.weight", "blocks.0.weight"),
        ("_modules.bn._buffers.mean", "bn.mean"),
        ("params/Dense_0/kernel", "params.Dense_0.kernel"),
        ("['params']['Dense_0']['kernel']", "params.Dense_0.kernel"),
        (".params['blocks'][0].kernel", "params.blocks.0.kernel"),
        ("network.blocks.0.kernel.value", "network.blocks.0.kernel"),
        ("network.blocks.0.kernel.raw_value", "network.blocks.0.kernel"),
        ("attention.value.kernel", "attention.value.kernel"),
        ("value", "value"),
        ("module", "module"),
        ("submodule.x", "submodule.x"),
    ],
)
def test_the_normal_form(name, normal):
    assert normal_name(name) == normal
    assert normal_name(normal) == normal


def test_names_that_would_be_one_stay_two():
    assert normal_names(["a.x", "module.a.x", "module.b.x"]) == {"a.x": "a.x", "module.a.x": "module.a.x", "b.x": "module.b.x"}


@pytest.mark.parametrize(
    "part", ["ema", "EMA", "net_ema", "ema_denoiser", "model_ema1", "modelEMA", "EMAModel", "netEma", "swa", "avg_model"]
)
def test_words_for_averages(part):
    assert says_average(part)


@pytest.mark.parametrize("part", ["schema", "cinema", "thematic", "embed", "model", "net", "emb_ma", "e_m_a"])
def test_words_that_are_none(part):
    assert not says_average(part)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("attn.", "attn._fsdp_wrapped_module.").replace("mlp.", "mlp._checkpoint_wrapped_module."),
        lambda name: name.replace(".", "/"),
        lambda name: f"generator._wrapped_module.{name}",
    ],
)
def test_wrapped_names(rename, meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", {rename(name): array for name, array in meta.items()})
    assert_is_meta_ema(import_checkpoint(path, num_heads=3)[0])


@pytest.mark.parametrize(
    ("trained", "averaged"),
    [
        ("denoiser", "ema_denoiser"),
        ("net", "net_ema"),
        ("model", "ema_0.9999"),
        ("state.params", "state.paramsEMA"),
        ("", "swa_model"),
    ],
)
def test_averages_under_any_name(trained, averaged, meta, other, tmp_path):
    arrays = {f"{averaged}.{name}": array for name, array in meta.items()}
    arrays |= {f"{trained}.{name}" if trained else name: array for name, array in other.items()}
    path = save_safetensors(tmp_path / "x.safetensors", arrays)
    model, found = import_checkpoint(path, num_heads=3)
    assert_is_meta_ema(model)
    assert found.ema
    assert averaged in found.words
    assert not import_checkpoint(path, num_heads=3, ema=False)[1].ema


def test_several_averages(meta, other, tmp_path, raises_sentence):
    sets = {"model": other, "ema_0.99": other, "ema_0.9999": meta}
    arrays = {f"{root}.{name}": array for root, weights in sets.items() for name, array in weights.items()}
    path = save_safetensors(tmp_path / "x.safetensors", arrays)
    with raises_sentence("2 sets of weights", "ema_0.99, ema_0.9999", "--weights NAME"):
        import_checkpoint(path, num_heads=3)
    model, found = import_checkpoint(path, num_heads=3, weights="ema_0.9999")
    assert_is_meta_ema(model)
    assert found.ema
    with raises_sentence("no weights named 'ema'", "model, ema_0.99, ema_0.9999"):
        import_checkpoint(path, num_heads=3, weights="ema")


@pytest.mark.parametrize("root", ["model.", "model.diffusion_model."])
def test_averages_without_dots(root, meta, other, tmp_path, raises_sentence):
    """As latent-diffusion's LitEma writes them: below the wrapped model, without its buffers."""
    inner = root.removeprefix("model.")
    averages = {"model_ema." + (inner + name).replace(".", ""): a for name, a in meta.items() if name != "pos_embed"}
    state = {root + name: array for name, array in other.items()} | averages | {"model_ema.decay": np.float32(0.99)}
    path = write_pickle(tmp_path / "last.pkl", {"state_dict": state})
    model, found = import_checkpoint(path, num_heads=3)
    assert_is_meta_ema(model)
    assert found.ema
    assert not import_checkpoint(path, num_heads=3, ema=False)[1].ema
    del state["model_ema." + (inner + "blocks.1.mlp.fc1.bias").replace(".", "")]
    write_pickle(path, {"state_dict": state})
    with raises_sentence("missing: blocks.1.mlp.fc1.bias"):
        import_checkpoint(path, num_heads=3)


@pytest.mark.parametrize("unread", [lambda m: {"shadow_params": list(m.values())}, lambda m: {"ema": {"w": m["pos_embed"][0]}}])
def test_averages_that_cannot_be_used_are_an_error(unread, meta, tmp_path, raises_sentence):
    path = write_pickle(tmp_path / "x.pkl", {"model": meta, "ema_state": unread(meta)})
    with raises_sentence("averaged weights", "ema_state", "--model-weights"):
        import_checkpoint(path, num_heads=3)
    assert_is_meta_ema(import_checkpoint(path, num_heads=3, ema=False)[0])


def kvfrans(tmp_path, tree):
    return import_checkpoint(write_pickle(tmp_path / "x.pkl", tree))[0]


def test_paths_as_keys(tmp_path):
    tree, golden = foreign_files.kvfrans()
    flat = traverse_util.flatten_dict({"params": tree})
    model = kvfrans(tmp_path, flat)
    out = np.asarray(model.jitted()(golden["x"], golden["t"], golden["y"]))
    assert np.abs(out - golden["out"]).max() <= 2e-5 * np.abs(golden["out"]).max()
    for keys in (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)},
        traverse_util.flatten_dict(tree, sep="/"),
        flax.core.freeze(tree),
    ):
        again = kvfrans(tmp_path, keys)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again.params, model.params))


@pytest.mark.parametrize("kind", ["pickle", "orbax"])
def test_copies_on_every_device(kind, tmp_path, raises_sentence):
    tree, _ = foreign_files.kvfrans()
    replicated = jax.tree.map(lambda a: np.stack([a] * 4), tree)
    path = tmp_path / "x"
    if kind == "orbax":
        ocp.PyTreeCheckpointer().save(path, {"params": replicated})
    else:
        write_pickle(path, {"params": replicated})
    model, plain = import_checkpoint(path)[0], kvfrans(tmp_path, tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), model.params, plain.params))
    replicated["FinalLayer_0"]["Dense_1"]["kernel"][2] += 1
    with raises_sentence("4 different copies of FinalLayer_0.Dense_1.kernel", "unreplicate"):
        kvfrans(tmp_path, replicated)


def test_a_table_of_labels_that_is_a_parameter_of_its_own(meta, tmp_path):
    changed = {name.removesuffix(".weight") if "embedding_table" in name else name: array for name, array in meta.items()}
    assert "y_embedder.embedding_table" in changed
    model, _ = import_checkpoint(foreign_files.write_torch(tmp_path / "x.pt", changed), num_heads=3)
    expected, _ = import_checkpoint(foreign_files.write_torch(tmp_path / "y.pt", meta), num_heads=3)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), model.params, expected.params))


@pytest.mark.parametrize("name", ["blocks.0.attn.bias", "final_layer.extra"])
def test_what_is_unread_among_weights_at_the_top_level(name, meta, tmp_path, raises_sentence):
    odd = np.array([None, "an array of objects"], object)
    path = foreign_files.write_pickle(tmp_path / "x", {**meta, name: odd})
    with raises_sentence("among its weights", name, "numpy.ndarray"):
        import_checkpoint(path, num_heads=3)
    _, found = import_checkpoint(foreign_files.write_pickle(path, {**meta, "history": odd}), num_heads=3)
    assert any("numpy.ndarray" in note for note in found.notes)


def test_repa_names_its_later_blocks_otherwise(meta, tmp_path):
    arrays = {name.replace("blocks.1.", "decoder_blocks.0."): array for name, array in meta.items()}
    arrays |= {"projectors.0.0.weight": np.zeros((8, 24), np.float32)}
    model, _ = import_checkpoint(save_safetensors(tmp_path / "x", arrays), num_heads=3, objective="noise")
    assert_is_meta_ema(model)
