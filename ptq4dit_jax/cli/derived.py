"""Makes options from dataclasses: from settings, whose fields say what they are for, and from options that commands share.

A command has one parameter for each dataclass. :func:`with_options` shows typer the options instead, and passes the command
those that were given. So every setting can be reached from the command line, and none is listed twice.

    @with_options
    def sample(model: ModelArgument, sampling: Annotated[Given, Settings(Sampling)], pictures: Annotated[Pictures, Group()]):
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import typer

from ptq4dit_jax.settings import Leaf, leaves, title_of

#: Settings that were given, by their flat names; those of a dataclass in a field (``Setting.of``) are a nested dictionary.
Given = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Marks a parameter as the given settings of a dataclass."""

    kind: type


@dataclasses.dataclass(frozen=True)
class Group:
    """Marks a parameter as a dataclass whose fields are options, annotated like a command's parameters."""


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option for a setting: where its value goes, by flat names, and how to make that from what typer read."""

    path: tuple[str, ...]
    leaf: Leaf

    @property
    def name(self) -> str:
        """The name of the parameter that typer fills."""
        return "_".join(self.path)

    @property
    def parameter(self) -> inspect.Parameter:
        said, field = self.leaf.said, self.leaf.field
        spelled = self.leaf.option.removeprefix("--")
        kind = _value_type(self.leaf)
        flag = f"--{spelled}/--no-{spelled}" if kind is bool and "/" not in spelled else f"--{spelled}"
        shown = said.shown
        if shown is None and field.default is not None:
            shown = f"{'' if field.default else 'no-'}{spelled.split('/')[0]}" if kind is bool else str(field.default)
        option = typer.Option(
            flag,
            help=said.help,
            show_default=shown or False,
            metavar=said.metavar,
            rich_help_panel=title_of(self.leaf.owner),
        )
        return _keyword(self.name, Annotated[kind | None, option], None)

    def value(self, given: object) -> object:
        if self.leaf.said.read is not None:
            return self.leaf.said.read(cast(str, given))  # typer reads text where it is not the value
        return tuple(given) if isinstance(given, list) else given


def _value_type(leaf: Leaf) -> Any:
    """Returns the type that typer reads for a setting: a number, a flag, texts, or one text for ``read`` or the dataclass."""
    hint = get_type_hints(leaf.owner)[leaf.field.name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    wanted = [kind for kind in kinds if kind is not type(None)]
    if leaf.said.read is None and get_origin(wanted[0]) is tuple:
        return list[str]
    return wanted[0] if len(wanted) == 1 and wanted[0] in (int, float, bool) else str


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options(kind: type, path: tuple[str, ...] = ()) -> Iterator[_Option]:
    for leaf in leaves(kind):
        if leaf.said.of is None:
            yield _Option((*path, leaf.name), leaf)
        else:
            yield from _options(leaf.said.of, (*path, leaf.name))


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Expands a parameter marked with :class:`Settings`."""

    options: tuple[_Option, ...]

    @property
    def parameters(self) -> list[inspect.Parameter]:
        return [option.parameter for option in self.options]

    def take(self, values: dict[str, object]) -> Given:
        found: Given = {}
        for option in self.options:
            if (given := values.pop(option.name)) not in (None, []):  # a repeatable option is [] if left out
                *sections, name = option.path
                inner = found
                for section in sections:
                    inner = inner.setdefault(section, {})
                inner[name] = option.value(given)
        return found


@dataclasses.dataclass(frozen=True)
class _Group:
    """Expands a parameter marked with :class:`Group`."""

    kind: type

    @property
    def parameters(self) -> list[inspect.Parameter]:
        hints = get_type_hints(self.kind, include_extras=True)
        return [_keyword(field.name, hints[field.name], field.default) for field in dataclasses.fields(self.kind)]

    def take(self, values: dict[str, object]) -> object:
        return self.kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(self.kind)})


def _expansion(annotation: object) -> _Settings | _Group | None:
    kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    for mark in marks:
        if isinstance(mark, Settings):
            return _Settings(tuple(_options(mark.kind)))
        if isinstance(mark, Group):
            return _Group(kind)
    return None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command that has options in place of its marked parameters."""
    hints = get_type_hints(command, include_extras=True)
    expanded, parameters = dict[str, _Settings | _Group](), list[inspect.Parameter]()
    for name, parameter in inspect.signature(command).parameters.items():
        if (expansion := _expansion(hints[name])) is None:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            expanded[name] = expansion
            parameters += expansion.parameters

    def run(**values: object) -> None:
        command(**{name: expansion.take(values) for name, expansion in expanded.items()}, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
