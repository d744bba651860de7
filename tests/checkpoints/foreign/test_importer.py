"""Importing DiT checkpoints: the network that comes out computes what the source's own code computed."""

import json
import pickle
import shutil

import flax
import foreign_files
import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from foreign_files import DIFFUSERS, META, OUTPUTS
from foreign_files import save_safetensors as save

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint, open_tensors
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.schedules import NoiseSchedule

META_GOLDEN = dict(np.load(foreign_files.GOLDEN / "dit.npz"))
SCHEDULE_OF_KVFRANS = NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.04)


@pytest.fixture(scope="module")
def meta():
    """The averaged weights of the golden file under Meta's names, position table included."""
    return {name.removeprefix("ema."): t.read() for name, t in open_tensors(META).items() if name.startswith("ema.")}


def assert_forward(model, golden):
    out = np.asarray(model.jitted()(golden["x"], golden["t"], golden["y"]))
    assert np.abs(out - golden["out"]).max() <= 2e-5 * np.abs(golden["out"]).max()


def assert_computes(model, name):
    nhwc = {key: OUTPUTS[source].transpose(0, 2, 3, 1) for key, source in (("x", "x"), ("out", name))}
    assert_forward(model, nhwc | {"t": OUTPUTS["t"], "y": OUTPUTS["y"]})


@pytest.mark.parametrize(("ema", "name"), [(True, "meta_ema"), (False, "meta_model")])
def test_meta_training_file(ema, name):
    seen = []
    model, found = import_checkpoint(META, num_heads=3, ema=ema, progress=lambda done, total: seen.append((done, total)))
    assert_computes(model, name)
    assert (found.layout, found.ema, found.dtype, found.files) == ("Meta DiT", ema, "float32", (META,))
    assert found.config == model.config
    assert model.config == DiTConfig(
        input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=3, num_classes=10
    )
    assert found.parameters == model.num_params == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert seen == [(i + 1, 31) for i in range(31)]


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict."])
def test_meta_state_dict(prefix, meta, tmp_path):
    path = foreign_files.write_torch(tmp_path / "x.pt", {prefix + name: array for name, array in meta.items()})
    model, found = import_checkpoint(path, num_heads=3)
    assert_computes(model, "meta_ema")
    assert not found.ema


@pytest.mark.parametrize(("as_diffusers", "name"), [(True, "diffusers"), (False, "diffusers_as_meta")])
def test_diffusers(as_diffusers, name):
    for path in (DIFFUSERS, DIFFUSERS / "transformer", DIFFUSERS / "transformer" / "diffusion_pytorch_model.safetensors"):
        model, found = import_checkpoint(path, as_diffusers=as_diffusers)
        assert_computes(model, name)
        assert (found.layout, model.config.num_heads, model.config.num_classes) == ("diffusers DiT", 2, 10)
        assert model.schedule == NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.03)


@pytest.mark.parametrize("kind", ["bin", "shards"])
def test_diffusers_in_other_files(kind, tmp_path):
    arrays = {name: tensor.read() for name, tensor in open_tensors(DIFFUSERS / "transformer").items()}
    shutil.copy(DIFFUSERS / "transformer" / "config.json", tmp_path)
    if kind == "bin":
        foreign_files.write_torch(tmp_path / "diffusion_pytorch_model.bin", arrays)
    else:
        places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
        for part in set(places.values()):
            save(tmp_path / part, {name: arrays[name] for name in arrays if places[name] == part})
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_computes(import_checkpoint(tmp_path, as_diffusers=True)[0], "diffusers")


def test_diffusers_embedders_must_be_copies(tmp_path, raises_sentence):
    arrays = {name: tensor.read() for name, tensor in open_tensors(DIFFUSERS / "transformer").items()}
    odd = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    arrays[odd] = arrays[odd] + 1
    shutil.copy(DIFFUSERS / "transformer" / "config.json", tmp_path)
    save(tmp_path / "x.safetensors", arrays)
    with raises_sentence(odd, "copy of the one in block 0"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value", "part"),
    [
        ("transformer/config.json", "activation_fn", "geglu", "'geglu'"),
        ("transformer/config.json", "num_attention_heads", "many", "no whole number"),
        ("transformer/config.json", "sample_size", 7, "multiple of patch_size"),
        ("scheduler/scheduler_config.json", "beta_schedule", "scaled_linear", "'scaled_linear'"),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "'v_prediction'"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x", "num_timesteps"),
    ],
)
def test_diffusers_settings_that_do_not_fit(file, key, value, part, tmp_path, raises_sentence):
    folder = shutil.copytree(DIFFUSERS, tmp_path / "pipeline")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), key: value}))
    with raises_sentence(part):
        import_checkpoint(folder)


