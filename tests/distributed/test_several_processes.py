"""Two processes with four devices each, which is how a pod is driven, against one process with eight."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import fast_compilation
import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("run_of_several.py")
#: Seconds that a pair may take before the test gives up, on a busy machine.
PATIENCE = 500
#: What JAX says in the processes that it ends because another one did.
LOST = ("Another process of this run has ended", "This most likely indicates that another task died")


def started(command: list[Any], devices: int) -> subprocess.Popen[str]:
    """Starts a process with so many virtual devices."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {
        **os.environ,
        **fast_compilation.environment(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(*command: Any) -> list[subprocess.Popen[str]]:
    """Starts two processes of :data:`PROGRAM`, with four devices each."""
    port = free_port()
    return [started([PROGRAM, *command, port, 2, index], 4) for index in range(2)]


def commands(*arguments: Any, others: tuple[Any, ...] | None = None) -> list[subprocess.Popen[str]]:
    """Starts a command as two processes; the second may be given ``others``."""
    shared = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"]
    each = [arguments, arguments if others is None else others]
    return [started(["-m", "ptq4dit_jax.cli", *shared, index, *each[index]], 1) for index in range(2)]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Waits for processes; returns the status, output and errors of each."""
    end = time.monotonic() + PATIENCE
    try:
        texts = [process.communicate(timeout=max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def succeeded(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for processes, none of which may fail, and returns what they print."""
    found = ended(processes)
    assert [status for status, _, _ in found] == [0] * len(found), "\n".join(errors[-3000:] for *_, errors in found)
    return [output for _, output, _ in found]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], prefix: str = "") -> None:
    names = [name for name in ours if name.startswith(prefix)]
    assert names
    for name in names:
        a, b = ours[name], theirs[name]
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all runs write, and the float model that the two processes saved."""
    return tmp_path_factory.mktemp("distributed")


class Two(NamedTuple):
    """What each of two processes found; how both ended when the second was killed, and the seconds in between."""

    found: list[dict[str, np.ndarray]]
    ends: list[tuple[int, str, str]]
    seconds: float


@pytest.fixture(scope="module")
def both(folder: Path) -> Two:
    processes = pair("values", folder)
    processes[1].wait(timeout=PATIENCE)
    before = time.monotonic()
    processes[0].wait(timeout=PATIENCE)
    seconds, ends = time.monotonic() - before, ended(processes)
    paths = [folder / f"values-2-{index}.npz" for index in range(2)]
    assert all(path.exists() for path in paths), "\n".join(errors[-3000:] for *_, errors in ends)
    return Two(list(map(arrays, paths)), ends, seconds)


@pytest.fixture(scope="module")
def two(both: Two) -> list[dict[str, np.ndarray]]:
    """What each of two processes found."""
    return both.found


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, np.ndarray]:
    """The same of a single process."""
    (folder / "one").mkdir()
    succeeded([started([PROGRAM, "values", folder / "one"], 8)])
    return arrays(folder / "one/values-1-0.npz")


def test_both_processes_have_the_same_values(two: Any) -> None:
    assert set(two[0]) == set(two[1])
    assert_same(two[0], two[1])


@pytest.mark.parametrize(
    "part",
    ["float", "streamed/", "quantized/", "integers", "cut/", "extremes/", "rounded/", "comparison", "loaded/", "of loaded"],
)
def test_they_are_those_of_a_single_process(part: str, two: Any, one: Any) -> None:
    """Samples, codes, all scales and biases, statistics of single rows, and figures: the same bytes."""
    assert_same({name: array for name, array in one.items() if name.startswith(part)}, two[0])


def test_an_exported_sampler_gives_the_same_bytes(two: Any) -> None:
    """Process 0 alone writes it, and both read it."""
    assert_same({"float": two[1]["float by a program"]}, two[0], "float")


def test_the_provenance_is_that_of_a_single_process(two: Any, one: Any) -> None:
    assert json.loads(str(two[1]["provenance"])) == json.loads(str(one["provenance"]))


def test_what_is_saved_once_is_loaded_by_both(two: Any, folder: Path) -> None:
    """Process 1 is given a path where nobody can write."""
    for found in two:
        assert_same(
            {name.replace("loaded/", "quantized/"): a for name, a in found.items() if name.startswith("loaded/")}, found
        )
        assert_same({"integers": found["integers"]}, {"integers": found["of loaded"]})
    assert sorted(entry.name for entry in (folder / "model").iterdir()) == ["arrays", "config.json"]


def test_samples_that_process_0_writes_are_those_of_all(two: Any) -> None:
    for found in two:
        expected = np.clip(127.5 * found["float"] + 128, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(found["streamed/arr_0"], expected)
        np.testing.assert_array_equal(found["streamed/labels"], np.arange(11) % 5)


def test_a_refusal_by_process_0_is_one_of_all(two: Any) -> None:
    for found in two:
        assert str(found["refused/streamed"]).endswith("exists already; choose another path, or ask for it to be overwritten.")
        assert str(found["refused/there"]).endswith("exists already; choose another path, or ask for it to be overwritten.")
        assert "must belong to one process, so a mesh's axis 'model' cannot have size 8 with 4" in str(found["refused/across"])
        assert str(found["refused/label"]).startswith("Label 99 is out of range")


def test_what_a_process_shares_arrives_bit_for_bit(two: Any) -> None:
    for found in two:
        np.testing.assert_array_equal(found["least"], [5, 7])
        assert found["unknown"]
        assert found["shared/0"].tobytes() == np.array([-0.0, np.nan, 1e-42], np.float32).tobytes()
        assert found["shared/1"].dtype == bool
        assert found["shared/1"]
        assert found["shared/2"] == -3
        assert found["shared/3"].shape == (0, 2)


def test_the_death_of_process_1_ends_the_other(both: Two) -> None:
    """Within a minute, with a sentence, and not as a success."""
    (status, _, errors), (killed, _, _) = both.ends
    assert killed == -9
    assert status != 0
    assert both.seconds < 60
    assert any(sentence in errors for sentence in LOST)


def test_a_killed_reconstruction_resumes_in_both(folder: Path, two: Any) -> None:
    """Both go on from process 0's journal, which process 1 cannot read, and end where an uninterrupted run ends."""
    succeeded(pair("resumed", folder))
    found = [arrays(folder / f"resumed-2-{index}.npz") for index in range(2)]
    assert_same(found[0], found[1])
    assert "resume reconstruction 2 units done: 2 of 4, up to embed condition" in found[1]["stages"]
    assert_same(found[0], two[0], "quantized/")


