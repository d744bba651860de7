"""The folder that holds a model: readable JSON beside an Orbax checkpoint, written whole or not at all. Knows no model.

    config.json   {"format": "ptq4dit_jax", "version": 2, "kind": ..., <meta>, "provenance": {...},
                   "arrays": {name: {"shape": [...], "dtype": ...}}, "files": {path: bytes}, "content_sha256": ...,
                   "config_sha256": ...}
    arrays/       an Orbax PyTree checkpoint of the flat dict name -> array, uncompressed, one chunk per array

Orbax does not check content, hence the sizes and the hash in ``config.json``; its own fields have a second hash (since version
2). Orbax refuses arrays without elements, so these live in ``config.json`` alone.

The whole folder is staged beside its target and then renamed. In a folder that exists, the new arrays first get the name
``arrays-<first digits of config_sha256>/``. Renaming the new ``config.json`` into place makes the exchange; then the arrays get
their usual name. A reader looks for that folder first, so that it finds the old model or the new one at every moment.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from ptq4dit_jax import memory, processes, sharding
from ptq4dit_jax.checkpoints import orbax_arrays
from ptq4dit_jax.checkpoints.addresses import address_of
from ptq4dit_jax.documents import parse_json, read_json
from ptq4dit_jax.edges import edge, shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import content_hash, native
from ptq4dit_jax.staging import flush, flush_entries, remove, staging

FORMAT, VERSION = "ptq4dit_jax", 2
_CONFIG, _ARRAYS = "config.json", "arrays"
_OWN_KEYS = ("format", "version", "arrays", "files", "content_sha256", "config_sha256")
#: How many times a folder is read at most if it is exchanged meanwhile.
_ATTEMPTS = 10
#: The first version with ``config_sha256``.
_HASHED = 2

#: Types that every supported Orbax stores exactly. Callers pack narrower integers into uint8.
_DTYPES = frozenset(
    ["bool", "bfloat16", *(f"float{n}" for n in (16, 32, 64)), *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))]
)

Arrays: TypeAlias = Mapping[str, "np.ndarray | jax.Array"]


def write(path: str | os.PathLike[str], arrays: Arrays, meta: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Writes a model folder. On any failure nothing of it stays behind, and what was there before is untouched.

    Args:
      path: the folder to make; its parents are made too.
      arrays: at least one, flat, of any shape; bool, integers of 8 to 64 bits, floats of 16 to 64 bits, bfloat16. JAX arrays
        may be sharded or replicated. Saving makes no second host copy of them.
      meta: what JSON can hold, with a string ``kind``. Software versions are added under ``provenance``.
      overwrite: replace the model in an existing folder, or fill an empty one. Other files in that folder stay.

    Returns:
      The absolute path of the folder.

    Raises:
      Ptq4ditError: ``path`` exists (or holds anything but a model, with ``overwrite``), cannot be written, or something given
        cannot be stored.
    """
    if not isinstance(meta.get("kind"), str) or set(meta).intersection(_OWN_KEYS):
        raise ValueError(f"meta needs a string 'kind' and none of {_OWN_KEYS}; it has {sorted(meta)}")
    if not arrays:
        raise Ptq4ditError("A model without arrays cannot be saved.")
    target = resolve(path)
    host = {name: _to_host(name, array) for name, array in arrays.items()}
    provenance = {**meta.get("provenance", {}), "versions": software_versions()}
    config = {"format": FORMAT, "version": VERSION, **meta, "provenance": provenance}
    config["arrays"] = {name: {"shape": host[name].shape, "dtype": host[name].dtype.name} for name in sorted(host)}
    config["content_sha256"] = content_hash(host)
    _to_json(config)  # before anything touches the disk
    processes.on_first(lambda: _write(target, host, config, overwrite))
    return target


