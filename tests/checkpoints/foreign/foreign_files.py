"""Foreign files made by hand for tests, without the libraries that usually write them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.safetensors_file import write_safetensors

GOLDEN = Path(__file__).parents[2] / "golden"
META, DIFFUSERS = GOLDEN / "foreign" / "meta_train.pt", GOLDEN / "foreign" / "diffusers"
OUTPUTS = dict(np.load(GOLDEN / "foreign" / "outputs.npz"))


def text(value: str) -> bytes:
    """A pickled string."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def torch_pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What torch's pickler says of a state dict of tensors: calls by name, storages by number."""
    kinds = {"float32": b"Float", "float16": b"Half", "int64": b"Long", "int32": b"Int"}
    out = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, array) in enumerate(tensors.items()):
        storage = (
            b"("
            + text("storage")
            + b"ctorch\n%bStorage\n" % kinds[array.dtype.name]
            + text(str(key))
            + text("cpu")
            + number(array.size)
            + b"tQ"
        )
        strides = [stride // array.itemsize for stride in array.strides]
        shape = b"(" + b"".join(map(number, array.shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
        rest = number(0) + shape + b"\x89ccollections\nOrderedDict\n)R"
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    return out + b"u."


def write_torch(
    path: Path, tensors: Mapping[str, np.ndarray], *, table: bytes | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A file as ``torch.save`` writes it; ``table`` replaces its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", torch_pickle(tensors) if table is None else table)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def nested(flat: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """``{"a/b": 1}`` to ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(separator)
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def kvfrans() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The golden tree, and its inputs and output."""
    arrays = dict(np.load(GOLDEN / "foreign" / "kvfrans.npz"))
    flat = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    return nested(flat, "/"), {name: arrays[name] for name in ("x", "t", "y", "out")}


def flow(family: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of ``sit``, ``shortcut`` or ``meanflow``: the golden parameters by path; inputs x, t, y, labels, and outputs."""
    arrays = dict(np.load(GOLDEN / "foreign" / "flows.npz"))
    mine = {name.removeprefix(f"{family}/"): array for name, array in arrays.items() if name.startswith(family)}
    params = {name.removeprefix("params/"): array for name, array in mine.items() if name.startswith("params/")}
    outputs = {name: array for name, array in mine.items() if not name.startswith("params/")}
    return params, {name: array for name, array in arrays.items() if "/" not in name} | outputs


def write_pickle(path: Path, tree: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    return path


def save_safetensors(path, arrays):
    """Writes arrays by name, and returns the path."""
    with path.open("wb") as file:
        shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        write_safetensors(file.write, {name: partial(np.asarray, array) for name, array in arrays.items()}, shapes)
    return path
