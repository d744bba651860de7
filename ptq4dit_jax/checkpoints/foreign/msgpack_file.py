"""Flax's msgpack files (``flax.serialization``), walked without loading them: arrays stay in the file until they are read.

Why not the msgpack package: its ``Unpacker`` returns an array only after copying it, and its buffer must hold the largest one.
A file of 1.07 GB takes 1.2 GB there before the first tensor is read, and less than 1 MB here. Its maps also silently take the
last of two entries with one name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import (
    MAX_DEPTH,
    MAX_ENTRIES,
    Contents,
    Damaged,
    Tensor,
    checked_shape,
    decoding,
    dtype_named,
    flatten,
    plain_key,
)
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children
from ptq4dit_jax.checkpoints.foreign.snapshot import Cursor, Snapshot, Span, tensor_of
from ptq4dit_jax.edges import quoted

_ARRAY, _SCALAR = 1, 3  # Flax's extension types; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
#: The most bytes of a text that is kept; a longer one is skipped.
_MAX_TEXT = 2**16


def looks_like_msgpack(head: bytes) -> bool:
    """Whether a file starts with a map whose first key is a string."""
    start = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    return bool(start) and len(head) > start and (0xA0 <= head[start] <= 0xBF or head[start] in (0xD9, 0xDA))


class _Walker:
    """Reads values one after another from a file."""

    def __init__(self, source: Cursor) -> None:
        self.source, self.take, self.depth, self.count = source, source.take, 0, 0

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def value(self) -> object:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.count > MAX_ENTRIES:
            raise Damaged("it holds more values than any checkpoint")
        if self.depth > MAX_DEPTH:
            raise Damaged("its values are nested without end")
        value = self.of_code(self.take(1)[0])
        self.depth -= 1
        return value

    def of_code(self, code: int) -> object:
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 256
        if code <= 0x8F:
            return self.map(code & 0x0F)
        if code <= 0x9F:
            return self.list(code & 0x0F)
        if code <= 0xBF:
            return self.text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in _SIZED:
            kind, size = _SIZED[code]
            count = self.number(size) if isinstance(size, str) else size
            return getattr(self, kind)(count)
        raise Damaged(f"it holds the value type {code:#04x}, which does not exist")

    def map(self, count: int) -> dict[object, object]:
        entries: dict[object, object] = {}
        for _ in range(count):
            key = self.value()
            if type(key) not in (str, int):
                raise Damaged("its maps have keys that are no names")
            if (name := plain_key(key)) in entries:
                raise Damaged(f"it has two entries {quoted(str(key))} in one place")
            entries[name] = self.value()
        return entries

    def list(self, count: int) -> list[object]:
        return [self.value() for _ in range(count)]

    def text(self, count: int) -> str | Span:
        if count > _MAX_TEXT:
            return self.source.span(count)
        try:
            return self.take(count).decode()
        except UnicodeDecodeError as error:
            raise Damaged("one of its names is no text") from error

    def bytes(self, count: int) -> Span:
        return self.source.span(count)

    def extension(self, count: int) -> Tensor | None:
        kind = self.number(">b")
        if kind not in (_ARRAY, _SCALAR):
            self.source.span(count)
            return None
        end = self.source.position + count
        parts = self.value()
        if not isinstance(parts, Iterable):
            raise TypeError("an array is no list")
        shape, dtype, values = parts
        if not isinstance(values, Span) or self.source.position != end:
            raise Damaged(f"the array that ends at byte {end} does not fill its place")
        return tensor_of(values, checked_shape(shape), dtype_named(dtype))


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_SIZED: dict[int, tuple[str, str | int]] = {
    0xC4: ("bytes", ">B"),
    0xC5: ("bytes", ">H"),
    0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"),
    0xC8: ("extension", ">H"),
    0xC9: ("extension", ">I"),
    0xD4: ("extension", 1),
    0xD5: ("extension", 2),
    0xD6: ("extension", 4),
    0xD7: ("extension", 8),
    0xD8: ("extension", 16),
    0xD9: ("text", ">B"),
    0xDA: ("text", ">H"),
    0xDB: ("text", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def _children(node: object) -> Mapping[object, object] | None:
    if isinstance(node, dict) and node.get(_CHUNKED):
        return {"": _joined(node)}
    return inert_children(node)


def _joined(node: dict[Any, Any]) -> Tensor:
    """Joins an array that Flax cut into pieces because it has a gigabyte or more."""
    shape = checked_shape(list(node["shape"].values()))
    chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
    if sum(chunk.size for chunk in chunks) != math.prod(shape) or len({chunk.dtype for chunk in chunks}) != 1:
        raise Damaged(f"the pieces of a tensor of shape {shape} do not fit together")
    return Tensor(shape, chunks[0].dtype, lambda: np.concatenate([chunk.read() for chunk in chunks]).reshape(shape))


def read_msgpack(path: Path) -> Contents:
    """Reads what a file holds, by dotted name; raises :class:`Damaged` or ``OSError``."""
    source = Cursor(Snapshot.of(path))
    with decoding(lambda: f"it makes no sense at byte {source.position}"):
        tree = _Walker(source).value()
        if source.position != source.end:
            raise Damaged("something follows after its end")
        found = flatten(tree, _children)
    tensors = {name.removesuffix("."): tensor for name, tensor in found.tensors.items()}
    return Contents(tensors, found.facts, found.dropped)
