"""Output that is whole or absent: claimed by one run, made beside its place, flushed to the disk, then renamed.

What a killed run leaves beside ``NAME``, and the next run that claims ``NAME`` removes:

    .NAME.ptq4dit.lock      the claim; locked by the system, which releases it when the process ends
    .NAME.<12 hex>.tmp      the output in the making
    .NAME.<12 hex>.old      a folder that an exchange moved aside; it goes back to ``NAME`` if nothing is there
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from ptq4dit_jax import unfinished
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError

_STAGED, _ASIDE = "tmp", "old"
_ADDED = len(f"..{'0' * 12}.{_STAGED}")
#: Bytes that paths of files inside a staged folder need beyond the output's path.
_INSIDE = 128
#: Errors of file systems without locks, such as some on clusters.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def place(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of an output, with links to folders followed.

    Raises:
      Ptq4ditError: nothing can be written under that name: it is too long for what is added while it is made, holds a NUL or
        what the system cannot encode, or is the root.
    """
    try:
        target = Path(path).expanduser().absolute()
        encoded = os.fsencode(target)
        if b"\0" in encoded:
            raise ValueError("it holds a NUL")
        target = target.resolve() if target.is_dir() else target.parent.resolve() / target.name
        there = next(folder for folder in target.parents if folder.exists())
    except Ptq4ditError:
        raise
    except StopIteration:
        raise Ptq4ditError(f"Nothing can be written to {shown(path)}; choose a path below it.") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            reason = f"{reason}, or path too long"
        raise Ptq4ditError(
            f"Cannot write {shown(path)}, which is not a usable path ({shown(str(reason))}); choose another one."
        ) from error
    for what, length, limit in (
        ("name", len(os.fsencode(target.name)) + _ADDED, _limit(there, "PC_NAME_MAX", 255)),
        ("path", len(os.fsencode(target)) + _ADDED + _INSIDE, _limit(there, "PC_PATH_MAX", 4096)),
    ):
        if length > limit:
            raise Ptq4ditError(
                f"Cannot write {shown(path)} (File {what} too long): while it is made it takes {length} bytes, and the system "
                f"allows {limit}; choose a shorter one."
            )
    return target


