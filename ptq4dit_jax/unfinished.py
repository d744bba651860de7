"""What a command has not finished: the outputs it owes, what it has staged, and what to say about them if it ends early.

A program's entry (:mod:`ptq4dit_jax.ending`) opens a :class:`Work` for its run. Without one, as in a notebook, nothing is
remembered here. Uses the standard library only, so that any code that writes files can report it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_work: ContextVar[Work | None] = ContextVar("ptq4dit_work", default=None)
#: Tells states of an output apart: its inode and modification time; None if nothing is there.
_State = tuple[int, int] | None


@dataclasses.dataclass
class Work:
    """``outputs`` with their states before, ``staged`` files and folders that do not have their final names yet, and the
    ``journal`` that the same command resumes from, unless it is told to start over."""

    outputs: dict[Path, _State] = dataclasses.field(default_factory=dict)
    staged: set[Path] = dataclasses.field(default_factory=set)
    journal: Path | None = None
    fresh: bool = False

    def clean(self) -> None:
        """Removes what is staged. Another thread may still be writing, so something may be left."""
        for path in tuple(self.staged):
            with contextlib.suppress(OSError):
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    def standing(self) -> str:
        """Says what was written so far, and what the same command would do; the rest of a sentence."""
        written = [str(path) for path, before in self.outputs.items() if _state(path) not in (None, before)]
        owed = [str(path) for path in self.outputs if str(path) not in written]
        if written and not owed:
            return f"{_listed(written)} written, and nothing is left to do"
        if written:
            return f"{_listed(written)} written, {_listed(owed)} not, and the same command with --overwrite starts over"
        if self.journal is not None and self.journal.exists():
            again = "the same command without --fresh" if self.fresh else "the same command"
            return f"no model was written, but the reconstruction so far is in {self.journal}, and {again} goes on from there"
        return "nothing was written, and the same command starts over"


@contextlib.contextmanager
def work() -> Iterator[Work]:
    """Opens a :class:`Work` for the block."""
    opened = Work()
    token = _work.set(opened)
    try:
        yield opened
    finally:
        _work.reset(token)


def expect(*outputs: str | os.PathLike[str]) -> None:
    """Announces what a command is going to write."""
    if (current := _work.get()) is not None:
        current.outputs |= {Path(path): _state(Path(path)) for path in outputs}


def expect_journal(journal: Path, *, fresh: bool) -> None:
    """Announces the journal that a command resumes from, unless it starts ``fresh``."""
    if (current := _work.get()) is not None:
        current.journal, current.fresh = journal, fresh


@contextlib.contextmanager
def staged(path: Path) -> Iterator[None]:
    """Marks what is at ``path`` as useless if the block does not end."""
    current = _work.get()
    if current is None:
        yield
        return
    current.staged.add(path)
    try:
        yield
    finally:
        current.staged.discard(path)


def _state(path: Path) -> _State:
    try:
        found = path.expanduser().stat()
    except (OSError, RuntimeError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'}"
