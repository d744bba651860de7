"""The start of a program: what it handles and shows before it imports the library, which takes a second or more.

A separate module, because importing anything from ``ptq4dit_jax`` imports all of it. It handles signals, and ends the process
as :func:`ptq4dit_jax.ending.run` does, which later takes over. It shows the help of the whole program, for which it reads only
``ptq4dit_jax/cli/overview.py``. This is the console script ``ptq4dit``.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn


def _leave(number: int, frame: Any) -> NoReturn:
    said = "Interrupted" if number == signal.SIGINT else "Terminated"
    try:
        os.write(2, f"{said}: nothing was written, and the same command starts over.\n".encode())
    finally:
        os._exit(128 + number)


def take_signals() -> None:
    """Ends the process at a signal with a sentence, unless it was told to ignore that signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _overview(arguments: list[str]) -> None:
    """Shows help and ends the process; returns if the package is not found as files."""
    package = importlib.util.find_spec("ptq4dit_jax")  # does not import it
    if package is None or package.origin is None:
        return
    path = Path(package.origin).parent / "cli" / "overview.py"
    spec = importlib.util.spec_from_file_location("ptq4dit_overview", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.show(arguments)


def entry() -> NoReturn:
    """The console script, which ends the process."""
    take_signals()
    if sys.argv[1:] in ([], ["--help"]):
        _overview(sys.argv[1:])
    from ptq4dit_jax.cli import entry as command

    command()


if __name__ == "__main__":
    entry()
