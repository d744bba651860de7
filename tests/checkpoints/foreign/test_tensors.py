"""Tensors of foreign files: the same values as their own libraries give, one at a time, and nothing in a file is run."""

import json
import os
import pickle
import tracemalloc
import zipfile
from typing import Any

import flax
import foreign_files
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state
from foreign_files import save_safetensors

from ptq4dit_jax.checkpoints.foreign import open_tensors

TREE: dict[str, Any] = {
    "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(3, ml_dtypes.bfloat16)},
    "step": np.int64(7),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


def assert_equal(file, expected):
    assert set(file) == set(expected)
    for name, array in expected.items():
        array = np.asarray(array)
        assert (file[name].shape, file[name].dtype) == (array.shape, array.dtype)
        read = file[name].read()
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read, array)


def test_a_training_file_of_torch():
    file = open_tensors(foreign_files.META)
    assert file.format == "torch"
    assert {name.split(".")[0] for name in file} == {"model", "ema", "opt"}, "args hold no tensors"
    assert file["ema.blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert file["opt.state.0.step"].shape == ()
    ema, model = file["ema.final_layer.linear.bias"].read(), file["model.final_layer.linear.bias"].read()
    assert ema.dtype == np.float32
    assert 0 < np.abs(ema - model).max() < 0.2


def test_views_of_torch_storages(tmp_path):
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"plain": base, "transposed": base.T, "scalar": np.array(2, np.float32), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / "x.pt"
    table = foreign_files.torch_pickle(arrays)
    foreign_files.write_torch(path, {**arrays, "transposed": base}, table=table)
    assert_equal(open_tensors(path), arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint32, np.bool_])
def test_safetensors(dtype, tmp_path):
    arrays = {"b": np.arange(6).reshape(2, 3).astype(dtype), "a": np.zeros((0, 2), dtype), "c": np.ones((), dtype)}
    file = open_tensors(save_safetensors(tmp_path / "x", arrays))
    assert file.format == "safetensors"
    assert_equal(file, arrays)


def test_safetensors_as_the_library_writes_them():
    file = open_tensors(foreign_files.DIFFUSERS / "transformer")
    assert [part.name for part in file.files] == ["diffusion_pytorch_model.safetensors"]
    assert file["pos_embed.proj.weight"].shape == (24, 4, 2, 2)


@pytest.mark.parametrize("of", ["folder", "index"])
def test_shards(of, tmp_path, raises_sentence):
    arrays = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    for i, name in enumerate(arrays):
        save_safetensors(tmp_path / f"x-{i}.safetensors", {name: arrays[name]})
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x-0.safetensors", "b": "x-1.safetensors"}}))
    path = tmp_path if of == "folder" else index
    assert_equal(open_tensors(path), arrays)
    index.write_text(json.dumps({"weight_map": {"a": "x-1.safetensors"}}))
    with raises_sentence("'a'", "x-1.safetensors"):
        open_tensors(path)
    index.write_text(json.dumps({"weight_map": {"a": "../x-0.safetensors"}}))
    with raises_sentence("../x-0.safetensors", "not beside it"):
        open_tensors(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_numpy_and_jax(protocol, tmp_path):
    tree: dict[str, Any] = {
        **TREE,
        "jax": jnp.ones((2, 2), jnp.bfloat16),
        "big": np.arange(3, dtype=">f4"),
        "list": [np.ones(2)],
        "text": "x",
    }
    file = open_tensors(foreign_files.write_pickle(tmp_path / "x", {"params": tree, "again": tree["a"]}, protocol))
    assert file.format == "pickle"
    expected = {f"params.{name}": tree[name] for name in ("step", "fortran", "jax")} | {"params.list.0": tree["list"][0]}
    for prefix in ("params.a", "again"):
        expected |= {f"{prefix}.{name}": array for name, array in tree["a"].items()}
    assert_equal(file, expected | {"params.big": np.arange(3, dtype=np.float32)})


def test_train_states_are_walked(tmp_path):
    params = flax.core.freeze({"w": np.ones(3, np.float32)})
    no_function: Any = None
    state = train_state.TrainState(0, no_function, params, None, optax.adam(1e-3).init(params))
    file = open_tensors(foreign_files.write_pickle(tmp_path / "x", {"state": state}))
    assert "state.params.w" in file
    assert [name for name in file if name.startswith("state.opt_state")] == [
        "state.opt_state.0.0",
        "state.opt_state.0.1.w",
        "state.opt_state.0.2.w",
    ]


def test_flax_msgpack(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.msgpack_serialize({**TREE, "fortran": np.arange(6.0)}))
    file = open_tensors(path)
    assert file.format == "msgpack"
    assert_equal(
        file, {"a.kernel": TREE["a"]["kernel"], "a.half": TREE["a"]["half"], "step": TREE["step"], "fortran": np.arange(6.0)}
    )


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_without_a_tree(ocdbt, tmp_path):
    tree: dict[str, Any] = {"a": TREE["a"], "blocks": [{"k": np.ones(2, np.float32)}, {"k": np.zeros(2, np.int32)}]}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)).save(tmp_path / "x", args=ocp.args.PyTreeSave(tree))
    file = open_tensors(tmp_path / "x")
    assert file.format == "Orbax"
    expected = {"a.kernel": tree["a"]["kernel"], "a.half": tree["a"]["half"]}
    assert_equal(file, expected | {f"blocks.{i}.k": tree["blocks"][i]["k"] for i in range(2)})


