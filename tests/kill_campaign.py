"""Kills commands at random moments, looks at what they leave, and runs them again.

    python tests/kill_campaign.py --count 100 --seed 0 --jobs 2

Each run gives a command a folder of its own and kills its process (SIGKILL), by turns after a random part of the time that it
takes and at a random one of the changes that it makes to the disk. Then the output must be whole or absent, and with
--overwrite the old one or the new one. The same command is run to its end; then there must be what an undisturbed run leaves,
and nothing else. Models are compared by the hash of their arrays, samples and pictures by their bytes. A bad run makes the exit
status 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import helpers
import numpy as np

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.checkpoints.foreign.exporter import export_meta
from ptq4dit_jax.hashing import content_hash

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--calib-steps 2 --calib-rows 4 --steps 4 --keep-poor"
#: Runs a program, here or with its own process killed at one of its changes below the working folder, counted from 0; tells a
#: file how many there were.
PROGRAM = """
import atexit, os, runpy, signal, sys
from pathlib import Path
at, told, here, done = int(sys.argv[1]), sys.argv[2], os.getcwd(), 0
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def hook(event, arguments):
    global done
    if event not in CHANGES and (event != "open" or not (arguments[2] or 0) & WRITES):
        return
    if str(arguments[0]).startswith(here):
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
sys.addaudithook(hook)
atexit.register(lambda: Path(told).write_text(str(done)))
del sys.argv[1:3]
if sys.argv[1] == "save":
    sys.path.insert(0, sys.argv[2])
    import helpers
    from ptq4dit_jax import checkpoints
    checkpoints.save(helpers.tiny_model(seed=3, in_channels=1), "out", overwrite="--overwrite" in sys.argv)
else:
    runpy.run_module("ptq4dit_start", run_name="__main__")
"""


class Command(NamedTuple):
    """What is run, and the name of its output."""

    words: str
    output: str


COMMANDS = {
    "quantize": Command(f"quantize tiny --out out {SMALL}", "out"),
    "quantize --reconstruct": Command(f"quantize tiny --out out {SMALL} --reconstruct --iterations 60", "out"),
    "save": Command(f"save {Path(__file__).parent}", "out"),
    "convert to meta": Command("convert tiny out.safetensors --to meta", "out.safetensors"),
    "convert": Command("convert tiny.safetensors out --num-heads 2", "out"),
    "sample to .npz": Command("sample tiny --labels 0-4 --repeat 8 --batch-size 8 --steps 20 --out out.npz", "out.npz"),
    "sample to .png": Command("sample tiny --labels 0-4 --steps 20 --out out.png", "out.png"),
    "evaluate": Command("evaluate tiny --against tiny --steps 4 --out out", "out"),
}


class Reference(NamedTuple):
    """An undisturbed run: its output's digest, the names that it leaves, seconds, and changes to the disk."""

    digest: str
    names: list[str]
    seconds: float
    changes: int


class Run(NamedTuple):
    """A killed command: where it was killed, what was there afterwards, and what was wrong."""

    command: str
    where: str
    found: str
    faults: tuple[str, ...]


def digest(path: Path) -> str | None:
    """What tells one whole output from another; None for none, and an error for what is not whole."""
    if not path.exists():
        return None
    if (path / "report.json").exists():
        return " ".join(sorted(file.name for file in path.iterdir()))
    if path.is_dir():
        return content_hash(store.read(path)[0])
    if path.suffix == ".npz":
        with np.load(path) as file:
            return content_hash(dict(file))
    return content_hash({"bytes": np.frombuffer(path.read_bytes(), np.uint8)})


