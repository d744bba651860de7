"""The start of a program: takes signals while the library is imported, which takes a second or more.

A module of its own, because importing anything of ``ptq4dit_jax`` imports all of it. It ends the process as
:func:`ptq4dit_jax.ending.run` does, which takes over. This is the console script ``ptq4dit``.
"""

from __future__ import annotations

import os
import signal
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


def entry() -> NoReturn:
    """The console script, which ends the process."""
    take_signals()
    from ptq4dit_jax.cli import entry as command

    command()


if __name__ == "__main__":
    entry()
