"""VAEs in folders of diffusers: every spelling and layout of the tensors, and folders that hold none."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import flax.serialization
import foreign_files
import jax
import numpy as np
import pytest

from ptq4dit_jax.checkpoints.foreign import import_vae, load_vae, open_tensors
from ptq4dit_jax.checkpoints.foreign.safetensors_file import write_safetensors
from ptq4dit_jax.vae import VAEDecoder

GOLDEN = foreign_files.GOLDEN.resolve()
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def write_file(path, tensors):
    shapes = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with Path(path).open("wb") as file:
        write_safetensors(file.write, {name: partial(np.asarray, array) for name, array in tensors.items()}, shapes)


@pytest.fixture(scope="module")
def tensors():
    """What diffusers has saved: torch's present names, encoder included."""
    return {name: tensor.read() for name, tensor in open_tensors(GOLDEN / "vae" / WEIGHTS).items()}


@pytest.fixture(scope="module")
def expected():
    return load_vae(GOLDEN / "vae")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The narrow VAE without its weights, as a relative path."""
    monkeypatch.chdir(tmp_path)
    where = Path("somewhere")
    where.mkdir()
    shutil.copy(GOLDEN / "vae/config.json", where)
    return where


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def assert_same(vae, expected):
    assert vae.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, vae.params, expected.params)


def former_names(tensors, pixel=False):
    """Attention as diffusers spelled it until 2023; with ``pixel`` as convolutions of one pixel."""
    renamed = {}
    for name, array in tensors.items():
        here = name
        for new, old in FORMER.items():
            here = here.replace(new, old)
        renamed[here] = array[:, :, None, None] if pixel and here != name and array.ndim == 2 else array
    assert sum(a != b for a, b in zip(renamed, tensors, strict=True)) == 16, "four layers, in encoder and decoder"
    return renamed


def flax_tree(tensors):
    """The tree of diffusers' former FlaxAutoencoderKL."""
    flat = {}
    for name, array in former_names(tensors).items():
        where, leaf = re.sub(r"\.(\d+)", r"_\1", name).rsplit(".", 1)
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        flat[f"{where}.{leaf}"] = np.ascontiguousarray(array)
    return foreign_files.nested(flat, ".")


# Spellings and layouts


def test_the_folder_of_a_pipeline(tmp_path, expected):
    shutil.copytree(GOLDEN / "vae", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "text_encoder").mkdir()
    assert_same(load_vae(str(tmp_path)), expected)


@pytest.mark.parametrize("pixel", [False, True])
def test_former_names_of_attention(folder, tensors, expected, pixel):
    write_file(folder / WEIGHTS, former_names(tensors, pixel))
    assert_same(load_vae(folder), expected)


def test_flax_msgpack(folder, tensors, expected):
    (folder / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(flax_tree(tensors)))
    change_config(folder, _class_name="FlaxAutoencoderKL")
    assert_same(load_vae(folder), expected)


