"""Copies what is needed of checkpoints at addresses (``gs://``, ``s3://``, ``hf://``, ``https://``), through fsspec.

First a temporary folder gets files with the names and sizes of all files there, the content of JSON files, and the first bytes
of files that may be weights; the rest takes no space. The usual search then decides there which weights are wanted, and only
these are copied.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeAlias, TypedDict

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.checkpoints.addresses import address_of, copy_command, local_path
from ptq4dit_jax.checkpoints.foreign.kinds import HEAD
from ptq4dit_jax.checkpoints.foreign.locate import locate
from ptq4dit_jax.checkpoints.foreign.weight_sets import is_candidate
from ptq4dit_jax.documents import MAX_JSON
from ptq4dit_jax.errors import Ptq4ditError

#: Called with (megabytes done, megabytes in all).
Progress: TypeAlias = Callable[[int, int], None]

#: More than any checkpoint has; a listing takes a request per thousand files.
_MAX_FILES, _MAX_HEADS = 50_000, 2_000
_BLOCK = 2**23
_MEGABYTE = 10**6


class _Entry(TypedDict, total=False):
    """What a store says about a file or folder."""

    name: str
    size: int | None
    type: str


class _Store(Protocol):
    """The part of an fsspec file system that is used; fsspec itself has no type hints."""

    def info(self, path: str) -> _Entry: ...

    def ls(self, path: str, detail: Literal[True]) -> Iterable[_Entry]: ...

    def find(self, path: str, *, detail: Literal[True]) -> Mapping[str, _Entry]: ...

    def cat_ranges(self, paths: Sequence[str], starts: int, ends: int | None) -> Iterable[bytes]: ...

    def open(self, path: str, mode: Literal["rb"], *, block_size: int) -> BinaryIO: ...


class _Copy:
    """A temporary folder with a checkpoint at ``path``, removed once nothing refers to this object."""

    def __init__(self, address: str) -> None:
        self.address, self.folder = address, Path(tempfile.mkdtemp(prefix="ptq4dit-"))
        self.path = self.folder
        self.remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Makes errors name the address instead of the temporary folder."""
        try:
            yield
        except Ptq4ditError as error:
            scheme = self.address.partition("://")[0]
            raise Ptq4ditError(str(error).replace(f"{self.folder}/", f"{scheme}://")) from error


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str], part: str = "transformer", progress: Progress | None = None) -> Iterator[Path]:
    """Yields a local path to what is at an address, until the block ends; any other path is yielded as it is.

    Args:
      path: an address or a path.
      part: the folder of a diffusers pipeline to use.
      progress: called with (megabytes copied, megabytes in all).

    Raises:
      Ptq4ditError: as :func:`fetch` does; errors raised in the block name the address.
    """
    if (address := address_of(path)) is None:
        yield local_path(path)
        return
    copy = fetch(address, part, progress)
    try:
        with copy.errors():
            yield copy.path
    finally:
        copy.remove()


def fetch(address: str, part: str = "transformer", progress: Progress | None = None) -> _Copy:
    """Copies the checkpoint at an address: its weights and all JSON beside them, or a whole model folder of this package.

    Raises:
      Ptq4ditError: there is nothing at the address, or no checkpoint or several; or there is no package, permission or
        connection to read it with, or no space for it, in which case the sentence says how to copy it by hand.
    """
    copy = _Copy(address)
    try:
        with _sentences(address):
            files, root = _connect(address)
            root, sizes = _listing(files, root, address)
            places = {name: copy.folder / _place(name) for name in sizes}
            copy.path = copy.folder / _place(root)
            if not copy.path.resolve().is_relative_to(copy.folder.resolve()) or copy.path == copy.folder:
                raise Ptq4ditError(f"The address {address} names no file or folder in a store; pass one that does.")
            _lay_out(files, sizes, places)
            with copy.errors():
                wanted = _wanted(copy.path, part)
            chosen = [name for name, place in places.items() if any(place.is_relative_to(item) for item in wanted)]
            _download(files, [name for name in chosen if not _is_json(name, sizes)], sizes, places, copy.folder, progress)
    except BaseException:
        copy.remove()
        raise
    return copy


@contextlib.contextmanager
def _sentences(address: str) -> Iterator[None]:
    """Turns whatever a store's package raises into one sentence; types of errors differ between stores and versions."""
    by_hand = f"copy it here with {copy_command(address)} and pass the copy"
    try:
        yield
    except Ptq4ditError:
        raise
    except FileNotFoundError as error:
        raise Ptq4ditError(
            f"There is nothing at {address}, or nothing that may be seen from here; check the address."
        ) from error
    except ImportError as error:
        name = getattr(error, "name", None)
        why = f"{name} is not installed" if name else " ".join(str(error).split())[:100].rstrip(".")
        raise Ptq4ditError(f"The address {address} cannot be read here ({why}); {by_hand}.") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        words = type(error).__name__ + (f": {reason}" if reason else "")
        raise Ptq4ditError(f"The address {address} cannot be read here ({words.rstrip('.')}); {by_hand}.") from error