def test_a_step_of_several_items(tmp_path):
    for item in ("state", "ema_state"):
        ocp.PyTreeCheckpointer().save(tmp_path / "step" / item, {"w": np.ones(2, np.float32)})
    assert set(open_tensors(tmp_path / "step")) == {"state.w", "ema_state.w"}


def test_a_file_in_a_folder_of_its_name(tmp_path):
    foreign_files.write_pickle(tmp_path / "model.tmp", TREE["a"])
    (tmp_path / "readme.txt").write_text("hello")
    assert set(open_tensors(tmp_path)) == {"kernel", "half"}


@pytest.mark.parametrize("kind", ["torch", "safetensors", "pickle"])
def test_opening_and_reading_one_tensor_does_not_load_the_file(kind, tmp_path):
    arrays = {str(i): np.zeros(2**20, np.float32) for i in range(8)}
    write = {
        "torch": foreign_files.write_torch,
        "safetensors": save_safetensors,
        "pickle": foreign_files.write_pickle,
    }[kind]
    path = write(tmp_path / "x", arrays)
    del arrays
    tracemalloc.start()
    open_tensors(path)["3"].read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 2**22


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["pickle", "torch"])
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("open('{}', 'w')",), "eval"),
        (getattr, (os, "x"), "getattr"),
        (exec, ("",), "exec"),
    ],
)
def test_nothing_is_run(where, function, args, name, tmp_path, raises_sentence):
    mark, path = tmp_path / "run", tmp_path / "x"
    args = tuple(a.format(mark) if isinstance(a, str) else "os" for a in args)
    table = pickle.dumps({"w": np.ones(3), "e": Evil(function, args)}, protocol=2)
    if where == "torch":
        foreign_files.write_torch(path, {}, table=table)
    else:
        path.write_bytes(table)
    with raises_sentence(str(path), f".{name}, which no checkpoint needs"):
        open_tensors(path)
    assert not mark.exists()


