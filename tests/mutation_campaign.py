"""Changes files of every format at random and reads them: what comes of it, how long it takes, how much memory.

    python tests/mutation_campaign.py --count 10000 --seed 0

Each file is opened and every array of it read, in a process that is watched. Counted are tracebacks (anything but one printable
sentence of a ``Ptq4ditError``), processes that ended, reads of more than five seconds, reads that took more than 1 GB, calls
that a file wanted and got, and, where a format has checksums, changed arrays that were read without a word. Any of these makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "checkpoints/foreign"))

import foreign_files
import helpers
import numpy as np
import orbax.checkpoint as ocp
import yaml
from flax import serialization
from mutations import mutated, mutated_bytes

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints.foreign import import_checkpoint, open_tensors
from ptq4dit_jax.documents import read_json, read_yaml
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.npz_file import read_npz
from ptq4dit_jax.reconstruction.resume import Journal

#: A read of more seconds, or of more bytes, is a fault; after so many seconds it is given up.
MOST_SECONDS, MOST_BYTES, GIVEN_UP = 5.0, 1e9, 60.0
FAULTS = ("traceback", "died", "slow", "large", "executed", "changed in silence")

Arrays = Mapping[str, np.ndarray]
_RUN = {"weights": "abc", "key": [0, 0]}


class Format(NamedTuple):
    """How a file or folder is made at a path, changed there, and read; None for a format whose reader gives no arrays.

    ``checked`` says that the format has checksums, so that what is read must be what was written.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Arrays | None]
    checked: bool = False
    structured: bool = False


class Caller:
    """Wants a file to be made when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def _tree(mark: Path | None = None) -> dict[str, Any]:
    return {
        "params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(3, np.int64)}},
        "step": 3,
        "args": {"lr": 1e-4, "names": ["x", "y"]},
    } | ({} if mark is None else {"call": Caller(mark)})


_FLAT = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(4, np.float32)}
_ROWS: dict[str, Any] = {"x": np.zeros((4, 8, 8, 4), np.float32), "t": np.arange(4), "y": np.zeros(4, np.int32)}
_SETTINGS = {"model": {"hidden_size": 24, "depth": 2}, "names": ["a", "b"], "beta": [1e-4, 0.02], "learn_sigma": True}


def _tensors(path: Path) -> Arrays:
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def _model(path: Path) -> Arrays:
    return dict(checkpoints.store.read(path)[0])


def _journal(path: Path) -> None:
    with Journal(path, _RUN) as journal:
        journal.finish(0, dict(_FLAT))
        journal.save_current(1, dict(_FLAT), 7)


def _of_journal(path: Path) -> Arrays:
    with Journal(path, _RUN) as journal:
        parts = {"done": journal.finished(0, dict(_FLAT)), "current": journal.current(1, dict(_FLAT))}
    return {f"{name}/{key}": array for name, part in parts.items() for key, array in (part or {}).items()}


def _nothing(read: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (read(path), None)[1]


def formats(mark: Path) -> dict[str, Format]:
    """By name; ``mark`` is what the pickles want to make."""
    pickled = lambda protocol, tree: lambda path: path.write_bytes(pickle.dumps(tree, protocol))
    model = helpers.tiny_model(in_channels=1)
    diffusers = lambda path: shutil.copytree(foreign_files.DIFFUSERS, path)
    return {
        **{f"pickle {protocol}": Format(pickled(protocol, _tree()), _tensors) for protocol in (2, 4, 5)},
        "pickle that calls": Format(pickled(4, _tree(mark)), _tensors),
        "torch": Format(lambda path: foreign_files.write_torch(path, _FLAT), _tensors, checked=True),
        "torch that calls": Format(
            lambda path: foreign_files.write_torch(path, {}, table=pickle.dumps(_tree(mark), 2)), _tensors, checked=True
        ),
        "safetensors": Format(lambda path: foreign_files.save_safetensors(path, _FLAT), _tensors),
        "msgpack": Format(
            lambda path: path.write_bytes(serialization.msgpack_serialize({"params": dict(_FLAT), "step": 3})), _tensors
        ),
        "orbax": Format(lambda path: ocp.PyTreeCheckpointer().save(path, {"params": dict(_FLAT)}), _tensors),
        "model folder": Format(lambda path: checkpoints.save(model, path), _model, checked=True),
        "config.json of a model": Format(lambda path: checkpoints.save(model, path), _model, checked=True, structured=True),
        "diffusers folder": Format(diffusers, _nothing(import_checkpoint)),
        "config.json of diffusers": Format(diffusers, _nothing(import_checkpoint), structured=True),
        "rows": Format(lambda path: np.savez(path.open("wb"), **_ROWS), lambda path: read_npz(path, _ROWS)[0], checked=True),
        "packed rows": Format(
            lambda path: np.savez_compressed(path.open("wb"), **_ROWS), lambda path: read_npz(path, _ROWS)[0], checked=True
        ),
        "journal": Format(_journal, _of_journal, checked=True),
        "json": Format(lambda path: path.write_text(json.dumps(_SETTINGS)), _nothing(lambda path: read_json(path, "x"))),
        "yaml": Format(lambda path: path.write_text(yaml.safe_dump(_SETTINGS)), _nothing(lambda path: read_yaml(path, "x"))),
    }


class Outcome(NamedTuple):
    """One file: its format and number, how it ended, and what is wrong with that; seconds and bytes that it took."""

    format: str
    number: int
    ended: str
    seconds: float
    grown: int
    said: str = ""


def change(path: Path, rng: np.random.Generator, structured: bool) -> None:
    """Changes one file at or below ``path``; if ``structured``, an entry of one of its JSON files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    if structured:
        files = [file for file in files if file.suffix == ".json"]
    file = files[rng.integers(len(files))]
    if structured:
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))


