"""Tensors that are read one at a time: what all foreign file formats share."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import ml_dtypes
import numpy as np

from ptq4dit_jax.edges import edge, quoted, shown
from ptq4dit_jax.errors import Ptq4ditError

#: No checkpoint nests deeper or holds more tensors and containers; a file that does is an attack.
MAX_DEPTH, MAX_NODES = 64, 200_000
#: Nor does one hold more values of any kind (a container counts wherever it occurs) or longer names, dots included.
MAX_ENTRIES, MAX_NAME = 1_000_000, 1000
#: Characters of all names together.
_MAX_NAMES = 50_000_000
#: The most plain values that are kept, their longest text and longest list: more than any training script writes.
_MAX_FACTS, _MAX_TEXT, _MAX_LIST = 20_000, 200, 32
#: The most kinds of objects not understood that are counted separately.
_MAX_KINDS = 100
#: Tied weights count more than once, so tensors may add up to more bytes than their file has, but not to this many times more.
MAX_EXPANSION = 16
#: The most values of a tensor, where an axis of zero counts as one.
_MAX_SIZE = 2**40
#: The most characters kept of a text that may be a JSON object of settings.
_MAX_OBJECT = 2**16

_INTEGERS = tuple(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))
_DTYPES = {name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", *_INTEGERS)}
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


class Damaged(Exception):
    """What is wrong with a file, in words for brackets; :func:`ptq4dit_jax.checkpoints.foreign.open_tensors` makes a sentence
    of them."""


class WantsCode(Damaged):
    """A file wants something called; holds the name of that."""


@contextmanager
def decoding(words: Callable[[], str]) -> Iterator[None]:
    """Turns whatever a decoder raises into :class:`Damaged`, with ``words`` evaluated at that time.

    ``OSError`` and ``MemoryError`` say nothing about the file's content, so they pass through.
    """
    try:
        yield
    except (Damaged, OSError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(words()) from error


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. ``dtype`` is NumPy's or one of ``ml_dtypes`` such as bfloat16, in the machine's byte order."""

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
        """Reads the values into a new array of ``shape`` and ``dtype``.

        Raises:
          Ptq4ditError: the file was removed, changed or became unreadable after it was opened, its checksum is wrong, or there
            is too little memory.
        """
        what = f"a tensor of shape {self.shape} and type {self.dtype}"
        with edge(what):
            try:
                return self.load()
            except Damaged as error:
                raise Ptq4ditError(
                    f"Cannot read {what} ({error}); open the file again, or copy or download it again."
                ) from error


#: A value in a file that is not a tensor.
Plain: TypeAlias = str | int | float | bool | tuple[str | int | float | bool, ...] | None


@dataclass(frozen=True)
class Contents:
    """What a reader finds in a file.

    Attributes:
      tensors: by dotted name.
      facts: values other than tensors (text, numbers, short lists of them) by dotted name, such as a script's arguments.
      dropped: how many objects of each kind were not understood; nothing else is left out.
      unread: the dotted names of these objects.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Plain] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)

    def dropped_words(self) -> str:
        """Returns ``; not understood: 2 x torch.Foo``, or nothing."""
        kinds = [f"{count} x {shown(kind, 80)}" for kind, count in self.dropped.most_common(4)]
        return "; not understood: " + ", ".join(kinds) if kinds else ""


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file or folder by dotted name; keys of nested containers are joined with dots.

    ``path`` is what was opened, ``format`` names its kind, ``files`` are those that hold tensors, and ``notes`` say what was
    decided where a folder holds more than one checkpoint. ``contents`` has the tensors and what the file says about them.
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


def dtype_named(name: object) -> np.dtype:
    """Returns the dtype of a plain name such as ``float32`` or ``bfloat16``."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise Damaged(f"its tensors are of the unknown type {quoted(name, 40)}")
    return _DTYPES[name]


def checked_shape(shape: object) -> tuple[int, ...]:
    """Checks a shape from a file: a few whole numbers whose product, without zeros, a machine could address."""
    if not isinstance(shape, (tuple, list)):
        raise Damaged(f"a tensor has {shown(shape, 40)} for a shape")
    fits = len(shape) <= 16 and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in shape)
    if not fits or math.prod(n or 1 for n in shape) > _MAX_SIZE:
        axes = ", ".join(shown(n, 24) for n in shape[:17])
        raise Damaged(f"a tensor has the impossible shape ({axes})")
    return tuple(shape)


