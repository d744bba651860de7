"""What a run leaves on disk so that it can go on after any interruption, and the check that it is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.staging import staging

_FINGERPRINT, _CURRENT = "fingerprint.json", "current.npz"


class Journal:
    """A folder with ``fingerprint.json``, one ``part-NNN.npz`` for each finished part and ``current.npz`` for the one at work.

    Every file is renamed into place when complete, so whatever moment a run dies at, what is there is whole.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Opens the folder of this very run, or makes it.

        Args:
          folder: where; its parents are made.
          fingerprint: what the result depends on, as JSON.
          fresh: forget what is there.

        Raises:
          Ptq4ditError: the folder belongs to another run (the sentence says what differs), or to something else.
        """
        self.folder = folder.expanduser().absolute()
        if self.folder.exists():
            self._check_ours(json.loads(json.dumps(fingerprint)), fresh)
        if fresh:
            self.remove()
        if not self.folder.exists():
            with staging(self.folder) as staged:
                staged.mkdir()
                (staged / _FINGERPRINT).write_text(json.dumps(fingerprint, indent=1) + "\n")
                staged.rename(self.folder)

    def _check_ours(self, wanted: dict[str, Any], fresh: bool) -> None:
        try:
            found = json.loads((self.folder / _FINGERPRINT).read_text())
        except (OSError, ValueError) as error:
            raise Ptq4ditError(
                f"The folder {self.folder} should hold a reconstruction's state but has no {_FINGERPRINT}; name another one."
            ) from error
        if not fresh and (differing := list(_differences(found, wanted))):
            raise Ptq4ditError(
                f"The reconstruction begun in {self.folder} is another one, different in {', '.join(differing[:4])}; "
                "run it with its own settings, or start over with --fresh (fresh=True)."
            )

    def finished(self, position: int, like: Any) -> Any | None:
        """The result of the part at ``position``, a tree of arrays like ``like``, or None."""
        return _read(self._part(position), like)

    def finish(self, position: int, result: Any) -> None:
        """Stores the result of a part."""
        _write(self._part(position), result)
        (self.folder / _CURRENT).unlink(missing_ok=True)

    def current(self, position: int, like: Any) -> Any | None:
        """The state of the part at ``position`` if it was interrupted, a tree of arrays like ``like``, or None."""
        path = self.folder / _CURRENT
        # The position first: a run that died just after finishing a part leaves that part's state, of other shapes, behind.
        found = _read(path, {"position": np.zeros((), np.int64)})
        return None if found is None or found["position"] != position else _read(path, {"state": like})["state"]  # type: ignore[index]

    def save_current(self, position: int, state: Any) -> None:
        """Stores the state of the part at work."""
        _write(self.folder / _CURRENT, {"position": np.int64(position), "state": state})

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, position: int) -> Path:
        return self.folder / f"part-{position:03d}.npz"


def _differences(found: Any, wanted: Any, name: str = "") -> Any:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} ({_short(found)} there, {_short(wanted)} here)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _names(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _write(path: Path, tree: Any) -> None:
    arrays = dict(zip(_names(tree), map(np.asarray, jax.tree.leaves(jax.device_get(tree))), strict=True))
    with staging(path) as staged:
        with staged.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        staged.replace(path)


def _read(path: Path, like: Any) -> Any | None:
    if not path.exists():
        return None
    damaged = Ptq4ditError(f"The state in {path} is damaged; start over with --fresh (fresh=True).")
    try:
        with np.load(path, allow_pickle=False) as file:
            leaves = [file[name] for name in _names(like)]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise damaged from error
    expected = jax.tree.leaves(like)
    if any(leaf.shape != other.shape or leaf.dtype != other.dtype for leaf, other in zip(leaves, expected, strict=True)):
        raise damaged
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