def _connect(address: str) -> tuple[_Store, str]:
    """Returns the store of an address, and the address in the store's own form."""
    fsspec = importlib.import_module("fsspec.core")
    files, root = fsspec.url_to_fs(address)
    return files, str(root).rstrip("/") or "/"


def _listing(files: _Store, root: str, address: str) -> tuple[str, dict[str, int]]:
    """Returns the store's name of what is at an address, and sizes by such names: of all files in a folder, or of a file, the
    files beside it and a pipeline's scheduler. A size is -1 if the store does not give it."""
    info = files.info(root)
    root = str(info.get("name") or root).rstrip("/")
    folder = info.get("type") == "directory"
    sizes: dict[str, int] = {}
    if folder:
        sizes = _sizes(files.find(root, detail=True).values())
        if not sizes:
            raise FileNotFoundError(root)
    parent = root.rpartition("/")[0]
    if not folder:
        sizes = {root: _size(info)}
    if address.startswith(("http://", "https://")):  # its listings are links to anything
        return root, sizes
    if not folder:
        with contextlib.suppress(Exception):  # not every store lists folders; neighbours of a file are optional
            sizes |= _sizes(files.ls(parent, detail=True))
    with contextlib.suppress(Exception):
        pipeline = parent if folder else parent.rpartition("/")[0]
        if pipeline:
            sizes |= _sizes(files.ls(f"{pipeline}/scheduler", detail=True))
    if len(sizes) > _MAX_FILES:
        raise Ptq4ditError(
            f"There are {len(sizes)} files at {address}, too many to look through; pass the folder with the weights."
        )
    return root, sizes


def _sizes(entries: Iterable[_Entry]) -> dict[str, int]:
    return {
        str(entry["name"]): _size(entry) for entry in entries if entry.get("type") == "file" and _usable(str(entry["name"]))
    }


def _size(entry: _Entry) -> int:
    return -1 if (size := entry.get("size")) is None else int(size)


def _usable(name: str) -> bool:
    return "\0" not in name and not {"..", "."}.intersection(_place(name).split("/"))


def _place(name: str) -> str:
    """Returns a store's name as a relative path: what follows the scheme, without a query."""
    return re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", name).partition("?")[0].strip("/")


def _is_json(name: str, sizes: dict[str, int]) -> bool:
    return _place(name).endswith(".json") and sizes[name] <= MAX_JSON


def _lay_out(files: _Store, sizes: dict[str, int], places: dict[str, Path]) -> None:
    """Creates all files with their sizes, and with content only where the search looks at it."""
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.truncate(max(sizes[name], 0))
    whole = [name for name in places if _is_json(name, sizes)]
    arrays = {place.parent for place in places.values() if place.name in ("manifest.ocdbt", ".zarray", "zarr.json")}
    heads = [
        name
        for name, place in places.items()
        if name not in whole and sizes[name] and is_candidate(place.name) and not arrays.intersection(place.parents)
    ]
    heads = heads[:_MAX_HEADS]
    for name, content in zip(whole, files.cat_ranges(whole, 0, None) if whole else (), strict=True):
        places[name].write_bytes(content)
    for name, content in zip(heads, files.cat_ranges(heads, 0, HEAD) if heads else (), strict=True):
        with places[name].open("r+b") as file:
            file.write(content[: HEAD if sizes[name] < 0 else min(HEAD, sizes[name])])


def _wanted(path: Path, part: str) -> Sequence[Path]:
    """Returns the files and folders to copy whole, found in the folder of files without content."""
    if store.is_model(path):
        return [path]
    return locate(path, part).files


def _download(
    files: _Store, names: Sequence[str], sizes: dict[str, int], places: dict[str, Path], folder: Path, progress: Progress | None
) -> None:
    total, done = sum(max(sizes[name], 0) for name in names), 0
    if total > (free := shutil.disk_usage(folder).free):
        raise Ptq4ditError(
            f"The weights take {total / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left to copy them to; set "
            "TMPDIR to a folder with more."
        )
    for name in names:
        with files.open(name, "rb", block_size=_BLOCK) as source, places[name].open("wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
                done += len(block)
                if progress is not None:
                    progress(done // _MEGABYTE, max(1, max(done, total) // _MEGABYTE))
        if sizes[name] >= 0 and places[name].stat().st_size != sizes[name]:
            raise Ptq4ditError(f"The file {name} changed while it was copied; copy it again when nobody writes to it.")