@pytest.mark.parametrize("ema", [True, False])
def test_kvfrans(ema, tmp_path):
    tree, golden = foreign_files.kvfrans()
    other = jax.tree.map(lambda a: a + 1, tree)
    params = jax.tree.map(jnp.asarray, flax.core.freeze(tree))
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.zeros((), jnp.int32)}
    garbage = {**state, "params": {**other, "pos_embed": tree["pos_embed"]}}
    saved = {"model": garbage, "model_eps": state} if ema else {"model": state, "model_eps": garbage}
    folder = tmp_path / "run"
    folder.mkdir()
    foreign_files.write_pickle(folder / "run.tmp", {**saved, "_timestamp": 1.5})
    model, found = import_checkpoint(folder, ema=ema)
    assert_forward(model, golden)
    assert (found.layout, found.ema) == ("kvfrans/jax-diffusion-transformer", ema)
    assert (model.config.num_heads, model.config.learn_sigma, model.schedule) == (3, False, SCHEDULE_OF_KVFRANS)


def meta_params():
    return {name.removeprefix("params/"): array for name, array in META_GOLDEN.items() if name.startswith("params/")}


def golden_of_meta():
    nhwc = {name: META_GOLDEN[name].transpose(0, 2, 3, 1) for name in ("x", "out")}
    return nhwc | {"t": META_GOLDEN["t"], "y": META_GOLDEN["y"]}


def jax_dit_name(name):
    """What convert_torch_to_jax.py of jax-dit makes of Meta's names."""
    name = name.replace("mlp.0", "mlp.layers_0").replace("mlp.2", "mlp.layers_2").replace("modulation.1", "modulation.layers_1")
    head, _, rest = name.partition(".")
    name = f"blocks_{rest}" if head == "blocks" else name
    return name.replace(".weight", ".embedding" if "table" in name else ".kernel")


def flax_array(name, array):
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and "table" not in name else array


@pytest.mark.parametrize("kind", ["orbax", "pickle"])
def test_jax_dit(kind, tmp_path):
    flat = {jax_dit_name(name): flax_array(name, array) for name, array in meta_params().items()}
    tree = foreign_files.nested(flat, ".") | {"pos_embed": META_GOLDEN["pos_embed"][None]}
    path = tmp_path / "x"
    if kind == "orbax":
        ocp.PyTreeCheckpointer().save(path, {"ema_params": tree, "params": jax.tree.map(np.zeros_like, tree)})
    else:
        foreign_files.write_pickle(path, tree)
    model, found = import_checkpoint(path, num_heads=4)
    assert_forward(model, golden_of_meta())
    assert (found.layout, found.ema) == ("demon2036/jax-dit", kind == "orbax")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_types(dtype, meta, tmp_path):
    arrays = {name: array.astype(dtype) for name, array in meta.items()}
    model, found = import_checkpoint(save(tmp_path / "x", arrays), num_heads=3)
    expected = "float32" if dtype is np.float64 else np.dtype(dtype).name
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {found.dtype} == {expected}
    np.testing.assert_array_equal(model.params["label_embed"]["embedding"], arrays["y_embedder.embedding_table.weight"])
    mixed = {**arrays, "final_layer.linear.bias": meta["final_layer.linear.bias"]}
    assert import_checkpoint(save(tmp_path / "mixed", mixed), num_heads=3)[1].dtype == "float32"


def test_sizes_that_only_the_user_knows(meta, tmp_path, raises_sentence):
    path = save(tmp_path / "x", {name: array for name, array in meta.items() if name != "pos_embed"})
    with raises_sentence("does not tell its input size", "--input-size"):
        import_checkpoint(path, num_heads=3)
    assert_computes(import_checkpoint(path, num_heads=3, input_size=8)[0], "meta_ema")
    with raises_sentence("does not tell its number of heads", "depth 2, width 24", "--num-heads"):
        import_checkpoint(META)
    with raises_sentence("multiple of num_heads (5)"):
        import_checkpoint(META, num_heads=5)
    with raises_sentence("has 8 as its input size, not 16"):
        import_checkpoint(META, num_heads=3, input_size=16)
    with raises_sentence("has 2 as its number of heads", "not 3"):
        import_checkpoint(DIFFUSERS, num_heads=3)


@pytest.mark.parametrize(("rows", "classes", "null"), [(11, 10, True), (1001, 1000, True), (1000, 1000, False), (1, 1, False)])
def test_the_table_of_labels(rows, classes, null, meta, tmp_path):
    table = np.zeros((rows, 24), np.float32)
    path = save(tmp_path / "x", {**meta, "y_embedder.embedding_table.weight": table})
    config = import_checkpoint(path, num_heads=3)[1].config
    assert (config.num_classes, config.null_class) == (classes, null)


