"""Checks and limits that sections of settings share."""

from __future__ import annotations

from ptq4dit_jax.errors import Ptq4ditError

#: The most rows, or groups of steps, that a run may ask for, far above what is of use; memory may allow less.
MAX_ROWS = 2**20


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises where a setting is none of its choices."""
    if value not in choices:
        raise Ptq4ditError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
