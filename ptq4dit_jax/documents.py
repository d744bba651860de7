"""Reads JSON and YAML that others wrote: one reader with limits, so that a file cannot exhaust memory or time.

The limits are stated here; :func:`read_json` and :func:`read_yaml` refuse anything beyond them in one sentence.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from ptq4dit_jax.edges import edge, quoted, shown
from ptq4dit_jax.errors import Ptq4ditError

#: The most bytes of a JSON document. Its objects take up to 31 times as many (``{"a":{}},...``): 0.3 GB. The index of a
#: language model with 671 billion parameters has 9 MB, and the config.json of a DiT some 20 kB.
MAX_JSON = 10_000_000
#: The most bytes of settings beside weights, which people read and write.
MAX_SETTINGS = 2**22
#: The most bytes of a YAML document: PyYAML, written in Python, takes 5 s per megabyte.
MAX_YAML = 2**18
#: The most levels of nested containers.
MAX_DEPTH = 64
#: The most values in all, including those that YAML aliases repeat.
MAX_VALUES = 2**20
#: The most mappings that a YAML mapping may merge, and the most entries that it may then have.
_MAX_MERGED, _MAX_ENTRIES = 100, 10_000
#: The most digits of a whole number; a NumPy seed has 39. Python itself raises an error at thousands of digits.
MAX_DIGITS = 100

_MERGE = "tag:yaml.org,2002:merge"
_TOO_DEEP = f"it nests more than {MAX_DEPTH} deep"


class _Refused(Exception):
    """What is wrong with a document, in words that follow a colon."""


def read_json(path: Path, remedy: str, *, what: str = "configuration", limit: int = MAX_JSON, finite: bool = True) -> Any:
    """Reads the value in a JSON file.

    Args:
      path: the file.
      remedy: what a user can do about a file that is refused.
      what: the kind of file, for the message about one that is too large.
      limit: the most bytes that the file may have.
      finite: refuse NaN and infinity, which are not JSON although Python writes them.

    Raises:
      Ptq4ditError: it cannot be read, is larger than ``limit``, or is no JSON within the limits of this module.
    """
    return parse_json(_content(path, remedy, what, limit), f"The file {path}", remedy, finite=finite)


def parse_json(text: str | bytes, subject: str, remedy: str, *, finite: bool = True) -> Any:
    """Reads the value of a JSON document in memory. ``subject`` names it, and starts an error's sentence. Raises as above."""
    constant = _no_constant if finite else float
    number = _finite_number if finite else float
    return _parsed(
        lambda: json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=constant, parse_float=number, parse_int=_short_integer
        ),
        f"{subject} is not valid JSON",
        remedy,
    )


def read_yaml(path: Path, remedy: str) -> Any:
    """Reads the value in a YAML file; tagged Python objects are read as the plain values that they are written with.

    Raises:
      Ptq4ditError: it cannot be read, is larger than :data:`MAX_YAML`, or is no YAML of plain values within the limits.
    """
    content = _content(path, remedy, "configuration", MAX_YAML)
    return _parsed(lambda: yaml.load(content, _Loader), f"The file {path} is not valid YAML of plain values", remedy)


def _content(path: Path, remedy: str, what: str, limit: int) -> bytes:
    with edge(path), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Ptq4ditError(f"The file {path} is larger than any {what}, which may have {limit:,} bytes; {remedy}.")
    return content


def _parsed(parse: Callable[[], object], problem: str, remedy: str) -> Any:
    try:
        value = parse()
        _check_size(value)
    except MemoryError:
        raise
    except RecursionError as error:
        raise Ptq4ditError(f"{problem}: {_TOO_DEEP}; {remedy}.") from error
    except Exception as error:  # the parsers may raise anything
        reason = f": {error}" if isinstance(error, _Refused) else ""
        raise Ptq4ditError(f"{problem}{reason}; {remedy}.") from error
    return value


def _check_size(value: object) -> None:
    """Refuses values that nest too deeply or are too many, including those that YAML aliases repeat."""
    left = MAX_VALUES
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, (dict, list, tuple, set)):
            left -= len(node)
            if left < 0:
                raise _Refused(f"it holds more than {MAX_VALUES:,} values")
            if depth == MAX_DEPTH:
                raise _Refused(_TOO_DEEP)
            waiting += [(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node)]


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _check_once([key for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise _Refused(f"the key {quoted(twice, 60)} is there twice")


def _no_constant(text: str) -> float:
    raise _Refused(f"it holds the number {text}")


def _finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _Refused(f"it holds the number {shown(text, 40)}, which is infinite")
    return value


def _short_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"it holds a number of {len(text)} digits, more than {MAX_DIGITS}")
    return int(text)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses duplicate keys and long numbers, and reads Python objects as plain values."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
            _check_once(keys)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == _MERGE and len(value.value) > _MAX_MERGED for key, value in node.value):
            raise _Refused(f"it merges more than {_MAX_MERGED} mappings into one")
        super().flatten_mapping(node)
        # Merging a mapping repeatedly repeats its keys, and some versions of PyYAML keep them all.
        name = lambda key: (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        node.value = list({name(key): (key, value) for key, value in node.value}.values())
        if len(node.value) > _MAX_ENTRIES:
            raise _Refused(f"it has a mapping of more than {_MAX_ENTRIES:,} entries")

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise _Refused(f"it holds a number of {len(node.value)} digits, more than {MAX_DIGITS}")
        return super().construct_yaml_int(node)


def _plain_value(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _plain_value)
