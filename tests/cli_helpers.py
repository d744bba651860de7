"""What the tests of the commands share: the program in this process, its inputs, and what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from ptq4dit_jax import cli

ROOT = Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "models/digits")
VAE = str(ROOT / "tests/golden/vae")
#: What is fastest to quantize by, and rows that are fastest to sample.
FAST = ["--weight-bits", "4", "--rounding", "nearest", "--balance", "csb+ssc"]
CALIBRATE = [*FAST, "--calib-steps", "2", "--calib-rows", "4", "--steps", "4"]
WALK = ["--labels", "0-3", "--steps", "4"]
PROGRAM: Any = typer.main.get_command(cli.app)  # a group of commands, of the click that typer brings
COMMANDS = PROGRAM.commands


def patch(monkeypatch, name, value):
    """Replaces what commands know by that name."""
    modules = [
        module
        for module in (cli.info, cli.convert, cli.quantize, cli.sample, cli.compile, cli.evaluate)
        if hasattr(module, name)
    ]
    assert modules, name
    for module in modules:
        monkeypatch.setattr(module, name, value)


def run(*arguments):
    """The program in this process; a command must succeed. Arguments may be paths."""
    assert cli.main([str(a) for a in arguments]) == 0


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def figures(path):
    """JSON as its standard has it: NaN is none of it."""
    return json.loads(Path(path).read_text(), parse_constant=lambda text: pytest.fail(f"{text} in {path}"))
