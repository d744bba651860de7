"""The journal of a run of several processes: process 0 keeps it, and tells the others what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ptq4dit_jax import processes
from ptq4dit_jax.reconstruction.resume import Journal, Standing

_Tree = TypeVar("_Tree")


class SharedJournal(Journal):
    """A journal that all processes open and use alike. Only process 0 needs its folder."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> None:
        def opened() -> tuple[str, Standing]:
            super(SharedJournal, self).__init__(folder, fingerprint, fresh=fresh)
            return str(self.folder), self.standing

        there, (finished, current) = processes.on_first(opened)
        self.folder = Path(there)
        self.standing = Standing(tuple(finished), current if current is None else (current[0], current[1]))

    def close(self) -> None:
        if processes.is_first():
            super().close()

    def finished(self, position: int, like: _Tree) -> _Tree | None:
        return self._told(super().finished, position, like)

    def finish(self, position: int, result: object) -> None:
        processes.on_first(lambda: super(SharedJournal, self).finish(position, result))

    def current(self, position: int, like: _Tree) -> _Tree | None:
        return self._told(super().current, position, like)

    def save_current(self, position: int, state: object, iteration: int = 0) -> None:
        processes.on_first(lambda: super(SharedJournal, self).save_current(position, state, iteration))

    def remove(self) -> None:
        processes.on_first(super().remove)

    def _told(self, read: Any, position: int, like: _Tree) -> _Tree | None:
        """Returns in all processes what process 0 reads, a tree of arrays like ``like``, or None."""
        found: list[_Tree | None] = [None]

        def first() -> bool:
            found[0] = read(position, like)
            return found[0] is not None

        if not processes.on_first(first):
            return None
        return processes.shared(like if found[0] is None else found[0])
