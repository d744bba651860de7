"""``ptq4dit --distributed``: makes a command one of several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import typer

from ptq4dit_jax import processes
from ptq4dit_jax.errors import Ptq4ditError


def connect(
    context: typer.Context, distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects this process to the others, if asked to, and has process 0 alone print."""
    if not distributed:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("coordinator", "num_processes", "process_id")
            if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        ]
        if given:
            raise Ptq4ditError(f"{', '.join(given)} is for --distributed; pass that too, or leave it out.")
        return
    processes.start(coordinator, num_processes, process_id)
    if not processes.is_first():
        context.with_resource(_nothing_printed())


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
