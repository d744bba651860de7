"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class StageProgress(Protocol):
    """Called with the stage, units done, units in all, and while reconstructing a note on how it goes."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Tells nothing."""
