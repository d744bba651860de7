"""Commands that are sent SIGINT or SIGTERM, as processes of their own: status, sentence, and what is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fast_compilation
import helpers
import pytest
from cli_helpers import ROOT, figures

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints

pytestmark = pytest.mark.usefixtures("heeded_signals")
#: A process has this long to end. On an idle machine it takes less than two seconds (benchmarks/interrupt_campaign.py).
PATIENCE = 60
#: Long enough for any moment below, were they not interrupted.
COMMANDS = {
    "quantize": "quantize tiny --out out --calib-rows 2000 --json figures.json",
    "sample": "sample tiny --labels 0-4 --repeat 20000 --batch-size 256 --steps 1000 --out out.npz",
    "evaluate": "evaluate tiny --against tiny --repeat 2000 --batch-size 256 --steps 1000 --out out",
}
SMALL = "--calib-steps 2 --calib-rows 4 --steps 4 --weight-bits 8 --balance csb+ssc"
#: Compiles fastest.
NEAREST = f"{SMALL} --rounding nearest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.save(helpers.tiny_model(in_channels=1, input_size=8), tmp_path / "tiny")
    return tmp_path


def start(folder: Path, *program: str) -> subprocess.Popen[str]:
    environment = os.environ | fast_compilation.environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Sends the signal; the sentence that the process ends with, but for its first word."""
    process.send_signal(number)
    try:
        out, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 128 + number, error
    word = "Interrupted" if number == signal.SIGINT else "Terminated"
    match = re.fullmatch(rf"{word}: ([^\n]+)\.\n", error)
    assert match, error
    assert "Traceback" not in out
    assert "Aborted" not in out
    return match[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_command_at_any_moment(command: str, seconds: float, number: signal.Signals, folder: Path) -> None:
    """So long after its first line: while it compiles, while it runs."""
    with start(folder, "-m", "ptq4dit_start", *COMMANDS[command].split()) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(seconds)
        assert ended(process, number) == "nothing was written, and the same command starts over"
    assert [path.name for path in folder.iterdir()] == ["tiny"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_a_signal_while_the_library_is_imported(seconds: float, number: signal.Signals, folder: Path) -> None:
    lines = "import ptq4dit_start as s; s.take_signals(); print(flush=True); s.entry()"
    with start(folder, "-c", lines, "info", "tiny") as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        assert ended(process, number) == "nothing was written, and the same command starts over"


#: The command with a save that stops before its end, when it has staged all of the arrays.
STOPPED = """
import sys, time
from ptq4dit_jax import cli, ending
from ptq4dit_jax.checkpoints import orbax_arrays
save = orbax_arrays.save
def stopped(*arguments, **more):
    save(*arguments, **more)
    print("staged", flush=True)
    time.sleep(600)
orbax_arrays.save = stopped
ending.run(lambda: sys.exit(cli.main()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_while_a_model_is_written(overwrite: bool, number: signal.Signals, folder: Path) -> None:
    if overwrite:
        checkpoints.save(helpers.tiny_model(seed=1, in_channels=1, input_size=8), folder / "out")
    old = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = f"quantize tiny --out out {NEAREST}{' --overwrite' if overwrite else ''}".split()
    with start(folder, "-c", STOPPED, *words) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "staged\n":
            assert process.poll() is None
        assert any(path.name.endswith(".tmp") for path in folder.iterdir())
        assert ended(process, number) == "nothing was written, and the same command starts over"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == old
    assert not any(path.name.endswith(".tmp") for path in folder.iterdir())


@pytest.mark.slow
def test_an_interrupted_reconstruction_goes_on(folder: Path) -> None:
    command = f"quantize tiny --out out {SMALL} --reconstruct --iterations 200".split()
    with start(folder, "-m", "ptq4dit_start", *command) as process:
        journal = folder / ".out.reconstruction"
        while not (journal / "part-000.npz").exists():
            assert process.poll() is None
            time.sleep(0.05)
        said = ended(process, signal.SIGINT)
    assert said == (
        f"no model was written, but the reconstruction so far is in {journal}, and the same command goes on from there"
    )
    first = (journal / "part-000.npz").stat().st_mtime_ns
    with start(folder, "-m", "ptq4dit_start", *command, "--json", "figures.json") as process:
        while journal.exists() and process.poll() is None:
            if (journal / "part-000.npz").exists():
                assert (journal / "part-000.npz").stat().st_mtime_ns == first
            time.sleep(0.05)
        assert process.wait(PATIENCE) == 0
    assert isinstance(ptq.load(folder / "out"), ptq.QuantizedDiT)
    assert json.loads((folder / "figures.json").read_text())["quality"]["steps"] == 2


@pytest.mark.slow
def test_the_output_of_a_command_may_be_closed(folder: Path) -> None:
    """What ``head`` does; the model is not written, as the command ends at its first line."""
    with start(folder, "-m", "ptq4dit_start", *f"quantize tiny --out out {SMALL}".split()) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 141
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_a_poor_model_is_refused_unless_it_is_to_be_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ptq4dit_jax import cli

    poor = f"{NEAREST} --weight-bits 2 --act-bits 2 --policy uniform"
    words = f"quantize {folder / 'tiny'} --out {folder / 'out'} {poor}".split()
    assert cli.main(words) == 1
    assert re.fullmatch(
        r"Error: The quantized model's predicted noise has [^\n]+ --keep-poor [^\n]+\.\n", capsys.readouterr().err
    )
    assert not (folder / "out").exists()
    assert cli.main([*words, "--keep-poor", "--json", str(folder / "figures.json")]) == 0
    captured = capsys.readouterr()
    assert re.search(r"Quality: SQNR -?\d+\.\d dB, worst in \S+", captured.out)
    assert "Warning: below 15 dB" in captured.out
    assert captured.err == ""
    assert figures(folder / "figures.json")["quality"]["sqnr_mean_db"] < 5
