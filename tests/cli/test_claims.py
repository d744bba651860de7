"""Outputs of commands: claimed from the start, asked for again at the end, and nothing of an earlier run left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import CALIBRATE, DIGITS, ROOT, WALK, listing, patch, run

import ptq4dit_jax as ptq
from ptq4dit_jax import cli
from ptq4dit_jax.reconstruction import Journal

COMMANDS = {
    "quantize": ["quantize", DIGITS, "--out", "out"],
    "sample": ["sample", DIGITS, "--out", "out.npz"],
    "evaluate": ["evaluate", DIGITS, "--against", DIGITS, "--out", "out"],
    "convert": ["convert", DIGITS, "out.safetensors", "--to", "meta"],
    "info": ["info", DIGITS, "--json", "out"],
}
HOLDER = """
import sys, time
from ptq4dit_jax.staging import claim
with claim(sys.argv[1]):
    print("holds it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holds(here):
    """Starts another process that holds the claim of an output."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    processes = []

    def start(name):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, name], env=env, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process_is_told_before_any_work(command, holds, here, capsys, monkeypatch):
    arguments = COMMANDS[command]
    name = next(a for a in arguments if a.startswith("out"))
    other = holds(name)
    before = listing(here)
    patch(monkeypatch, "load_model", lambda *_, **__: pytest.fail("work began"))
    for more in ([], ["--json", name] if command != "info" else [], ["--overwrite"] if command != "info" else []):
        assert cli.main([*arguments, *more]) == 1
        assert "Another run is writing" in capsys.readouterr().err
        assert listing(here) == before
    other.kill()
    other.wait()
    with pytest.raises(pytest.fail.Exception, match="work began"):
        cli.main(arguments)
    assert listing(here) == {}


def test_a_journal_that_another_process_holds_is_refused_before_any_work(holds, here, capsys, monkeypatch):
    holds(".out.reconstruction")
    patch(monkeypatch, "load_model", lambda *_, **__: pytest.fail("work began"))
    assert cli.main(["quantize", DIGITS, "--out", "out", "--reconstruct"]) == 1
    assert ".out.reconstruction" in capsys.readouterr().err
    long = "x" * 225  # fits, but its journal's name does not
    assert cli.main(["quantize", DIGITS, "--out", long, "--reconstruct"]) == 1
    assert "name too long" in capsys.readouterr().err


def test_a_command_removes_what_a_killed_one_left(here, w4):
    Path(".a.npz.0123456789ab.tmp").write_bytes(b"half")
    Path(".a.npz.ptq4dit.lock").touch()
    run("sample", w4.folder, "--out", "a.npz", *WALK)
    assert os.listdir() == ["a.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_figures_may_go_into_the_folder_that_a_command_makes(existing, here, w4):
    more = ["--labels", "0", "--repeat", "2", "--steps", "2"]
    for name in ("report", "q"):
        if existing:
            Path(name).mkdir()
        flag = ["--overwrite"] if existing else []
        command = ["evaluate", w4.folder, "--against", DIGITS, *more] if name == "report" else ["quantize", DIGITS, *CALIBRATE]
        run(*command, "--out", name, "--json", f"{name}/figures/all.json", *flag)
        assert Path(name, "figures/all.json").is_file()
    assert sorted(os.listdir()) == ["q", "report"]
    assert "report.json" in os.listdir("report")
    assert sorted(os.listdir("q")) == ["arrays", "config.json", "figures"]
    ptq.load("q")


def test_a_file_that_came_to_the_place_meanwhile_is_kept_without_overwrite(here, w4, capsys, monkeypatch):
    def slow(file, batches, count, labels):
        Path("a.npz").write_text("mine")
        file.write(b"all samples")

    patch(monkeypatch, "write_samples", slow)
    assert cli.main(["sample", str(w4.folder), "--out", "a.npz", *WALK]) == 1
    assert "a.npz exists" in capsys.readouterr().err
    assert listing(here) == {"a.npz": b"mine"}
    run("sample", w4.folder, "--out", "a.npz", "--overwrite", *WALK)
    assert listing(here) == {"a.npz": b"all samples"}


@pytest.mark.parametrize("name", ["pipe", "socket"])
def test_what_is_neither_file_nor_folder_is_not_replaced(name, here, capsys):
    os.mkfifo("pipe")
    Path("socket").symlink_to("pipe")
    assert cli.main(["info", DIGITS, "--json", name]) == 1
    assert "a device or the like" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["pipe", "socket"]


def test_the_state_of_a_finished_reconstruction_goes_and_what_is_none_stays(here, w4, capsys, monkeypatch):
    def quick(*_, state, **__):
        with Journal(state, {"weights": "abc"}) as journal:
            journal.finish(0, {"a": np.zeros(3)})
        Path(state, "notes.txt").write_text("mine")
        return ptq.load(w4.folder)

    monkeypatch.setattr(cli.quantize.quantization, "quantize", quick)
    run("quantize", DIGITS, "--out", "q", "--reconstruct")
    assert sorted(os.listdir()) == [".q.reconstruction", "q"]
    assert os.listdir(".q.reconstruction") == ["notes.txt"]
    assert "could not be removed" not in capsys.readouterr().out
    Path(".q.reconstruction/notes.txt").unlink()
    patch(monkeypatch, "forget_journal", lambda state: False)
    run("quantize", DIGITS, "--out", "q", "--reconstruct", "--overwrite", "--json", "x.json")
    assert ".q.reconstruction" in capsys.readouterr().out.split("could not be removed")[1]
    assert Path("x.json").exists()
