"""The safetensors format: eight bytes of header size, a JSON header of names, types, shapes and offsets, then raw values.

The ``safetensors`` package reads and checks the header: types, shapes against offsets, and that offsets leave no gap, do not
overlap and end with the file. The values are read here: the package maps the file, so a file that is cut short while it is open
ends the process with SIGBUS, and it does not support float8 in NumPy. One more thing is checked here, because the package takes
the last of two tensors of one name at one place. Files are written here, since the package needs all tensors in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ptq4dit_jax.checkpoints.foreign.lazy import MAX_NODES, Contents, Damaged, Plain, checked_shape, dtype_named, flatten
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children
from ptq4dit_jax.checkpoints.foreign.snapshot import Snapshot, Span, tensor_of
from ptq4dit_jax.edges import quoted, shown

_TYPES = {
    f"{kind}{bits}": f"{name}{bits}" for kind, name in (("F", "float"), ("I", "int"), ("U", "uint")) for bits in (16, 32, 64)
}
_TYPES |= {
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_NAMES = {name: short for short, name in _TYPES.items()}
#: The format allows 100 MB, but JSON takes many times its size in memory, and 200,000 tensors need no more than this.
MAX_HEADER = 2**24


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts with ``head`` can be one."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER


def read_safetensors(path: Path) -> Contents:
    """Reads the tensors of a file by name, and its metadata; raises :class:`Damaged` or ``OSError``."""
    file = Snapshot.of(path)
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if 8 + length > file.size:
        raise Damaged("its header is cut off")
    try:
        with safe_open(path, framework="numpy") as header:
            names = header.offset_keys()
            if len(names) > MAX_NODES:
                raise Damaged("it holds more tensors than any checkpoint")
            entries = [(name, header.get_slice(name)) for name in names]
            described = [(name, entry.get_dtype(), entry.get_shape()) for name, entry in entries]
            metadata = header.metadata()
    except SafetensorError as error:
        said = str(error).rpartition("deserializing header: ")[2]
        raise Damaged(f"it is cut off or damaged, as safetensors says: {shown(said, 200)}") from error
    json.loads(file.read(8, length).tobytes(), object_pairs_hook=_check_once)
    tensors, start = {}, 8 + length
    for name, kind, shape in described:  # they follow each other without a gap: the package checked that
        dtype, shape = dtype_named(_TYPES.get(kind, kind)), checked_shape(shape)
        span = Span(file, start, math.prod(shape) * dtype.itemsize)
        tensors[name], start = tensor_of(span, shape, dtype), start + span.size
    file.check()
    return Contents(tensors, _metadata(metadata))


def _check_once(pairs: list[tuple[str, object]]) -> None:
    """Refuses a JSON object with two entries of one name; keeps nothing of it."""
    names = set()
    for name, _ in pairs:
        if name in names:
            raise Damaged(f"its header has two entries {quoted(name, 60)}")
        names.add(name)


def _metadata(values: object) -> dict[str, Plain]:
    """Returns what the header says besides the tensors: text, or the values in JSON text, by dotted name after ``metadata``."""
    facts: dict[str, Plain] = {}
    for name, text in values.items() if isinstance(values, dict) else ():
        try:  # text other than a JSON object stays text: a number must keep its spelling
            value = json.loads(text) if isinstance(text, str) and text.lstrip()[:1] == "{" else text
        except (ValueError, RecursionError):
            value = text
        facts |= flatten({"metadata": {name: value}}, inert_children).facts
    return facts


def write_safetensors(
    write: Callable[[bytes | memoryview], object],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
) -> None:
    """Writes tensors one at a time, in the order of ``tensors``, through ``write``, a file's method.

    Args:
      write: takes bytes.
      tensors: by name, functions that make the arrays; each is called once, in order.
      shapes: the shape and dtype of each array.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, readers for torch refuse the file
    position = 0
    for name in tensors:
        shape, dtype = shapes[name]
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight bytes
    write(struct.pack("<Q", len(text)) + text)
    for name, make in tensors.items():
        array = np.asarray(make(), order="C")
        if (array.shape, array.dtype) != shapes[name]:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {shapes[name]}")
        write(array.reshape(-1).view(np.uint8).data)