def _reset_peak() -> int:
    """Lets the system measure the most memory anew; the bytes that are taken now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _same(found: Arrays, expected: Arrays) -> bool:
    """Compares bytes, so that NaN is itself."""
    describe = lambda arrays: {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}
    return describe(found) == describe(expected)


def judge(format: Format, path: Path, expected: Arrays | None) -> tuple[str, str]:
    """How a read ends, and what it says."""
    try:
        found = format.read(path)
    except Ptq4ditError as error:
        said = str(error)
        return ("refused", said) if said.isprintable() and said.endswith(".") else ("traceback", said)
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    if format.checked and not _same(found or {}, expected or {}):
        return "changed in silence", ""
    return "read", ""


def work(pipe: Connection, tasks: list[tuple[str, int]], seed: int) -> None:
    """Sends the :class:`Outcome` of each task, and reads every unchanged file before the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mark, path = folder / "mark", folder / "x"
        known = formats(mark)
        expected = {}
        for place, (name, format) in enumerate(known.items()):
            original = folder / f"original-{place}"
            format.make(original)
            expected[name] = None if name.endswith("that calls") else format.read(original)
        pipe.send(None)
        for name, number in tasks:
            place, format = list(known).index(name), known[name]
            original = folder / f"original-{place}"
            _copy(original, path)
            change(path, np.random.default_rng([seed, place, number]), format.structured)
            before, started = _reset_peak(), time.perf_counter()
            ended, said = judge(format, path, expected[name])
            seconds, grown = time.perf_counter() - started, _peak() - before
            if mark.exists():
                mark.unlink()
                ended = "executed"
            elif ended in ("read", "refused") and (seconds > MOST_SECONDS or grown > MOST_BYTES):
                ended = "slow" if seconds > MOST_SECONDS else "large"
            pipe.send(Outcome(name, number, ended, seconds, grown, said))


def _copy(original: Path, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    if original.is_dir():
        shutil.copytree(original, path)
    else:
        shutil.copy(original, path)


def campaign(count: int, seed: int, told: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """``count`` changed files, equally many of each format, read in one process, or in another one where that ends."""
    names = list(formats(Path()))
    tasks = [(names[index % len(names)], index // len(names)) for index in range(count)]
    found: list[Outcome] = []
    spawn = multiprocessing.get_context("spawn")
    while len(found) < count:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(theirs, tasks[len(found) :], seed))
        process.start()
        theirs.close()
        try:
            if not ours.poll(10 * GIVEN_UP):
                raise RuntimeError("the files could not be made")
            ours.recv()
            while len(found) < count:
                name, number = tasks[len(found)]
                try:
                    late = not ours.poll(GIVEN_UP)
                    outcome = Outcome(name, number, "slow", GIVEN_UP, 0, "given up") if late else ours.recv()
                except EOFError:
                    process.join()
                    late, outcome = True, Outcome(name, number, "died", 0.0, 0, f"exit code {process.exitcode}")
                found.append(outcome)
                told(outcome)
                if late:
                    break
        finally:
            process.kill()
            process.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="changed files in all (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default 0)")
    options = parser.parse_args()
    started, done = time.perf_counter(), Counter[str]()

    def tell(outcome: Outcome) -> None:
        done[outcome.ended] += 1
        if outcome.ended in FAULTS:
            print(f"{outcome.format} {outcome.number}: {outcome.ended} ({outcome.seconds:.1f} s, {outcome.grown / 1e6:.0f} MB)")
            print(f"  {outcome.said}", flush=True)
        if done.total() % 500 == 0:
            print(f"{done.total()} of {options.count}, {time.perf_counter() - started:.0f} s: {dict(done)}", flush=True)

    outcomes = campaign(options.count, options.seed, tell)
    print(f"{'format':26}{'files':>7}{'read':>7}{'refused':>9}{'faults':>8}{'slowest (s)':>13}{'largest (MB)':>14}")
    for name in dict.fromkeys(outcome.format for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.format == name]
        ended = Counter(outcome.ended for outcome in some)
        bad = sum(ended[fault] for fault in FAULTS)
        slowest, largest = max(outcome.seconds for outcome in some), max(outcome.grown for outcome in some) / 1e6
        print(f"{name:26}{len(some):7}{ended['read']:7}{ended['refused']:9}{bad:8}{slowest:13.2f}{largest:14.0f}")
    faults = {fault: sum(outcome.ended == fault for outcome in outcomes) for fault in FAULTS}
    print(f"{len(outcomes)} files, seed {options.seed}: " + ", ".join(f"{n} {fault}" for fault, n in faults.items()))
    return int(any(faults.values()))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
