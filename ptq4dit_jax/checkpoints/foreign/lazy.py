"""Tensors that are read one at a time: what all formats of foreign files share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ptq4dit_jax.errors import Ptq4ditError

#: No checkpoint nests deeper or holds more tensors and containers; a file that claims to is an attack.
_MAX_DEPTH, _MAX_NODES = 64, 200_000
#: Tied weights are counted more than once, so tensors may add up to more than their file; not to this many times as much.
_MAX_EXPANSION = 16

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


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file or folder by dotted name; keys of nested containers are joined with dots.

    ``path`` is what was opened, ``format`` names its kind, ``files`` are those that hold tensors, and ``notes`` say what was
    decided where a folder holds more than one checkpoint.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], path: Path, format: str, files: tuple[Path, ...], notes: tuple[str, ...] = ()
    ) -> None:
        self._tensors, self.path, self.format, self.files, self.notes = dict(tensors), path, format, files, notes

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


def flatten(tree: Any, children: Callable[[Any], Mapping[Any, Any] | None]) -> dict[str, Tensor]:
    """All tensors of a tree of containers by dotted name; ``children`` gives a container's entries, and None for anything else.

    Containers may be shared but not hold themselves.
    """
    tensors: dict[str, Tensor] = {}
    nodes = 0

    def walk(node: Any, path: tuple[str, ...]) -> None:
        nonlocal nodes
        entries = None if isinstance(node, Tensor) else children(node)
        nodes += entries is not None or isinstance(node, Tensor)
        if nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise Damaged("its values are nested without end")
        if isinstance(node, Tensor):
            name = ".".join(path)
            if name in tensors:
                raise Damaged(f"the name {name[:80]!r} stands for two tensors")
            tensors[name] = node
        elif entries is not None:
            for key, value in entries.items():
                if isinstance(key, (str, int)):
                    walk(value, (*path, str(key)))

    walk(tree, ())
    return tensors
