"""Tensors that are read one at a time: what all formats of foreign files share."""

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

#: No checkpoint nests deeper or holds more tensors and containers; a file that claims to is an attack.
MAX_DEPTH, MAX_NODES = 64, 200_000
#: Nor does one hold more values of any kind, a container counted wherever it occurs, or longer names, dots included.
MAX_ENTRIES, MAX_NAME = 1_000_000, 1000
#: Characters of all names together.
_MAX_NAMES = 50_000_000
#: Plain values are kept up to this many, this long, and as lists of this many: more than any training script writes.
_MAX_FACTS, _MAX_TEXT, _MAX_LIST = 20_000, 200, 32
#: Kinds of what was not understood that are told apart.
_MAX_KINDS = 100
#: Tied weights are counted more than once, so tensors may add up to more than their file; not to this many times as much.
MAX_EXPANSION = 16
#: Values of a tensor, an axis of zero counted as one.
_MAX_SIZE = 2**40
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


@contextmanager
def decoding(words: Callable[[], str]) -> Iterator[None]:
    """Turns whatever a decoder raises into :class:`Damaged`, in the ``words`` that hold by then.

    ``OSError`` and ``MemoryError`` say nothing of the file's content, so they stay.
    """
    try:
        yield
    except (Damaged, OSError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(words()) from error


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
          Ptq4ditError: the file has gone, changed or become unreadable since it was opened, its checksum does not fit, or
            memory does not suffice.
        """
        what = f"a tensor of shape {self.shape} and type {self.dtype}"
        with edge(what):
            try:
                return self.load()
            except Damaged as error:
                raise Ptq4ditError(
                    f"Cannot read {what} ({error}); open the file again, or copy or download it again."
                ) from error


#: A value in a file that is no tensor.
Plain: TypeAlias = str | int | float | bool | tuple[str | int | float | bool, ...] | None


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
        kinds = [f"{count} x {shown(kind, 80)}" for kind, count in self.dropped.most_common(4)]
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


def dtype_named(name: object) -> np.dtype:
    """The dtype of a plain name such as ``float32`` or ``bfloat16``."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise Damaged(f"its tensors are of the unknown type {quoted(name, 40)}")
    return _DTYPES[name]


def checked_shape(shape: object) -> tuple[int, ...]:
    """A shape from a file: a few whole numbers whose product, zeros left out, some machine could address."""
    if not isinstance(shape, (tuple, list)):
        raise Damaged(f"a tensor has {shown(shape, 40)} for a shape")
    fits = len(shape) <= 16 and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in shape)
    if not fits or math.prod(n or 1 for n in shape) > _MAX_SIZE:
        axes = ", ".join(shown(n, 24) for n in shape[:17])
        raise Damaged(f"a tensor has the impossible shape ({axes})")
    return tuple(shape)


def check_total(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuses tensors that together are far larger than the ``size`` bytes on the disk that they are read from."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > MAX_EXPANSION * size + 2**20:
        raise Damaged(f"it declares {total / 1e6:.1f} MB of tensors in {size / 1e6:.1f} MB")


@dataclass(frozen=True)
class OtherKey:
    """What stands for a key that is no name: neither compared nor hashed, it could take any time. ``kind`` names its type."""

    kind: str

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def plain_key(key: object) -> str | tuple[str, ...] | OtherKey:
    """A key as a container may have it: text, a tuple of texts, or an :class:`OtherKey`.

    Numbers become text, whose hashes no file can foresee: a dict of integers with equal hashes takes hours to fill.
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
    """All tensors and plain values of a tree of containers by dotted name.

    Containers may be shared but not hold themselves.

    Args:
      tree: containers, tensors and anything else.
      children: gives a container's entries, and None for anything else. Keys that are tuples of names are paths.
      unread: names the kind of an object that stands for something that was not built. It is counted where nothing of use is
        found in it, or where it is a function that rebuilds a tensor from parts, which are no tensors of their own.

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
    """The node itself if it is text, a number, or a short list of such; ``_NOT_PLAIN`` for anything else."""
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
