"""Keeps compiled programs in a folder (JAX's persistent compilation cache), so that the second start compiles nothing.

Importing this turns nothing on. What a user has told JAX, by its environment variables or ``jax.config``, stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from ptq4dit_jax import processes
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError

#: The most bytes and programs in the user's folder. Beyond either, the programs that were not used for longest are removed,
#: down to a share of both. What commands keep is in docs/programs.md.
MAX_BYTES, MAX_PROGRAMS = 2**30, 10_000
_SHARE = 0.75
#: The ends of JAX's files of a program and, where JAX itself bounds a folder, of the time when the program was last used.
_PROGRAM, _USED = "-cache", "-atime"


def cache_programs(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Has JAX keep what it compiles from now on in a folder, and take from there what it has compiled before.

    Call it first: what this process has compiled already is not written. JAX tells programs apart by their code, its version,
    the device and the flags of the compiler. **Whoever can write to the folder can run code as you.** It is made for you alone
    (mode 700). The processes of a run need a folder that all of them see, since process 0 alone writes.

    Args:
      folder: the folder; None for the one that JAX was told of, or else ``ptq4dit_jax/programs`` in your cache folder
        (``XDG_CACHE_HOME``, or ``~/.cache``), which is kept below :data:`MAX_BYTES`.

    Returns:
      The folder, or None if JAX was told to use no cache (``JAX_ENABLE_COMPILATION_CACHE``).

    Raises:
      Ptq4ditError: the folder cannot be made, or others can write to the default one.
    """
    if not _is_enabled() or (folder is None and told_folder() is not None):
        return folder_in_use()
    target = _default() if folder is None else Path(folder).expanduser().absolute()
    processes.on_first(lambda: _prepare(target, own=folder is None))
    name, default = "jax_persistent_cache_min_compile_time_secs", 1.0
    if getattr(jax.config, name) == default:
        jax.config.update(name, 0.0)  # small programs are most of them
    jax.config.update("jax_compilation_cache_dir", str(target))
    compilation_cache.reset_cache()  # it may be open elsewhere
    return target


def told_folder() -> Path | None:
    """Returns the folder for programs that JAX was told of; None if it was told of none."""
    told: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return None if told is None else Path(told)


def folder_in_use() -> Path | None:
    """Returns the folder in which JAX keeps what it compiles; None if it keeps nothing."""
    return told_folder() if _is_enabled() else None


def forget_programs() -> None:
    """Has JAX neither keep nor look up compiled programs from now on."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def remove_program(folder: Path, name: str) -> None:
    """Removes all programs of that name, as JAX reports it: one of them is damaged, and JAX never replaces what is there."""
    for program in folder.glob(f"{name}-*{_PROGRAM}"):
        _remove(program)


def _is_enabled() -> bool:
    return bool(jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        raise Ptq4ditError("There is no home folder to keep compiled programs in; name a folder for them.") from None
    return root / "ptq4dit_jax" / "programs"


def _prepare(folder: Path, *, own: bool) -> None:
    """Makes the folder for this user. If it is the package's ``own``, others may not write there, and it is bounded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if own and os.name == "posix" and _is_open(folder.stat()):
            raise Ptq4ditError(
                f"Others than you can write to {shown(folder, 1000)}, and could have programs of theirs run as you; make it "
                "yours (chmod 700)."
            )
        if own:
            _make_room(folder)
    except OSError as error:
        raise Ptq4ditError(
            f"Compiled programs cannot be kept in {shown(folder, 1000)} ({error.strerror or error}); name another folder."
        ) from error


def _is_open(found: os.stat_result) -> bool:
    return found.st_uid != os.getuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _make_room(folder: Path) -> None:
    """Removes the programs that were not used for longest, if there are too many.

    JAX can bound a folder, too, but it then looks at all programs before it writes one: 36 us each on one core, which is a
    minute for 500 programs among 3,500. The time of use is the file system's, which notes it once a day or so.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_PROGRAM):
                with contextlib.suppress(FileNotFoundError):  # another process makes room
                    state = entry.stat()
                    found.append((max(state.st_atime_ns, state.st_mtime_ns), state.st_size, Path(entry.path)))
    count, size = len(found), sum(one for _, one, _ in found)
    if count <= MAX_PROGRAMS and size <= MAX_BYTES:
        return
    for _, one, program in sorted(found):
        if count <= _SHARE * MAX_PROGRAMS and size <= _SHARE * MAX_BYTES:
            return
        _remove(program)
        count, size = count - 1, size - one


def _remove(program: Path) -> None:
    for path in (program, program.with_name(program.name.removesuffix(_PROGRAM) + _USED)):
        with contextlib.suppress(OSError):
            path.unlink()
