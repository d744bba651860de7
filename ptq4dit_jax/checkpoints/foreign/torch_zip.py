"""What ``torch.save`` writes, read without torch: a zip of a pickle with names and shapes, and the raw bytes of each storage.

The pickle is read by :mod:`ptq4dit_jax.checkpoints.foreign.pickle_machine`, which runs nothing. torch never compresses its
zips, so a compressed member is refused, and with it every zip bomb.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Damaged, Tensor, checked_shape, dtype_named, flatten, read_span
from ptq4dit_jax.checkpoints.foreign.pickle_machine import Inert, Name, Rebuild, inert_children, run, unread_kind
from ptq4dit_jax.checkpoints.foreign.pickles import ARRAYS

_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
_MAX_PICKLE = 2**27
#: The first number in files of torch before 1.6.
LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclass(frozen=True)
class _Storage:
    """``count`` values of a type from byte ``offset`` of the file on."""

    path: Path
    offset: int
    count: int
    dtype: np.dtype

    def view(self, first: Any, shape: Any, strides: Any) -> Tensor:
        """A tensor with strides, all counted in values."""
        shape, strides = checked_shape(shape), checked_shape(strides)
        size = math.prod(shape)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else 0
        if type(first) is not int or first < 0 or first + extent > self.count or size > self.count:
            raise Damaged(f"a tensor of shape {shape} lies outside of its storage")
        offset, item = self.offset + first * self.dtype.itemsize, self.dtype.itemsize

        def load() -> np.ndarray:
            data = read_span(self.path, offset, extent * item).view(self.dtype)
            if extent == size and strides == _c_strides(shape):
                return data.reshape(shape)
            steps = tuple(stride * item for stride in strides)
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, shape, steps)) if size else data.reshape(shape)

        return Tensor(shape, self.dtype, load)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> Any:
    return storage.view(first, shape, strides) if isinstance(storage, _Storage) else Inert(Name("torch", "Tensor"))


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any = None, *_: Any) -> Any:
    """A tensor with attributes, or of a subclass: the tensor itself. A subclass that wraps others keeps them as its state."""
    if function in _TORCH and isinstance(args, tuple):
        return _TORCH[function](*args)
    return Inert(kind, (), state)


_TORCH: Rebuild = {
    **ARRAYS,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    **{
        ("torch._utils", name): lambda data, *_: data
        for name in (
            "_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_buffer", "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_xla_tensor",
        )
    },
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda shape=(), *_: Inert(Name("torch", "Size")),
}  # fmt: skip


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every file in the zip, by its name inside the one folder that torch makes."""
    size = path.stat().st_size
    members = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
                raise Damaged(f"its member {entry.filename[:60]!r} is compressed or encrypted, which torch never does")
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise Damaged(f"its member {entry.filename[:60]!r} is not where the zip says")
            offset = (
                entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            )
            if offset + entry.file_size > size:
                raise Damaged(f"its member {entry.filename[:60]!r} reaches beyond the end of the file")
            members[entry.filename.partition("/")[2]] = (offset, entry.file_size)
    return members


def read_torch(path: Path) -> Contents:
    """What a zip holds, by dotted name, as nested as it was saved; raises :class:`Damaged` or ``OSError``."""
    try:
        members = _members(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, LookupError) as error:
        raise Damaged("its zip directory is missing or cut off") from error
    if "data.pkl" not in members:
        raise Damaged("it is a zip, but not one that torch.save wrote")
    if "byteorder" in members and read_span(path, *members["byteorder"]).tobytes() != b"little":
        raise Damaged("it was written on a big-endian machine")
    if members["data.pkl"][1] > _MAX_PICKLE:
        raise Damaged("its table of tensors is too large to be one")

    def persistent(reference: Any) -> Any:
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, Name) or storage.name not in _STORAGES:
            return Inert(Name("torch", "Storage"))
        dtype = dtype_named(_STORAGES[storage.name])
        if (member := members.get(f"data/{key}")) is None:
            raise Damaged(f"the storage {str(key)[:20]!r} is missing")
        offset, size = member
        if type(count) is not int or count * dtype.itemsize != size:
            raise Damaged(f"a storage declares {count} values of {dtype} and has {size} bytes")
        return _Storage(path, offset, count, dtype)

    tree, _ = run(memoryview(read_span(path, *members["data.pkl"]).tobytes()), _TORCH, persistent)
    return flatten(tree, inert_children, unread_kind)
