"""The edge to Orbax: a flat dict of NumPy arrays into a folder and out of it, quietly, without a copy, with one type of error.

Orbax's handler is used without its checkpointer, whose commit protocol would write a marker with the absolute path of the
machine into the folder; atomicity is the caller's (:mod:`ptq4dit_jax.checkpoints.store`). This API is the one that Orbax 0.11
and 0.12 share. Names may contain slashes. Each array is one uncompressed chunk, so that a write needs no buffer of its own.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


class _Borrowed(np.ndarray):
    """An array that Orbax does not deep-copy before it writes, as it does with any other, at twice the memory."""

    def __deepcopy__(self, memo: dict[int, Any] | None, /) -> _Borrowed:
        return self


@contextlib.contextmanager
def _handler() -> Iterator[ocp.PyTreeCheckpointHandler]:
    """A handler whose failures, which are of any type, are ``OSError``; what its threads print about them is muted."""
    hook = sys.unraisablehook

    def unraisable(info: sys.UnraisableHookArgs) -> None:
        if str(info.exc_value) != "Event loop is closed":
            hook(info)

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", hook)
        sys.unraisablehook = unraisable
        for name in ("absl", "asyncio", "concurrent.futures"):
            logger = logging.getLogger(name)
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
        try:
            with contextlib.closing(ocp.PyTreeCheckpointHandler(use_compression=False)) as handler:
                yield handler
        except Exception as error:
            time.sleep(0.1)  # what was under way beside the operation that failed still reports to its event loop, now closed
            # TensorStore appends its source lines and context in brackets.
            raise OSError(str(error).partition(" [")[0].partition("\n")[0][:200] or type(error).__name__) from error


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a flat dict of arrays, each with elements, to a new folder; the arrays must not change meanwhile.

    Raises:
      OSError: for whatever reason it did not succeed; the folder may then hold anything.
    """
    folder.mkdir()
    with _handler() as handler:
        handler.save(folder, args=ocp.args.PyTreeSave({name: array.view(_Borrowed) for name, array in arrays.items()}))
        handler.finalize(folder)


def restore(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a folder, in host memory, whatever they are. The content is not verified.

    Raises:
      OSError: for whatever reason they cannot be read.
    """
    with _handler() as handler:
        tree = handler.restore(folder, args=ocp.args.PyTreeRestore())
        return {str(name): np.asarray(array) for name, array in tree.items()}


def describe(folder: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every array of a folder, by its name, as :func:`restore` will find them; nothing else is read.

    Raises:
      OSError: for whatever reason they cannot be told.
    """
    with _handler() as handler:
        found = handler.metadata(folder)
        return {str(name): (tuple(array.shape), np.dtype(array.dtype)) for name, array in getattr(found, "tree", found).items()}