class Campaign:
    """Folders to start from, and what undisturbed commands make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = folder / "start"
        self.start.mkdir()
        model = helpers.tiny_model(in_channels=1)
        checkpoints.save(model, self.start / "tiny")
        export_meta(model, self.start / "tiny.safetensors")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.references: dict[tuple[str, bool], Reference] = {}

    def prepare(self, name: str, overwrite: bool, folder: Path) -> None:
        """Makes the folder that a run begins with; with ``overwrite`` an old output is there."""
        shutil.copytree(self.start, folder)
        old = folder / COMMANDS[name].output
        if not overwrite:
            return
        if name == "evaluate":
            old.mkdir()
            (old / "report.json").write_text("{}")
            (old / "old.md").write_text("old")
        elif old.suffix == ".npz":
            np.savez(old, arr_0=np.zeros(3, np.uint8))
        elif old.suffix:
            old.write_bytes(b"old")
        else:
            checkpoints.save(helpers.tiny_model(seed=9, in_channels=1), old)

    def call(self, name: str, overwrite: bool, folder: Path, at: int = -1, after: float | None = None) -> tuple[int, str, int]:
        """The exit status, stderr and number of changes of a run that is killed at a change, or after so many seconds."""
        told = folder.with_suffix(".changes")
        words = COMMANDS[name].words.split() + (["--overwrite"] if overwrite else [])
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(at), str(told), *words],
            cwd=folder,
            env=self.environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                error = process.communicate(timeout=after)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                error = process.communicate()[1]
        return process.returncode, error, int(told.read_text()) if told.exists() else 0

    def learn(self, name: str, overwrite: bool) -> None:
        """Runs a command undisturbed: once to fill the cache of compiled programs, once to watch it."""
        for attempt in range(2):
            folder = self.folder / f"reference-{name}-{overwrite}-{attempt}".replace(" ", "_")
            self.prepare(name, overwrite, folder)
            started = time.perf_counter()
            status, error, changes = self.call(name, overwrite, folder)
            if status:
                raise RuntimeError(f"{name}: {error}")
        seconds, found = time.perf_counter() - started, digest(folder / COMMANDS[name].output)
        assert found is not None
        self.references[name, overwrite] = Reference(found, sorted(os.listdir(folder)), seconds, changes)

    def kill(self, number: int, name: str, overwrite: bool, seed: int) -> Run:
        """One run, which is killed and then run again."""
        rng, folder = random.Random(f"{seed} {number}"), self.folder / f"run-{number}"
        reference, output = self.references[name, overwrite], folder / COMMANDS[name].output
        self.prepare(name, overwrite, folder)
        old, faults = digest(output), []
        if number % 2:
            after = rng.uniform(0, reference.seconds)
            where = f"after {after:.2f} of {reference.seconds:.2f} s"
            status, error, _ = self.call(name, overwrite, folder, after=after)
        else:
            at = rng.randrange(max(reference.changes, 1))
            where = f"at change {at} of {reference.changes}"
            status, error, _ = self.call(name, overwrite, folder, at=at)
        if status not in (0, -signal.SIGKILL):
            faults.append(f"status {status}: {error[-300:]}")
        found = "the old one" if overwrite else "nothing"
        try:
            left = digest(output)
            if left == reference.digest:
                found = "the new one"
            elif left != old:
                faults.append("another output")
        except Exception as broken:
            faults.append(f"a broken output: {broken}")
        status, error, _ = self.call(name, overwrite or output.exists(), folder)
        if status:
            faults.append(f"status {status} when run again: {error[-300:]}")
        elif digest(output) != reference.digest:
            faults.append("another output when run again")
        if more := sorted(set(os.listdir(folder)) ^ set(reference.names)):
            faults.append(f"left behind or missing: {', '.join(more)}")
        shutil.rmtree(folder)
        return Run(name + (" --overwrite" if overwrite else ""), where, found, tuple(faults))


def campaign(count: int, seed: int, jobs: int, names: Sequence[str] = tuple(COMMANDS)) -> list[Run]:
    """``count`` runs of the commands in turn, with and without --overwrite, ``jobs`` at once; a line for each."""
    kinds = [(name, overwrite) for name in names for overwrite in (False, True)][:count]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        whole = Campaign(Path(folder))
        list(pool.map(lambda kind: whole.learn(*kind), kinds))
        runs = []
        kind = lambda i: kinds[(i // 2) % len(kinds)]
        for run in pool.map(lambda i: whole.kill(i, kind(i)[0], kind(i)[1], seed), range(count)):
            runs.append(run)
            print(f"{run.command:34}{run.where:28}{run.found:14}{'; '.join(run.faults) or '-'}", flush=True)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="killed runs in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="commands at once (default 2)")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="a command; may be repeated")
    options = parser.parse_args()
    runs = campaign(options.count, options.seed, options.jobs, options.only or tuple(COMMANDS))
    bad = sum(bool(run.faults) for run in runs)
    print(f"{len(runs)} runs killed, seed {options.seed}: {bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
