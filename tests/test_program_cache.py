"""The folder of compiled programs: where it is, who may write to it, and what becomes of damage in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ptq4dit_jax import processes, program_cache
from ptq4dit_jax.program_cache import cache_programs, folder_in_use, forget_programs, remove_program

#: What JAX has where a user has said nothing.
UNTOLD: dict[str, Any] = {
    "jax_compilation_cache_dir": None,
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}


@pytest.fixture(autouse=True)
def untold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nobody has said anything about a cache; what the tests share is in use again afterwards."""
    before = {name: getattr(jax.config, name) for name in UNTOLD}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name, value in UNTOLD.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def told() -> dict[str, Any]:
    return {name: getattr(jax.config, name) for name in UNTOLD}


def compiled(factor: int) -> list[str]:
    """Compiles a small program, the same for the same factor, and returns what JAX warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(jax.jit(lambda x: x * factor)(jnp.int32(2)), 2 * factor)
    return [str(warning.message) for warning in caught]


def programs(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("jit__lambda*-cache")}


def test_programs_are_kept_and_found(tmp_path: Path) -> None:
    folder = cache_programs(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b" == folder_in_use()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert told() == UNTOLD | {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    assert compiled(1009) == []
    assert len(kept := programs(folder)) == 1  # however small
    assert compiled(1009) == []
    assert programs(folder) == kept
    compiled(1013)
    assert len(programs(folder)) == 2
    elsewhere = cache_programs(tmp_path / "c")
    assert elsewhere is not None
    compiled(1019)
    assert (len(programs(folder)), len(programs(elsewhere))) == (2, 1)


@pytest.mark.parametrize("variable", ["relative", ""])
def test_the_folder_is_in_the_users_cache(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_programs() == tmp_path / "caches/ptq4dit_jax/programs"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", variable)  # which is to be ignored, as its standard says
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_programs() == tmp_path / ".cache/ptq4dit_jax/programs"


def test_what_a_user_has_told_jax_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    before = told()
    assert cache_programs() == tmp_path / "mine"
    assert told() == before
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    cache_programs(tmp_path / "named")
    assert told() == before | {
        "jax_compilation_cache_dir": str(tmp_path / "named"),
        "jax_persistent_cache_min_compile_time_secs": 7.0,
    }
    jax.config.update("jax_enable_compilation_cache", False)
    assert cache_programs(tmp_path / "other") is None
    assert not (tmp_path / "other").exists()


def test_programs_can_be_forgotten(tmp_path: Path) -> None:
    folder = cache_programs(tmp_path / "programs")
    assert folder is not None
    forget_programs()
    assert folder_in_use() is None
    compiled(1021)
    assert not programs(folder)


def test_a_folder_of_no_use(tmp_path: Path, raises_sentence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with raises_sentence("Compiled programs cannot be kept in", str(tmp_path / name), "name another folder"):
            cache_programs(tmp_path / name)
    default = tmp_path / "caches/ptq4dit_jax/programs"
    default.mkdir(parents=True)
    default.chmod(0o777)
    with raises_sentence("Others than you can write to", str(default), "chmod 700"):
        cache_programs()
    assert cache_programs(default) == default  # whoever names a folder answers for it
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    jax.config.update("jax_compilation_cache_dir", None)
    with raises_sentence("no home folder"):
        cache_programs()


def test_a_damaged_program_is_compiled_again_and_can_be_removed(tmp_path: Path) -> None:
    folder = cache_programs(tmp_path / "programs")
    assert folder is not None
    compiled(1033)
    [name] = programs(folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    [warning] = compiled(1033)
    assert warning.startswith("Error reading persistent compilation cache entry for 'jit__lambda'")
    remove_program(folder, "jit_of_another_name")
    assert programs(folder) == {name}
    remove_program(folder, "jit__lambda")
    assert not programs(folder)
    assert compiled(1033) == []
    assert programs(folder) == {name}


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_PROGRAMS"])
def test_the_programs_not_used_for_longest_make_room(bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "caches/ptq4dit_jax/programs"
    folder.mkdir(parents=True, mode=0o700)
    written = {"a": (50, 9), "b": (40, 2), "c": (30, 30), "d": (60, 1), "e": (45, 5)}  # by when they were read and written
    for name, times in written.items():
        (folder / f"{name}-cache").write_bytes(b"x" * 10)
        (folder / f"{name}-atime").touch()
        os.utime(folder / f"{name}-cache", times)
    (folder / "notes").write_text("not JAX's")
    monkeypatch.setattr(program_cache, bound, {"MAX_BYTES": 50, "MAX_PROGRAMS": 5}[bound])
    cache_programs()
    assert len(list(folder.glob("*-cache"))) == 5  # as many as may be
    monkeypatch.setattr(program_cache, bound, {"MAX_BYTES": 40, "MAX_PROGRAMS": 4}[bound])
    jax.config.update("jax_compilation_cache_dir", None)
    cache_programs()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{n}-{k}" for n in "aed" for k in ("cache", "atime")] + ["notes"]
    )


def test_a_folder_that_is_named_is_not_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be one that JAX has used before."""
    monkeypatch.setattr(program_cache, "MAX_PROGRAMS", 0)
    (tmp_path / "a-cache").touch()
    cache_programs(tmp_path)
    assert (tmp_path / "a-cache").exists()


def test_process_0_alone_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "on_first", lambda make: None)
    assert cache_programs(tmp_path / "shared") == tmp_path / "shared"
    assert not (tmp_path / "shared").exists()
