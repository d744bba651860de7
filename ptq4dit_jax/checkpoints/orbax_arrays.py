"""The edge to Orbax: writes a flat dict of NumPy arrays to a folder and reads it, quietly, uncopied, with one type of error.

Orbax's handler is used without its checkpointer, whose commit protocol would write a marker with an absolute path of the
machine into the folder. Atomicity is left to the caller (:mod:`ptq4dit_jax.checkpoints.store`). Orbax 0.11 and 0.12 share this
API. Names may contain slashes. Each array is one uncompressed chunk, so that a write needs no buffer of its own.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ptq4dit_jax import processes


class _Borrowed(np.ndarray):
    """An array that Orbax does not deep-copy before it writes. It copies any other array, which takes twice the memory."""

    def __deepcopy__(self, memo: dict[int, Any] | None, /) -> _Borrowed:
        return self


@contextlib.contextmanager
def _handler() -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Yields a handler. Its failures, of whatever type, become ``OSError``, and what its threads print about them is muted."""
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
            # Each process reads for itself, and process 0 writes alone: what is saved is whole on each host.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="ptq4dit"
            )
            options = {"multiprocessing_options": alone} if processes.several() else {}
            with contextlib.closing(ocp.PyTreeCheckpointHandler(use_compression=False, **options)) as handler:
                yield handler
        except Exception as error:
            time.sleep(0.1)  # operations beside the failed one still report to its event loop, now closed
            # TensorStore appends its source lines and context in brackets.
            raise OSError(str(error).partition(" [")[0].partition("\n")[0][:200] or type(error).__name__) from error


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a flat dict of arrays, each with elements, to a new folder; the arrays must not change meanwhile.

    Raises:
      OSError: on any failure; the folder may then hold anything.
    """
    folder.mkdir()
    with _handler() as handler:
        handler.save(folder, args=ocp.args.PyTreeSave({name: array.view(_Borrowed) for name, array in arrays.items()}))
        handler.finalize(folder)


def restore(folder: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a folder into host memory, whatever they are. The content is not verified.

    Raises:
      OSError: they cannot be read, for whatever reason.
    """
    with _handler() as handler:
        tree = handler.restore(folder, args=ocp.args.PyTreeRestore())
        return {str(name): np.asarray(array) for name, array in tree.items()}


def describe(folder: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns the shape and dtype of every array of a folder, by name, as :func:`restore` will find them; reads nothing else.

    Raises:
      OSError: they cannot be determined, for whatever reason.
    """
    with _handler() as handler:
        found = handler.metadata(folder)
        return {str(name): (tuple(array.shape), np.dtype(array.dtype)) for name, array in getattr(found, "tree", found).items()}
