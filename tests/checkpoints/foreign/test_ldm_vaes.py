"""VAEs in one file without ``config.json``: latent-diffusion's names against a NumPy forward of its decoder, diffusers' names
by shapes, and the scaling factor, from whatever tells it."""

import contextlib
import json
import re
import warnings

import jax
import numpy as np
import pytest
from cli_helpers import DIGITS, VAE
from foreign_files import GOLDEN, save_safetensors, write_torch

from ptq4dit_jax import cli, terminal
from ptq4dit_jax.checkpoints.foreign import import_vae, load_vae, open_tensors
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.vae import VAEDecoder

WIDTHS, BLOCKS, Z = (32, 96, 64), 2, 4


def ldm_decoder(widths=WIDTHS, blocks=BLOCKS, z=Z, attention=True, post=True):
    """Random tensors with the names and shapes that latent-diffusion's ``AutoencoderKL`` gives its decoder."""
    rng, tensors = np.random.default_rng(0), {}

    def conv(name, n, k, size=3):
        scale = 0.7 / np.sqrt(k * size * size)
        tensors[f"{name}.weight"] = (rng.standard_normal((n, k, size, size)) * scale).astype(np.float32)
        tensors[f"{name}.bias"] = (rng.standard_normal(n) * 0.1).astype(np.float32)

    def norm(name, n):
        tensors[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(n)).astype(np.float32)
        tensors[f"{name}.bias"] = (rng.standard_normal(n) * 0.1).astype(np.float32)

    def resnet(name, k, n):
        norm(f"{name}.norm1", k), conv(f"{name}.conv1", n, k), norm(f"{name}.norm2", n), conv(f"{name}.conv2", n, n)
        if k != n:
            conv(f"{name}.nin_shortcut", n, k, 1)

    width = widths[-1]
    if post:
        conv("post_quant_conv", z, z, 1)
    conv("decoder.conv_in", width, z)
    resnet("decoder.mid.block_1", width, width), resnet("decoder.mid.block_2", width, width)
    if attention:
        norm("decoder.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"decoder.mid.attn_1.{name}", width, width, 1)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width), conv("decoder.conv_out", 3, width)
    return tensors


def ldm_decode(t, z):
    """latent-diffusion's decoder in float64 on one latent (C, H, W), after the scaling factor."""
    levels, blocks = len(WIDTHS), BLOCKS
    t = {name: array.astype(np.float64) for name, array in t.items()}

    def conv(name, x):
        weight = t[f"{name}.weight"]
        pad = weight.shape[2] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
        return np.einsum("khwij,nkij->nhw", patches, weight) + t[f"{name}.bias"][:, None, None]

    def norm(name, x):
        groups = x.reshape(32, -1)
        centered = groups - groups.mean(1, keepdims=True)
        x = (centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-6)).reshape(x.shape)
        return x * t[f"{name}.weight"][:, None, None] + t[f"{name}.bias"][:, None, None]

    def swish(x):
        return x / (1 + np.exp(-x))

    def resnet(name, x):
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in t else x)

    x = conv("decoder.conv_in", conv("post_quant_conv", z))
    x = resnet("decoder.mid.block_1", x)
    h = norm("decoder.mid.attn_1.norm", x)
    q, k, v = (conv(f"decoder.mid.attn_1.{name}", h).reshape(len(h), -1) for name in "qkv")
    logits = q.T @ k / np.sqrt(len(h))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    h = v @ (probs / probs.sum(1, keepdims=True)).T
    x = resnet("decoder.mid.block_2", x + conv("decoder.mid.attn_1.proj_out", h.reshape(x.shape)))
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            x = resnet(f"decoder.up.{level}.block.{block}", x)
        if level:
            x = conv(f"decoder.up.{level}.upsample.conv", x.repeat(2, 1).repeat(2, 2))
    return conv("decoder.conv_out", swish(norm("decoder.norm_out", x)))


@pytest.fixture(scope="module")
def tensors():
    return ldm_decoder()


def assert_same(vae, expected):
    assert vae.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, vae.params, expected.params)


