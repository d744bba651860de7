"""Tensors that are read one at a time: what all formats of foreign files share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from ptq4dit_jax.errors import Ptq4ditError

#: No checkpoint nests deeper or holds more tensors and containers; a file that claims to is an attack.
_MAX_DEPTH, _MAX_NODES = 64, 200_000
#: Plain values are kept up to this many, this long, and as lists of this many: more than any training script writes.
_MAX_FACTS, _MAX_TEXT, _MAX_LIST = 20_000, 200, 32
#: Tied weights are counted more than once, so tensors may add up to more than their file; not to this many times as much.
_MAX_EXPANSION = 16
#: Text that may be a JSON object of settings.
_MAX_OBJECT = 2**16

_INTEGERS = tuple(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))
_DTYPES = {name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", *_INTEGERS)}
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


class Damaged(Exception):
    """What is wrong with a file, in words that go between brackets; :func:`ptq4dit_jax.checkpoints.foreign.open_tensors` makes
    it a sentence."""


class WantsCode(Damaged):
    """The name of what a file wants to have called."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. ``dtype`` is NumPy's, or bfloat16 and such of ``ml_dtypes``, in the machine's byte order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, in a new array of ``shape`` and ``dtype``.

        Raises:
          Ptq4ditError: the file has gone, shrunk or become unreadable since it was opened.
        """
        try:
            return self.load()
        except (OSError, Damaged) as error:
            reason = getattr(error, "strerror", None) or error
            raise Ptq4ditError(
                f"A tensor of shape {self.shape} cannot be read any more ({reason}); open the file again."
            ) from error


#: A value in a file that is no tensor.
Plain: TypeAlias = str | int | float | bool | tuple[Any, ...] | None


@dataclass(frozen=True)
class Contents:
    """What a reader finds in a file.

    Attributes:
      tensors: by dotted name.
      facts: values that are no tensors (text, numbers, short lists of them) by dotted name, such as a script's arguments.
      dropped: how many objects of each kind were not understood; nothing else is left out.
      unread: where these were, by dotted name.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Plain] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)

    def dropped_words(self) -> str:
        """``; not understood: 2 x torch.Foo``, or nothing."""
        kinds = [f"{count} x {kind[:80]}" for kind, count in self.dropped.most_common(4)]
        return "; not understood: " + ", ".join(kinds) if kinds else ""


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file or folder by dotted name; keys of nested containers are joined with dots.

    ``path`` is what was opened, ``format`` names its kind, ``files`` are those that hold tensors, and ``notes`` say what was
    decided where a folder holds more than one checkpoint. ``contents`` has besides the tensors what the file says about them.
    """

    def __init__(
        self,
        contents: Contents | Mapping[str, Tensor],
        path: Path,
        format: str,
        files: tuple[Path, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.contents = contents if isinstance(contents, Contents) else Contents(dict(contents))
        self.path, self.format, self.files, self.notes = path, format, files, notes
        self._tensors = self.contents.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def dtype_named(name: Any) -> np.dtype:
    """The dtype of a plain name such as ``float32`` or ``bfloat16``."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise Damaged(f"its tensors are of the unknown type {str(name)[:40]!r}")
    return _DTYPES[name]


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape from a file: a few whole numbers whose product some machine could address."""
    if not isinstance(shape, (tuple, list)) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise Damaged(f"a tensor has the impossible shape {str(shape)[:60]}")
    if math.prod(shape) >= 2**48:
        raise Damaged(f"a tensor has the impossible shape {tuple(shape)}")
    return tuple(shape)


def check_total(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuses tensors that together are far larger than the ``size`` bytes on the disk that they are read from."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_EXPANSION * size + 2**20:
        raise Damaged(f"it declares {total / 1e6:.1f} MB of tensors in {size / 1e6:.1f} MB")


def span_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """A tensor that lies in a file as little-endian values in C order, from byte ``offset`` on."""

    def load() -> np.ndarray:
        return read_span(path, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    return Tensor(shape, dtype, load)


def read_span(path: Path, offset: int, size: int) -> np.ndarray:
    """``size`` bytes of a file, (size,) uint8."""
    data = np.fromfile(path, np.uint8, size, offset=offset)
    if data.size != size:
        raise Damaged(f"{path.name} ends before byte {offset + size}")
    return data


def buffer_tensor(data: Any, shape: tuple[int, ...], dtype: np.dtype, order: str = "C") -> Tensor:
    """A tensor whose values lie in ``data``, such as a slice of a memory map; ``dtype`` may be of either byte order."""
    if memoryview(data).nbytes != math.prod(shape) * dtype.itemsize:
        raise Damaged(f"a tensor of shape {shape} and type {dtype} has {memoryview(data).nbytes} bytes")
    native = dtype.newbyteorder("=")

    def load() -> np.ndarray:
        array = np.frombuffer(data, dtype) if math.prod(shape) else np.empty(0, dtype)
        return np.array(array.reshape(shape, order=order), native, order="C")  # type: ignore[call-overload]

    return Tensor(shape, native, load)


def flatten(
    tree: Any, children: Callable[[Any], Mapping[Any, Any] | None], unread: Callable[[Any], str | None] = lambda node: None
) -> Contents:
    """All tensors and plain values of a tree of containers by dotted name.

    Containers may be shared but not hold themselves.

    Args:
      tree: containers, tensors and anything else.
      children: gives a container's entries, and None for anything else. Keys that are tuples of names are paths.
      unread: names the kind of an object that stands for something that was not built. It is counted where nothing of use is
        found in it, or where it is a function that rebuilds a tensor from parts, which are no tensors of their own.
    """
    found = Contents({})
    nodes = 0

    def drop(kind: str, name: str) -> None:
        found.dropped[kind] += 1
        if len(found.unread) < _MAX_FACTS:
            found.unread.append(name)

    def walk(node: Any, path: tuple[str, ...]) -> None:
        nonlocal nodes
        entries = None if isinstance(node, Tensor) else children(node)
        nodes += entries is not None or isinstance(node, Tensor)
        if nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise Damaged("its values are nested without end")
        name = ".".join(path)
        if isinstance(node, Tensor):
            if name in found.tensors:
                raise Damaged(f"the name {name[:80]!r} stands for two tensors")
            found.tensors[name] = node
            return
        if (plain := _plain(node)) is not _NOT_PLAIN:
            if len(found.facts) < _MAX_FACTS:
                found.facts[name] = plain
            return
        kind = unread(node)
        if kind is not None and "rebuild" in kind:
            drop(kind, name)
            return
        before = len(found.tensors) + len(found.facts)
        for key, value in (entries or {}).items():
            parts = key if isinstance(key, tuple) else (key,)
            if all(isinstance(part, (str, int)) for part in parts):
                walk(value, (*path, *map(str, parts)))
            else:
                drop(f"entry under a key of type {type(key).__name__}", name)
        if kind is not None and len(found.tensors) + len(found.facts) == before:
            drop(kind, name)

    walk(tree, ())
    return found


_NOT_PLAIN = object()


def _plain(node: Any) -> Any:
    """The node itself if it is text, a number, or a short list of such; ``_NOT_PLAIN`` for anything else."""
    if node is None or type(node) in (bool, int, float):
        return node
    if isinstance(node, tuple) and hasattr(node, "_fields"):  # a class or function that a pickle names
        return ".".join(map(str, node))[:_MAX_TEXT]
    if type(node) is str:
        return node[: _MAX_OBJECT if node[:1] == "{" else _MAX_TEXT]
    if type(node) in (list, tuple) and 0 < len(node) <= _MAX_LIST:
        items = tuple(item[:_MAX_TEXT] if type(item) is str else item for item in node)
        if all(type(item) in (str, bool, int, float) for item in items):
            return items
    return _NOT_PLAIN