@contextlib.contextmanager
def claim(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes from writing an output until the block ends, and removes what killed ones left beside it.

    Parents are made, and removed afterwards if they are still empty. Claims of one process may nest: a path in a folder that
    this process has claimed is claimed with it. On a file system without locks there are no claims, and nothing is removed.

    Raises:
      Ptq4ditError: another process has claimed the output, or nothing can be written there.
    """
    target = place(path)
    if any(_lock(folder).is_locked for folder in target.parents):
        yield
        return
    lock, locked = _lock(target), False
    outermost = not lock.is_locked
    with _parents(target):
        try:
            try:
                locked = _acquired(lock, target)
                if locked and outermost:
                    _tidy(target)
            except OSError as error:
                raise _cannot_write(target, error) from error
            with unfinished.staged(Path(lock.lock_file)) if locked else contextlib.nullcontext():
                yield
        finally:
            if locked:
                if outermost and lock.lock_counter == 1:
                    with contextlib.suppress(OSError):
                        _tidy(target)
                    with contextlib.suppress(OSError):
                        os.unlink(lock.lock_file)
                lock.release()


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yields a path beside ``target``, where the block makes a file or a folder and moves it to ``target`` when complete.

    The output is claimed meanwhile. Parents of ``target`` are made. Anything left at the path afterwards is removed; if the
    block fails, so are those parents.

    Raises:
      Ptq4ditError: as :func:`claim` does; or the operating system refused something inside the block, and the sentence names
        ``target`` and the reason.
    """
    with claim(target), _parents(target):
        path = beside(target)
        try:
            with unfinished.staged(path):
                yield path
        except OSError as error:
            raise _cannot_write(target, error) from error
        finally:
            remove(path)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Makes the folders that lead to ``target``; afterwards removes those that it made and that are still empty."""
    made: list[Path] = []
    try:
        try:
            made = list(itertools.takewhile(lambda folder: not folder.exists(), target.parents))
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_whole(target: Path, write: Callable[[BinaryIO], object], check: Callable[[], None]) -> Path:
    """Writes a file beside its place and moves it there when it is complete and ``check`` still allows it; returns its path."""
    with staging(target) as staged:
        with staged.open("wb") as file:
            write(file)
        check()
        publish(staged, target)
    return target


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises if there is a folder or a device where a file is to be written or, without ``overwrite``, anything."""
    if target.is_dir():
        raise Ptq4ditError(f"The path {target} is a folder, which a file cannot replace; choose another path.")
    if target.exists() and not overwrite:
        raise Ptq4ditError(f"The path {target} exists already; choose another path, or ask for it to be overwritten.")
    if target.exists() and not target.is_file():
        raise Ptq4ditError(f"The path {target} is a device or the like, which a file does not replace; choose another path.")


def publish(staged: Path, target: Path) -> None:
    """Flushes a staged file and moves it into place in one step, replacing any file there."""
    flush(staged)
    staged.replace(target)
    flush_entries(target.parent)


def exchange(staged: Path, target: Path) -> None:
    """Flushes a staged folder and moves it into place. A folder that is there first moves aside, and is removed at the end."""
    flush(staged)
    aside = beside(target, _ASIDE)
    try:
        if target.exists():
            target.rename(aside)
        staged.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    flush_entries(target.parent)
    remove(aside)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on disk."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
        flush_entries(path)
    elif not path.is_symlink():
        _fsync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def flush_entries(folder: Path) -> None:
    """Waits until the names in a folder are on disk, if the system supports this. Errors do not matter: renaming succeeded."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            _fsync(folder, os.O_RDONLY)


def remove_staged(folder: Path) -> None:
    """Removes whatever a killed run was making inside a folder that this run has claimed."""
    for entry in folder.iterdir():
        if is_staged(entry.name):
            remove(entry)


def is_staged(name: str, of: str | None = None) -> bool:
    """Whether a name is ours for something in the making: for the output named ``of``, or for any."""
    output = ".+" if of is None else re.escape(of)
    return re.fullmatch(rf"\.{output}\.[0-9a-f]{{12}}\.({_STAGED}|{_ASIDE})", name, re.DOTALL) is not None


def beside(target: Path, kind: str = _STAGED) -> Path:
    """Returns a new name beside an output, for something that the next claim of the output removes if this run cannot."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _lock(target: Path) -> filelock.BaseFileLock:
    """Returns the lock of an output, one object per process, whatever its threads."""
    name = str(target.with_name(f".{target.name}.ptq4dit.lock")) if target.name else f"{target}.ptq4dit.lock"
    return filelock.FileLock(name, thread_local=False, is_singleton=True)


def _acquired(lock: filelock.BaseFileLock, target: Path) -> bool:
    try:
        lock.acquire(timeout=0)
        while not os.path.exists(lock.lock_file):  # its last holder just removed it, so it locks nothing
            lock.release()
            lock.acquire(timeout=0)
    except NotImplementedError:
        return False
    except filelock.Timeout:
        raise Ptq4ditError(
            f"Another run is writing {shown(target, 1000)} at this moment; wait until it has ended, or choose another path."
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _tidy(target: Path) -> None:
    """Removes or puts back what dead runs left beside an output; a live one would hold the claim."""
    for name in sorted(os.listdir(target.parent)):
        if is_staged(name, target.name):
            left = target.with_name(name)
            if name.endswith(_ASIDE) and not target.exists():
                left.rename(target)
            else:
                remove(left)


def _limit(folder: Path, name: str, default: int) -> int:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.pathconf(folder, name)
    return default


def _fsync(path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # a file system without this call
            raise
    finally:
        os.close(opened)


def _cannot_write(target: Path, error: OSError) -> Ptq4ditError:
    reason = error.strerror or error
    return Ptq4ditError(f"Cannot write {shown(target, 1000)} ({reason}); check its permissions and the free space.")


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as the system allows."""
    # After a failed save, pending writes of Orbax may still add files.
    for _ in range(20):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
        if not os.path.lexists(path):
            return
        time.sleep(0.05)
