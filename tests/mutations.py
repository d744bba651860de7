"""Settings and bytes changed at random: what a damaged, edited or hostile file may say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

#: What a value becomes. Numbers at and beyond the ends of what computers and people use, and every other type of JSON.
VALUES: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        3,
        5,
        7,
        8,
        -1,
        -8,
        16,
        255,
        1000,
        32768,
        65536,
        2**20,
        2**31 - 1,
        2**31,
        2**40,
        2**53 + 1,
        2**63,
        2**70,
        10**99,
    ),
    *(0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, 1e38, 3.7),
    *(True, False, None),
    *("", "8", "float32", "object", "O", "V8", "x" * 5000, "\x1b[2J\x07\n"),
    *([], [0], [2**70], [-1, 0], [0] * 70, {}, {"a": {}}, {"shape": [0, 2**70], "dtype": "float32"}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of nested containers."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(config: Any, rng: np.random.Generator) -> Any:
    """A copy with one or two entries replaced, removed, renamed or scaled."""
    new = copy.deepcopy(config)
    for _ in range(rng.integers(1, 3)):
        every = list(places(new))
        *above, key = every[rng.integers(len(every))]
        parent = new
        for part in above:
            parent = parent[part]
        match rng.integers(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[str(VALUES[rng.integers(len(VALUES))])[:50]] = parent.pop(key)
            case 2 if type(parent[key]) in (int, float):
                parent[key] = parent[key] * [2, 3, 10, 1000, 0.5, -1][rng.integers(6)]
            case _:
                parent[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return new


def mutated_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy that is cut, or has bytes removed, repeated or replaced."""
    data = bytearray(content)
    match rng.integers(5):
        case 0:
            del data[rng.integers(len(data)) :]
        case 1:
            start = rng.integers(len(data))
            del data[start : start + rng.integers(1, 9)]
        case 2:
            start = rng.integers(len(data))
            data[start:start] = data[rng.integers(len(data)) :][: rng.integers(1, 40)]
        case _:
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(len(data))] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
    return bytes(data)