def with_metadata(path, tensors, **metadata):
    """A safetensors file with words in its header."""
    save_safetensors(path, tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header | {"__metadata__": metadata}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


# The function


def test_parity_with_latent_diffusion(tensors, tmp_path):
    vae = load_vae(with_metadata(tmp_path / "vae.safetensors", tensors, scaling_factor="0.5"))
    assert (vae.config.block_out_channels, vae.config.layers_per_block, vae.config.scaling_factor) == (WIDTHS, BLOCKS, 0.5)
    latents = np.random.default_rng(1).standard_normal((1, 3, 2, Z)).astype(np.float32)
    made = np.asarray(jax.jit(VAEDecoder.decode)(vae, latents))[0]
    expected = ldm_decode(tensors, latents[0].transpose(2, 0, 1).astype(np.float64) / 0.5).transpose(1, 2, 0)
    assert made.shape == (12, 8, 3)
    np.testing.assert_allclose(made, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("root", ["first_stage_model.", "state_dict.first_stage_model.", "vae.", "state_dict."])
def test_inside_a_whole_checkpoint(root, tensors, tmp_path):
    """With the diffusion model, an encoder and a loss beside it."""
    expected = load_vae(save_safetensors(tmp_path / "vae.safetensors", tensors), scaling_factor=0.2)
    whole = {f"{root}{name}": array for name, array in tensors.items()}
    outer = root.removesuffix("first_stage_model.").removesuffix("vae.")
    for other in ("encoder.conv_in.weight", "quant_conv.weight", "loss.discriminator.main.0.weight"):
        whole[root + other] = np.ones((2, 2, 3, 3), np.float32)
    for other in ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.decay", "cond_stage_model.x"):
        whole[outer + other] = np.ones(3, np.float32)
    vae, found = import_vae(write_torch(tmp_path / "last.ckpt", whole), scaling_factor=0.2)
    assert_same(vae, expected)
    assert found.layout == "latent-diffusion"


@pytest.mark.parametrize("changes", [{"attention": False}, {"post": False}, {"widths": (64,), "blocks": 1}, {"z": 16}])
def test_sizes_are_read_off_shapes(changes, tmp_path):
    made = ldm_decoder(**changes)
    config = load_vae(save_safetensors(tmp_path / "x.safetensors", made), scaling_factor=1.0).config
    wanted = {"widths": WIDTHS, "blocks": BLOCKS, "z": Z, "attention": True, "post": True} | changes
    assert wanted == {
        "widths": config.block_out_channels,
        "blocks": config.layers_per_block,
        "z": config.latent_channels,
        "attention": config.mid_block_add_attention,
        "post": config.use_post_quant_conv,
    }


def diffusers_names(tensors, flax):
    """latent-diffusion's names in diffusers', torch's or Flax's."""
    made = {}
    attention = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
    for name, array in tensors.items():
        name = re.sub(r"up\.(\d)\.block", lambda m: f"up_blocks.{len(WIDTHS) - 1 - int(m[1])}.resnets", name)
        name = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{len(WIDTHS) - 1 - int(m[1])}.upsamplers.0", name)
        name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
        name = re.sub(r"mid\.attn_1\.(\w+)", lambda m: f"mid_block.attentions.0.{attention[m[1]]}", name)
        name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
        if flax:
            name = re.sub(r"\.(\d+)\.", r"_\1.", name)
            if array.ndim == 4:
                name, array = name.replace("weight", "kernel"), np.ascontiguousarray(array.transpose(2, 3, 1, 0))
            name = name.replace("weight", "scale")
        made[name] = array
    return made


@pytest.mark.parametrize("flax", [False, True])
def test_diffusers_names_without_a_config(flax, tensors, tmp_path):
    expected = load_vae(save_safetensors(tmp_path / "ldm.safetensors", tensors), scaling_factor=0.3)
    file = save_safetensors(tmp_path / "diffusers.safetensors", diffusers_names(tensors, flax))
    vae, found = import_vae(file, scaling_factor=0.3)
    assert_same(vae, expected)
    assert len(found.guesses) == 1
    assert "groups in a norm; 32" in found.guesses[0]


def test_a_file_beside_its_config(tensors):
    """The file of a folder is as good as the folder."""
    assert_same(load_vae(open_tensors(GOLDEN / "vae").path), load_vae(GOLDEN / "vae"))


@pytest.mark.parametrize("path", [".", "vae", "models--me--x"])
def test_folders_with_such_a_file(path, tensors, tmp_path):
    file = with_metadata(tmp_path / "sd.vae.safetensors", tensors, scaling_factor="2")
    expected = load_vae(file)
    folder = tmp_path / "in"
    inner = folder / path if path != "models--me--x" else folder / path / "snapshots" / "0"
    inner.mkdir(parents=True)
    (inner / "vae.safetensors").symlink_to(file)
    assert_same(load_vae(folder if path != "models--me--x" else folder / path), expected)


# The scaling factor


def test_a_guess_is_called_one(tensors, tmp_path):
    file = save_safetensors(tmp_path / "x.safetensors", tensors)
    vae, found = import_vae(file)
    assert vae.config.scaling_factor == 0.18215
    assert found.notes == ()
    assert len(found.guesses) == 1
    assert "0.18215" in found.guesses[0]
    assert "--vae-scale" in found.guesses[0]
    with pytest.warns(UserWarning, match="does not tell its scaling factor; 0.18215"):
        load_vae(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_vae(file, scaling_factor=0.13025).config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("metadata", {"scaling_factor": "0.25"}),
        ("metadata", {"scale_factor": "0.25", "shift_factor": "0.5"}),
        ("x.json", {"scaling_factor": 0.25}),
        ("x.safetensors.json", {"scale_factor": 0.25, "shift_factor": 0.5}),
        ("config.json", {"model": {"params": {"scale_factor": 0.25}}}),
        ("config.json", {"_class_name": "AutoencoderTiny", "scaling_factor": 0.25}),
        ("tensor", {"scale_factor": 0.25}),
    ],
)
def test_what_tells_the_scaling_factor(where, values, tensors, tmp_path, raises_sentence):
    file = tmp_path / "x.safetensors"
    more = {"scale_factor": np.array(0.25, np.float32)} if where == "tensor" else {}
    with_metadata(file, {**{f"first_stage_model.{k}": v for k, v in tensors.items()}, **more})
    if where == "metadata":
        with_metadata(file, tensors, **values)
    elif where != "tensor":
        (tmp_path / where).write_text(json.dumps(values))
    vae, found = import_vae(file)
    assert vae.config.scaling_factor == 0.25
    assert vae.config.shift_factor == float(values.get("shift_factor", 0))
    assert found.guesses == ()
    assert "scaling factor 0.25, from" in found.notes[-1]
    assert import_vae(file, scaling_factor=0.25)[0].config == vae.config
    with raises_sentence("0.25", "0.18215", "--vae-scale"):
        import_vae(file, scaling_factor=0.18215)


@pytest.mark.parametrize("value", ["x", "nan", "0", "1e999", "inf"])
def test_a_scaling_factor_that_is_none(value, tensors, tmp_path, raises_sentence):
    file = with_metadata(tmp_path / "x.safetensors", tensors, scaling_factor=value)
    with raises_sentence("its metadata", repr(value)):
        load_vae(file)


def test_the_option_against_a_config(tmp_path, raises_sentence):
    with raises_sentence("config.json", "0.18215", "0.2", "--vae-scale"):
        load_vae(GOLDEN / "vae", scaling_factor=0.2)
    for wrong in (0.0, float("nan")):
        with raises_sentence("scaling_factor"):
            load_vae(GOLDEN / "vae", scaling_factor=wrong)
    assert_same(load_vae(GOLDEN / "vae", scaling_factor=0.18215), load_vae(GOLDEN / "vae"))


def test_the_command_line_prints_guess_and_option(tensors, tmp_path, capsys):
    file = save_safetensors(tmp_path / "vae.safetensors", tensors)
    assert terminal.load_vae(str(file), None).config.scaling_factor == 0.18215
    assert "VAE: the file does not tell its scaling factor; 0.18215" in capsys.readouterr().out
    assert terminal.load_vae(str(file), 0.5).config.scaling_factor == 0.5
    assert "VAE: scaling factor 0.5, from the option" in capsys.readouterr().out
    walk = ["--labels", "0", "--steps", "1", "--vae", VAE, "--vae-scale", "0.2"]
    assert cli.main(["sample", DIGITS, "--out", str(tmp_path / "x.png"), *walk]) == 1
    assert "not 0.2" in capsys.readouterr().err


# Files that are none


def test_faults_in_their_names(tensors, tmp_path, raises_sentence):
    faulty = dict(tensors)
    del faulty["decoder.up.2.block.1.conv2.weight"], faulty["decoder.mid.attn_1.q.bias"]
    faulty["decoder.up.0.attn.0.norm.weight"] = np.ones(32, np.float32)
    faulty["decoder.mid.attn_1.k.weight"] = np.ones((64, 3, 1, 1), np.float32)
    file = save_safetensors(tmp_path / "x.safetensors", faulty)
    with raises_sentence(
        "by what its shapes tell",
        "missing: decoder.mid.attn_1.q.bias, decoder.up.2.block.1.conv2.weight;",
        "unexpected: decoder.up.0.attn.0.norm.weight;",
        "decoder.mid.attn_1.k.weight (64, 3, 1, 1) instead of (64, 64, 1, 1)",
    ):
        load_vae(file, scaling_factor=1.0)


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "decoder.conv_out.weight"])
def test_sizes_that_cannot_be_read(name, tensors, tmp_path, raises_sentence):
    for shape in ((3,), None):
        faulty = dict(tensors)
        faulty[name] = np.ones(shape or 1, np.float32)
        if shape is None:
            del faulty[name]
        with raises_sentence(name, "cannot be read off"):
            load_vae(save_safetensors(tmp_path / "x.safetensors", faulty), scaling_factor=1.0)


