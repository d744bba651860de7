"""What a run keeps on disk to resume after any interruption, and the check that it is the same run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ptq4dit_jax.documents import read_json
from ptq4dit_jax.edges import edge, shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.npz_file import read_npz
from ptq4dit_jax.staging import beside, claim, is_staged, place, publish, remove, remove_staged, staging

_FINGERPRINT, _CURRENT = "fingerprint.json", "current.npz"
_UNIT = re.compile(r"part-(\d{3,})\.npz")
_FORMAT, _VERSION = "ptq4dit_jax reconstruction", 4
#: Prefix of the names of what each file says about itself.
_HEAD = "journal/"
_OVER = "start over with --fresh (fresh=True)"


_Tree = TypeVar("_Tree")


class Standing(NamedTuple):
    """How far a run has come: the finished units' positions; if saved, that of the unit in progress and its next iteration."""

    finished: tuple[int, ...]
    current: tuple[int, int] | None


class _File(NamedTuple):
    """The content of one journal file: arrays by name, the unit that they belong to, and its next iteration."""

    arrays: dict[str, np.ndarray]
    position: int
    iteration: int


class Journal:
    """A folder with ``fingerprint.json``, a ``part-NNN.npz`` per finished unit, and ``current.npz`` for the one in progress.

    Every file is renamed into place when complete, so whenever a run dies, the files there are whole. Each says which run and
    which unit it belongs to. The folder belongs to this process alone until :meth:`close`, or until the process ends.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Opens the folder of this same run, or creates it.

        Args:
          folder: where; its parents are created, and a link is followed.
          fingerprint: what the result depends on, as JSON.
          fresh: discard what is there.

        Raises:
          Ptq4ditError: the folder belongs to another run (the message says what differs), to one that is running now, or to
            something else; or a file in it is damaged, or of another run or unit.
        """
        self.folder = place(folder).resolve()
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._hash = np.frombuffer(hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest(), np.uint8)
        self._claim = contextlib.ExitStack()
        try:
            self._claim.enter_context(claim(self.folder))
            if fresh:
                remove_journal(self.folder)
            if fresh or _is_empty(self.folder):
                self._begin()
            else:
                self._check_ours()
            remove_staged(self.folder)
            self.standing = self._standing()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder to other processes."""
        self._claim.close()

    def _begin(self) -> None:
        document = {"format": _FORMAT, "version": _VERSION, "fingerprint": self._fingerprint}
        with staging(self.folder / _FINGERPRINT) as staged:
            staged.write_text(json.dumps(document, indent=1) + "\n")
            publish(staged, self.folder / _FINGERPRINT)

    def _check_ours(self) -> None:
        path = self.folder / _FINGERPRINT
        if not is_journal(self.folder):
            raise Ptq4ditError(
                f"The folder {self.folder} should hold a reconstruction's state but has no {_FINGERPRINT} of one; "
                "move it elsewhere, or name another folder."
            )
        if not path.exists():
            raise Ptq4ditError(f"The reconstruction's state in {self.folder} has lost its {_FINGERPRINT}; {_OVER}.")
        with edge(path, f"{_FINGERPRINT} is damaged; {_OVER}"):
            document = read_json(path, _OVER, what="fingerprint of a reconstruction")
            version = document.get("version", 1)
            found = document["fingerprint"] if version == _VERSION else None
        if version != _VERSION:
            raise Ptq4ditError(
                f"The reconstruction in {self.folder} was begun by another version of this program (format {shown(version)}, "
                f"not {_VERSION}); resume with that version, or {_OVER}."
            )
        if differing := list(_differences(found, self._fingerprint)):
            raise Ptq4ditError(
                f"The reconstruction begun in {self.folder} belongs to another run, which differs in "
                f"{', '.join(differing[:4])}; run it as it was begun, or {_OVER}."
            )

    def _standing(self) -> Standing:
        """Returns how far the run has come. Raises if a file is not of this run."""
        finished = sorted(int(match[1]) for name in os.listdir(self.folder) if (match := _UNIT.fullmatch(name)))
        for position in finished:
            self._read(self._path(position), [], position)
        if (found := self._read(self.folder / _CURRENT, [], None)) is None or found.position in finished:
            return Standing(tuple(finished), None)
        return Standing(tuple(finished), (found.position, found.iteration))

    def finished(self, position: int, like: _Tree) -> _Tree | None:
        """Returns the result of the unit at ``position``, a tree of arrays like ``like``, or None."""
        found = self._read(self._path(position), _names(like), position)
        return None if found is None else self._tree(self._path(position), found.arrays, like)

    def finish(self, position: int, result: object) -> None:
        """Stores the result of a unit."""
        self._write(self._path(position), result, position)
        (self.folder / _CURRENT).unlink(missing_ok=True)

    def current(self, position: int, like: _Tree) -> _Tree | None:
        """Returns the state of the unit at ``position`` if it was interrupted, a tree of arrays like ``like``, or None."""
        path = self.folder / _CURRENT
        # The position first: a run that died just after finishing a unit leaves behind that unit's state, of other shapes.
        head = self._read(path, [], None)
        if head is None or head.position != position:
            return None
        found = self._read(path, _names(like), position)
        return None if found is None else self._tree(path, found.arrays, like)

    def save_current(self, position: int, state: object, iteration: int = 0) -> None:
        """Stores the state of the unit in progress, whose next iteration is ``iteration``."""
        self._write(self.folder / _CURRENT, state, position, iteration)

    def remove(self) -> None:
        """Deletes the folder."""
        remove_journal(self.folder)

    def _path(self, position: int) -> Path:
        return self.folder / f"part-{position:03d}.npz"

    def _write(self, path: Path, tree: object, position: int, iteration: int = 0) -> None:
        head = {"fingerprint": self._hash, "position": np.int64(position), "iteration": np.int64(iteration)}
        arrays = {f"{_HEAD}{name}": value for name, value in head.items()}
        arrays |= zip(_names(tree), map(np.asarray, jax.tree.leaves(jax.device_get(tree))), strict=True)
        if not (self.folder / _FINGERPRINT).exists():  # somebody removed it: the remaining work is saved all the same
            self._begin()
        with staging(path) as staged:
            with staged.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            publish(staged, path)

    def _read(self, path: Path, names: list[str], position: int | None) -> _File | None:
        """Reads the named arrays and the head of a file of this run and, unless None, of the unit at ``position``."""
        if not path.exists():
            return None
        head = [_HEAD + name for name in ("fingerprint", "position", "iteration")]
        arrays, _ = read_npz(path, [*head, *names], _OVER)
        with edge(path, f"{path.name} is damaged; {_OVER}"):
            ours = np.array_equal(arrays[head[0]], self._hash)
            found = _File({name: arrays[name] for name in names}, int(arrays[head[1]]), int(arrays[head[2]]))
        if not ours:
            raise Ptq4ditError(
                f"The file {path} is of another run than {_FINGERPRINT} beside it; put the right one there, or {_OVER}."
            )
        if position is not None and found.position != position:
            raise Ptq4ditError(
                f"The file {path} holds the unit at position {found.position}; put the right one there, or {_OVER}."
            )
        return found

    def _tree(self, path: Path, found: Mapping[str, np.ndarray], like: _Tree) -> _Tree:
        leaves, expected = [found[name] for name in _names(like)], jax.tree.leaves(like)
        if any(leaf.shape != other.shape or leaf.dtype != other.dtype for leaf, other in zip(leaves, expected, strict=True)):
            raise Ptq4ditError(f"The state in {path} is damaged; {_OVER}.")
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def journal_beside(out: Path) -> Path:
    """Returns where the command keeps the journal of an output."""
    target = place(out)
    return target.with_name(f".{target.name}.reconstruction")


def is_journal(folder: Path) -> bool:
    """Returns whether a folder holds only a journal's files, or a journal's fingerprint; an empty folder counts."""
    if not folder.is_dir():
        return False
    if all(map(_is_ours, os.listdir(folder))):
        return True
    try:
        return bool(read_json(folder / _FINGERPRINT, "")["format"] == _FORMAT)
    except Exception:
        return False


def remove_journal(folder: Path) -> bool:
    """Deletes a journal, but neither other files in its folder nor a link to it; returns whether it is gone.

    Raises:
      Ptq4ditError: the folder is no journal.
    """
    linked, folder = folder.is_symlink(), folder.resolve()
    if not os.path.lexists(folder):
        return True
    if not is_journal(folder):
        raise Ptq4ditError(
            f"The folder {folder} should hold a reconstruction's state but has no {_FINGERPRINT} of one, so it is not removed; "
            "move it elsewhere, or name another folder."
        )
    names = os.listdir(folder)
    if not linked and all(map(_is_ours, names)):
        away = beside(folder)
        with contextlib.suppress(OSError):  # a mount point stays
            folder.rename(away)
            remove(away)
            return not away.exists()
    # The fingerprint last, so that what a kill leaves is still a journal.
    for name in sorted(filter(_is_ours, names), key=lambda name: name == _FINGERPRINT):
        remove(folder / name)
    if not linked:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return not folder.exists() or not any(map(_is_ours, os.listdir(folder)))


def forget_journal(folder: Path) -> bool:
    """Removes a journal that is of no more use, without ever raising; returns whether it is gone."""
    try:
        return remove_journal(folder)
    except (Ptq4ditError, OSError):
        return False


def _is_empty(folder: Path) -> bool:
    """Returns whether nothing is there, or only what a run killed at its beginning left."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(map(is_staged, os.listdir(folder)))


def _is_ours(name: str) -> bool:
    return name in (_FINGERPRINT, _CURRENT) or _UNIT.fullmatch(name) is not None or is_staged(name)


def _differences(found: object, wanted: object, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} ({_short(found)} there, {_short(wanted)} here)"


def _short(value: object) -> str:
    text = shown(value if isinstance(value, str) else json.dumps(value), 1000)
    return text if len(text) <= 40 else text[:12] + "..."


def _names(tree: object) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
