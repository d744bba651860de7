"""Files as they were when opened, read piece by piece; a file that changes meanwhile raises a sentence.

Files are read and never mapped: if a mapped file is cut short, a signal ends the process. No file is kept open, so the number
of shards does not matter.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Damaged, Tensor

#: Bytes that are read ahead where values are adjacent.
_CHUNK = 2**16

Stamp: TypeAlias = tuple[int, int, int]


class Changed(Damaged):
    """A file is no longer the one that was opened."""


def _stamp(state: os.stat_result) -> Stamp:
    return state.st_size, state.st_mtime_ns, state.st_ino


@dataclass(frozen=True)
class Snapshot:
    """A file with the size, modification time and inode that it had when it was opened."""

    path: Path
    stamp: Stamp

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Remembers a file as it is now; raises ``OSError``."""
        return cls(path, _stamp(path.stat()))

    @property
    def size(self) -> int:
        return self.stamp[0]

    def read(self, offset: int, size: int) -> np.ndarray:
        """Reads ``size`` bytes from byte ``offset`` on, (size,) uint8.

        Raises:
          Damaged: they reach beyond the file.
          Changed: the file is not the one that was opened.
          OSError: it cannot be read.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Damaged(f"{self.path.name} ends before byte {offset + size}")
        data = np.empty(size, np.uint8)
        rest = data.data
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
            self._compare(os.fstat(file.fileno()))  # last, so that a change while reading shows
        if rest:
            raise Changed(self._words())
        return data

    def check(self) -> None:
        """Raises :class:`Changed` if the file is not the one that was opened, and ``OSError`` if it was removed."""
        self._compare(self.path.stat())

    def _compare(self, state: os.stat_result) -> None:
        if _stamp(state) != self.stamp:
            raise Changed(self._words())

    def _words(self) -> str:
        return f"{self.path.name} was changed or replaced since it was opened"


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are read on demand."""

    file: Snapshot
    offset: int
    size: int

    def read(self) -> np.ndarray:
        """The bytes, (size,) uint8."""
        return self.file.read(self.offset, self.size)


@dataclass(frozen=True)
class LatinSpan:
    """Bytes that a file holds as UTF-8 text, one character per byte, as pickles of protocol 2 do."""

    text: Span

    @cached_property
    def size(self) -> int:
        """Returns the number of characters, counted once."""
        ends = range(0, self.text.size, _CHUNK)
        pieces = (self.text.file.read(self.text.offset + at, min(_CHUNK, self.text.size - at)) for at in ends)
        return sum(int(np.count_nonzero((piece & 0xC0) != 0x80)) for piece in pieces)

    def read(self) -> np.ndarray:
        """The bytes, (size,) uint8."""
        try:
            return np.frombuffer(self.text.read().tobytes().decode().encode("latin-1"), np.uint8)
        except UnicodeError as error:
            raise Damaged("the bytes of a tensor are no text of single bytes") from error


class Bytes(Protocol):
    """``size`` bytes that ``read`` returns as an array (size,) uint8."""

    @property
    def size(self) -> int: ...

    def read(self) -> np.ndarray: ...


class Cursor:
    """Reads small values one after another from a part of a file, and skips large ones."""

    def __init__(self, file: Snapshot, start: int = 0, size: int | None = None) -> None:
        self.file, self.end = file, file.size if size is None else start + size
        self._chunk, self._start, self._at = b"", start, 0

    @property
    def position(self) -> int:
        """Returns the position of the next byte in the file."""
        return self._start + self._at

    def take(self, count: int) -> bytes:
        """Reads the next ``count`` bytes; raises :class:`Damaged` if there are fewer."""
        at, end = self._at, self._at + count
        if count < 0 or end > len(self._chunk):
            self._refill(count)
            at, end = 0, count
        self._at = end
        return self._chunk[at:end]

    def span(self, count: int) -> Span:
        """Returns the next ``count`` bytes as a span, and skips them; raises :class:`Damaged` if there are fewer."""
        span = Span(self.file, self.position, self._within(count))
        self._at += count  # may exceed the chunk, and is still a position in the file
        return span

    def _within(self, count: int) -> int:
        if count < 0 or self.position + count > self.end:
            raise Damaged("it is cut off")
        return count

    def _refill(self, count: int) -> None:
        start, wanted = self.position, max(self._within(count), _CHUNK)
        self._chunk = self.file.read(start, min(wanted, self.end - start)).tobytes()
        self._start, self._at = start, 0


def tensor_of(data: Bytes, shape: tuple[int, ...], dtype: np.dtype, order: str = "C") -> Tensor:
    """Makes a tensor whose values are ``data``; ``dtype`` may have either byte order.

    Raises:
      Damaged: the number of bytes does not fit the shape.
    """
    if data.size != math.prod(shape) * dtype.itemsize:
        raise Damaged(f"a tensor of shape {shape} and type {dtype} has {data.size} bytes")
    native = dtype.newbyteorder("=")

    def load() -> np.ndarray:
        array = data.read().view(dtype).reshape(shape, order="F" if order == "F" else "C")
        return np.require(array.astype(native, copy=False), requirements=["C", "W"])

    return Tensor(shape, native, load)
