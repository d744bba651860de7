"""Reads pickles of nested containers of NumPy and JAX arrays, as JAX users write them with ``pickle.dump``.

Arrays are recognized by the few names, old and new, under which NumPy and JAX pickle them. JAX's are read without JAX, because
pickles of one version do not load in another. FrozenDict is a dict; train states, optimizer states and configurations are inert
objects whose fields are searched for arrays. Nothing in the file is run
(:mod:`ptq4dit_jax.checkpoints.foreign.pickle_machine`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Tensor, checked_shape, dtype_named, flatten, plain_key
from ptq4dit_jax.checkpoints.foreign.pickle_machine import Inert, Name, Rebuild, inert_children, run, unread_kind
from ptq4dit_jax.checkpoints.foreign.snapshot import Cursor, LatinSpan, Snapshot, Span, tensor_of

#: NumPy's short names of plain types: kind and size in bytes.
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]")


class _UnfilledArray:
    """An array before its state is set: shape, type and bytes."""


def _dtype(name: object, *_: object) -> np.dtype | Inert:
    if isinstance(name, Name):  # ml_dtypes.bfloat16
        return dtype_named(name.name)
    if isinstance(name, str) and _PLAIN.fullmatch(name):
        return np.dtype(name)
    return Inert(Name("numpy", "dtype"), (name,))


@dataclass(frozen=True)
class _Latin:
    """Bytes stored as text, one character per byte. They are not copied, however often the file uses them."""

    text: str

    @property
    def size(self) -> int:
        return len(self.text)

    def read(self) -> np.ndarray:
        return np.frombuffer(self.text.encode("latin-1"), np.uint8)


def _bytes(text: object = "", *_: object) -> object:
    return _Latin(text) if isinstance(text, str) else text


def _array(data: object, dtype: object, shape: object, order: str) -> Tensor | Inert:
    data = _bytes(data)  # text if Python 2 wrote it
    if not isinstance(dtype, np.dtype) or not isinstance(data, (_Latin, LatinSpan, Span)):
        return Inert(Name("numpy", "ndarray"))  # an array of objects or records is no tensor
    return tensor_of(data, checked_shape(shape), dtype, order)


def _frombuffer(data: object, dtype: object, shape: object, order: object, *_: object) -> Tensor | Inert:
    return _array(data, dtype, shape, "F" if order == "F" else "C")


def _scalar(dtype: object, data: object = None) -> Tensor | Inert:
    return _array(data, dtype, (), "C")


def _build(target: object, state: object) -> object:
    if isinstance(target, np.dtype):
        if not isinstance(state, Sequence):
            raise TypeError("the state of a dtype is no tuple")
        return target.newbyteorder(state[1]) if state[1] in "<>" else target
    if isinstance(target, _UnfilledArray):
        if not isinstance(state, Iterable):
            raise TypeError("the state of an array is no tuple")
        _, shape, dtype, fortran, data = state
        return _array(data, dtype, shape, "F" if fortran else "C")
    return target


def _reconstruct_jax(function: object, args: object, state: object, *_: object) -> object:
    return _build(_UnfilledArray(), state)


def _mapping(entries: object = ()) -> dict[object, object]:
    """Makes a dict from a dict or from pairs."""
    if isinstance(entries, dict):
        return dict(entries)
    if not isinstance(entries, Iterable):
        raise TypeError("a dict is made of neither a dict nor pairs")
    return {plain_key(key): value for key, value in entries}


#: Names of plain containers, which every kind of file may have.
CONTAINERS: Rebuild = {
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): _mapping,
}
_NUMPY = ("numpy.core", "numpy._core")
ARRAYS: Rebuild = {
    **CONTAINERS,
    ("_codecs", "encode"): _bytes,
    **{(module, "bytes"): _bytes for module in ("builtins", "__builtin__")},  # no bytes, for an empty array
    ("numpy", "dtype"): _dtype,
    **{(f"{root}.multiarray", "_reconstruct"): lambda *_: _UnfilledArray() for root in _NUMPY},
    **{(f"{root}.multiarray", "scalar"): _scalar for root in _NUMPY},
    **{(f"{root}.numeric", "_frombuffer"): _frombuffer for root in _NUMPY},
    ("jax._src.array", "_reconstruct_array"): _reconstruct_jax,
    ("jax._src.device_array", "reconstruct_device_array"): _reconstruct_jax,
    ("jax.interpreters.xla", "reconstruct_device_array"): _reconstruct_jax,
    ("flax.core.frozen_dict", "FrozenDict"): _mapping,
}


def read_pickle(path: Path) -> Contents:
    """Reads what a pickle holds, by dotted name; raises :class:`Damaged` or ``OSError``."""
    return flatten(run(Cursor(Snapshot.of(path)), ARRAYS, build=_build), inert_children, unread_kind)