def check_total(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuses tensors that together are far larger than the ``size`` bytes on disk that they are read from."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > MAX_EXPANSION * size + 2**20:
        raise Damaged(f"it declares {total / 1e6:.1f} MB of tensors in {size / 1e6:.1f} MB")


@dataclass(frozen=True)
class OtherKey:
    """Stands for a key that is no name, since comparing or hashing that could take any time. ``kind`` names its type."""

    kind: str

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def plain_key(key: object) -> str | tuple[str, ...] | OtherKey:
    """Turns a key into one that a container may have: text, a tuple of texts, or an :class:`OtherKey`.

    Numbers become text, whose hashes no file can predict: a dict of integers with equal hashes takes hours to fill.
    """
    if type(key) is str:
        return key
    if type(key) in (int, bool):
        return str(key)
    if type(key) is tuple and 0 < len(key) <= MAX_DEPTH and all(type(part) is str for part in map(plain_key, key)):
        return tuple(part for part in map(plain_key, key) if isinstance(part, str))
    return OtherKey(type(key).__name__)


def flatten(
    tree: object,
    children: Callable[[object], Mapping[object, object] | None],
    unread: Callable[[object], str | None] = lambda node: None,
) -> Contents:
    """Returns all tensors and plain values in a tree of containers, by dotted name.

    Containers may be shared but must not contain themselves.

    Args:
      tree: containers, tensors and anything else.
      children: returns a container's entries, or None for anything else. Keys that are tuples of names are paths.
      unread: names the kind of an object that stands for something that was not built. It is counted if nothing of use is
        found in it, or if it is a function that rebuilds a tensor from parts, which are not tensors of their own.

    Raises:
      Damaged: there are more values, longer names or deeper levels than in any checkpoint.
    """
    found = Contents({})
    nodes = entries_seen = characters = 0

    def drop(kind: str, name: str) -> None:
        known = kind in found.dropped or len(found.dropped) < _MAX_KINDS
        found.dropped[kind if known else "objects of other kinds"] += 1
        if len(found.unread) < _MAX_FACTS:
            keep(name)
            found.unread.append(name)

    def keep(name: str) -> None:
        nonlocal characters
        characters += len(name)
        if characters > _MAX_NAMES:
            raise Damaged("its names are longer than those of any checkpoint")

    def walk(node: object, name: str, depth: int) -> None:
        nonlocal nodes, entries_seen
        if (plain := _plain(node)) is not _NOT_PLAIN:
            if len(found.facts) < _MAX_FACTS:
                keep(name)
                found.facts[name] = plain
            return
        entries = None if isinstance(node, Tensor) else children(node)
        nodes += entries is not None or isinstance(node, Tensor)
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Damaged("its values are nested without end")
        if isinstance(node, Tensor):
            if name in found.tensors:
                raise Damaged(f"the name {quoted(name)} stands for two tensors")
            keep(name)
            found.tensors[name] = node
            return
        kind = unread(node)
        if kind is not None and "rebuild" in kind:
            drop(kind, name)
            return
        before = len(found.tensors) + len(found.facts)
        for key, value in (entries or {}).items():
            entries_seen += 1
            if entries_seen > MAX_ENTRIES:
                raise Damaged("it holds more values than any checkpoint")
            parts = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(part, (str, int)) for part in parts):
                drop(f"entry under a key of type {getattr(key, 'kind', type(key).__name__)}", name)
                continue
            inner = ".".join(map(str, parts)) if depth == 0 else ".".join((name, *map(str, parts)))
            if len(inner) > MAX_NAME:
                raise Damaged(f"its names are longer than those of any checkpoint: {quoted(inner)}")
            walk(value, inner, depth + len(parts))
        if kind is not None and len(found.tensors) + len(found.facts) == before:
            drop(kind, name)

    walk(tree, "", 0)
    return found


class _Kind(enum.Enum):
    NOT_PLAIN = enum.auto()


_NOT_PLAIN: Final = _Kind.NOT_PLAIN


def _plain(node: object) -> Plain | _Kind:
    """Returns the node if it is text, a number, or a short list of these; ``_NOT_PLAIN`` for anything else."""
    if node is None or type(node) is bool or type(node) is int or type(node) is float:
        return node
    if isinstance(node, tuple) and hasattr(node, "_fields"):  # a class or function that a pickle names
        return ".".join(map(str, node))[:_MAX_TEXT]
    if type(node) is str:
        return node[: _MAX_OBJECT if node[:1] == "{" else _MAX_TEXT]
    if (type(node) is list or type(node) is tuple) and 0 < len(node) <= _MAX_LIST:
        items = tuple(item[:_MAX_TEXT] if type(item) is str else item for item in node)
        if all(type(item) in (str, bool, int, float) for item in items):
            return items
    return _NOT_PLAIN
