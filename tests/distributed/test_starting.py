"""How processes find each other, and what is said if they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from ptq4dit_jax import cli, processes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("10.0.0.1",), "(--coordinator) must be HOST:PORT"),
        (("10.0.0.1:70000",), "not '10.0.0.1:70000'"),
        ((None, 0), "(--num-processes) must be positive, not 0"),
        ((None, 2, 2), "(--process-id) must be from 0 to the number of processes minus 1, not 2"),
        ((None, None, -1), "not -1"),
    ],
)
def test_wrong_arguments(arguments: Any, said: str, raises_sentence: Callable[..., AbstractContextManager[None]]) -> None:
    with raises_sentence(said):
        processes.start(*arguments)


def test_options_without_distributed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--process-id", "1", "info", "random:DiT-S/2"]) == 1
    assert "--process-id is for --distributed" in capsys.readouterr().err


def run(program: str) -> tuple[int, str]:
    """Runs a program that ends as commands do; returns its status and errors."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_CO", "JAX_NUM", "JAX_PROCESS"))}
    line = f"from ptq4dit_jax import cli, ending, processes; ending.run(lambda: {program})"
    found = subprocess.run([sys.executable, "-c", line], env=unset, capture_output=True, text=True, timeout=300)
    return found.returncode, found.stderr


@pytest.mark.slow
def test_nothing_detected() -> None:
    """No cluster: the sentence names the options that are missing, and environment variables stand for options."""
    status, errors = run("processes.start('127.0.0.1:1')")
    assert status == 1
    assert "JAX detects no cluster here" in errors
    assert "pass --num-processes, --process-id." in errors


@pytest.mark.slow
def test_nobody_there() -> None:
    """The program ends with its own sentence before JAX would end it with another."""
    status, errors = run("processes.start('127.0.0.1:1', 2, 1, timeout=2)")
    assert status == 1
    assert "did not find each other through 127.0.0.1:1 within 2 s" in errors
