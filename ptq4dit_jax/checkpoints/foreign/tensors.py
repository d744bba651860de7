"""Opens a checkpoint of any kind that others write, recognized by content: tensors by name, read one at a time.

    open_tensors("DiT-XL-2-256x256.pt")["blocks.0.attn.qkv.weight"].read()

No code from a file is ever run, nothing is unpacked, and a file cannot make its reader use much more memory than the file has
bytes. Supported are files of ``torch.save``, safetensors (also in shards), pickles of NumPy and JAX arrays, Flax's msgpack, and
Orbax folders. :mod:`~.locate` finds them in folders.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.checkpoints.addresses import AddressPath, address_of, local_path
from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Damaged, Tensor, TensorFile, WantsCode, check_total
from ptq4dit_jax.checkpoints.foreign.locate import Located, locate
from ptq4dit_jax.checkpoints.foreign.msgpack_file import read_msgpack
from ptq4dit_jax.checkpoints.foreign.orbax_folder import read_orbax
from ptq4dit_jax.checkpoints.foreign.pickles import read_pickle
from ptq4dit_jax.checkpoints.foreign.remote import Progress, fetch
from ptq4dit_jax.checkpoints.foreign.safetensors_file import read_safetensors
from ptq4dit_jax.checkpoints.foreign.torch_zip import read_torch
from ptq4dit_jax.checkpoints.foreign.weight_sets import read_index
from ptq4dit_jax.edges import edge, quoted, shown
from ptq4dit_jax.errors import Ptq4ditError

__all__ = ["Tensor", "TensorFile", "find_tensors", "is_foreign", "local_path", "open_tensors"]

_READERS: dict[str, Callable[[Path], Contents]] = {
    "torch": read_torch,
    "safetensors": read_safetensors,
    "pickle": read_pickle,
    "msgpack": read_msgpack,
}
_Found = TypeVar("_Found")


def open_tensors(path: str | os.PathLike[str], *, part: str = "transformer", progress: Progress | None = None) -> TensorFile:
    """Opens the tensors of a checkpoint file or folder, by dotted name.

    Args:
      path: a file, a JSON index of shards, a folder in which :func:`~.locate.locate` finds one checkpoint, or the address of
        any of these, whose weights are copied to a temporary folder that exists as long as a tensor of it does.
      part: the folder of a diffusers pipeline to use.
      progress: called with (megabytes copied from an address, megabytes in all).

    Raises:
      Ptq4ditError: it does not exist, is of no known kind, is damaged or cut off, or would have to run code; a folder holds no
        checkpoint or several; an address cannot be read from here.
    """
    if (address := address_of(path)) is None:
        return _read(find_tensors(path, part=part))
    copy = fetch(address, part, progress)
    with copy.errors():
        file = _read(find_tensors(copy.path, part=part))
    kept = {name: Tensor(t.shape, t.dtype, lambda t=t, copy=copy: t.load()) for name, t in file.items()}  # type: ignore[misc]
    return TensorFile(
        dataclasses.replace(file.contents, tensors=kept), AddressPath(address), file.format, file.files, file.notes
    )


def find_tensors(path: str | os.PathLike[str], *, part: str = "transformer") -> Located:
    """Finds where :func:`open_tensors` would read the tensors at a local path, and what it would decide; raises as it does."""
    where = local_path(path)
    if not _guarded(where, where.exists):
        raise Ptq4ditError(f"There is no checkpoint at {where}: the path does not exist.")
    return _guarded(where, lambda: locate(where, part))


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an address, or exists and is no model folder of this package, so that :func:`open_tensors` must open
    it or say what is wrong with it."""
    try:
        where = local_path(path)
        return isinstance(where, AddressPath) or (where.exists() and not store.is_model(where))
    except (OSError, ValueError):
        return False


def _guarded(where: Path, act: Callable[[], _Found]) -> _Found:
    """Returns the result of ``act``; its exceptions become sentences about the file."""
    with edge(where, "it makes no sense; copy or download it again if it should be a checkpoint"):
        try:
            return act()
        except Damaged as error:
            raise _damaged(where, error) from error


