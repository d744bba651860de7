"""The command line: ``ptq4dit info | convert | quantize | sample | compile | evaluate``. Thin; all work is in the library."""

from __future__ import annotations

import sys
from typing import NoReturn

from ptq4dit_jax import ending
from ptq4dit_jax.cli import compile, convert, evaluate, info, quantize, sample
from ptq4dit_jax.cli.overview import program

app = program()
for _command in (info.info, convert.convert, quantize.quantize, sample.sample, compile.compile, evaluate.evaluate):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status; a user's mistake becomes one sentence on stderr and status 1."""
    return ending.status_of(lambda: app(args=arguments, prog_name="ptq4dit", standalone_mode=True))


def entry() -> NoReturn:
    """The console script, which ends the process."""
    ending.run(lambda: sys.exit(main()))
