"""The file of an exported sampler: what it is of, as JSON, and the program.

    16 bytes   PTQ4DIT SAMPLER and a line feed
    32 bytes   SHA-256 of all that follows
     8 bytes   length of the description, little-endian
               the description, JSON in UTF-8
               the program, StableHLO in JAX's portable form

Damage must not reach JAX: the reader of programs in XLA corrupts memory on some of them. The hash keeps it out. It keeps out no
one who writes such a file on purpose, and a program is code (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jax import export

from ptq4dit_jax import processes
from ptq4dit_jax.checkpoints.store import software_versions
from ptq4dit_jax.devices import DeviceKind
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.documents import MAX_SETTINGS, parse_json
from ptq4dit_jax.edges import edge, shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.exported import ExportedSampler
from ptq4dit_jax.forms import ArrayForm, Form
from ptq4dit_jax.settings import flat
from ptq4dit_jax.staging import check_replaceable, place, write_whole

VERSION = 1
_MAGIC = b"PTQ4DIT SAMPLER\n"
_LENGTH = 8
_START = len(_MAGIC) + hashlib.sha256().digest_size + _LENGTH
#: The most bytes of a program. That of DiT-XL/2 has 1 MB, half of it the fixed table of positions.
MAX_PROGRAM = 2**28
#: Fields of an exported sampler that are whole numbers.
_NUMBERS = ("batch_size", "devices", "convention")
_AGAIN = "export it again (ptq4dit compile)"


def save_sampler(sampler: ExportedSampler, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes an exported sampler to a file, whole or not at all; returns its absolute path.

    Raises:
      Ptq4ditError: ``path`` exists (without ``overwrite``), is a folder, or cannot be written.
    """
    content = _packed(sampler)

    def write() -> str:
        target = place(path)
        return str(write_whole(target, lambda file: file.write(content), lambda: check_replaceable(target, overwrite)))

    return Path(processes.on_first(write))


def load_sampler(path: str | os.PathLike[str]) -> ExportedSampler:
    """Reads an exported sampler from a file. Load only files that you trust: a program is code.

    Raises:
      Ptq4ditError: the file cannot be read, is none or damaged, or this version of the package or of JAX cannot use it.
    """
    where = Path(path).expanduser()
    with edge(where), where.open("rb") as file:
        start = file.read(_START)
        if not start.startswith(_MAGIC):
            raise Ptq4ditError(f"The file {where} is no exported sampler; ptq4dit compile makes one.")
        length = int.from_bytes(start[-_LENGTH:], "little")
        if len(start) < _START or length > MAX_SETTINGS:
            raise _damaged(where)
        content = file.read(length + MAX_PROGRAM + 1)
        expected = start[len(_MAGIC) : -_LENGTH]
        if len(content) > length + MAX_PROGRAM or hashlib.sha256(start[-_LENGTH:] + content).digest() != expected:
            raise _damaged(where)
        said = parse_json(content[:length], f"What {where} says of itself", _AGAIN)
        return _read(said, content[length:], where)


def _damaged(where: Path) -> Ptq4ditError:
    return Ptq4ditError(f"The exported sampler in {where} is damaged or was cut short; copy it again, or {_AGAIN}.")


def _packed(sampler: ExportedSampler) -> bytes:
    said = {
        "version": VERSION,
        "versions": software_versions() | {"jax": sampler.jax_version},
        "kind": sampler.kind._asdict(),
        "sampling": flat(sampler.sampling),
        **{name: getattr(sampler, name) for name in _NUMBERS},
        "kept": sampler.kept,
        "images": sampler.images,
        "settings": dict(sampler.form.settings),
        "arrays": sampler.form.arrays,
    }
    description = json.dumps(said, separators=(",", ":"), allow_nan=False).encode()
    rest = len(description).to_bytes(_LENGTH, "little") + description + sampler.module
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def _read(said: Any, module: bytes, where: Path) -> ExportedSampler:
    if said["version"] != VERSION:
        raise Ptq4ditError(f"The exported sampler in {where} is of another version of ptq4dit_jax; {_AGAIN}.")
    own, theirs = software_versions()["ptq4dit_jax"], shown(said["versions"]["ptq4dit_jax"])
    if theirs != own:
        # A program is called with what this version makes of a model and a sampler, and that may change.
        raise Ptq4ditError(f"The sampler in {where} was exported by ptq4dit_jax {theirs}, and this is {own}; {_AGAIN}.")
    kind, arrays = said["kind"], tuple(map(_array, said["arrays"]))
    sampler = ExportedSampler(
        sampling=Sampling.of(**said["sampling"]),
        kind=DeviceKind(**kind | {"capability": tuple(kind["capability"])}),
        form=Form(dict(said["settings"]), arrays),
        images=_array(said["images"]),
        module=module,
        kept=tuple(map(int, said["kept"])),
        jax_version=shown(said["versions"]["jax"]),
        **{name: int(said[name]) for name in _NUMBERS},
    )
    if sorted(set(sampler.kept) & set(range(len(arrays)))) != list(sampler.kept):
        raise _damaged(where)
    first, last = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    if not first <= sampler.convention <= last:
        raise sampler.unreadable()
    return sampler


def _array(said: Any) -> ArrayForm:
    path, dtype, shape = said
    return ArrayForm(str(path), np.dtype(dtype).name, tuple(map(int, shape)))
