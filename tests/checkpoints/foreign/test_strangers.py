"""Files that are no plain DiT: other networks are named, only missing tensors are damage, nothing is dropped silently."""

import foreign_files
import ml_dtypes
import numpy as np
import pytest
from foreign_files import META, OUTPUTS, save_safetensors, write_pickle
from helpers import relative_error

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint, open_tensors
from ptq4dit_jax.checkpoints.foreign.importer import is_rounded
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import position_embedding


@pytest.fixture(scope="module")
def meta():
    return {name.removeprefix("ema."): t.read() for name, t in open_tensors(META).items() if name.startswith("ema.")}


def output(model):
    x = OUTPUTS["x"].transpose(0, 2, 3, 1)
    return np.asarray(model.jitted()(x, OUTPUTS["t"], OUTPUTS["y"]))


def renamed(arrays, *pairs, **more):
    out = {}
    for name, array in arrays.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = array
    return out | more


EXTRA = np.ones((24, 24), np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda m: m | {"blocks.0.attn.norm_q.weight": EXTRA[0], "blocks.0.attn.norm_k.weight": EXTRA[0]},
            ("norms of queries",),
        ),
        (lambda m: renamed(m, ("mlp.fc1", "mlp.gate_proj"), ("mlp.fc2", "mlp.w3")), ("SwiGLU",)),
        (lambda m: m | {"rotary_emb.inv_freq": EXTRA[0]}, ("rotary positions",)),
        (lambda m: m | {"blocks.1.norm2.weight": EXTRA[0]}, ("norms with learned gains",)),
        (lambda m: m | {"blocks.0.cross_attn.q.weight": EXTRA}, ("conditioning on text",)),
        (lambda m: m | {"r_embedder.mlp.0.weight": EXTRA}, ("second embedder of time",)),
        (lambda m: m | {"blocks.0.skip_linear.weight": EXTRA}, ("U-ViT",)),
        (lambda m: m | {"mystery.weight": EXTRA}, ("tensors that a DiT has not", "mystery.weight")),
    ],
)
def test_another_network(change, parts, meta, tmp_path, raises_sentence):
    path = save_safetensors(tmp_path / "x", change(meta))
    with raises_sentence("another network than a Meta DiT", *parts):
        import_checkpoint(path, num_heads=3)
    with pytest.raises(Ptq4ditError) as raised:
        import_checkpoint(path, num_heads=3)
    assert "download" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: renamed(m, ("attn.qkv.weight", "attn.qkv.lora_A.weight")), ("LoRA", "merge_and_unload")),
        (lambda m: m | {"blocks.0.attn.qkv.lora_up.weight": EXTRA}, ("LoRA",)),
        (
            lambda m: renamed(m, ("fc1.weight", "fc1.weight._data")) | {"blocks.0.mlp.fc1.weight._scale": EXTRA},
            ("quanto", "float weights"),
        ),
        (lambda m: m | {"blocks.0.mlp.fc1.weight.absmax": EXTRA[0]}, ("bitsandbytes",)),
        (lambda m: m | {"blocks.0.mlp.fc1.SCB": EXTRA[0]}, ("bitsandbytes",)),
        (lambda m: renamed(m, ("qkv.weight", "qkv.weight.tensor_impl.int_data")), ("torchao",)),
        (lambda m: m | {"blocks.0.mlp.fc1.weight_quantizer.delta": EXTRA}, ("PTQ4DiT's code",)),
        (lambda m: renamed(m, ("fc2.weight", "fc2.qweight")), ("GPTQ",)),
        (lambda m: renamed(m, ("fc2.weight", "fc2.parametrizations.weight.original0")), ("parametrization",)),
    ],
)
def test_weights_in_another_form(change, parts, meta, tmp_path, raises_sentence):
    with raises_sentence("cannot be imported as it is", *parts):
        import_checkpoint(save_safetensors(tmp_path / "x", change(meta)), num_heads=3)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a text encoder"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder"),
        (("decoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight"), "a VAE"),
        (("first_stage_model.decoder.up.0.block.0.conv1.weight",), "a VAE"),
        (("down_blocks.0.resnets.0.conv1.weight",), "a U-Net"),
        (("state.0.exp_avg", "state.0.exp_avg_sq"), "the state of an optimizer"),
        (("double_blocks.0.img_attn.qkv.weight",), "a transformer of two streams"),
    ],
)
def test_other_files(names, part, tmp_path, raises_sentence):
    with raises_sentence("no DiT of a known layout", f"seems to be {part}"):
        import_checkpoint(save_safetensors(tmp_path / "x", dict.fromkeys(names, EXTRA)))


