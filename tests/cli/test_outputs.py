"""Outputs that cannot be made, and work that is interrupted: nothing is lost, nothing half written stays."""

import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import DIGITS, WALK, listing, patch

import ptq4dit_jax as ptq
from ptq4dit_jax import chain, cli
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.quantization import pipeline, weights

OUTPUTS = {
    "quantize D": "q",
    "sample D": "a.npz",
    "compile D --batch-size 1": "p",
    "evaluate Q --against D": "r",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_that_cannot_be_made(command, refused, here):
    name = OUTPUTS[command]
    refused(f"{command} --out file/below/{name}", "file", "not a folder")
    refused(f"{command} --out {'x' * 300 + name}", "name too long")
    Path(name).mkdir()
    Path(name, "thesis.txt").write_text("precious")
    refused(f"{command} --out {name}", f"{name} exists", "--overwrite")
    refused(f"{command} --out {name} --overwrite", name, "another path")


@pytest.mark.parametrize("command", ["quantize D", "evaluate Q --against D"])
def test_files_are_not_replaced_by_folders(command, refused):
    refused(f"{command} --out file", "file exists", "--overwrite")
    refused(f"{command} --out file --overwrite", "file", "another path")


def test_a_report_does_not_replace_a_model_nor_a_model_a_report(refused):
    shutil.copytree(DIGITS, "model")
    Path("report").mkdir()
    Path("report/report.json").write_text("{}")
    refused("evaluate Q --against D --out model --overwrite", "model", "another path")
    refused("quantize D --out report --overwrite", "report", "another path")


@pytest.mark.parametrize("command", [*OUTPUTS, "info D"])
def test_figures_that_cannot_be_written_stop_a_command_before_it_works(command, refused):
    out = f" --out new/{OUTPUTS[command]}" if command in OUTPUTS else ""
    refused(f"{command}{out} --json file/below/x.json", "file", "not a folder")
    refused(f"{command}{out} --json foreign", "foreign", "folder")


@pytest.mark.parametrize("command", OUTPUTS)
def test_folders_without_permission(command, refused):
    Path("locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    refused(f"{command} --out locked/new/{OUTPUTS[command]}", "locked", "may write")


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_forms_that_samples_are_not_written_in(name, refused):
    refused(f"sample D --out {name}", repr(name), ".png or .npz")


# Interruptions


@pytest.mark.parametrize(
    ("command", "owner", "work"),
    [
        ("quantize D --out new/q", pipeline, "sample_trajectories"),
        ("quantize D --out new/q", weights, "quantize_linear"),
        ("sample D --out new/a.png", chain, "sample_batch"),
        ("evaluate Q --against D --out new/r", cli.evaluate, "compare"),
        ("info D --json new/x.json", cli.info, "summary_of"),
    ],
)
def test_control_c_while_working(command, owner, work, here, w4, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if work == "quantize_linear":  # the stages before it are not what is tested
        monkeypatch.setattr(cli.quantize.quantization, "quantize", interrupted)
    monkeypatch.setattr(owner, work, interrupted)
    arguments = [{"D": DIGITS, "Q": str(w4.folder)}.get(a, a) for a in command.split()]
    assert cli.main(arguments) not in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
    assert listing(here) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_written_stays(error, here, w4, capsys, monkeypatch):
    def begun(file, batches, count, labels):
        next(iter(batches))
        file.write(b"PK half")
        raise error

    patch(monkeypatch, "write_samples", begun)
    status = cli.main(["sample", str(w4.folder), "--out", "new/a.npz", *WALK])
    message = capsys.readouterr().err
    assert status != 0
    assert "Traceback" not in message
    assert ("No space left" in message) == isinstance(error, OSError)
    assert listing(here) == {}


def test_an_interrupted_save_leaves_the_old_model(here, w4, monkeypatch):
    shutil.copytree(DIGITS, "model", ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.md"))
    before = listing(here)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.quantize.quantization, "quantize", lambda *_, **__: ptq.load(w4.folder))
    monkeypatch.setattr(store, "_publish", interrupted)
    assert cli.main(["quantize", DIGITS, "--out", "model", "--overwrite"]) != 0
    assert listing(here) == before
