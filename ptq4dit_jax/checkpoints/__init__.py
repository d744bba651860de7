"""Loads and saves models of every kind: a table from the ``kind`` in a folder to the code for it, and importers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ptq4dit_jax.checkpoints import float_dit, foreign, quantized_dit, store
from ptq4dit_jax.edges import edge
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError, printable
from ptq4dit_jax.model import FloatDiT

__all__ = ["Model", "load", "load_noted", "save"]

Model: TypeAlias = FloatDiT | QuantizedDiT


class _Kind(NamedTuple):
    type: type
    save: Callable[..., Path]
    load: Callable[..., Any]


_KINDS = {
    float_dit.KIND: _Kind(FloatDiT, float_dit.save_float, float_dit.load_float),
    quantized_dit.KIND: _Kind(QuantizedDiT, quantized_dit.save_quantized, quantized_dit.load_quantized),
}


def load(path: str | os.PathLike[str]) -> Model:
    """Loads the float or quantized model in a folder, or imports a float one from a checkpoint of another code base, with the
    defaults of :func:`ptq4dit_jax.checkpoints.foreign.import_checkpoint`. The model is on the default device. What the import
    had to guess is a warning.

    Args:
      path: a path of this machine, or an address such as ``gs://bucket/run``, from which what is needed is copied to a
        temporary folder that is removed afterwards.

    Raises:
      Ptq4ditError: ``path`` is no model, is damaged or incomplete, or was written by a newer version; an address cannot be read
        from here.
    """
    with foreign.local_copy(path) as where:
        model, notes = load_noted(where)
    if notes:
        warnings.warn(printable(f"{path}: {' '.join(notes)}"), stacklevel=2)
    return model


def load_noted(path: str | os.PathLike[str]) -> tuple[Model, tuple[str, ...]]:
    """Loads from a local path as :func:`load` does; also returns the import's guesses and other notes for the user."""
    if foreign.is_foreign(path):
        try:
            model, found = foreign.import_checkpoint(path)
            return model, found.notes
        except foreign.NothingFound as error:
            what = f"there is no config.json of one in it, and no checkpoint either; what can be read: {foreign.KNOWN}"
            raise Ptq4ditError(f"The folder {path} holds no model: {what}.") from error
    with edge(f"the model in {os.fspath(path)}", "it is damaged; copy, download or quantize it again"):
        arrays, meta = store.read(path)
        if meta["kind"] not in _KINDS:
            raise Ptq4ditError(
                f"{path} holds a model of kind {meta['kind']!r}; this version knows {', '.join(_KINDS)}: upgrade ptq4dit_jax."
            )
        return _KINDS[meta["kind"]].load(arrays, meta), ()


def save(
    model: Model, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Writes a model to a folder, whole or not at all, and returns the folder's absolute path.

    In a run of several processes, all of them call this, and process 0 writes.

    Args:
      model: float or quantized.
      path: must not exist unless ``overwrite`` is set, which replaces the model in a folder and keeps other files there.
      provenance: where the model comes from, as values that JSON can hold; software versions are added.

    Raises:
      Ptq4ditError: ``path`` exists, holds something other than a model, or cannot be written; the model is inconsistent.
    """
    for kind in _KINDS.values():
        if isinstance(model, kind.type):
            return kind.save(model, path, provenance, overwrite)
    raise Ptq4ditError(f"An object of type {type(model).__name__} is no model that can be saved.")