def test_only_missing_tensors_are_damage(meta, tmp_path, raises_sentence):
    arrays = {name: array for name, array in meta.items() if "blocks.1.attn.proj" not in name}
    with raises_sentence("no complete Meta DiT checkpoint", "missing: blocks.1.attn.proj.bias", "download it again"):
        import_checkpoint(save_safetensors(tmp_path / "x", arrays), num_heads=3)
    integers = {name: (array * 9).astype(np.int8) if "fc1.weight" in name else array for name, array in meta.items()}
    with raises_sentence("blocks.0.mlp.fc1.weight of int8", "quantized already"):
        import_checkpoint(save_safetensors(tmp_path / "y", integers), num_heads=3)


@pytest.mark.parametrize("layer", ["attn.qkv", "mlp.fc2"])
def test_linears_without_biases(layer, meta, tmp_path):
    without = {name: array for name, array in meta.items() if not name.endswith(f"{layer}.bias")}
    zeros = {name: np.zeros_like(array) if name.endswith(f"{layer}.bias") else array for name, array in meta.items()}
    model, found = import_checkpoint(save_safetensors(tmp_path / "x", without), num_heads=3)
    np.testing.assert_array_equal(
        output(model), output(import_checkpoint(save_safetensors(tmp_path / "y", zeros), num_heads=3)[0])
    )
    assert any(f"blocks.*.{layer}.bias" in note for note in found.notes)


def test_no_table_of_labels(meta, tmp_path, raises_sentence):
    arrays = {name: array for name, array in meta.items() if not name.startswith("y_embedder")}
    path = save_safetensors(tmp_path / "x", arrays)
    model, found = import_checkpoint(path, num_heads=3)
    assert (model.config.num_classes, model.config.null_class) == (0, False)
    assert any("unconditional" in note for note in found.notes)
    zeros = {**meta, "y_embedder.embedding_table.weight": np.zeros((11, 24), np.float32)}
    with_zeros = import_checkpoint(save_safetensors(tmp_path / "y", zeros), num_heads=3)[0]
    # Two programs, which may round differently although one adds zeros alone.
    assert relative_error(output(model), output(with_zeros)) < 1e-6
    assert set(open_tensors(export_meta(model, tmp_path / "z.safetensors"))) == set(arrays)
    with raises_sentence("no table of labels", "leave the option out"):
        import_checkpoint(path, num_heads=3, classes=10)


KINDS = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_table_of_positions_is_the_same(kind, meta, tmp_path):
    rounded = {**meta, "pos_embed": meta["pos_embed"].astype(kind).astype(np.float32)}
    model, found = import_checkpoint(save_safetensors(tmp_path / "x", rounded), num_heads=3)
    assert not model.config.position_table
    assert not any("positions" in note for note in found.notes)


def test_what_is_no_rounding():
    exact = position_embedding(checkpoints.load(META.parent / "diffusers").config)
    assert is_rounded(exact, exact)
    for kind in KINDS:
        rounded = exact.astype(kind).astype(np.float32)
        assert is_rounded(rounded, exact)
        assert not is_rounded(rounded + np.float32(0.01), exact)
        assert not is_rounded(np.roll(rounded, 1, axis=0), exact)
    noise = np.random.default_rng(0).normal(0, 1e-3, exact.shape).astype(np.float32)
    assert not is_rounded(exact + noise, exact)


