"""The safetensors format: eight bytes of header size, a JSON header of names, types, shapes and offsets, then raw values."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Contents, Damaged, Plain, checked_shape, dtype_named, flatten, span_tensor
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children

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
#: The format's own limit.
_MAX_HEADER = 100_000_000


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts with ``head`` can be one."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER


def read_safetensors(path: Path) -> Contents:
    """The tensors of a file by name, and its metadata; raises :class:`Damaged` or ``OSError``."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise Damaged("its header is cut off")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise Damaged("its header is no JSON") from error
    if not isinstance(header, dict):
        raise Damaged("its header is no JSON object")
    start, tensors, spans = 8 + length, {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = (
                dtype_named(_TYPES.get(entry["dtype"])),
                checked_shape(entry["shape"]),
                entry["data_offsets"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"its entry {name[:60]!r} is incomplete") from error
        tensor = span_tensor(path, start + begin, shape, dtype) if type(begin) is int and type(end) is int else None
        if tensor is None or begin < 0 or end - begin != tensor.nbytes:
            raise Damaged(f"its tensor {name[:60]!r} has a shape and a place that do not fit")
        if start + end > size:
            raise Damaged(f"it is cut off in the tensor {name[:60]!r}")
        tensors[name] = tensor
        spans.append((begin, end))
    spans.sort()
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise Damaged("its tensors overlap")
    return Contents(tensors, _metadata(header.get("__metadata__")))


def _metadata(values: Any) -> dict[str, Plain]:
    """What the header says besides the tensors: text, or what text holds as JSON, by dotted name behind ``metadata``."""
    facts: dict[str, Plain] = {}
    for name, text in values.items() if isinstance(values, dict) else ():
        try:  # text that is no object stays text: a number must not lose its spelling
            value = json.loads(text) if isinstance(text, str) and text.lstrip()[:1] == "{" else text
        except (ValueError, RecursionError):
            value = text
        facts |= flatten({"metadata": {name: value}}, inert_children).facts
    return facts


def write_safetensors(
    write: Callable[[Any], Any],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
) -> None:
    """Writes tensors one at a time, in the order of ``tensors``, through ``write``, a file's method.

    Args:
      write: takes bytes.
      tensors: what makes the array of each name, called once, in order.
      shapes: its shape and dtype.
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
