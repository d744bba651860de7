"""Pickles of nested containers of arrays of NumPy and JAX: what JAX users write with ``pickle.dump``.

Arrays are recognized by the few names that NumPy and JAX pickle them under, old and new; JAX's are read without JAX, because
pickles of one version do not load in another. FrozenDict is a dict; train states, optimizer states and configurations are inert
objects whose fields are walked for arrays. Nothing in the file is run (:mod:`ptq4dit_jax.checkpoints.foreign.pickle_machine`).
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, buffer_tensor, checked_shape, dtype_named, flatten
from ptq4dit_jax.checkpoints.foreign.pickle_machine import Inert, Name, Rebuild, inert_children, run, unread_kind

#: NumPy's short names of plain types: kind and bytes.
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]")


class _UnfilledArray:
    """An array before its state is set: shape, type and bytes."""


def _dtype(name: Any, *_: Any) -> Any:
    if isinstance(name, Name):  # ml_dtypes.bfloat16
        return dtype_named(name.name)
    if isinstance(name, str) and _PLAIN.fullmatch(name):
        return np.dtype(name)
    return Inert(Name("numpy", "dtype"), (name,))


def _bytes(text: Any, *_: Any) -> Any:
    return text.encode("latin-1") if isinstance(text, str) else b""


def _array(data: Any, dtype: Any, shape: Any, order: str) -> Any:
    if isinstance(data, str):  # written by Python 2
        data = data.encode("latin-1")
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, memoryview)):
        return Inert(Name("numpy", "ndarray"))  # of objects or records: no tensor
    return buffer_tensor(data, checked_shape(shape), dtype, order)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
    return _array(data, dtype, shape, "F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any = None) -> Any:
    return _array(data, dtype, (), "C")


def _build(target: Any, state: Any) -> Any:
    if isinstance(target, np.dtype):
        return target.newbyteorder(state[1]) if state[1] in "<>" else target
    if isinstance(target, _UnfilledArray):
        _, shape, dtype, fortran, data = state
        return _array(data, dtype, shape, "F" if fortran else "C")
    return target


def _reconstruct_jax(function: Any, args: Any, state: Any, *_: Any) -> Any:
    return _build(_UnfilledArray(), state)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return dict(pairs if isinstance(pairs, dict) else (tuple(pair) for pair in pairs))


def _frozen_dict(entries: Any = None) -> Any:
    return dict(entries or {})


#: Names of plain containers, which every kind of file has.
CONTAINERS: Rebuild = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): _ordered_dict,
}
_NUMPY = ("numpy.core", "numpy._core")
ARRAYS: Rebuild = {
    **CONTAINERS,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _dtype,
    **{(f"{root}.multiarray", "_reconstruct"): lambda *_: _UnfilledArray() for root in _NUMPY},
    **{(f"{root}.multiarray", "scalar"): _scalar for root in _NUMPY},
    **{(f"{root}.numeric", "_frombuffer"): _frombuffer for root in _NUMPY},
    ("jax._src.array", "_reconstruct_array"): _reconstruct_jax,
    ("jax._src.device_array", "reconstruct_device_array"): _reconstruct_jax,
    ("jax.interpreters.xla", "reconstruct_device_array"): _reconstruct_jax,
    ("flax.core.frozen_dict", "FrozenDict"): _frozen_dict,
}


def map_file(path: Path) -> memoryview:
    """The bytes of a file, of any size, as they are needed."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_pickle(path: Path) -> Contents:
    """What a pickle holds, by dotted name; raises :class:`Damaged` or ``OSError``."""
    tree, _ = run(map_file(path), ARRAYS, build=_build)
    return flatten(tree, inert_children, unread_kind)