@pytest.mark.parametrize("kind", ["learned", "swapped"])
def test_a_table_of_its_own(kind, meta, tmp_path):
    table = meta["pos_embed"]
    table = np.random.default_rng(0).normal(0, 0.02, table.shape).astype(np.float32) if kind == "learned" else table[..., ::-1]
    path = save_safetensors(tmp_path / "x", {**meta, "pos_embed": np.ascontiguousarray(table)})
    model, found = import_checkpoint(path, num_heads=3)
    assert model.config.position_table
    assert any("keeps them as its own" in note for note in found.notes)
    np.testing.assert_array_equal(np.asarray(model.params["position_embed"]["embedding"]), table[0])
    difference = output(model) - output(import_checkpoint(save_safetensors(tmp_path / "y", meta), num_heads=3)[0])
    assert np.abs(difference).max() > 1e-3
    again = checkpoints.load(checkpoints.save(model, tmp_path / "ours"))
    np.testing.assert_array_equal(output(again), output(model))
    exported = open_tensors(export_meta(model, tmp_path / "z.safetensors"))
    np.testing.assert_array_equal(exported["pos_embed"].read(), table)


def torch_entry(name, array, *, kind, key, state=b"}"):
    """An entry of torch's pickle whose tensor goes through ``_rebuild_from_type_v2`` as an object of class ``kind``."""
    plain = foreign_files.torch_pickle({name: array})
    start = plain.index(b"ctorch._utils")
    call = plain[start:-2].replace(
        foreign_files.text("0") + foreign_files.text("cpu"), foreign_files.text(key) + foreign_files.text("cpu")
    )
    function, args = b"ctorch._utils\n_rebuild_tensor_v2\n", call.removeprefix(b"ctorch._utils\n_rebuild_tensor_v2\n")[:-1]
    module, _, cls = kind.rpartition(".")
    return (
        foreign_files.text(name)
        + b"ctorch._tensor\n_rebuild_from_type_v2\n("
        + function
        + f"c{module}\n{cls}\n".encode()
        + args
        + state
        + b"tR"
    )


@pytest.mark.parametrize("kind", ["torch.Tensor", "fastai.torch_core.TensorBase", "torch.nn.parameter.Parameter"])
def test_tensors_with_attributes_and_of_subclasses(kind, meta, tmp_path):
    table = b"\x80\x02}(" + b"".join(torch_entry(n, a, kind=kind, key=str(i)) for i, (n, a) in enumerate(meta.items())) + b"u."
    path = foreign_files.write_torch(tmp_path / "x.pt", meta, table=table)
    found = open_tensors(path)
    assert set(found) == set(meta)
    for name in meta:
        np.testing.assert_array_equal(found[name].read(), meta[name])


def test_what_is_not_understood_is_counted(tmp_path, raises_sentence):
    sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n(K\x01K\x02tR"
    table = b"\x80\x02}(" + b"".join(foreign_files.text(f"w{i}") + sparse for i in range(3)) + b"u."
    path = foreign_files.write_torch(tmp_path / "x.pt", {}, table=table)
    with raises_sentence("holds no tensors", "not understood: 3 x torch._utils._rebuild_sparse_tensor"):
        open_tensors(path)
    with raises_sentence("holds no tensors", "2 x entry under a key of type float"):
        open_tensors(write_pickle(tmp_path / "x.pkl", {0.5: EXTRA, 1.5: EXTRA}))


def test_dropped_tensors_are_named_beside_the_missing(meta, tmp_path, raises_sentence):
    tree = {name: array for name, array in meta.items() if name != "final_layer.linear.bias"}
    objects = {name: np.array([None, "x"], object) for name in ("final_layer.linear.bias",)}
    with raises_sentence("final_layer.linear.bias", "not understood: 1 x numpy.ndarray"):
        import_checkpoint(write_pickle(tmp_path / "x.pkl", tree | objects), num_heads=3)
