"""``--compilation-cache`` and ``--no-compilation-cache``: what becomes of them, and of failures; never the end of a command."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from cli_helpers import PROGRAM, ROOT, run
from jax.experimental.compilation_cache import compilation_cache

from ptq4dit_jax import cli, processes
from ptq4dit_jax.cli import compilation_cache as option

READING = "Error reading persistent compilation cache entry for '{}': {}"


@pytest.fixture
def asked(monkeypatch):
    """The folders that commands ask JAX to use, which it is not told of; a list."""
    folders = []
    monkeypatch.setattr(option, "cache_programs", lambda folder: folders.append(folder))
    return folders


def test_commands_keep_programs_unless_jax_is_told_of_a_folder(asked, inputs, monkeypatch):
    run("info", inputs / "tiny")
    assert asked == []  # the tests have one
    run("--compilation-cache", "here", "info", inputs / "tiny")
    monkeypatch.setattr(option, "told_folder", lambda: None)
    run("info", inputs / "tiny")
    assert asked == [Path("here"), None]
    monkeypatch.setattr(processes, "several", lambda: True)  # each host may have another cache folder
    context = typer.Context(PROGRAM)
    option.keep_programs(context, None, off=False)
    option.keep_programs(context, Path("shared"), off=False)
    assert asked[2:] == [Path("shared")]


def test_programs_are_not_kept(inputs, here):
    try:
        run("--no-compilation-cache", "info", inputs / "tiny")
        assert not jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def test_both_at_once(asked, capsys):
    assert cli.main(["--no-compilation-cache", "--compilation-cache", "x", "info", "m"]) == 1
    assert "--compilation-cache and --no-compilation-cache contradict each other" in capsys.readouterr().err
    assert asked == []


def test_a_folder_of_no_use_is_said_and_the_command_goes_on(inputs, here, capsys):
    Path("file").touch()
    run("--compilation-cache", "file", "info", inputs / "tiny")
    out = capsys.readouterr().out
    assert out.startswith("All programs are compiled anew: Compiled programs cannot be kept in ")
    assert "kind  float" in out
    assert jax.config.jax_compilation_cache_dir != str(here / "file")  # type: ignore[attr-defined]


def test_failures_of_the_cache_are_one_sentence(tmp_path, capsys):
    names = ["jit_f-1-cache", "jit_f-1-atime", "jit_g-1-cache", "jit_h-1-cache"]
    for name in names:
        (tmp_path / name).touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        with option._failures_in_a_sentence(tmp_path):
            warnings.warn(READING.format("jit_f", "error: Error -5\nwhile decompressing"), stacklevel=1)
            warnings.warn(READING.format("jit_g", "PermissionError: denied"), stacklevel=1)
            warnings.warn(READING.replace("reading", "writing").format("jit_h", "OSError: full"), stacklevel=1)
            warnings.warn("Cache value for key 'jit_h' of size 2 bytes exceeds the maximum cache size of 1 bytes", stacklevel=1)
            with pytest.raises(UserWarning, match="other"):
                warnings.warn("other", stacklevel=1)
    assert not caught
    out = capsys.readouterr().out
    assert out.startswith(f"Some programs in {tmp_path} could not be read or written (error: Error -5")
    assert out.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names) - {"jit_f-1-cache", "jit_f-1-atime"})


#: Runs commands one after another in a fresh process, and prints what JAX compiled for each, or took from its folder.
STARTS = """
import collections, json, sys
import jax
from ptq4dit_jax import cli
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
found = []
for command in json.loads(sys.argv[1]):
    counts.clear()
    assert cli.main(command) == 0
    found.append({name: counts[name] for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")})
print(json.dumps(found))
"""


def started(folder, *commands):
    """What commands, in one fresh process that is told of no cache, compiled or found; one device."""
    untold = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in untold}
    environment |= {"XDG_CACHE_HOME": str(folder / "caches"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    arguments = [[str(argument) for argument in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", STARTS, json.dumps(arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_second_start_compiles_nothing(inputs, tmp_path):
    """With an exported sampler and without; both, and both starts, give the same bytes."""
    model, how = inputs / "tiny", ["--labels", "0-2", "--seed", "3"]
    sampled = lambda out: ["sample", model, *how, "--steps", "3", "--batch-size", "3", "--out", out]
    exported = lambda out: ["sample", model, *how, "--program", "program", "--out", out]
    export = ["compile", model, "--steps", "3", "--batch-size", "3", "--out", "program"]
    first = started(tmp_path, sampled("1.npz"), export, exported("2.npz"))
    kept = {path.name for path in tmp_path.glob("caches/ptq4dit_jax/programs/*-cache")}
    assert all(start["cache_hits"] < start["compile_requests_use_cache"] for start in first[:2])
    assert len(kept) == sum(start["cache_misses"] for start in first)
    second = started(tmp_path, sampled("3.npz"), exported("4.npz"))
    for start in second:
        assert start["compile_requests_use_cache"] == start["cache_hits"] > 0
        assert start["cache_misses"] == 0
    assert {path.name for path in tmp_path.glob("caches/ptq4dit_jax/programs/*-cache")} == kept
    images = [np.load(tmp_path / f"{number}.npz")["arr_0"] for number in range(1, 5)]
    assert images[0].std() > 0
    assert all(image.tobytes() == images[0].tobytes() for image in images[1:])
