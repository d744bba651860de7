"""How programs end: signals whatever the main thread is doing, outputs that nobody reads, and too little memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import pytest

from ptq4dit_jax import ending, unfinished
from ptq4dit_jax.errors import Ptq4ditError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("heeded_signals")
#: Of a process that is expected to end at once.
PATIENCE = 120

#: A main thread that no signal wakes: it locks a mutex twice, in C.
STUCK = """
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(256)
libc.pthread_mutex_init(mutex, None)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""
#: One that handles the signal and then takes all the time in the world to clean up.
SLOW = """
try:
    print("ready", flush=True)
    time.sleep(600)
finally:
    print("cleaning", flush=True)
    time.sleep(600)
"""


def program(body: str, *, run: str = "ending.run(main)") -> list[str]:
    lines = "import ctypes, sys, time\nfrom pathlib import Path\nfrom ptq4dit_jax import ending, unfinished\n"
    lines += "from ptq4dit_jax.staging import staging\ndef main():\n" + textwrap.indent(body.strip(), "    ") + "\n" + run
    return [sys.executable, "-c", lines]


def start(arguments: list[str], stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def signalled(body: str, *numbers: signal.Signals, after: str = "ready", **more: Any) -> tuple[int, str]:
    """Exit status and stderr of a program that is sent signals, each once it has said the next word."""
    with start(program(body), **more) as process:
        assert process.stdout is not None
        try:
            for number, word in zip(numbers, (after, "cleaning"), strict=False):
                while process.stdout.readline().strip() != word:
                    assert process.poll() is None
                process.send_signal(number)
            return process.wait(PATIENCE), process.stderr.read() if process.stderr else ""
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_main_thread_that_is_stuck_in_c(number: signal.Signals, tmp_path: Path) -> None:
    target = tmp_path / "model"
    lines = textwrap.indent(f"staged.mkdir()\n(staged / 'file').write_text('half')\n{STUCK.strip()}", "    ")
    status, error = signalled(
        f"unfinished.expect({str(target)!r})\nwith staging(Path({str(target)!r})) as staged:\n{lines}", number
    )
    word = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated", signal.SIGHUP: "Hung up"}[number]
    assert status == 128 + number
    assert error == f"{word}: nothing was written, and the same command starts over.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals, tmp_path: Path) -> None:
    """Python drops what is raised there; the program has its time to clean up all the same."""
    body = f"""
class Slow:
    def __del__(self):
        print("ready", flush=True)
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            pass
try:
    slow = Slow()
    del slow
    time.sleep(600)
finally:
    Path({str(tmp_path)!r}, "cleaned").touch()
"""
    status, error = signalled(body, number)
    assert status == 128 + number
    assert re.fullmatch(r"\w+: nothing was written, and the same command starts over\.\n", error)
    assert (tmp_path / "cleaned").exists()


def test_a_signal_after_the_end_changes_nothing() -> None:
    body = "import atexit\natexit.register(lambda: (print('ready', flush=True), time.sleep(0.5)))"
    assert signalled(body, signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_cleaning_up_ends_after_its_time_or_at_a_second_signal(numbers: tuple[signal.Signals, ...]) -> None:
    status, error = signalled(SLOW, *numbers)
    assert status == 128 + numbers[0]
    assert error.count("\n") == 1


def test_what_a_program_cleans_up_is_cleaned_up_and_what_it_wrote_is_named(tmp_path: Path) -> None:
    done, owed = tmp_path / "done", tmp_path / "owed"
    body = f"""
unfinished.expect({str(done)!r}, {str(owed)!r})
Path({str(done)!r}).write_text("whole")
try:
    print("ready", flush=True)
    time.sleep(600)
finally:
    Path({str(tmp_path)!r}, "cleaned").touch()
"""
    status, error = signalled(body, signal.SIGTERM)
    assert status == 143
    assert error == f"Terminated: {done} was written, {owed} was not, and the same command with --overwrite starts over.\n"
    assert (tmp_path / "cleaned").exists()


def test_an_ignored_signal_stays_ignored() -> None:
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    with start(ignoring + program("print('ready', flush=True)\ntime.sleep(0.5)\nsys.exit(7)")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 7


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('words')", 1)])
def test_a_program_that_ends_by_itself_keeps_its_status(body: str, status: int) -> None:
    with start(program(body)) as process:
        assert process.wait(PATIENCE) == status


PRINTERS = ("while True: print('line')", "while True: print('line', flush=True)", "print('line')")


@pytest.mark.parametrize("body", PRINTERS)
def test_a_closed_output_ends_quietly(body: str) -> None:
    reader, writer = os.pipe()
    with start(program(body), stdout=writer) as process:
        os.close(writer)
        os.close(reader)
        assert process.wait(PATIENCE) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("body", PRINTERS)
def test_a_full_output_is_one_sentence(body: str) -> None:
    with open("/dev/full", "w") as full, start(program(body), stdout=full) as process:
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            "Error: Cannot write to the standard output (No space left on device); what was printed is incomplete.\n"
        )


def raising(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    "error",
    [MemoryError(), MemoryError("x" * 999), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8")],
)
def test_low_memory_is_called_low_memory(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.status_of(raising(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: There is too little free memory; take a smaller batch (--batch-size")
    assert said.count("\n") == 1


def test_mistakes_are_sentences_and_faults_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.status_of(raising(Ptq4ditError("Seven is too many."))) == 1
    assert capsys.readouterr().err == "Error: Seven is too many.\n"
    for fault in (RuntimeError("a bug"), jax.errors.JaxRuntimeError("INTERNAL: a bug")):
        with pytest.raises(type(fault)):
            ending.status_of(raising(fault))


def test_what_stands_depends_on_what_is_there(tmp_path: Path) -> None:
    old, model, journal = (tmp_path / name for name in ("old", "model", "journal"))
    old.write_text("old")
    with unfinished.work() as work:
        unfinished.expect(old, model)
        unfinished.expect_journal(journal, fresh=False)
        assert work.standing() == "nothing was written, and the same command starts over"
        journal.mkdir()
        assert work.standing().endswith(f"is in {journal}, and the same command goes on from there")
        unfinished.expect(old, model)
        unfinished.expect_journal(journal, fresh=True)
        assert "the same command without --fresh goes on" in work.standing()
        old.unlink()
        old.write_text("new")
        model.mkdir()
        assert work.standing() == f"{old} and {model} were written, and nothing is left to do"


def test_without_a_program_nothing_is_remembered(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    unfinished.expect(tmp_path)
    with unfinished.staged(tmp_path / "a"), unfinished.work() as work:
        assert (work.outputs, work.staged) == ({}, set())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
