"""Help and exit status."""

import os
import re
import subprocess
import sys

import pytest
from cli_helpers import COMMANDS, DIGITS, ROOT, listing, run

from ptq4dit_jax import cli


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    run(command, "--help")
    shown = " ".join(re.sub(r"[│╭╮╰╯─|]", " ", capsys.readouterr().out).split())
    parameters = COMMANDS[command].params
    assert len(parameters) > 1
    for parameter in parameters:
        assert parameter.help, f"{parameter.name} has no help"
        assert " ".join(parameter.help.split()) in shown
        assert all(option in shown for option in parameter.opts if option.startswith("-"))
    assert COMMANDS[command].help in shown


def test_help_of_the_program_names_the_commands(capsys):
    run("--help")
    shown = capsys.readouterr().out
    assert set(COMMANDS) == {"info", "convert", "quantize", "sample", "compile", "evaluate"}
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_of_the_program_is_the_same_without_the_library(arguments, tmp_path):
    """What the console script shows, which imports nothing heavy, and what the library's commands say of themselves."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    script = f"import sys, ptq4dit_start; sys.argv[1:] = {arguments}; ptq4dit_start.entry()"
    # A module that is None here cannot be imported.
    alone = "import sys; sys.modules.update(jax=None, numpy=None, flax=None, orbax=None); " + script
    shown = [
        subprocess.run(
            [sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        for program in (["-c", alone], ["-m", "ptq4dit_jax.cli", *arguments])
    ]
    outputs = {(done.returncode, done.stdout, done.stderr) for done in shown}
    assert len(outputs) == 1, outputs
    assert all(command in shown[0].stdout for command in COMMANDS)


def test_exit_status_of_the_program(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ptq4dit_jax.cli", "info", "random:DiT-XXL/2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"Error: Unknown DiT preset 'DiT-XXL/2'; .*\.\n", done.stderr)


def test_usage_errors_exit_with_2(here, capsys):
    for arguments in (["sample"], ["sample", DIGITS], ["quantize", DIGITS, "--out", "q", "--weight-bits", "x"], ["paint"]):
        assert cli.main(arguments) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert listing(here) == {}
