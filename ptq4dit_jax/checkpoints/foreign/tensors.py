"""Opening a checkpoint of any kind that others write, told apart by content: tensors by name, read one at a time.

    open_tensors("DiT-XL-2-256x256.pt")["blocks.0.attn.qkv.weight"].read()

No code from a file is ever run, nothing is unpacked, and a file cannot make its reader take up much more memory than it has
bytes. What is read: files of ``torch.save``, safetensors (also in shards), pickles of arrays of NumPy and JAX, Flax's msgpack,
folders of Orbax.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Damaged, Tensor, TensorFile, WantsCode, check_total
from ptq4dit_jax.checkpoints.foreign.msgpack_file import looks_like_msgpack, read_msgpack
from ptq4dit_jax.checkpoints.foreign.orbax_folder import is_orbax, read_orbax
from ptq4dit_jax.checkpoints.foreign.pickles import read_pickle
from ptq4dit_jax.checkpoints.foreign.safetensors_file import looks_like_safetensors, read_safetensors
from ptq4dit_jax.checkpoints.foreign.torch_zip import LEGACY_MAGIC, read_torch
from ptq4dit_jax.errors import Ptq4ditError

__all__ = ["Tensor", "TensorFile", "open_tensors"]

_KNOWN = "files of torch.save (.pt, .pth, .bin), safetensors, pickles of arrays, Flax msgpack, folders of Orbax"
_READERS: dict[str, Callable[[Path], Contents]] = {
    "torch": read_torch, "safetensors": read_safetensors, "pickle": read_pickle, "msgpack": read_msgpack,
}  # fmt: skip
_LFS = b"version https://git-lfs"
_INDEX = "*.index.json"
#: What other files start with.
_OTHERS = {
    b"\x1f\x8b": "gzip", b"\x89HDF": "HDF5", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"%PDF": "PDF", b"GGUF": "GGUF",
    b"\x93NUMPY": "NumPy array", b"<": "HTML or XML", b"7z\xbc\xaf": "7-zip", b"(\xb5/\xfd": "Zstandard", b"BZh": "bzip2",
}  # fmt: skip


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of a checkpoint file or folder, by dotted name.

    Args:
      path: a file, a JSON index of shards, or a folder: of Orbax, with such an index, or with one file of weights in it.

    Raises:
      Ptq4ditError: it does not exist, is of no known kind, is damaged or cut off, or wants code to be run.
    """
    where = local_path(path)
    try:
        if not where.exists():
            raise Ptq4ditError(f"There is no checkpoint at {where}: the path does not exist.")
        if where.is_dir():
            return _open_folder(where)
        if (kind := _kind(where)) == "index":
            return _open_shards(where)
        return _collect(where, kind, [where], lambda: _READERS[kind](where))
    except Damaged as error:
        raise _damaged(where, error) from error
    except OSError as error:
        raise Ptq4ditError(f"Cannot read {where} ({error.strerror or type(error).__name__}); check its permissions.") from error
    except (ValueError, TypeError, LookupError, MemoryError, RecursionError, OverflowError) as error:
        if isinstance(error, Ptq4ditError):
            raise
        raise _damaged(where, Damaged("it makes no sense")) from error


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` replaced, its links kept: caches of downloads link to files whose neighbours matter."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise Ptq4ditError(f"The path {os.fspath(path)!r} is not usable: {error}.") from error


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at ``path`` that :func:`open_tensors` would try: a file, or a folder of others' weights."""
    try:
        where = Path(path).expanduser()
        return where.is_file() or (where.is_dir() and _holds_weights(where))
    except (OSError, RuntimeError, ValueError):
        return False


def _holds_weights(folder: Path) -> bool:
    if (folder / "arrays").is_dir():  # a model of this package, whole or not
        return False
    folders = [folder, *(item for item in folder.iterdir() if item.is_dir())]
    return any(is_orbax(item) for item in folders) or any(
        bool(weight_files(item)) or any(item.glob(_INDEX)) for item in (folder, folder / "transformer") if item.is_dir()
    )


def _damaged(path: Path, error: Damaged) -> Ptq4ditError:
    if isinstance(error, WantsCode):
        return Ptq4ditError(
            f"The file {path} was not read: it wants to call {error}, which no checkpoint needs; open it with nothing else."
        )
    return Ptq4ditError(f"The file {path} is no whole checkpoint ({error}); copy or download it again if it should be one.")


def _kind(path: Path) -> str:
    """The key into ``_READERS``, or ``index``."""
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if not head:
        raise Ptq4ditError(f"The file {path} is empty; copy or download it again.")
    if head.startswith(_LFS):
        raise Ptq4ditError(
            f"The file {path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull` or download the file."
        )
    if head.startswith(b"PK\x03\x04"):
        if head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy"):
            raise Ptq4ditError(
                f"The file {path} is a file of another kind (.npz) and no checkpoint; what can be read: {_KNOWN}."
            )
        return "torch"
    if head[0] == 0x80 and head[2:].startswith(LEGACY_MAGIC):
        raise Ptq4ditError(
            f"The file {path} was written by torch before 1.6; load it there and save it again with a newer torch."
        )
    if head[0] == 0x80 and len(head) > 1 and head[1] in range(2, 6):
        return "pickle"
    if looks_like_safetensors(head, size):
        return "safetensors"
    if head[:1] == b"{":
        return "index"
    if looks_like_msgpack(head):
        return "msgpack"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise Ptq4ditError(
                f"The file {path} is a file of another kind ({name}) and no checkpoint; what can be read: {_KNOWN}."
            )
    raise Ptq4ditError(f"The file {path} is no checkpoint of a known kind; what can be read: {_KNOWN}.")