def test_objects_of_other_packages_are_inert(tmp_path):
    call = b"cnot_installed.thing\nLaunch\n(" + foreign_files.text("rm -rf") + b"tR"
    array = foreign_files.text("w") + pickle.dumps(np.ones(3), 2)[2:-1]
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x02}(" + foreign_files.text("o") + call + array + b"u.")
    assert_equal(open_tensors(path), {"w": np.ones(3)})


def test_a_zip_bomb(tmp_path, raises_sentence):
    zeros = {"w": np.zeros(2**20, np.float32)}
    with raises_sentence("compressed"):
        open_tensors(foreign_files.write_torch(tmp_path / "x.pt", zeros, compression=zipfile.ZIP_DEFLATED))


def expanded(shape, strides, count):
    """The table of a torch file with one tensor of a small storage seen as a large one."""
    fake = np.lib.stride_tricks.as_strided(np.zeros(count, np.float32), shape, [4 * s for s in strides])
    table = foreign_files.torch_pickle({"w": fake})
    return table.replace(foreign_files.number(fake.size) + b"tQ", foreign_files.number(count) + b"tQ", 1)


@pytest.mark.parametrize(("shape", "strides"), [((2**15, 2**15), (0, 0)), ((2**10, 4), (1, 1)), ((5,), (1,))])
def test_views_larger_than_their_storage(shape, strides, tmp_path, raises_sentence):
    path = foreign_files.write_torch(tmp_path / "x", {"w": np.zeros(4, np.float32)}, table=expanded(shape, strides, 4))
    with raises_sentence("outside of its storage"):
        open_tensors(path)


def test_one_storage_under_very_many_names(tmp_path, raises_sentence):
    array = np.zeros(2**20, np.float32)
    with raises_sentence("declares", "MB of tensors"):
        open_tensors(foreign_files.write_pickle(tmp_path / "x", {str(i): array for i in range(40)}))


def test_containers_that_hold_each_other(tmp_path, raises_sentence):
    loop: dict[str, Any] = {}
    doubling: list[Any] = [np.ones(1)]
    loop["again"] = loop
    for _ in range(40):
        doubling = [doubling, doubling]
    for tree in (loop, doubling):
        with raises_sentence("nested without end"):
            open_tensors(foreign_files.write_pickle(tmp_path / "x", tree))


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04" + b"}" * 10**6, b"\x81\xa1w\xdd" + (10**6).to_bytes(4, "big") + b"\x80" * 10**6],
    ids=["pickle", "msgpack"],
)
def test_more_values_than_any_checkpoint(content, tmp_path, raises_sentence, monkeypatch):
    monkeypatch.setattr("ptq4dit_jax.checkpoints.foreign.pickle_machine.MAX_STEPS", 10**5)
    monkeypatch.setattr("ptq4dit_jax.checkpoints.foreign.msgpack_file.MAX_ENTRIES", 10**5)
    (tmp_path / "x").write_bytes(content)
    with raises_sentence("more values than any checkpoint"):
        open_tensors(tmp_path / "x")


def header(entries):
    data = json.dumps(entries).encode()
    return len(data).to_bytes(8, "little") + data + bytes(16)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS"),
        (b"hello world, this is text", "no checkpoint of a known kind"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "torch before 1.6"),
        (b'{"_class_name": "CLIPTextModel"}', "weight_map"),
        (b"\x80\x04}.", "holds no tensors"),
        (b"\x80\x04\x95", "cut off"),
        (b"\x80\x04P0\n.", "instruction"),
        (b"\x80\x04(((((" + b"2" * 100 + b".", "no tensors"),
        (b"\x80\x04" + b"]\x94h\x00" * 3 + b"u.", "mark"),
        (header({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 17]}}), "invalid shape"),
        (header({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}), "file not fully covered"),
        (header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "integer `-1`"),
        (header({"w": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}), "unknown variant `Q4`"),
        (header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}), "invalid offset"),
        ((100).to_bytes(8, "little") + b"{", "header is cut off"),
        (b"\x81\xa1w" + b"\x81\xa1w" * 80 + b"\xc0", "nested without end"),
        (b"\x82\xa1w\xc1", "value type"),
    ],
)
def test_files_that_are_none(content, part, tmp_path, raises_sentence):
    path = tmp_path / "x"
    path.write_bytes(content)
    with raises_sentence(str(path), part):
        open_tensors(path)


@pytest.mark.parametrize("keep", [10, 1000, 100_000, 292_000])
def test_a_truncated_torch_file(keep, tmp_path, raises_sentence):
    path = tmp_path / "x.pt"
    path.write_bytes(foreign_files.META.read_bytes()[:keep])
    with raises_sentence("x.pt", "copy or download it again"):
        open_tensors(path)


def test_other_zips_and_folders(tmp_path, raises_sentence):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with raises_sentence(".npz"):
        open_tensors(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    with raises_sentence("not one that torch.save wrote"):
        open_tensors(tmp_path / "x.zip")
    with raises_sentence("does not exist"):
        open_tensors(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with raises_sentence("must hold one checkpoint"):
        open_tensors(tmp_path / "empty")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path, raises_sentence):
    path = save_safetensors(tmp_path / "x", {"w": np.ones(100, np.float32)})
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with raises_sentence("(100,)", "open the file again"):
        file["w"].read()
