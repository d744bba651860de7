"""Annotations held against what passes through them while tests run: shapes and types of arrays.

Fields of pytrees are checked as a pytree is made, inside traced functions too; arguments and results of backends' operations
and of public functions after they return, so that what a function refuses is its own affair. A name of an axis stands for one
size within a pytree or a call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import AbstractArray, jaxtyped

from ptq4dit_jax.engine.stacks import OfLayer

#: Whether annotations are held against anything: not where a test breaks what they say on purpose.
_HELD: ContextVar[bool] = ContextVar("held", default=True)
#: Kinds of pytrees, and functions by qualified names, that were held against their annotations in this process.
SEEN: set[str] = set()


class Disagreement(AssertionError):
    """A value that is not what its annotation says."""


@contextmanager
def unheld() -> Iterator[None]:
    """Holds no annotation against anything."""
    token = _HELD.set(False)
    try:
        yield
    finally:
        _HELD.reset(token)


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    return typing.get_type_hints(annotated)


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    """Annotations of the fields that hold arrays."""
    hints = _hints(kind)
    fields = dataclasses.fields(kind)
    return {field.name: hints[field.name] for field in fields if field.metadata.get("pytree_node", True)}


def _described(value: object) -> str:
    said = lambda leaf: f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else repr(leaf)
    return str(jax.tree.map(said, value))


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is what an annotation says of arrays. The types of all else are a type checker's affair."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        if hint.array_type is jax.Array and isinstance(value, np.ndarray):  # JAX takes one for the other
            hint = hint.dtype[np.ndarray, hint.dim_str]
        return isinstance(value, hint)
    if origin in (typing.Union, types.UnionType):
        return any(value is None if one is type(None) else _fits(value, one) for one in arguments)
    if not isinstance(origin, type) or not arguments:
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, arguments[-1]) for item in value.values())
    if issubclass(origin, tuple) and arguments[-1] is not ...:
        return isinstance(value, tuple) and all(map(_fits, value, arguments))
    if issubclass(origin, tuple | Sequence):
        return isinstance(value, Sequence) and all(_fits(item, arguments[0]) for item in value)
    return True


def _agree(values: Iterable[tuple[str, Any, Any]], where: str) -> None:
    """Raises at the first of these names, values and annotations that disagree; axes are those of one scope."""
    if not _HELD.get():
        return
    with jaxtyped("context"):
        for name, value, hint in values:
            if not _fits(value, hint):
                raise Disagreement(f"{where}: {name} is {_described(value)}, not {hint}")


def check_fields(node: struct.PyTreeNode) -> None:
    """Holds a pytree's fields against their annotations, unless its leaves are shapes, axes or places of arrays, or answers
    about them."""
    leaves = jax.tree.leaves(node, is_leaf=lambda leaf: isinstance(leaf, OfLayer))
    if not all(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves):
        return
    if leaves and all(leaf.dtype == bool for leaf in leaves):
        return
    kind: Any = type(node)
    SEEN.add(f"{kind.__module__}.{kind.__qualname__}")
    _agree(((name, getattr(node, name), hint) for name, hint in _fields(kind).items()), kind.__qualname__)


def checked(function: Callable[..., Any], annotated: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function, whose arguments and result are held against its annotations, or those of another, once it has returned."""
    annotated = annotated or function
    signature = inspect.signature(annotated)
    gathered = {name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        SEEN.add(f"{annotated.__module__}.{annotated.__qualname__}")
        hints = _hints(annotated)
        given = signature.bind(*args, **kwargs).arguments
        values = [(name, value, hints[name]) for name, value in given.items() if name in hints and name not in gathered]
        _agree([*values, ("what it returns", result, hints.get("return", Any))], annotated.__qualname__)
        return result

    return run


def watch_methods(kind: type, annotated: type) -> None:
    """Holds the methods of a class against the annotations of another class's from now on, where both have one."""
    for name, method in vars(annotated).items():
        own = vars(kind).get(name)
        if name.startswith("_") or not inspect.isfunction(method) or own is None:
            continue
        call = own.__func__ if isinstance(own, staticmethod) else own
        # A static one is given all but the instance.
        whole = (lambda _, *args, call=call, **kwargs: call(*args, **kwargs)) if isinstance(own, staticmethod) else call
        setattr(kind, name, functools.wraps(call)(checked(whole, method)))


def watch_functions(module: types.ModuleType) -> None:
    """Holds the functions that a module exports against their annotations from now on, where they are called as its own."""
    for name in module.__all__:
        if inspect.isfunction(function := getattr(module, name)):
            setattr(module, name, checked(function))


def pytrees(package: str) -> list[type]:
    """The kinds of pytrees that modules of a package have defined."""

    def below(kind: type) -> Iterable[type]:
        sub: type
        for sub in kind.__subclasses__():
            yield sub
            yield from below(sub)

    found = {kind for kind in below(struct.PyTreeNode) if kind.__module__.startswith(package)}
    return sorted(found, key=str)


def watch_fields(kind: type) -> None:
    """Holds every pytree of this kind against its annotations from now on, but for those that JAX puts together of any leaves:
    of what a function of trees makes of each, say."""
    make = kind.__init__  # type: ignore[misc]  # of this very class, not of one below it

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if not sys._getframe(1).f_globals["__name__"].startswith("jax."):
            check_fields(self)

    kind.__init__ = init  # type: ignore[misc]
