"""Settings as dataclasses in sections, and the flat names by which stored models and the command line know them.

Code uses sections: ``config.balancing.exponent``. Stored settings and options are flat: ``{"exponent": 0.5}``,
``--exponent 0.5``. A field declares both at once, so that neither side needs its own list:

    exponent: float = setting(0.5, "Of the balancing factors; 0.5 is CSB, 0 no balancing.")
    balancing: Balancing = section(Balancing())
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_S = TypeVar("_S", bound="DataclassInstance")
_Value = TypeVar("_Value")
_KEY, _SECTION = "setting", "section"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is said about a field outside the code.

    Attributes:
      help: a sentence for the command line.
      name: the flat name; empty if it is the field's.
      shown: the default as help shows it; None for the default itself.
      metavar: the value as help shows it; None for the type's name.
      read: makes the value from an option's text, if the text is not the value.
      flag: the option's name, if it differs from the flat name.
      of: the dataclass of settings that the value is, if it may also be None.
      former: the flat name under which earlier versions stored it.
    """

    help: str
    name: str = ""
    shown: str | None = None
    metavar: str | None = None
    read: Callable[[str], object] | None = None
    flag: str | None = None
    of: type | None = None
    former: str | None = None


def setting(default: _Value, help: str, **more: Any) -> _Value:
    """Declares a field of a section; ``more`` are attributes of its :class:`Setting`."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **more)})


def section(default: _Value) -> _Value:
    """Declares a field that is itself a dataclass of settings, and has no flat name."""
    return dataclasses.field(default=default, metadata={_SECTION: True})


def is_section(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of settings is a section."""
    return _SECTION in field.metadata


def title_of(kind: type) -> str:
    """Returns a section's heading in help: its ``TITLE``, or else its name."""
    return str(getattr(kind, "TITLE", kind.__name__))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A setting by its flat ``name``: its ``field`` of the dataclass ``owner``, and what is ``said`` about it."""

    name: str
    owner: type
    field: dataclasses.Field[Any]
    said: Setting

    @property
    def option(self) -> str:
        """The command-line option, such as ``--calib-rows``; both names of a flag that has two."""
        return f"--{(self.said.flag or self.name).replace('_', '-')}"


def leaves(kind: type) -> Iterator[Leaf]:
    """Yields all settings of a dataclass and its sections, in order."""
    for field in dataclasses.fields(kind):
        if is_section(field):
            yield from leaves(type(field.default))
        elif (said := field.metadata.get(_KEY)) is not None:
            yield Leaf(said.name or field.name, kind, field, said)


def options_given(kind: type, given: Mapping[str, object]) -> list[str]:
    """Returns the options of the settings ``given`` by their flat names, in order."""
    return [leaf.option for leaf in leaves(kind) if leaf.name in given]


def numbers(option: str, example: str) -> Callable[[str], tuple[float, ...]]:
    """Returns a reader of an option's numbers, separated by commas as in the example. The settings check the values."""

    def read(text: str) -> tuple[float, ...]:
        try:
            return tuple(float(number) for number in text.split(","))
        except ValueError:
            raise Ptq4ditError(f"{option} must be two numbers such as {example}, not {quoted(text)}.") from None

    return read


def changed(value: _S, settings: Mapping[str, Any]) -> _S:
    """Returns a dataclass of settings with some of them changed, by their flat names. Every section that changes checks itself.

    Raises:
      TypeError: no setting has that name.
    """
    names = [leaf.name for leaf in leaves(type(value))]
    if unknown := [name for name in settings if name not in names]:
        close = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}."
        raise TypeError(f"{type(value).__name__} has no setting {unknown[0]!r}; {hint}")
    return _changed(value, settings)


def _changed(value: _S, settings: Mapping[str, Any]) -> _S:
    new = {}
    for field in dataclasses.fields(value):
        if is_section(field):
            old = getattr(value, field.name)
            if (part := _changed(old, settings)) is not old:
                new[field.name] = part
        elif (said := field.metadata.get(_KEY)) is not None and (name := said.name or field.name) in settings:
            new[field.name] = settings[name]
    return dataclasses.replace(value, **new) if new else value


def flat(value: DataclassInstance) -> dict[str, Any]:
    """Returns all settings of a dataclass and its sections by their flat names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if is_section(field):
            found |= flat(getattr(value, field.name))
        elif (said := field.metadata.get(_KEY)) is not None:
            found[said.name or field.name] = getattr(value, field.name)
    return found
