"""Checkpoints at addresses, in fsspec's store in memory: what is copied, what is left, and addresses that cannot be read."""

import gc
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from foreign_files import DIFFUSERS, GOLDEN, META, save_safetensors, write_torch
from helpers import load_float

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints import addresses, store
from ptq4dit_jax.checkpoints.foreign import import_checkpoint, load_vae, open_tensors, remote
from ptq4dit_jax.cli import main
from ptq4dit_jax.terminal import check_target, read_arrays

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty store, and an empty folder for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()
    gc.collect()
    assert not list(scratch.iterdir()), "a temporary folder was left"


def upload(files, source, target):
    for file in (file for file in sorted(Path(source).rglob("*")) if file.is_file()):
        files.pipe_file(f"/{target}/{file.relative_to(source).as_posix()}", file.read_bytes())


def opened(monkeypatch):
    """The names of all files that are read whole from now on."""
    names = []
    download = remote._download

    def noted(files, chosen, *rest):
        names.extend(chosen)
        download(files, chosen, *rest)

    monkeypatch.setattr(remote, "_download", noted)
    return names


def assert_same(model, expected):
    assert (model.config, model.schedule) == (expected.config, expected.schedule)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


def test_only_the_weights_that_are_read_are_copied(memory, tmp_path, monkeypatch):
    """A pipeline with the transformer in half precision too, a VAE, and pictures."""
    source = shutil.copytree(DIFFUSERS, tmp_path / "dit")
    weights = open_tensors(source).files[0]
    narrow = {name: t.read().astype(np.float16) for name, t in open_tensors(source).items()}
    save_safetensors(weights.with_name("diffusion_pytorch_model.fp16.safetensors"), narrow)
    (source / "vae").mkdir()
    write_torch(source / "vae" / "diffusion_pytorch_model.bin", {"x": np.ones(5, np.float32)})
    (source / "sample.png").write_bytes(b"\x89PNG" + bytes(1000))
    upload(memory, source, "hub/dit")
    names = opened(monkeypatch)
    model, found = import_checkpoint("memory://hub/dit")
    assert_same(model, import_checkpoint(source)[0])
    assert names == [f"/hub/dit/transformer/{weights.name}"]
    assert found.dtype == "float32"


def test_the_config_and_scheduler_of_a_file_are_found(memory):
    upload(memory, DIFFUSERS, "b/dit")
    weights = open_tensors(DIFFUSERS).files[0].name
    expected = import_checkpoint(DIFFUSERS)[0]
    for address in (f"memory://b/dit/transformer/{weights}", "memory://b/dit/transformer/"):
        assert_same(import_checkpoint(address)[0], expected)
    assert_same(import_checkpoint(Path("memory://b/dit/transformer"))[0], expected)


def test_tensors_can_be_read_as_long_as_there_are_any(memory, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"a": np.arange(4, dtype=np.float32)})
    upload(memory, tmp_path, "b")
    done = []
    file = open_tensors("memory://b/x.safetensors", progress=lambda *figures: done.append(figures))
    assert (str(file.path), file.path.name) == ("memory://b/x.safetensors", "x.safetensors")
    tensor = file["a"]
    del file
    gc.collect()
    np.testing.assert_array_equal(tensor.read(), np.arange(4))
    assert done
    del tensor


