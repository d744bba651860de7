"""Parses settings that a script stores as text: a command line or a JSON object."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from ptq4dit_jax.checkpoints.foreign.lazy import Plain, flatten
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children
from ptq4dit_jax.documents import parse_json
from ptq4dit_jax.errors import Ptq4ditError

#: ``--num-heads`` with or without ``=16``, or ``model.num_heads=16`` as in Hydra; not the number -1.
_OPTION = re.compile(r"--?(?P<name>[A-Za-z][\w.-]*)(=(?P<value>.*))?|\+{0,2}(?P<path>[A-Za-z][\w./-]*)=(?P<set>.*)", re.DOTALL)


def spelled_out(facts: Mapping[str, Plain], holds_settings: Callable[[str], bool]) -> dict[str, Plain]:
    """Returns plain values by dotted name; texts that are a command line or a JSON object are replaced by their settings.

    Args:
      facts: a file's plain values.
      holds_settings: whether a name is that of a container of settings, such as ``args``, where such text may occur.
    """
    found: dict[str, Plain] = {}
    lines: dict[str, dict[int, str]] = defaultdict(dict)
    for name, value in facts.items():
        head, _, last = name.rpartition(".")
        if isinstance(value, str) and re.fullmatch(r"\d{1,6}", last) and holds_settings(head):  # an item of a long list
            lines[head][int(last)] = value
        elif isinstance(value, tuple) and value and all(isinstance(item, str) for item in value) and holds_settings(name):
            lines[name] = dict(enumerate(map(str, value)))
        elif isinstance(value, str) and value.lstrip()[:1] == "{" and holds_settings(name):
            found |= _of_json(name, value)
        else:
            found[name] = value
    for name, words in lines.items():
        ordered = [words[i] for i in sorted(words)]
        if any(_OPTION.fullmatch(word) for word in ordered):
            found |= dict(_of_command(name, ordered))
        else:
            found |= {f"{name}.{i}": word for i, word in words.items()}
    return found


def _of_json(name: str, text: str) -> dict[str, Plain]:
    try:
        values = parse_json(text, f"The text {name}", "mend it", finite=False)
    except Ptq4ditError:
        return {f"{name}.text": text}  # to be reported as not understood
    return {f"{name}.{key}": value for key, value in flatten(values, inert_children).facts.items()}


def _of_command(name: str, words: list[str]) -> Iterator[tuple[str, Plain]]:
    """Yields the options of a command line. One without a value is true; several values are a tuple."""
    option: str | None = None
    values: list[str] = []
    for word in [*words, "--end"]:
        match = _OPTION.fullmatch(word)
        if match is None:
            values.append(word)
            continue
        if option is not None:
            yield f"{name}.{option}", True if not values else values[0] if len(values) == 1 else tuple(values)
        option, values = None, []
        if match["path"] is not None:
            yield f"{name}.{match['path'].replace('/', '.')}", match["set"]
        elif match["value"] is not None:
            yield f"{name}.{match['name']}", match["value"]
        else:
            option = match["name"]
