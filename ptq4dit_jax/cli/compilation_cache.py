"""``ptq4dit --compilation-cache``: keeps compiled programs for the next start."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ptq4dit_jax import processes
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.program_cache import cache_programs, forget_programs, remove_program, told_folder
from ptq4dit_jax.terminal import console

#: JAX's warnings about a program that could not be read or written: which of both, its name, the kind of error, and the rest.
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (\w+): (.*)", re.DOTALL)
_TOO_LARGE = "Cache value for key"
#: Kinds of errors that mean damage.
_DAMAGED = ("error", "ZstdError", "JaxRuntimeError", "XlaRuntimeError")


def keep_programs(context: typer.Context, folder: Path | None, off: bool) -> None:
    """Keeps compiled programs until ``context``'s command ends, unless they are ``off``.

    Without a ``folder`` it is the one that JAX was told of, where nothing is changed, or else the user's; of several processes,
    whose folders may differ, none then keeps any. If the folder is of no use, one sentence says so, and the command goes on.
    """
    if off and folder is not None:
        raise Ptq4ditError("--compilation-cache and --no-compilation-cache contradict each other; leave out one of both.")
    if off:
        return forget_programs()
    if folder is None and (processes.several() or told_folder() is not None):
        return
    try:
        kept = cache_programs(folder)
    except Ptq4ditError as error:
        console.print(f"All programs are compiled anew: {error}")
        return
    if kept is not None:
        context.with_resource(_failures_in_a_sentence(kept))


@contextlib.contextmanager
def _failures_in_a_sentence(folder: Path) -> Iterator[None]:
    """Says once, at the end, that programs could not be kept, in place of JAX's warnings; removes damaged ones."""
    failed: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def listen(message: Warning | str, *rest: Any, **more: Any) -> None:
            if found := _FAILED.match(str(message)):
                failed.append(f"{found[3]}: {found[4]}")
                if found[1] == "reading" and found[3] in _DAMAGED and processes.is_first():
                    remove_program(folder, found[2])
            elif not str(message).startswith(_TOO_LARGE):
                show(message, *rest, **more)

        warnings.showwarning = listen
        for beginning in ("Error (reading|writing) persistent", _TOO_LARGE):
            warnings.filterwarnings("always", beginning)  # even where warnings are errors
        yield
    if failed:
        console.print(f"Some programs in {folder} could not be read or written ({shown(failed[0])}) and were compiled anew.")