def test_the_latest_step_of_a_run(memory, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        ocp.PyTreeCheckpointer().save(tmp_path / "run" / str(step) / "state", {"a": np.full(3, float(step))})
    (tmp_path / "run" / "2" / "commit_success.txt").touch()
    (tmp_path / "run" / "1" / "commit_success.txt").touch()
    upload(memory, tmp_path / "run", "b/run")
    names = opened(monkeypatch)
    file = open_tensors("memory://b/run")
    assert file.notes == ("step 2, the latest of 1, 2 (3 without whole weights)",)
    np.testing.assert_array_equal(file["state.a"].read(), np.full(3, 2.0))
    assert names
    assert all(name.startswith("/b/run/2/state/") for name in names)


@pytest.mark.parametrize("of", ["", "/model.safetensors.index.json"])
def test_shards(of, memory, tmp_path, monkeypatch):
    for n in (1, 2, 3):
        save_safetensors(tmp_path / f"model-{n}-of-2.safetensors", {f"t{n}": np.full(2, n, np.float32)})
    places = {f"t{n}": f"model-{n}-of-2.safetensors" for n in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    upload(memory, tmp_path, "b/m")
    names = opened(monkeypatch)
    assert {name: tensor.read()[0] for name, tensor in open_tensors(f"memory://b/m{of}").items()} == {"t1": 1, "t2": 2}
    assert sorted(names) == [f"/b/m/model-{n}-of-2.safetensors" for n in (1, 2)]


def test_models_of_this_package(memory, tmp_path, tiny_model):
    upload(memory, ptq.save(tiny_model, tmp_path / "m"), "b/m")
    loaded = load_float("memory://b/m")
    assert loaded.config == tiny_model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_model.params)


def test_commands(memory, tmp_path, capsys):
    """The model that comes out says where it is from, not where its copy was."""
    upload(memory, DIFFUSERS, "b/dit")
    assert main(["convert", "memory://b/dit", str(tmp_path / "ours")]) == 0
    assert_same(ptq.load(tmp_path / "ours"), import_checkpoint(DIFFUSERS)[0])
    upload(memory, tmp_path / "ours", "b/ours")
    capsys.readouterr()
    assert main(["info", "memory://b/ours"]) == 0
    shown = capsys.readouterr().out
    assert "memory://b/dit" in shown
    assert "scratch" not in shown
    assert main(["convert", "memory://b/ours", str(tmp_path / "again")]) == 1
    assert "memory://b/ours is a model of this program already" in capsys.readouterr().err


def test_a_vae_in_a_pipeline(memory):
    upload(memory, GOLDEN / "vae", "b/p/vae")
    jax.tree.map(np.testing.assert_array_equal, load_vae("memory://b/p").params, load_vae(GOLDEN / "vae").params)


# Addresses that cannot be read


def test_sentences_name_the_address(memory, tmp_path, raises_sentence):
    write_torch(tmp_path / "a.pt", {"x": np.ones(3, np.float32)})
    write_torch(tmp_path / "b.pt", {"x": np.ones(3, np.float32)})
    (tmp_path / "cut.pt").write_bytes(META.read_bytes()[:5000])
    upload(memory, tmp_path, "b")
    with raises_sentence("memory://b must hold one checkpoint", "a.pt, b.pt"):
        open_tensors("memory://b")
    with raises_sentence("memory://b/cut.pt is no whole checkpoint"):
        open_tensors("memory://b/cut.pt")
    with raises_sentence("memory://b/a.pt is no DiT"):
        ptq.load("memory://b/a.pt")
    for absent in ("memory://b/none", "memory://none"):
        with raises_sentence(f"nothing at {absent}"):
            open_tensors(absent)


@pytest.mark.parametrize(
    ("address", "package", "command"),
    [
        ("gs://bucket/run/1000", "gcsfs", "gcloud storage cp -r gs://bucket/run/1000 ."),
        ("s3://bucket/run", "s3fs", "aws s3 cp --recursive s3://bucket/run run"),
        ("hf://me/dit", "huggingface_hub", "huggingface-cli download me/dit --local-dir dit"),
        ("hf://me/dit@v2/transformer", "huggingface_hub", "--include 'transformer/*' --revision v2"),
        ("https://huggingface.co/me/dit/tree/main", "huggingface_hub", "huggingface-cli download me/dit --local-dir dit"),
        ("https://huggingface.co/me/dit/blob/main/x.pt", "huggingface_hub", "huggingface-cli download me/dit x.pt"),
        ("https://example.com/a b.pt", "aiohttp", "curl -LO 'https://example.com/a b.pt'"),
        ("nonsense://x/y", None, "the program of its store"),
    ],
)
@pytest.mark.parametrize("act", [open_tensors, ptq.load, load_vae])
def test_without_a_package_for_the_store(act, address, package, command, raises_sentence):
    if package is not None and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with raises_sentence("cannot be read here", command, "pass the copy"):
        act(address)


@pytest.mark.parametrize(
    "error", [PermissionError("denied"), RuntimeError("Anonymous caller\nhas no access."), OSError(5, "I/O")]
)
def test_whatever_a_store_raises(error, memory, monkeypatch, raises_sentence):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(type(memory), "info", refuse)
    with raises_sentence("memory://b/x cannot be read here", type(error).__name__):
        open_tensors("memory://b/x")


def test_no_space(memory, tmp_path, monkeypatch, raises_sentence):
    write_torch(tmp_path / "a.pt", {"x": np.ones(3, np.float32)})
    upload(memory, tmp_path, "b")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with raises_sentence("TMPDIR", "left to copy them to"):
        open_tensors("memory://b/a.pt")


def test_a_file_that_is_being_written(memory, tmp_path, monkeypatch, raises_sentence):
    write_torch(tmp_path / "a.pt", {"x": np.ones(3, np.float32)})
    upload(memory, tmp_path, "b")
    lay_out = remote._lay_out

    def then_grow(files, *rest):
        lay_out(files, *rest)
        files.pipe_file("/b/a.pt", (tmp_path / "a.pt").read_bytes() + b"more")

    monkeypatch.setattr(remote, "_lay_out", then_grow)
    with raises_sentence("a.pt changed while it was copied"):
        open_tensors("memory://b/a.pt")


def test_names_that_lead_out_of_the_folder(memory, tmp_path, monkeypatch):
    write_torch(tmp_path / "a.pt", {"x": np.ones(3, np.float32)})
    upload(memory, tmp_path, "b/in")
    find = type(memory).find

    def hostile(self, path, **options):
        entry = {"name": "/b/in/../../../../escaped.json", "size": 2, "type": "file"}
        return find(self, path, **options) | {"x": entry, "y": entry | {"name": "/b/in/nul\0.pt"}}

    monkeypatch.setattr(type(memory), "find", hostile)
    assert list(open_tensors("memory://b/in")) == ["x"]
    assert not list(tmp_path.rglob("escaped*"))


def test_very_many_files(memory, tmp_path, monkeypatch, raises_sentence):
    for name in "abc":
        write_torch(tmp_path / name, {"x": np.ones(3, np.float32)})
    upload(memory, tmp_path, "b")
    monkeypatch.setattr(remote, "_MAX_FILES", 2)
    with raises_sentence("3 files at memory://b"):
        open_tensors("memory://b")


# Addresses and paths


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("gs://b/x", "gs://b/x"),
        ("GS://b/x", "gs://b/x"),
        ("gs:/b/x", "gs://b/x"),
        ("https://hf.co/me/dit", "hf://me/dit"),
        ("https://huggingface.co/me/dit/tree/v2/a/b?x=1", "hf://me/dit@v2/a/b"),
        ("https://huggingface.co/me/dit/resolve/main/a/x.pt?download=true", "hf://me/dit@main/a/x.pt"),
        ("https://example.com/x.pt?token=1", "https://example.com/x.pt?token=1"),
        ("file:///x", None),
        ("/gs://b/x", None),
        ("C:/models/x", None),
        ("a:b", None),
        ("models/digits", None),
        ("", None),
    ],
)
def test_what_is_an_address(text, address):
    assert addresses.address_of(text) == address
    if address is not None:
        path = addresses.local_path(text)
        assert (str(path), f"{path}", path.exists()) == (address, address, False)
        assert str(path / "y").startswith(address)


def test_a_folder_whose_name_looks_like_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:").mkdir()
    write_torch(tmp_path / "run:" / "x.pt", {"x": np.ones(3, np.float32)})
    assert list(open_tensors("run:/x.pt")) == ["x"]
    assert list(open_tensors(f"file://{tmp_path}/run:/x.pt")) == ["x"]


def test_outputs_and_arrays_are_on_this_machine(tmp_path, monkeypatch, tiny_model, raises_sentence):
    monkeypatch.chdir(tmp_path)
    for target in ("gs://b/m", Path("gs://b/m")):
        with raises_sentence("gs://b/m is an address"):
            ptq.save(tiny_model, target)
        with raises_sentence("gs://b/m is an address"):
            store.read(target)
    with raises_sentence("s3://b/x.png is an address"):
        check_target(Path("s3://b/x.png"), overwrite=False)
    with raises_sentence("gs://b/rows.npz is an address", "gcloud storage cp"):
        read_arrays(Path("gs://b/rows.npz"), ("x",))
    assert not list(tmp_path.iterdir())