def _write(target: Path, host: Mapping[str, np.ndarray], config: dict[str, Any], overwrite: bool) -> None:
    with staging(target) as staged:
        _check_replaceable(target, overwrite)
        staged.mkdir()
        if stored := {name: array for name, array in host.items() if array.size}:
            orbax_arrays.save(staged / _ARRAYS, stored)
        files = sorted(file for file in staged.rglob("*") if file.is_file())
        config["files"] = {file.relative_to(staged).as_posix(): file.stat().st_size for file in files}
        config["config_sha256"] = config_hash(as_read(config))
        (staged / _CONFIG).write_text(_to_json(config), encoding="utf-8")
        _check_readable(staged)
        _check_replaceable(target, overwrite)
        _publish(staged, target, config["config_sha256"])


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hexadecimal) of a ``config.json`` without this hash, as the shortest JSON with sorted keys.

    Raises:
      ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    fields = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def as_read(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``meta`` as :func:`read` will return it after it was written.

    Raises:
      Ptq4ditError: JSON cannot hold it, or a reader would refuse it.
    """
    restored: dict[str, Any] = parse_json(_to_json(meta), "The model's description", "save it with less provenance")
    return restored


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays of a model folder into host memory, and its ``meta``, both as they were passed to :func:`write`.

    A model that is being replaced is read as it was before or as it is afterwards.

    Raises:
      Ptq4ditError: ``path`` is missing, is no model, was written in a newer format, is incomplete, or is damaged in any byte
        of its arrays or any field of its ``config.json``.
    """
    source = resolve(path)
    for _ in range(_ATTEMPTS):
        before = _state(source)
        try:
            return _read(source)
        except Ptq4ditError:
            if _state(source) == before:
                raise
    raise Ptq4ditError(f"The model in {source} changes faster than it can be read; load it when nobody writes to it.")


def _read(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    config = read_config(source)
    damaged = _damaged(source)
    listed, folder = _listed(source, config), _arrays_of(source, config)
    try:
        with edge(source):  # a later failure of memory would be in C++ threads
            memory.ensure_start(2 * sum(map(int, config["files"].values())))
        arrays = orbax_arrays.restore(folder) if any(0 not in shape for shape, _ in listed.values()) else {}
    except OSError as error:
        raise Ptq4ditError(f"{damaged}: its arrays cannot be read.") from error
    arrays |= {name: np.empty(shape, dtype) for name, (shape, dtype) in listed.items() if 0 in shape}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != listed:
        raise Ptq4ditError(f"{damaged}: its arrays are not those that its {_CONFIG} lists.")
    if content_hash(arrays) != config["content_sha256"]:
        raise Ptq4ditError(f"{damaged}: the content of its arrays does not match the hash in its {_CONFIG}.")
    return arrays, {key: value for key, value in config.items() if key not in _OWN_KEYS}


def _damaged(source: Path) -> str:
    return f"The model in {source} is damaged; copy, download or quantize it again"


def _listed(source: Path, config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns the shape and dtype of each array, by name, as ``config`` lists them; raises if a file differs from its entry."""
    damaged = _damaged(source)
    try:
        listed = {str(name): (tuple(map(int, a["shape"])), np.dtype(a["dtype"])) for name, a in config["arrays"].items()}
        files = {str(file): int(size) for file, size in config["files"].items()}
        str(config["content_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Ptq4ditError(f"{damaged}: its {_CONFIG} lacks a valid list of arrays and files.") from error
    folder = _arrays_of(source, config)
    for file, size in files.items():
        where = folder / file.removeprefix(f"{_ARRAYS}/") if file.startswith(f"{_ARRAYS}/") else source / file
        try:
            found = where.stat().st_size if where.is_file() else None
        except OSError as error:
            raise Ptq4ditError(f"{damaged}: its arrays cannot be read.") from error
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise Ptq4ditError(f"{damaged}: {file} {state}.")
    return listed


def _arrays_of(source: Path, config: Mapping[str, Any]) -> Path:
    """Returns where the arrays are. During an exchange, and after a kill during one, the new ones have a name of their own."""
    moved = source / _incoming(str(config.get("config_sha256")))
    return moved if moved.is_dir() else source / _ARRAYS


def _incoming(config_sha256: str) -> str:
    return f"{_ARRAYS}-{config_sha256[:16]}"


def _state(source: Path) -> object:
    """Returns a value that changes when the model in a folder is exchanged."""
    try:
        config = (source / _CONFIG).stat()
        folders = sorted((entry.name, entry.inode()) for entry in os.scandir(source) if entry.name.startswith(_ARRAYS))
        return config.st_ino, config.st_mtime_ns, config.st_size, folders
    except OSError:
        return None


def is_model(path: Path) -> bool:
    """Whether a path is a model folder, complete or not; a file or any other folder is none."""
    folder = path.expanduser()
    if not folder.is_dir():
        return False
    if _names_format(folder):
        return True
    # A step of an Orbax checkpoint may have an item of that name.
    return (folder / _ARRAYS).is_dir() and not (folder / "_CHECKPOINT_METADATA").is_file()


def _names_format(folder: Path) -> bool:
    """Whether a folder's ``config.json`` can be read and names this format."""
    try:
        return bool(read_json(folder / _CONFIG, "")["format"] == FORMAT)
    except (Ptq4ditError, LookupError, TypeError):
        return False


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all of ``config.json``, but not the arrays; raises as :func:`read` does."""
    source = resolve(path)
    expected = f"a model is a folder with {_CONFIG} and {_ARRAYS}/"
    try:
        if not source.exists():
            raise Ptq4ditError(f"There is no model at {source}: the path does not exist.")
        if not source.is_dir():
            raise Ptq4ditError(f"{source} is a file and no model; {expected}.")
        if not (source / _CONFIG).is_file():
            raise Ptq4ditError(f"{source} holds no model: there is no {_CONFIG} in it, and {expected}.")
    except OSError as error:
        raise Ptq4ditError(f"Cannot read {source} ({error.strerror}); check its permissions.") from error
    config = read_json(source / _CONFIG, "copy, download or quantize the model again")
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise Ptq4ditError(f"{source} holds no model of {FORMAT}: its {_CONFIG} names the format {found!r}.")
    version = config.get("version")
    if type(version) is not int or version < 1:
        raise Ptq4ditError(f"{source / _CONFIG} names the format version {version!r}, which does not exist.")
    if version > VERSION:
        newer = f"{source} was written by a newer ptq4dit_jax (format {version})"
        raise Ptq4ditError(f"{newer}; this one reads up to {VERSION}: upgrade ptq4dit_jax.")
    if version >= _HASHED and not _is_unchanged(config):
        raise Ptq4ditError(
            f"{source / _CONFIG} is damaged or was edited: its fields do not match their hash; copy, download or quantize the "
            "model again."
        )
    if not isinstance(config.get("kind"), str):
        raise Ptq4ditError(f"{source / _CONFIG} does not say what kind of model this is; copy, download or quantize it again.")
    if not isinstance(config.get("provenance", {}), dict):
        raise Ptq4ditError(f"The provenance in {source / _CONFIG} is no JSON object; copy, download or quantize it again.")
    return config


def _is_unchanged(config: Mapping[str, Any]) -> bool:
    try:
        return config_hash(config) == config.get("config_sha256")
    except (ValueError, RecursionError):  # such as NaN, which is not JSON
        return False


def resolve(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a model folder, with links followed.

    Raises:
      Ptq4ditError: it is an address, no path at all, or a path from which Orbax cannot read arrays.
    """
    if (address := address_of(path)) is not None:
        raise Ptq4ditError(
            f"{address} is an address, where no model is read or written in place; use a folder of this machine."
        )
    try:
        target = Path(path).expanduser().resolve()
        str(target).encode()
    except (OSError, RuntimeError, ValueError) as error:
        raise Ptq4ditError(f"{os.fspath(path)!r} is not a usable path: {shown(str(error))}.") from error
    # If a name holds a backslash, TensorStore writes to one folder and reads from another.
    if os.sep == "/" and "\\" in str(target):
        raise Ptq4ditError(
            f"{shown(target, 1000)} is not a usable path: no model can be read from below a backslash; choose another one."
        )
    return target


def _to_host(name: str, array: np.ndarray | jax.Array) -> np.ndarray:
    if not isinstance(name, str) or not name:
        raise Ptq4ditError(f"Arrays are saved under names; {name!r} is none.")
    dtype = getattr(getattr(array, "dtype", None), "name", type(array).__name__)
    if dtype not in _DTYPES:
        raise Ptq4ditError(
            f"The array {name!r} is of type {dtype}, which cannot be saved; cast it to a NumPy type or bfloat16."
        )
    return native(sharding.own(array))


def software_versions() -> dict[str, str]:
    """Returns the versions of this package and of those that write its files, by name."""
    try:
        own = importlib.metadata.version("ptq4dit-jax")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"ptq4dit_jax": own, "jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__}


def _to_json(config: Mapping[str, Any]) -> str:
    """Writes one line per entry of a field, so that an array's shape stays on one line."""

    def entry(key: object, value: object) -> str:
        return json.dumps({key: value}, allow_nan=False)[1:-1]

    def field(key: str, value: object) -> str:
        if not isinstance(value, dict) or not value:
            return entry(key, value)
        return f"{json.dumps(key)}: {{\n    " + ",\n    ".join(entry(*item) for item in value.items()) + "\n  }"

    try:
        return "{\n  " + ",\n  ".join(field(*item) for item in config.items()) + "\n}\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise Ptq4ditError(f"The model's description cannot be saved as JSON: {error}.") from error


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise Ptq4ditError(f"{target} exists already; choose another path, or ask for it to be overwritten.")
    if not target.is_dir():
        raise Ptq4ditError(f"{target} is a file, which is not overwritten by a model; choose another path.")
    if any(target.iterdir()) and not _names_format(target):
        raise Ptq4ditError(f"{target} holds something else than a model, so it is not overwritten; choose another path.")


def _check_readable(staged: Path) -> None:
    """Raises if :func:`read` would refuse what was just written; the bytes of the arrays are not read again."""
    try:
        listed = _listed(staged, read_config(staged))
        wanted = {name: spec for name, spec in listed.items() if 0 not in spec[0]}
        found = orbax_arrays.describe(staged / _ARRAYS) if wanted else {}
    except Ptq4ditError as error:
        raise OSError(f"what was written cannot be read: {error}") from error
    if found != wanted:
        raise OSError("what was written cannot be read: its arrays are others")


def _publish(staged: Path, target: Path, config_sha256: str) -> None:
    flush(staged)
    if not target.exists():
        staged.rename(target)
        flush_entries(target.parent)
        return
    # In an existing folder only the model is exchanged: a card or a recipe beside it belongs to the user.
    _settle(target)
    replaced, incoming = staged / "replaced", target / _incoming(config_sha256)
    replaced.mkdir()
    old, arrays, config = target / _ARRAYS, staged / _ARRAYS, target / _CONFIG
    undo: list[tuple[Path, Path]] = []

    def move(source: Path, destination: Path) -> None:
        if source.exists():
            undo.append((destination, source))
            source.rename(destination)

    try:
        move(arrays, incoming)
        flush_entries(target)
        if config.exists():
            shutil.copy2(config, replaced / _CONFIG)
            flush(replaced / _CONFIG)
            undo.append((replaced / _CONFIG, config))
        else:
            undo.append((config, staged / _CONFIG))
        (staged / _CONFIG).replace(config)  # from here on it is the new model
        flush_entries(target)
        move(old, replaced / _ARRAYS)
        move(incoming, old)
        flush_entries(target)
    except BaseException:
        for source, destination in reversed(undo):
            if source.exists():
                source.replace(destination)
        raise


def _settle(target: Path) -> None:
    """Completes an exchange that was killed: removes arrays that the model there does not use."""
    try:
        config = read_json(target / _CONFIG, "")
    except Ptq4ditError:
        return
    arrays, usual = _arrays_of(target, config), target / _ARRAYS
    for entry in list(target.iterdir()):
        if re.fullmatch(_ARRAYS + "-[0-9a-f]{16}", entry.name) and entry != arrays:
            remove(entry)
    if arrays != usual:
        remove(usual)
        arrays.rename(usual)