def test_torch_files_come_before_those_of_flax(folder, tensors, expected):
    foreign_files.write_torch(folder / "diffusion_pytorch_model.bin", tensors)
    (folder / "diffusion_flax_model.msgpack").write_text("never opened")
    assert_same(load_vae(folder), expected)


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards(ending, variant, folder, tensors, expected):
    """Every third tensor in one of three files, by the same search as for transformers."""
    names, stem = sorted(tensors), "diffusion_pytorch_model"
    places: dict[str, str] = {}
    for n in range(3):
        file = f"{stem}{variant}-0000{n + 1}-of-00003{ending}"
        part = {name: tensors[name] for name in names[n::3]}
        write_file(folder / file, part) if ending == ".safetensors" else foreign_files.write_torch(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = f"{stem}{ending}.index{variant}.json"
    (folder / index).write_text(json.dumps({"weight_map": places}))
    assert_same(load_vae(folder), expected)
    assert_same(load_vae(folder / index), expected)


def test_full_precision_beside_half(folder, tensors, expected):
    write_file(folder / "diffusion_pytorch_model.fp16.safetensors", {k: v.astype(np.float16) for k, v in tensors.items()})
    foreign_files.write_torch(folder / "diffusion_pytorch_model.bin", tensors)
    vae, found = import_vae(folder)
    assert_same(vae, expected)
    assert found.notes == ("diffusion_pytorch_model.bin, full precision, beside diffusion_pytorch_model.fp16.safetensors",)


@pytest.mark.parametrize("inner", [".", "vae"])
def test_a_download_of_hugging_face(inner, tmp_path, expected):
    """Its revision holds links, here of a folder."""
    revision = tmp_path / "models--me--x" / "snapshots" / "0123"
    revision.mkdir(parents=True)
    if inner == ".":
        revision.rmdir()
    (revision / inner).symlink_to(GOLDEN / "vae")
    vae, found = import_vae(tmp_path / "models--me--x")
    assert_same(vae, expected)
    assert found.layout == "diffusers"


def test_half_precision_is_read_as_float32(folder, tensors, expected):
    write_file(folder / "diffusion_pytorch_model.fp16.safetensors", {k: v.astype(np.float16) for k, v in tensors.items()})
    vae = load_vae(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(vae)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), vae.params, expected.params)


def test_a_decoder_alone(folder, tensors, expected):
    only = {k: v for k, v in tensors.items() if k.startswith(("decoder.", "post_quant_conv."))}
    assert len(only) < len(tensors)
    write_file(folder / WEIGHTS, only)
    assert_same(load_vae(folder), expected)


def test_settings_of_old_and_new_configs(folder, tensors):
    write_file(folder / WEIGHTS, tensors)
    # sd-vae-ft-mse's config is older than these.
    new = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "use_post_quant_conv", "mid_block_add_attention")
    change_config(folder, **dict.fromkeys(new, ...))
    config = load_vae(folder).config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean) == (0.18215, 0.0, None)
    mean, std = [0.5, -0.5, 0.1, 0.2], [4, 5, 3, 4.5]
    change_config(folder, scaling_factor=0.13025, shift_factor=0.1, latents_mean=mean, latents_std=std)
    config = load_vae(folder).config
    assert (config.scaling_factor, config.shift_factor) == (0.13025, 0.1)
    assert (config.latents_mean, config.latents_std) == (tuple(mean), tuple(std))


def test_the_loaded_decoder_is_an_argument_of_jit(expected):
    latents = np.zeros((1, 2, 2, 4), np.float32)
    assert jax.eval_shape(VAEDecoder.decode, expected, latents).shape == (1, 16, 16, 3)


# Files that do not fit


def test_all_faults_are_named_at_once(folder, tensors, raises_sentence):
    faulty = dict(tensors)
    del faulty["decoder.conv_in.bias"], faulty["decoder.mid_block.attentions.0.to_out.0.weight"]
    faulty["decoder.extra.weight"] = np.zeros(3, np.float32)
    faulty["decoder.conv_out.weight"] = faulty["decoder.conv_out.weight"].transpose(2, 3, 1, 0).copy()
    faulty["decoder.conv_norm_out.bias"] = np.zeros(4, np.int64)
    write_file(folder / WEIGHTS, faulty)
    with raises_sentence(
        WEIGHTS,
        "missing: decoder.conv_in.bias, decoder.mid_block.attentions.0.to_out.0.weight;",
        "unexpected: decoder.extra.weight;",
        "decoder.conv_out.weight (3, 3, 4, 3) instead of (3, 4, 3, 3)",
        "decoder.conv_norm_out.bias of int64",
    ):
        load_vae(folder)


