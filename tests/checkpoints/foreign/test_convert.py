"""``ptq4dit convert``, and foreign checkpoints as models of the other commands."""

import json
import shutil

import foreign_files
import numpy as np
import pytest

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints.foreign import import_checkpoint, open_tensors
from ptq4dit_jax.cli import main


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_there_and_back(tmp_path, capsys):
    ours, theirs, figures = tmp_path / "ours", tmp_path / "x.safetensors", tmp_path / "x.json"
    assert main(["convert", str(foreign_files.META), str(ours), "--num-heads", "3", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    for part in ("Meta DiT", "averaged (EMA)", "depth 2, width 24, 3 heads, patch 2", "30896", f"Model: {ours}"):
        assert part in shown
    assert json.loads(figures.read_text())["layout"] == "Meta DiT"
    model = checkpoints.load(ours)
    assert model.config == import_checkpoint(foreign_files.META, num_heads=3)[1].config
    assert main(["info", str(ours)]) == 0
    assert str(foreign_files.META) in capsys.readouterr().out, "the model says where it comes from"
    assert main(["convert", str(ours), str(theirs), "--to", "meta"]) == 0
    assert set(open_tensors(theirs)) == {name[4:] for name in open_tensors(foreign_files.META) if name.startswith("ema.")}


def test_model_weights(tmp_path):
    arguments = ["convert", str(foreign_files.META), str(tmp_path / "x.safetensors"), "--to", "meta", "--num-heads", "3"]
    assert main([*arguments, "--model-weights"]) == 0
    name = "blocks.1.mlp.fc1.weight"
    read = open_tensors(tmp_path / "x.safetensors")[name].read()
    np.testing.assert_array_equal(read, open_tensors(foreign_files.META)[f"model.{name}"].read())


def test_info_of_a_foreign_checkpoint(capsys):
    assert main(["info", str(foreign_files.DIFFUSERS)]) == 0
    assert "depth 2, width 24, 2 heads, patch 2" in capsys.readouterr().out


def test_guesses_are_printed_and_warned_of(tmp_path, capsys):
    tree, _ = foreign_files.kvfrans()
    path = foreign_files.write_pickle(tmp_path / "x.pkl", tree)
    assert main(["info", str(path)]) == 0
    assert "Guess: the 11 rows of the table of labels are 10 classes and a null class. To override: classes (--classes" in (
        capsys.readouterr().out
    )
    with pytest.warns(UserWarning, match="Guess: the 11 rows"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("options", "classes", "null"),
    [
        (["--no-null-class"], 11, False),
        (["--classes", "10"], 10, True),
        (["--ignore", "num_classes", "--null-class"], 10, True),
    ],
)
def test_options_and_what_they_leave_out(options, classes, null, tmp_path):
    tree, _ = foreign_files.kvfrans()
    settings = {"num_classes": 9} if "--ignore" in options else {}
    path = foreign_files.write_pickle(tmp_path / "x.pkl", {"params": tree, "config": settings})
    assert main(["convert", str(path), str(tmp_path / "ours"), *options]) == 0
    config = checkpoints.load(tmp_path / "ours").config
    assert (config.num_classes, config.null_class) == (classes, null)


def test_what_was_decided_in_a_folder_is_printed(tmp_path, capsys):
    """In half precision beside full precision, in a download of Hugging Face; and kept in the model's provenance."""
    root, ours = tmp_path / "models--me--dit", tmp_path / "ours"
    source = shutil.copytree(foreign_files.DIFFUSERS, root / "snapshots" / "0123")
    weights = open_tensors(source)
    narrow = {name: tensor.read().astype(np.float16) for name, tensor in weights.items()}
    foreign_files.save_safetensors(weights.files[0].with_suffix(".fp16.safetensors"), narrow)
    for arguments in (["info", root], ["convert", root, ours], ["info", ours]):
        assert main([str(argument) for argument in arguments]) == 0
        shown = capsys.readouterr().out
        assert "snapshot 0123, the only one" in shown
        assert "diffusion_pytorch_model.safetensors, full precision, beside" in shown
    assert checkpoints.load(ours).dtype == np.float32


@pytest.mark.parametrize("command", ["info", "convert"])
def test_an_unknown_folder(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("hello")
    assert main([command, str(tmp_path / "run"), *([str(tmp_path / "x")] if command == "convert" else [])]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model of this program already" not in error
    assert "what can be read: files of torch.save" in error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{meta}", "{tmp}/x"], "--num-heads"),
        (["{meta}", "{tmp}/x", "--to", "onnx"], "--to must be ptq4dit or meta, not 'onnx'"),
        (["{meta}", "{tmp}/x.pt", "--to", "meta"], "must end in .safetensors"),
        (["{meta}", "{tmp}", "--num-heads", "3"], "exists"),
        (["{tmp}/nothing", "{tmp}/x"], "does not exist"),
        (["{tmp}/ours", "{tmp}/x"], "is a model of this program already; --to meta exports one"),
        (["gs://bucket/run", "{tmp}/x"], "gs://bucket/run"),
        (["{meta}", "gs://bucket/x", "--num-heads", "3"], "gs://bucket/x is an address"),
    ],
)
def test_mistakes_are_one_sentence(arguments, part, tmp_path, capsys):
    (tmp_path / "ours" / "arrays").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *(a.format(meta=foreign_files.META, tmp=tmp_path) for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert part in error
    assert sorted(tmp_path.rglob("*")) == before