def test_heads_of_published_sizes(tmp_path):
    """Depth and width of DiT-S, all else tiny."""
    config = DiTConfig.preset("DiT-S/8", input_size=8, num_classes=3, mlp_ratio=0.125)
    model = helpers.tiny_model(**config.to_dict())
    found = import_checkpoint(export_meta(model, tmp_path / "x.safetensors"))[1]
    assert found.config == model.config


def test_everything_wrong_is_named_at_once(meta, tmp_path, raises_sentence):
    arrays = {name: array for name, array in meta.items() if name != "t_embedder.mlp.2.bias"}
    arrays["blocks.1.attn.proj.bias"] = np.zeros(23, np.float32)
    arrays["blocks.0.mlp.fc2.bias"] = np.zeros(24, np.int32)
    arrays["extra.weight"] = np.zeros(1, np.float32)
    with raises_sentence(
        "missing: t_embedder.mlp.2.bias",
        "unexpected: extra.weight",
        "blocks.1.attn.proj.bias (23,) instead of (24,)",
        "blocks.0.mlp.fc2.bias of int32",
    ):
        import_checkpoint(save(tmp_path / "x", arrays), num_heads=3)


def test_long_lists_are_cut(meta, tmp_path, raises_sentence):
    arrays = {name.replace("blocks.1.", "blocks.11."): array for name, array in meta.items()}
    with raises_sentence("missing: blocks.1.adaLN_modulation.1.bias", "and 92 more"):
        import_checkpoint(save(tmp_path / "x", arrays), num_heads=3)
    arrays = {name.replace("blocks.1.", "blocks.99999."): array for name, array in meta.items()}
    with raises_sentence("unexpected: blocks.99999."):
        import_checkpoint(save(tmp_path / "y", arrays), num_heads=3)


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("x_embedder.proj.weight", (24, 4), "x_embedder.proj.weight (24, 4)"),
        ("x_embedder.proj.weight", (24, 3, 2, 2), "final_layer.linear.weight"),
        ("final_layer.linear.weight", (30, 24), "final_layer.linear.weight (30, 24)"),
        ("final_layer.linear.weight", (), "final_layer.linear.weight ()"),
        ("y_embedder.embedding_table.weight", (11, 20), "(11, 20) instead of (11, 24)"),
        ("blocks.0.attn.qkv.weight", (24, 72), "(24, 72) instead of (72, 24)"),
        ("pos_embed", (1, 15, 24), "15 tokens"),
        ("pos_embed", (1, 16, 20), "16 tokens of width 24"),
    ],
)
def test_misshapen_tensors(name, shape, part, meta, tmp_path, raises_sentence):
    with raises_sentence(part):
        import_checkpoint(save(tmp_path / "x", {**meta, name: np.zeros(shape, np.float32)}), num_heads=3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(value, meta, tmp_path, raises_sentence):
    arrays = {**meta, "blocks.1.mlp.fc1.bias": np.full(96, value, np.float32)}
    with raises_sentence("NaN or infinity", "blocks.1.mlp.fc1.bias"):
        import_checkpoint(save(tmp_path / "x", arrays), num_heads=3)


def test_files_that_are_no_dit(meta, tmp_path, raises_sentence):
    encoder = {"text_model.embeddings.token_embedding.weight": np.zeros((4, 3), np.float32)}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save(folder / "model.safetensors", encoder)
    (folder / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with raises_sentence("no DiT of a known layout", "Meta DiT", "text_model.embeddings"):
        import_checkpoint(folder)
    vit = {name: array for name, array in meta.items() if name.startswith("blocks.")}
    with raises_sentence("no DiT of a known layout"):
        import_checkpoint(save(tmp_path / "vit", vit))
    with raises_sentence("2 sets of weights", "a, b"):
        import_checkpoint(save(tmp_path / "two", {f"{root}.{name}": array for root in "ab" for name, array in meta.items()}))
    with raises_sentence("averaged (EMA) weights only", "--ema"):
        import_checkpoint(save(tmp_path / "ema", {f"ema.{name}": array for name, array in meta.items()}), ema=False)


def test_load_takes_foreign_paths(tmp_path, raises_sentence):
    assert_computes(checkpoints.load(DIFFUSERS), "diffusers_as_meta")
    saved = checkpoints.save(checkpoints.load(DIFFUSERS), tmp_path / "ours")
    assert_computes(checkpoints.load(saved), "diffusers_as_meta")
    path = tmp_path / "evil"
    path.write_bytes(b"\x80\x04cposix\nsystem\n" + pickle.dumps(("true",), 4)[2:-1] + b"R.")
    with raises_sentence("posix.system"):
        checkpoints.load(path)
