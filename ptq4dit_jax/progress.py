"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class StageProgress(Protocol):
    """Called with the stage, units done, units in all, and where there is something to say a note on how it goes."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Tells nothing."""


@contextmanager
def in_one(progress: StageProgress, stage: str) -> Iterator[Callable[[str], None]]:
    """Tells of a stage that has no parts to count; yields what is to be called with the note at its end."""
    notes = [""]
    progress(stage, 0, 1)
    yield notes.append
    progress(stage, 1, 1, notes[-1])
