"""Determines what kind of checkpoint a file is, by its first bytes and never by its name."""

from __future__ import annotations

from pathlib import Path

from ptq4dit_jax.checkpoints.foreign.msgpack_file import looks_like_msgpack
from ptq4dit_jax.checkpoints.foreign.safetensors_file import looks_like_safetensors
from ptq4dit_jax.checkpoints.foreign.torch_zip import LEGACY_MAGIC
from ptq4dit_jax.errors import Ptq4ditError

KNOWN = "files of torch.save (.pt, .pth, .bin), safetensors, pickles of arrays, Flax msgpack, folders of Orbax"
#: How many bytes of a file are read to determine its kind.
HEAD = 512
_LFS = b"version https://git-lfs"
#: First bytes of other files.
_OTHERS = {
    b"\x1f\x8b": "gzip",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"%PDF": "PDF",
    b"GGUF": "GGUF",
    b"\x93NUMPY": "NumPy array",
    b"<": "HTML or XML",
    b"7z\xbc\xaf": "7-zip",
    b"(\xb5/\xfd": "Zstandard",
    b"BZh": "bzip2",
}


def kind_of(path: Path) -> str:
    """Returns ``torch``, ``safetensors``, ``pickle``, ``msgpack``, or ``index`` for JSON.

    Raises:
      Ptq4ditError: a file of another kind, named if it is known; an empty file; a Git LFS pointer.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
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
                f"The file {path} is a file of another kind (.npz) and no checkpoint; what can be read: {KNOWN}."
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
                f"The file {path} is a file of another kind ({name}) and no checkpoint; what can be read: {KNOWN}."
            )
    raise Ptq4ditError(f"The file {path} is no checkpoint of a known kind; what can be read: {KNOWN}.")
