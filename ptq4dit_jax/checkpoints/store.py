"""The folder that holds a model: JSON to read beside an Orbax checkpoint, written whole or not at all. Knows no model.

    config.json   {"format": "ptq4dit_jax", "version": 1, "kind": ..., <meta>, "provenance": {...},
                   "arrays": {name: {"shape": [...], "dtype": ...}}, "files": {path: bytes}, "content_sha256": ...}
    arrays/       an Orbax PyTree checkpoint of the flat dict name -> array, uncompressed, one chunk per array

Orbax checks no content, hence the sizes and the hash in ``config.json``. The whole folder is staged beside its target and then
renamed. Arrays without elements, which Orbax refuses, live in ``config.json`` alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from ptq4dit_jax import memory
from ptq4dit_jax.checkpoints import orbax_arrays
from ptq4dit_jax.checkpoints.addresses import address_of
from ptq4dit_jax.edges import edge
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.staging import staging

FORMAT, VERSION = "ptq4dit_jax", 1
_CONFIG, _ARRAYS = "config.json", "arrays"
_MAX_CONFIG = 2**27
_OWN_KEYS = ("format", "version", "arrays", "files", "content_sha256")

#: What every supported Orbax stores bit by bit; narrower integers are packed into uint8 by whoever has them.
_DTYPES = frozenset(
    ["bool", "bfloat16", *(f"float{n}" for n in (16, 32, 64)), *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))]
)

Arrays: TypeAlias = Mapping[str, "np.ndarray | jax.Array"]


def content_hash(arrays: Arrays) -> str:
    """SHA-256 (hexadecimal) over the name, dtype, shape and bytes of every array, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = _native(arrays[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        # Arrays of ml_dtypes have no buffer of their own; their bytes do.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], arrays: Arrays, meta: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Writes a model folder; on any failure nothing of it stays behind and what was there before is untouched.

    Args:
      path: the folder to make; its parents are made too.
      arrays: at least one, flat, of any shape; bool, integers of 8 to 64 bits, floats of 16 to 64 bits, bfloat16. Arrays of JAX
        may be sharded or replicated over the devices of this process. The save holds no second host copy of them.
      meta: what JSON can hold, with a string ``kind``. Versions of the software are added under ``provenance``.
      overwrite: replace the model in an existing folder, or fill an empty one. Other files in that folder stay.

    Returns:
      The absolute path of the folder.

    Raises:
      Ptq4ditError: ``path`` exists (or holds anything but a model, with ``overwrite``), cannot be written, or something given
        cannot be stored.
    """
    if jax.process_count() > 1:
        raise Ptq4ditError(f"Saving works from a single process only, and this run has {jax.process_count()}.")
    if not isinstance(meta.get("kind"), str) or set(meta).intersection(_OWN_KEYS):
        raise ValueError(f"meta needs a string 'kind' and none of {_OWN_KEYS}; it has {sorted(meta)}")
    if not arrays:
        raise Ptq4ditError("A model without arrays cannot be saved.")
    target = _resolve(path)
    host = {name: _to_host(name, array) for name, array in arrays.items()}
    provenance = {**meta.get("provenance", {}), "versions": _software_versions()}
    config = {"format": FORMAT, "version": VERSION, **meta, "provenance": provenance}
    config["arrays"] = {name: {"shape": host[name].shape, "dtype": host[name].dtype.name} for name in sorted(host)}
    config["content_sha256"] = content_hash(host)
    _to_json(config)  # before anything touches the disk
    with staging(target) as staged:
        _check_replaceable(target, overwrite)
        staged.mkdir()
        if stored := {name: array for name, array in host.items() if array.size}:
            orbax_arrays.save(staged / _ARRAYS, stored)
        files = sorted(file for file in staged.rglob("*") if file.is_file())
        config["files"] = {file.relative_to(staged).as_posix(): file.stat().st_size for file in files}
        (staged / _CONFIG).write_text(_to_json(config), encoding="utf-8")
        _publish(staged, target)
    return target


def as_read(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read` will return of ``meta`` once it has been written.

    Raises:
      Ptq4ditError: JSON cannot hold it.
    """
    restored: dict[str, Any] = json.loads(_to_json(meta))
    return restored


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a model folder, in host memory, and its ``meta``, both as :func:`write` was given them.

    Raises:
      Ptq4ditError: ``path`` is missing, is no model, was written in a newer format, or is incomplete or damaged in any byte
        of its arrays.
    """
    source = _resolve(path)
    config = read_config(source)
    damaged = f"The model in {source} is damaged; copy, download or quantize it again"
    try:
        listed = {str(name): (tuple(map(int, a["shape"])), np.dtype(a["dtype"])) for name, a in config["arrays"].items()}
        files = {str(file): int(size) for file, size in config["files"].items()}
        sha256 = str(config["content_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Ptq4ditError(f"{damaged}: its {_CONFIG} lacks a valid list of arrays and files.") from error
    try:
        for file, size in files.items():
            found = (source / file).stat().st_size if (source / file).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise Ptq4ditError(f"{damaged}: {file} {state}.")
        with edge(source):  # where memory fails later, it is in threads of C++
            memory.ensure_start(2 * sum(files.values()))
        arrays = orbax_arrays.restore(source / _ARRAYS) if any(0 not in shape for shape, _ in listed.values()) else {}
    except OSError as error:
        raise Ptq4ditError(f"{damaged}: its arrays cannot be read.") from error
    arrays |= {name: np.empty(shape, dtype) for name, (shape, dtype) in listed.items() if 0 in shape}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != listed:
        raise Ptq4ditError(f"{damaged}: its arrays are not those that its {_CONFIG} lists.")
    if content_hash(arrays) != sha256:
        raise Ptq4ditError(f"{damaged}: the content of its arrays does not match the hash in its {_CONFIG}.")
    return arrays, {key: value for key, value in config.items() if key not in _OWN_KEYS}


def is_model(path: Path) -> bool:
    """Whether a path is a model folder, whole or not; what else is there nobody calls one."""
    folder = path.expanduser()
    if not folder.is_dir():
        return False
    try:
        source = folder / _CONFIG
        if source.stat().st_size <= _MAX_CONFIG and json.loads(source.read_bytes())["format"] == FORMAT:
            return True
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    # Steps of Orbax may have an item of that name.
    return (folder / _ARRAYS).is_dir() and not (folder / "_CHECKPOINT_METADATA").is_file()


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All of ``config.json``, without reading the arrays; raises as :func:`read` does."""
    source = _resolve(path)
    expected = f"a model is a folder with {_CONFIG} and {_ARRAYS}/"
    try:
        if not source.exists():
            raise Ptq4ditError(f"There is no model at {source}: the path does not exist.")
        if not source.is_dir():
            raise Ptq4ditError(f"{source} is a file and no model; {expected}.")
        if not (source / _CONFIG).is_file():
            raise Ptq4ditError(f"{source} holds no model: there is no {_CONFIG} in it, and {expected}.")
        text = (source / _CONFIG).read_bytes()
    except OSError as error:
        raise Ptq4ditError(f"Cannot read {source} ({error.strerror}); check its permissions.") from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Ptq4ditError(f"{source / _CONFIG} is not valid JSON; copy, download or quantize the model again.") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise Ptq4ditError(f"{source} holds no model of {FORMAT}: its {_CONFIG} names the format {found!r}.")
    version = config.get("version")
    if type(version) is not int or version < 1:
        raise Ptq4ditError(f"{source / _CONFIG} names the format version {version!r}, which does not exist.")
    if version > VERSION:
        newer = f"{source} was written by a newer ptq4dit_jax (format {version})"
        raise Ptq4ditError(f"{newer}; this one reads up to {VERSION}: upgrade ptq4dit_jax.")
    if not isinstance(config.get("kind"), str):
        raise Ptq4ditError(f"{source / _CONFIG} does not say what kind of model this is; copy, download or quantize it again.")
    if not isinstance(config.get("provenance", {}), dict):
        raise Ptq4ditError(f"The provenance in {source / _CONFIG} is no JSON object; copy, download or quantize it again.")
    return config


def _resolve(path: str | os.PathLike[str]) -> Path:
    if (address := address_of(path)) is not None:
        raise Ptq4ditError(
            f"{address} is an address, where no model is read or written in place; use a folder of this machine."
        )
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise Ptq4ditError(f"{os.fspath(path)!r} is not a usable path: {error}.") from error


def _native(array: np.ndarray | jax.Array) -> np.ndarray:
    host = np.asarray(array)
    return host.astype(host.dtype.newbyteorder("="), copy=False)


def _to_host(name: str, array: np.ndarray | jax.Array) -> np.ndarray:
    if not isinstance(name, str) or not name:
        raise Ptq4ditError(f"Arrays are saved under names; {name!r} is none.")
    dtype = getattr(getattr(array, "dtype", None), "name", type(array).__name__)
    if dtype not in _DTYPES:
        raise Ptq4ditError(
            f"The array {name!r} is of type {dtype}, which cannot be saved; cast it to a NumPy type or bfloat16."
        )
    return _native(array)


def _software_versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("ptq4dit-jax")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"ptq4dit_jax": own, "jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__}


def _to_json(config: Mapping[str, Any]) -> str:
    """One line per entry of a field, so that an array's shape stays on one line."""

    def entry(key: Any, value: Any) -> str:
        return json.dumps({key: value}, allow_nan=False)[1:-1]

    def field(key: str, value: Any) -> str:
        if not isinstance(value, dict) or not value:
            return entry(key, value)
        return f"{json.dumps(key)}: {{\n    " + ",\n    ".join(entry(*item) for item in value.items()) + "\n  }"

    try:
        return "{\n  " + ",\n  ".join(field(*item) for item in config.items()) + "\n}\n"
    except (TypeError, ValueError) as error:
        raise Ptq4ditError(f"The model's description cannot be saved as JSON: {error}.") from error


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise Ptq4ditError(f"{target} exists already; choose another path, or ask for it to be overwritten.")
    if not target.is_dir():
        raise Ptq4ditError(f"{target} is a file, which is not overwritten by a model; choose another path.")
    if any(target.iterdir()):
        try:
            ours = json.loads((target / _CONFIG).read_text(encoding="utf-8"))["format"] == FORMAT
        except (OSError, ValueError, LookupError, TypeError):
            ours = False
        if not ours:
            raise Ptq4ditError(f"{target} holds something else than a model, so it is not overwritten; choose another path.")


def _publish(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        return
    # Inside an existing folder only the model is exchanged: a card or a recipe beside it belongs to the user. Without a
    # config.json the folder counts as no model, so that one goes first and comes last.
    replaced = staged / "replaced"
    replaced.mkdir()
    moves = [(target / name, replaced / name) for name in (_CONFIG, _ARRAYS) if (target / name).exists()]
    moves += [(staged / name, target / name) for name in (_ARRAYS, _CONFIG) if (staged / name).exists()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.rename(source)
        raise
