"""Checks and limits that sections of settings share."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.settings import is_section

#: The most rows, or groups of steps, that a run may ask for, far more than is useful; memory may allow fewer.
MAX_ROWS = 2**20


def check_sections(settings: Any) -> None:
    """Raises if a section of a dataclass of settings has another type."""
    for field in dataclasses.fields(settings):
        kind, value = type(field.default), getattr(settings, field.name)
        if is_section(field) and not isinstance(value, kind):
            name = f"{type(settings).__name__} {field.name}"
            raise Ptq4ditError(f"{name} must be a {kind.__name__}, such as {kind.__name__}(), not {quoted(value)}.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises if a setting is not one of its choices."""
    if value not in choices:
        raise Ptq4ditError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
