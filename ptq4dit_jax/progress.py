"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class StageProgress(Protocol):
    """Called with the stage, units done, units in all, and optionally a note on how it goes."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Reports nothing."""


@contextmanager
def in_one(progress: StageProgress, stage: str) -> Iterator[Callable[[str], None]]:
    """Reports a stage that has no parts to count; yields a function to call with the note at its end."""
    notes = [""]
    progress(stage, 0, 1)
    yield notes.append
    progress(stage, 1, 1, notes[-1])
