"""Finds the weights in whatever folder a user passes, for transformers and VAEs alike.

A folder is tried as a Hugging Face cache, a diffusers pipeline, an Orbax checkpoint, the steps of a CheckpointManager, and
files of weights. If it is none of these, its subfolders are tried. Notes say what was decided; where nothing decides, the
candidates are listed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ptq4dit_jax.checkpoints.foreign.kinds import KNOWN, kind_of
from ptq4dit_jax.checkpoints.foreign.orbax_folder import is_orbax
from ptq4dit_jax.checkpoints.foreign.weight_sets import WeightSet, choose, index_set, listed_paths, weight_sets
from ptq4dit_jax.errors import Ptq4ditError

#: Folders of a pipeline; none is ever taken in place of another.
_PARTS = re.compile(
    r"transformer|unet|vae|vae_1_0|vqvae|prior|scheduler|safety_checker|feature_extractor|(image_|text_)?(encoder|tokenizer)(_\d)?"
)
_STEP = re.compile(r"(?P<prefix>|.*[._-])(?P<step>[0-9]+)")
_COMMITTED, _IS_STEP = "commit_success.txt", "_CHECKPOINT_METADATA"
_MAX_DEPTH, _MAX_ENTRIES = 3, 50_000


@dataclass(frozen=True)
class Located:
    """A checkpoint that a search found.

    Attributes:
      path: the file, index or folder.
      kind: a result of :func:`~.kinds.kind_of`, ``shards`` (without an index), ``orbax`` or ``items`` (a step of Orbax items).
      files: files with tensors, or Orbax folders, each of which is read whole.
      notes: what the search decided, in words.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


class NothingFound(Ptq4ditError):
    """A folder holds nothing that could be a checkpoint."""


def locate(where: Path, part: str = "transformer") -> Located:
    """Finds the checkpoint at a path.

    Args:
      where: a file, an index of shards, or a folder.
      part: the folder to use if ``where`` is a diffusers pipeline.

    Raises:
      NothingFound: a folder without a checkpoint.
      Ptq4ditError: no file of a known kind; several checkpoints, which are listed.
      OSError: something cannot be read.
    """
    if where.is_dir():
        return _Search(part).folder(where, 0, part)
    kind = kind_of(where)
    return _of_set(index_set(where)) if kind == "index" else Located(where, kind, (where,))


def _of_set(found: WeightSet, notes: tuple[str, ...] = ()) -> Located:
    if not found.kind:  # named like weights, but with other content: the reader says what it is
        if not found.path.exists():
            raise Ptq4ditError(f"The file {found.path} is a link to a file that is not there; download it again.")
        return Located(found.path, kind_of(found.path), found.files, notes)
    if not found.files:  # an unreadable index; reading it again raises
        found = index_set(found.path)
    return Located(found.path, found.kind, found.files, notes)


