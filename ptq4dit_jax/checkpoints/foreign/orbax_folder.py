"""Reads folders that Orbax wrote for any tree, without that tree, one array at a time.

The names of the arrays are the keys of the store below Orbax, so TensorStore alone can read them, whatever version of Orbax and
whatever Python classes wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorstore as ts

from ptq4dit_jax import memory
from ptq4dit_jax.checkpoints.foreign.lazy import MAX_EXPANSION, MAX_NAME, MAX_NODES, Damaged, Tensor, checked_shape, decoding
from ptq4dit_jax.checkpoints.foreign.snapshot import Snapshot
from ptq4dit_jax.edges import shown

_OCDBT, _DESCRIPTIONS = "manifest.ocdbt", {".zarray": "zarr", "zarr.json": "zarr3"}
#: The most bytes of one array's description, which is JSON of a few hundred.
_MAX_DESCRIPTION = 2**20


def is_orbax(folder: Path) -> bool:
    """Whether a folder is one item of an Orbax checkpoint: a database, or a folder for each array."""
    return (folder / _OCDBT).is_file() or any(any(folder.glob(f"*/{name}")) for name in _DESCRIPTIONS)


def read_orbax(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder by dotted name; raises :class:`Damaged` or ``OSError``."""
    # Not as a URL, in which "%" or "#" in a folder's name would have a meaning.
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    if is_database := (folder / _OCDBT).is_file():
        base = {"driver": "ocdbt", "base": base}
    memory.ensure_start(0)
    files = [Snapshot.of(file) for file in folder.rglob("*") if file.is_file()]
    size = sum(file.size for file in files)
    with decoding(lambda: "its arrays cannot be opened"):
        keys = [key.decode() for key in ts.KvStore.open(base).result().list().result()]
        kinds = dict(key.rpartition("/")[::2] for key in keys if key.rpartition("/")[2] in _DESCRIPTIONS)
        if len(kinds) > MAX_NODES or any(len(name) > MAX_NAME for name in kinds):
            raise Damaged("it holds more arrays or longer names than any checkpoint")
        if any(file.size > _MAX_DESCRIPTION for file in files if file.path.name in _DESCRIPTIONS):
            raise Damaged("the description of an array is too large to be one")
        specs = {name: _spec(base, name, _DESCRIPTIONS[kind]) for name, kind in kinds.items()}
        opened = {name: ts.open(spec, open=True, read=True) for name, spec in specs.items()}
        stores = {name: store.result() for name, store in sorted(opened.items())}
    own = {name: files if is_database else _below(folder / name, files) for name in stores}
    return {name: _tensor(store, size, own[name]) for name, store in stores.items() if _is_array(store)}


def _below(folder: Path, files: Sequence[Snapshot]) -> list[Snapshot]:
    return [file for file in files if file.path.is_relative_to(folder)]


def _spec(base: dict[str, Any], name: str, driver: str) -> dict[str, Any]:
    path = f"{name}/" if base["driver"] == "ocdbt" else f"{base['path']}{name}/"
    return {"driver": driver, "kvstore": {**base, "path": path}}


def _is_array(store: ts.TensorStore) -> bool:
    return store.dtype.name not in ("string", "json", "ustring")


def _tensor(store: ts.TensorStore, size: int, files: Sequence[Snapshot]) -> Tensor:
    """Makes the tensor of an array in a folder whose files have ``size`` bytes; ``files`` are those that may hold it."""
    shape, dtype = checked_shape(store.shape), np.dtype(store.dtype.numpy_dtype)
    # A chunk is always read whole; None for a single value.
    pieces = cast(tuple[int, ...], store.chunk_layout.write_chunk.shape or ())  # an open array knows all of them
    chunk = math.prod(pieces) * dtype.itemsize
    if chunk > MAX_EXPANSION * size + 2**20:
        raise Damaged(f"an array comes in pieces of {chunk / 1e6:.1f} MB in {size / 1e6:.1f} MB")

    def load() -> np.ndarray:
        memory.ensure(math.prod(shape) * dtype.itemsize + chunk)  # on failure, its threads would end the process
        try:
            array = np.asarray(store.read().result())
        except Exception as error:
            raise Damaged(f"its bytes do not decode: {shown(str(error).partition(' [')[0], 100)}") from error
        for file in files:
            file.check()
        return array

    return Tensor(shape, dtype, load)