def test_the_commands_from_end_to_end(folder: Path, two: Any) -> None:
    """Quantizes, samples and evaluates. Process 1 is given outputs where nobody can write, and prints nothing."""
    nowhere, given = Path("/proc/nowhere"), ["--steps", "3"]
    quantize = ["--weight-bits", "4", "--rounding", "nearest", "--balance", "csb+ssc", "--range-search", "minmax", *given]
    quantize += ["--calib-steps", "2", "--calib-rows", "44", "--keep-poor"]
    steps = {
        "quantize": ([folder / "float", *quantize, "--out"], "made"),
        "sample": ([folder / "made", "--labels", "0-4", "--repeat", "2", *given, "--out"], "samples.npz"),
        "evaluate": ([folder / "made", "--against", folder / "float", "--repeat", "1", *given, "--out"], "report"),
    }
    for command, (arguments, out) in steps.items():
        first, second = ([command, *arguments, at / out, "--json", at / f"{out}.json"] for at in (folder, nowhere))
        printed = succeeded(commands(*first, others=tuple(second)))
        assert "2 x cpu (cpu) in 2 processes" in printed[0]
        assert "2 processes" not in printed[1]
        assert (folder / f"{out}.json").exists()
    assert (folder / "made/config.json").exists()
    assert arrays(folder / "samples.npz")["arr_0"].shape == (10, 6, 6, 3)
    assert (folder / "report/report.md").exists()
    assert not [
        entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.name.endswith((".lock", ".tmp"))
    ]


def test_the_death_of_process_0_ends_a_command(folder: Path, two: Any) -> None:
    """With a sentence, and not as a success."""
    out = folder / "never.npz"
    processes = commands(
        "sample", folder / "float", "--steps", "1000", "--repeat", "100000", "--batch-size", "64", "--out", out
    )
    assert processes[0].stdout is not None
    assert any("Sampling" in line for line in processes[0].stdout)
    time.sleep(5)
    processes[0].kill()
    before = time.monotonic()
    processes[1].wait(timeout=PATIENCE)
    assert time.monotonic() - before < 60
    status, _, errors = ended(processes)[1]
    assert status not in (0, -9)
    assert any(sentence in errors for sentence in LOST)


def test_a_mistake_is_one_sentence_in_each_process(folder: Path) -> None:
    """Neither waits for the other for long."""
    before = time.monotonic()
    found = ended(commands("sample", folder / "absent", "--out", folder / "none.npz"))
    assert time.monotonic() - before < PATIENCE
    for status, _, errors in found:
        assert status != 0
        assert "There is no model at" in errors or any(sentence in errors for sentence in LOST)
    assert "There is no model at" in found[0][2]