class _Search:
    """A search that visits a bounded number of files; one object per search."""

    def __init__(self, part: str) -> None:
        self.part, self.left = part, _MAX_ENTRIES

    def entries(self, folder: Path) -> list[Path]:
        found = []
        with os.scandir(folder) as listing:
            for entry in listing:
                self.left -= 1
                if self.left < 0:
                    raise Ptq4ditError(
                        f"The folder {folder} holds too many files to look through; pass the file or folder with the weights "
                        "itself."
                    )
                found.append(folder / entry.name)
        return sorted(found)

    def folder(self, folder: Path, depth: int, part: str) -> Located:
        """Finds the checkpoint in a folder; ``part`` is "" inside that part of a pipeline."""
        if (snapshot := _snapshot(folder)) is not None:
            revision, notes = snapshot
            found = self.folder(revision, depth, part)
            return replace(found, notes=(*notes, *found.notes))
        if part and (folder / part).is_dir():
            return self.folder(folder / part, depth, "")
        entries = self.entries(folder)
        if is_orbax(folder):
            return Located(folder, "orbax", (folder,))
        folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        if (step := self.latest_step(folder, folders)) is not None:
            return step
        if items := tuple(entry for entry in folders if self.is_orbax(entry)):
            return Located(folder, "items", items)
        # A dangling link is kept, so that opening it reports the problem.
        if sets := weight_sets([entry for entry in entries if entry.is_file() or (entry.is_symlink() and not entry.exists())]):
            return _of_set(*choose(folder, sets))
        if part and (folder / "model_index.json").is_file():
            raise NothingFound(
                f"The folder {folder} is a pipeline of diffusers without {part}/; pass the folder with the weights."
            )
        return self._inside(folder, folders, depth)

    def is_orbax(self, folder: Path) -> bool:
        """Does what the function of that name does, which visits every subfolder, within the bounds of the search."""
        self.entries(folder)
        return is_orbax(folder)

    def orbax_in(self, folder: Path) -> tuple[Path, ...]:
        """Returns the items of a step: the folder itself, or folders in it."""
        if self.is_orbax(folder):
            return (folder,)
        return tuple(entry for entry in self.entries(folder) if entry.is_dir() and self.is_orbax(entry))

    def latest_step(self, folder: Path, folders: list[Path]) -> Located | None:
        """Finds the latest step in a folder of Orbax's CheckpointManager; None for any other folder."""
        if (folder / _IS_STEP).is_file():
            return None
        named = [(entry, match) for entry in folders if (match := _STEP.fullmatch(entry.name)) and "-tmp" not in entry.name]
        steps = {entry: (match["prefix"], int(match["step"])) for entry, match in named}
        items = {entry: self.orbax_in(entry) for entry in steps}
        # In buckets a step is written in place, and this file marks it as complete.
        committed = [entry for entry in items if (entry / _COMMITTED).is_file()]
        whole = [entry for entry in committed or items if items[entry]]
        if not whole:
            return None
        others = [entry for entry in folders if entry not in steps and self.is_orbax(entry)]
        latest = max(whole, key=lambda entry: steps[entry][1])
        twice = sum(steps[entry][1] == steps[latest][1] for entry in whole) > 1
        if others or twice or len({steps[entry][0] for entry in whole}) > 1:
            raise Ptq4ditError(
                f"The folder {folder} must hold one checkpoint, and has some in {listed_paths([*whole, *others])}; "
                "pass the one that is wanted."
            )
        ordered = sorted(whole, key=lambda entry: steps[entry][1])
        which = "the only one" if len(whole) == 1 else "the latest of " + _last_steps([steps[entry][1] for entry in ordered])
        absent = [entry for entry in steps if entry not in whole and steps[entry][0] == steps[latest][0]]
        empty = f" ({listed_paths(absent)} without whole weights)" if absent else ""
        kind = "orbax" if items[latest] == (latest,) else "items"
        return Located(latest, kind, items[latest], (f"step {steps[latest][1]}, {which}{empty}",))

    def _inside(self, folder: Path, folders: list[Path], depth: int) -> Located:
        """Finds the checkpoint in the only subfolder that has one; several are refused by name."""
        found: list[tuple[Path, Located | Ptq4ditError]] = []
        if depth < _MAX_DEPTH:
            for inner in folders:
                if not _PARTS.fullmatch(inner.name):
                    try:
                        found.append((inner, self.folder(inner, depth + 1, self.part)))
                    except NothingFound:
                        pass
                    except Ptq4ditError as error:
                        if self.left < 0:
                            raise
                        found.append((inner, error))
        if len(found) > 1:
            raise Ptq4ditError(
                f"The folder {folder} must hold one checkpoint, and has some in {listed_paths(inner for inner, _ in found)}; "
                "pass the one that is wanted."
            )
        if found:
            inner, result = found[0]
            if isinstance(result, Ptq4ditError):
                raise result
            return replace(result, notes=(f"the weights in {inner.name}/", *result.notes))
        raise NothingFound(
            f"The folder {folder} must hold one checkpoint, and holds nothing that is one; what can be read: {KNOWN}."
        )


def revision_in(folder: Path) -> Path | None:
    """Returns the folder of the one revision in a Hugging Face cache; None for any other folder."""
    found = _snapshot(folder)
    return None if found is None else found[0]


def _snapshot(folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Returns the folder of the one revision in a Hugging Face cache, and notes; None for any other folder."""
    snapshots, refs = folder / "snapshots", folder / "refs"
    if not snapshots.is_dir() or not (refs.is_dir() or folder.name.startswith("models--")):
        return None
    revisions = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    main = ""
    if (refs / "main").is_file():
        with (refs / "main").open("rb") as file:
            main = file.read(200).decode("ascii", "replace").strip()
    if named := [entry for entry in revisions if entry.name == main]:
        return named[0], (f"snapshot {main[:12]}, which is main",)
    if len(revisions) == 1:
        return revisions[0], (f"snapshot {revisions[0].name[:12]}, the only one",)
    if not revisions:
        raise NothingFound(f"The folder {folder} is a download of Hugging Face without files; download it again.")
    raise Ptq4ditError(
        f"The folder {folder} holds the snapshots {listed_paths(revisions)}, and none of them is main; pass the one that is "
        "wanted."
    )


def _last_steps(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[-8:]))
    return f"{len(steps)}: ..., {shown}" if len(steps) > 8 else shown