def _damaged(path: Path, error: Damaged) -> Ptq4ditError:
    if isinstance(error, WantsCode):
        return Ptq4ditError(
            f"The file {path} was not read: it wants to call {error}, which no checkpoint needs; open it with nothing else."
        )
    return Ptq4ditError(f"The file {path} is no whole checkpoint ({error}); copy or download it again if it should be one.")


def _read(found: Located) -> TensorFile:
    """Reads the tensors of a checkpoint on this machine."""
    return _guarded(found.path, lambda: _read_kind(found))


def _read_kind(found: Located) -> TensorFile:
    path, notes = found.path, found.notes
    match found.kind:
        case "orbax":
            return _collect(path, "Orbax", _files_below(path), Contents(read_orbax(path)), notes)
        case "items":  # names of items come first
            parts = {item.name: _collect(item, "Orbax", _files_below(item), Contents(read_orbax(item))) for item in found.files}
            tensors = {f"{item}.{name}": tensor for item, part in parts.items() for name, tensor in part.items()}
            return TensorFile(tensors, path, "Orbax", tuple(file for part in parts.values() for file in part.files), notes)
        case "index":
            return _collect(path, "safetensors shards", found.files, _read_index(path, found.files), notes)
        case "shards":
            return _collect(path, "shards", found.files, _read_shards(found.files), notes)
        case _:
            return _collect(path, kind := found.kind, [path], _READERS[kind](path), notes)


def _files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _collect(path: Path, kind: str, files: Iterable[Path], contents: Contents, notes: tuple[str, ...] = ()) -> TensorFile:
    files = tuple(files)
    if not contents.tensors:
        words = contents.dropped_words()
        raise Ptq4ditError(f"The file {path} holds no tensors ({kind}){words}; pass the file or folder with the weights.")
    check_total(contents.tensors, sum(file.stat().st_size for file in files))
    return TensorFile(contents, path, kind, files, notes)


def _shard(file: Path) -> TensorFile:
    """Reads the tensors of one shard, which is a file and never another index."""
    if not file.is_file():
        raise Ptq4ditError(f"The shard {file} is not there; copy or download all shards again.")
    found = _guarded(file, lambda: locate(file))
    if found.kind == "index":
        raise Ptq4ditError(f"The shard {file} is an index itself and holds no tensors; copy or download it again.")
    return _read(found)


def _read_index(index: Path, files: Iterable[Path]) -> Contents:
    """Reads all tensors that an index such as ``model.safetensors.index.json`` assigns to files beside it."""
    places, shards = read_index(index), {file.name: _shard(file) for file in files}
    if absent := [name for name, file in places.items() if name not in shards[file]]:
        raise Ptq4ditError(
            f"The index {index} places {quoted(absent[0])} in {shown(places[absent[0]])}, where it is not; download the "
            "shards again."
        )
    return _joined({name: shards[file][name] for name, file in places.items()}, shards.values())


def _joined(tensors: dict[str, Tensor], shards: Iterable[TensorFile]) -> Contents:
    """Joins the tensors of shards with everything that the shards say besides."""
    joined = Contents(tensors)
    for shard in shards:
        joined.facts.update(shard.contents.facts)
        joined.dropped.update(shard.contents.dropped)
    return joined


def _read_shards(files: tuple[Path, ...]) -> Contents:
    """Reads all tensors of shards that have no index but numbers in their names."""
    number = re.compile(r"(.*-)(\d+)(-of-)(\d+)(.*)", re.DOTALL)
    parts = [match for file in files if (match := number.fullmatch(file.name))]
    if len(files) != int(parts[0][4]):
        raise Ptq4ditError(
            f"The shards of {files[0]} are {len(files)} of the {int(parts[0][4])} files that their names count; copy or "
            "download the others too."
        )
    tensors: dict[str, Tensor] = {}
    shards = [_shard(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if twice := sorted(tensors.keys() & shard.keys()):
            raise Ptq4ditError(f"The shard {file} holds {quoted(twice[0])}, which another one holds too; download them again.")
        tensors |= shard
    return _joined(tensors, shards)
