"""Folders that Orbax wrote for any tree, read without that tree, one array at a time.

The names of the arrays are the keys of the store below Orbax, so that TensorStore alone reads them, whatever version of Orbax
and whatever Python classes wrote them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ptq4dit_jax.checkpoints.foreign.lazy import Damaged, Tensor, checked_shape

_OCDBT, _DESCRIPTIONS = "manifest.ocdbt", {".zarray": "zarr", "zarr.json": "zarr3"}


def is_orbax(folder: Path) -> bool:
    """Whether a folder is one item of an Orbax checkpoint: a database, or a folder for each array."""
    return (folder / _OCDBT).is_file() or any(any(folder.glob(f"*/{name}")) for name in _DESCRIPTIONS)


def read_orbax(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by dotted name; raises :class:`Damaged` or ``OSError``."""
    # Not as an address, in which a "%" or "#" of a folder's name would mean something.
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    if (folder / _OCDBT).is_file():
        base = {"driver": "ocdbt", "base": base}
    try:
        keys = [key.decode() for key in ts.KvStore.open(base).result().list().result()]
        kinds = dict(key.rpartition("/")[::2] for key in keys if key.rpartition("/")[2] in _DESCRIPTIONS)
        specs = {name: _spec(base, name, _DESCRIPTIONS[kind]) for name, kind in kinds.items()}
        opened = {name: ts.open(spec, open=True, read=True) for name, spec in specs.items()}
        return {name: _tensor(store.result()) for name, store in sorted(opened.items()) if _is_array(store.result())}
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise Damaged("its arrays cannot be opened") from error


def _spec(base: dict[str, Any], name: str, driver: str) -> dict[str, Any]:
    path = f"{name}/" if base["driver"] == "ocdbt" else f"{base['path']}{name}/"
    return {"driver": driver, "kvstore": {**base, "path": path}}


def _is_array(store: Any) -> bool:
    return store.dtype.name not in ("string", "json", "ustring")


def _tensor(store: Any) -> Tensor:
    def load() -> np.ndarray:
        try:
            return np.asarray(store.read().result())
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise Damaged("its bytes do not decode") from error

    return Tensor(checked_shape(store.shape), np.dtype(store.dtype.numpy_dtype), load)