def _collect(path: Path, kind: str, files: Iterable[Path], read: Callable[[], Contents]) -> TensorFile:
    contents, files = read(), tuple(files)
    if not contents.tensors:
        words = contents.dropped_words()
        raise Ptq4ditError(f"The file {path} holds no tensors ({kind}){words}; pass the file or folder with the weights.")
    check_total(contents.tensors, sum(file.stat().st_size for file in files))
    return TensorFile(contents, path, kind, files)


def weight_files(folder: Path) -> list[Path]:
    """Files in a folder that are checkpoints by content, by name."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            try:
                kind = _kind(file)
            except (Ptq4ditError, OSError):
                continue
            found += [file] * (kind != "index")
    return found


def _open_folder(folder: Path) -> TensorFile:
    if is_orbax(folder):
        files = [file for file in folder.rglob("*") if file.is_file()]
        return _collect(folder, "Orbax", files, lambda: Contents(read_orbax(folder)))
    if items := [item for item in sorted(folder.iterdir()) if item.is_dir() and is_orbax(item)]:
        return _open_items(folder, items)
    indices = sorted(folder.glob(_INDEX), key=lambda file: ("safetensors" not in file.name, file.name))
    if indices:
        return _open_shards(indices[0])
    files = weight_files(folder)
    # Folders often hold the same weights twice, as safetensors and as what came before.
    preferred = [file for file in files if _kind(file) == "safetensors"] or files
    if len(preferred) != 1:
        names = ", ".join(file.name for file in preferred[:8]) or "nothing that is one"
        raise Ptq4ditError(f"The folder {folder} must hold one checkpoint, and holds {names}; pass the file itself.")
    return open_tensors(preferred[0])


def _open_items(folder: Path, items: list[Path]) -> TensorFile:
    """A step of Orbax's CheckpointManager: items in folders of their own, whose names come first."""
    opened = {item.name: open_tensors(item) for item in items}
    tensors = {f"{item}.{name}": tensor for item, file in opened.items() for name, tensor in file.items()}
    return TensorFile(tensors, folder, "Orbax", tuple(part for file in opened.values() for part in file.files))


def _open_shards(index: Path) -> TensorFile:
    """All tensors that an index such as ``model.safetensors.index.json`` places in files beside it."""
    try:
        content = json.loads(index.read_bytes())
        places = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Ptq4ditError(
            f"The index {index} is no checkpoint: a JSON file must be an index with a weight_map of names to files."
        ) from error
    if odd := [file for file in places.values() if Path(file).name != file]:
        raise Ptq4ditError(
            f"The index {index} names the file {odd[0][:80]!r}, which is not beside it; copy or download it again."
        )
    shards = {file: open_tensors(index.with_name(file)) for file in sorted(set(places.values()))}
    if absent := [name for name, file in places.items() if name not in shards[file]]:
        raise Ptq4ditError(
            f"The index {index} places {absent[0][:80]!r} in {places[absent[0]]}, where it is not; download the shards again."
        )
    files = [index.with_name(file) for file in shards]
    facts = {name: value for shard in shards.values() for name, value in shard.contents.facts.items()}
    contents = Contents({name: shards[file][name] for name, file in places.items()}, facts)
    return _collect(index, "safetensors shards", files, lambda: contents)
