"""Reads files of ``torch.save`` without torch: a zip of a pickle with names and shapes, and the raw bytes of each storage.

The pickle is read by :mod:`ptq4dit_jax.checkpoints.foreign.pickle_machine`, which runs nothing. torch never compresses its
zips, so compressed members are refused, and with them every zip bomb. The standard library reads the directory of a zip;
members are read here, in pieces, and compared with their checksums.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Damaged, Tensor, checked_shape, decoding, dtype_named, flatten
from ptq4dit_jax.checkpoints.foreign.pickle_machine import Inert, Name, Rebuild, inert_children, run, unread_kind
from ptq4dit_jax.checkpoints.foreign.pickles import ARRAYS
from ptq4dit_jax.checkpoints.foreign.snapshot import Cursor, Snapshot, Span
from ptq4dit_jax.edges import quoted, shown

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
#: The most bytes of a zip's directory, which takes some ten times as much when read: 80,000 members or more.
MAX_DIRECTORY = 2**23
_CHUNK = 2**20
#: The first number in files of torch before 1.6.
LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclass(frozen=True)
class _Member:
    """A member of a zip. ``crc`` is None where the zip was written without checksums."""

    name: str
    span: Span
    crc: int | None

    def read(self, first: int, size: int) -> np.ndarray:
        """Reads ``size`` bytes, (size,) uint8, after checking the checksum."""
        if size == self.span.size:
            data = self.span.read()
            self._compare(zlib.crc32(data.data))
            return data
        self.verify()
        return self.span.file.read(self.span.offset + first, size)

    def verify(self) -> None:
        """Raises :class:`Damaged` if the checksum is wrong; reads the bytes for that only once."""
        if self.crc is not None:
            self._compare(self._checksum)

    @cached_property
    def _checksum(self) -> int:
        value = 0
        for at in range(0, self.span.size, _CHUNK):
            value = zlib.crc32(self.span.file.read(self.span.offset + at, min(_CHUNK, self.span.size - at)).data, value)
        return value

    def _compare(self, found: int) -> None:
        if self.crc is not None and found != self.crc:
            raise Damaged(f"its member {quoted(self.name, 60)} does not match its checksum")


@dataclass(frozen=True)
class _Storage:
    """``count`` values of one type: all that a member of the zip holds."""

    member: _Member
    count: int
    dtype: np.dtype

    def view(self, first: object, shape: object, strides: object) -> Tensor:
        """Makes a tensor with strides; everything is counted in values."""
        shape, strides = checked_shape(shape), checked_shape(strides)
        size = math.prod(shape)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else 0
        if type(first) is not int or first < 0 or first + extent > self.count or size > self.count:
            raise Damaged(f"a tensor of shape {shape} lies outside of its storage")
        item = self.dtype.itemsize

        def load() -> np.ndarray:
            data = self.member.read(first * item, extent * item).view(self.dtype)
            if extent == size and strides == _c_strides(shape):
                return data.reshape(shape)
            steps = tuple(stride * item for stride in strides)
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, shape, steps)) if size else data.reshape(shape)

        return Tensor(shape, self.dtype, load)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _rebuild_tensor(storage: object, first: object, shape: object, strides: object, *_: object) -> Tensor | Inert:
    return storage.view(first, shape, strides) if isinstance(storage, _Storage) else Inert(Name("torch", "Tensor"))


def _rebuild_from_type(function: object, kind: object, args: object, state: object = None, *_: object) -> object:
    """Returns the plain tensor for one with attributes or of a subclass. A subclass that wraps others has them as its state."""
    if isinstance(function, Name) and function in _TORCH and isinstance(args, tuple):
        return _TORCH[function](*args)
    return Inert(kind if isinstance(kind, Name) else Name("torch", "Tensor"), (), state)


_TORCH: Rebuild = {
    **ARRAYS,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    **{
        ("torch._utils", name): lambda data, *_: data
        for name in (
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
            "_rebuild_buffer",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor",
            "_rebuild_xla_tensor",
        )
    },
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda shape=(), *_: Inert(Name("torch", "Size")),
}


class _Directory(io.FileIO):
    """A zip of which only the directory is read, whose size is bounded."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > MAX_DIRECTORY:
            raise Damaged(f"its zip directory has {size} bytes, more than the {MAX_DIRECTORY} of any checkpoint's")
        return super().read(size) or b""


def _members(file: Snapshot) -> dict[str, _Member]:
    """Returns every file in the zip, by its name inside the one folder that torch makes."""
    with _Directory(file.path) as raw, zipfile.ZipFile(raw) as archive:
        entries = archive.infolist()
    has_checksums = any(entry.CRC for entry in entries)  # otherwise set_crc32_options(False) was active
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if len(roots) > 1:
        raise Damaged(f"its members lie in {len(roots)} folders instead of one, such as {quoted(min(roots), 40)}")
    members, places = {}, []
    for entry in entries:
        name = shown(entry.filename, 60)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise Damaged(f"its member {name!r} is compressed or encrypted, which torch never does")
        header = file.read(entry.header_offset, 30).tobytes()
        if header[:4] != b"PK\3\4":
            raise Damaged(f"its member {name!r} is not where the zip says")
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + entry.file_size > file.size:
            raise Damaged(f"its member {name!r} reaches beyond the end of the file")
        short = entry.filename.partition("/")[2]
        if short in members:
            raise Damaged(f"it has two members {name!r}")
        places.append((entry.header_offset, start + entry.file_size, name))
        members[short] = _Member(entry.filename, Span(file, start, entry.file_size), entry.CRC if has_checksums else None)
    for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(places)):
        if end > begin:
            raise Damaged(f"its members {one!r} and {other!r} overlap")
    return members


def read_torch(path: Path) -> Contents:
    """Reads what a zip holds, by dotted name, nested as it was saved; raises :class:`Damaged` or ``OSError``."""
    file = Snapshot.of(path)
    with decoding(lambda: "its zip directory is missing or cut off"):
        members = _members(file)
    if (table := members.get("data.pkl")) is None:
        raise Damaged("it is a zip, but not one that torch.save wrote")
    order = members.get("byteorder")
    if order is not None and (order.span.size != 6 or order.read(0, 6).tobytes() != b"little"):
        raise Damaged("it was written on a big-endian machine")

    def persistent(reference: object) -> object:
        if not isinstance(reference, Iterable):
            raise TypeError("a reference to a storage is no tuple")
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, Name) or storage.name not in _STORAGES:
            return Inert(Name("torch", "Storage"))
        dtype = dtype_named(_STORAGES[storage.name])
        member = members.get(f"data/{key}") if type(key) in (str, int) else None
        if member is None:
            raise Damaged(f"the storage {quoted(key, 20)} is missing")
        if type(count) is not int or count * dtype.itemsize != member.span.size:
            raise Damaged(f"a storage declares {shown(count, 24)} values of {dtype} and has {member.span.size} bytes")
        return _Storage(member, count, dtype)

    table.verify()
    cursor = Cursor(file, table.span.offset, table.span.size)
    return flatten(run(cursor, _TORCH, persistent), inert_children, unread_kind)