def test_widths_that_do_not_make_groups(tmp_path, raises_sentence):
    made = {name: array[:48] if name.startswith("decoder.up.0") else array for name, array in ldm_decoder((48, 64)).items()}
    with raises_sentence("norm_num_groups 32"):
        load_vae(save_safetensors(tmp_path / "x.safetensors", made), scaling_factor=1.0)


def test_two_decoders(tensors, tmp_path, raises_sentence):
    two = {f"{root}{name}": array for root in ("a.", "b.") for name, array in tensors.items()}
    with raises_sentence("2 decoders", "a, b"):
        load_vae(save_safetensors(tmp_path / "x.safetensors", two))


def test_a_whole_checkpoint_without_a_vae(tmp_path, raises_sentence):
    file = save_safetensors(tmp_path / "x.safetensors", {"model.diffusion_model.out.0.weight": np.ones(3, np.float32)})
    with raises_sentence("no decoder of a VAE", "model.diffusion_model.out.0.weight"):
        load_vae(file)


def test_headers_and_names_that_mean_harm(tensors, tmp_path):
    """Opened, or refused with one sentence."""
    rng = np.random.default_rng(3)
    file = tmp_path / "x.safetensors"
    content = save_safetensors(file, ldm_decoder((32,), 1)).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(100):
        data = bytearray(content)
        for _ in range(3):
            data[rng.integers(8, length)] = rng.integers(32, 127)
        file.write_bytes(data)
        with contextlib.suppress(Ptq4ditError):
            import_vae(file, scaling_factor=1.0)


def test_very_many_levels(tmp_path, raises_sentence):
    """Names of levels without their layers."""
    made = ldm_decoder((32,), 1)
    made |= {f"decoder.up.{n}.block.0.conv1.weight": np.ones((32, 32, 1, 1), np.float32) for n in range(1, 3000)}
    with raises_sentence("has 3000 levels"):
        load_vae(save_safetensors(tmp_path / "x.safetensors", made), scaling_factor=1.0)
