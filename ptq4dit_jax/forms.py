"""The form of a program's arguments: all that decides the program besides the values in arrays, as values that JSON holds.

JAX decides by the structure of trees, which it cannot write to files for types of ours. A form can be stored, compared, and its
first difference from another can be named.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ptq4dit_jax.errors import Ptq4ditError

#: A setting that JSON holds as it is.
Plain: TypeAlias = str | int | float | bool | None


class ArrayForm(NamedTuple):
    """The ``path`` of an array in its tree, such as ``model/linears/blocks.qkv/bias``, its type and its shape."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Difference(NamedTuple):
    """What differs between two forms, by the path of a setting or an array, and both of its values in words."""

    what: str
    first: str
    second: str


@dataclasses.dataclass(frozen=True)
class Form:
    """``settings`` by name, the most telling first, and ``arrays`` in the order in which JAX flattens them."""

    settings: Mapping[str, Plain]
    arrays: tuple[ArrayForm, ...]

    @classmethod
    def of(cls, trees: Sequence[Any], settings: Mapping[str, Plain]) -> Form:
        """Returns the form of some trees: ``settings``, followed by the static fields of their dataclasses, and their arrays.

        Raises:
          Ptq4ditError: a tree holds something that is no array, container or dataclass, or a static field no plain value.
        """
        found, arrays = dict(settings), list[ArrayForm]()
        for tree in trees:
            found |= _static_fields(tree, "")
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                arrays.append(ArrayForm(name, np.dtype(leaf.dtype).name, tuple(leaf.shape)))
        return cls(found, tuple(arrays))

    def difference(self, other: Form) -> Difference | None:
        """Returns the first difference from another form; None if both are the same."""
        for what in {**self.settings, **other.settings}:
            first, second = (form.settings.get(what, "absent") for form in (self, other))
            if first != second:
                return Difference(what, _shown(first), _shown(second))
        if self.arrays == other.arrays:
            return None
        mine, theirs = ({array.path: array for array in form.arrays} for form in (self, other))
        for path in mine | theirs:
            if mine.get(path) != theirs.get(path):
                return Difference(path, str(mine.get(path, "absent")), str(theirs.get(path, "absent")))
        return Difference("order of arrays", "another", "that of this version")


def _shown(value: Plain) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _static_fields(tree: Any, path: str) -> Iterator[tuple[str, Plain]]:
    """Yields the types of a tree's dataclasses and the values of their static fields, by path."""
    if tree is None or isinstance(tree, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return
    if isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from _static_fields(tree[key], _joined(path, key))
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from _static_fields(item, _joined(path, index))
    elif dataclasses.is_dataclass(tree):
        if path:
            yield path, type(tree).__name__
        for field in dataclasses.fields(tree):
            inner = _static_fields if field.metadata.get("pytree_node", True) else _values
            yield from inner(getattr(tree, field.name), _joined(path, field.name))
    else:
        raise _no_form(tree, path)


def _values(value: Any, path: str) -> Iterator[tuple[str, Plain]]:
    """Yields the plain values in a static field. What does not count where two of them are compared does not count here."""
    if dataclasses.is_dataclass(value):
        yield path, type(value).__name__
        for field in dataclasses.fields(value):
            if field.compare:
                yield from _values(getattr(value, field.name), _joined(path, field.name))
    elif isinstance(value, (tuple, list)):
        yield path, f"{len(value)} values"
        for index, item in enumerate(value):
            yield from _values(item, _joined(path, index))
    elif value is None or isinstance(value, (str, bool, int, float)):
        yield path, value
    elif isinstance(value, (np.dtype, enum.Enum)):
        yield path, value.name
    else:
        raise _no_form(value, path)


def _joined(path: str, name: object) -> str:
    return f"{path}/{name}" if path else str(name)


def _no_form(value: Any, path: str) -> Ptq4ditError:
    return Ptq4ditError(
        f"A sampler of this model cannot be exported, since no file can say what {path or 'it'} is, a {type(value).__name__}; "
        "use the models of this package."
    )