def test_faults_of_flax_files_in_their_names(folder, tensors, raises_sentence):
    tree = flax_tree(tensors)
    del tree["decoder"]["mid_block"]["attentions_0"]["query"]["kernel"]
    (folder / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    with raises_sentence("missing: decoder.mid_block.attentions_0.query.kernel."):
        load_vae(folder)


def test_a_config_of_another_size(folder, tensors, raises_sentence):
    write_file(folder / WEIGHTS, tensors)
    change_config(folder, layers_per_block=2)
    with raises_sentence("missing: decoder.up_blocks.0.resnets.2.conv1.bias, ", " and 24 more"):
        load_vae(folder)
    change_config(folder, layers_per_block=50_000)
    with raises_sentence("too few for the 200000 layers"):
        load_vae(folder)
    change_config(folder, layers_per_block=1, latent_channels=16)
    with raises_sentence("decoder.conv_in.weight (12, 4, 3, 3) instead of (12, 16, 3, 3)"):
        load_vae(folder)


def test_weights_of_something_else(folder, raises_sentence):
    write_file(folder / WEIGHTS, {"text_model.embeddings.weight": np.zeros((2, 2), np.float32)})
    with raises_sentence(WEIGHTS, "no decoder of a VAE", "text_model.embeddings.weight"):
        load_vae(folder)


def test_nan(folder, tensors, raises_sentence):
    write_file(folder / WEIGHTS, tensors | {"decoder.conv_in.bias": np.full(12, np.nan, np.float32)})
    with raises_sentence("NaN", "decoder/conv_in/bias"):
        load_vae(folder)


def test_a_pointer_of_git_lfs(folder, raises_sentence):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 334643276\n")
    with raises_sentence(WEIGHTS, "Git LFS", "git lfs pull"):
        load_vae(folder)


def test_truncated_weights(folder, raises_sentence):
    content = (GOLDEN / "vae" / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with raises_sentence(WEIGHTS, "cut off", "download it again"):
        load_vae(folder)


# Folders that hold no VAE


def test_folders_without_a_vae(tmp_path, folder, raises_sentence):
    with raises_sentence("There is no VAE at", "missing", "does not exist"):
        load_vae(tmp_path / "missing")
    Path("text_encoder").mkdir()
    with raises_sentence("text_encoder holds no VAE", "config.json", "vae/"):
        load_vae("text_encoder")
    with raises_sentence("config.json is a file", "give the folder"):
        load_vae(folder / "config.json")
    with raises_sentence("no weights", WEIGHTS):
        load_vae(folder)
    with raises_sentence("Cannot read"):
        load_vae(tmp_path / ("x" * 300))


def test_a_path_that_cannot_exist(raises_sentence):
    with raises_sentence("does not exist"):
        load_vae("a\0b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"architectures": ["CLIPTextModel"]}', ("holds no VAE", "no class of diffusers", "AutoencoderKL")),
        ('{"_class_name": "DiTTransformer2DModel"}', ("holds no VAE", "'DiTTransformer2DModel'", "AutoencoderKL")),
        ('["a", "list"]', ("holds no VAE",)),
        ("{", ("config.json", "not valid JSON")),
        ('{"_class_name": "AutoencoderKL"}', ("lacks block_out_channels, layers_per_block",)),
    ],
)
def test_configs_of_no_vae(folder, text, words, raises_sentence):
    (folder / "config.json").write_text(text)
    with raises_sentence(*words):
        load_vae(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "gelu"}, ("act_fn", "'gelu'", "silu")),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, ("'AttnUpDecoderBlock2D'", "UpDecoderBlock2D")),
        ({"block_out_channels": 64}, ("block_out_channels", "64")),
        ({"norm_num_groups": 0}, ("norm_num_groups", "0")),
        ({"scaling_factor": "1"}, ("scaling_factor", "'1'")),
        ({"latents_mean": [1]}, ("latents_mean", "(1,)")),
    ],
)
def test_configs_of_other_decoders(folder, changes, words, raises_sentence):
    change_config(folder, **changes)
    (folder / WEIGHTS).write_text("never opened")
    with raises_sentence(*words):
        load_vae(folder)
