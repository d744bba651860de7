"""Interrupts every command at random moments, and measures how long its process lives on and what it leaves behind.

python -m benchmarks.interrupt_campaign --count 50 --seed 0

Each run starts a command in a folder of its own, sends it SIGINT or SIGTERM after a random part of the time that it takes (the
start of Python included) and waits. A run is bad if the process lives for more than two seconds, ends with another status than
130 or 143, says anything but one sentence, or leaves staged files. Runs that ended before their signal, or had ended but for
Python's own shutdown (status 0, nothing said, at once), are counted apart.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 2.0
_ROOT = Path(__file__).resolve().parents[1]
_DIGITS = str(_ROOT / "models/digits")
#: Name, arguments, and about how many seconds it runs on two cores; OUT is the run's folder.
COMMANDS: dict[str, tuple[Sequence[str], float]] = {
    "quantize": (("quantize", _DIGITS, "--out", "OUT/model"), 14),
    "quantize --reconstruct": (("quantize", _DIGITS, "--out", "OUT/model", "--reconstruct", "--weight-bits", "4"), 60),
    "sample": (("sample", _DIGITS, "--labels", "0-9", "--repeat", "100", "--out", "OUT/digits.npz"), 14),
    "evaluate": (("evaluate", _DIGITS, "--against", _DIGITS, "--out", "OUT/report"), 25),
    "convert": (("convert", _DIGITS, "OUT/digits.safetensors", "--to", "meta"), 3),
    "info": (("info", _DIGITS), 2.5),
    "demo": (("models.digits.demo", "--out", "OUT/demo"), 40),
}


class Run(NamedTuple):
    """One interrupted command: when it was sent its signal and how long it lived on (seconds), and what was wrong."""

    command: str
    sent: str
    after: float
    lived: float
    finished: bool
    faults: tuple[str, ...]
    left: tuple[str, ...]


def interrupt(command: str, number: signal.Signals, after: float) -> Run:
    """Runs a command and sends it the signal ``after`` so many seconds."""
    arguments, _ = COMMANDS[command]
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("OUT", folder) for word in arguments]
        program = ["-m", *words] if command == "demo" else ["-m", "ptq4dit_start", *words]
        with subprocess.Popen(
            [sys.executable, *program],
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                process.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                sent = time.perf_counter()
                process.send_signal(number)
                error = process.communicate()[1]
                lived = time.perf_counter() - sent
            else:
                return Run(command, number.name, after, 0.0, True, (), ())
        left = tuple(sorted(os.listdir(folder)))
    faults = []
    if process.returncode == 0 and not error and lived <= LIMIT:
        return Run(command, number.name, after, lived, True, (), left)
    if lived > LIMIT:
        faults.append(f"lived for {lived:.1f} s")
    if process.returncode != 128 + number:
        faults.append(f"status {process.returncode}")
    if not re.fullmatch(r"(Interrupted|Terminated): [^\n]+\.\n", error):
        faults.append(f"said {error[-200:]!r}")
    if any(name.endswith(".tmp") for name in left):
        faults.append(f"left {left}")
    return Run(command, number.name, after, lived, False, tuple(faults), left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="runs in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of commands, signals and moments (default 0)")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="a command to interrupt; may be repeated")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:  # as in the background; the commands would inherit it
            signal.signal(number, signal.SIG_DFL)
    rng = random.Random(options.seed)
    names = options.only or list(COMMANDS)
    runs = []
    print(f"{'command':24}{'signal':9}{'after (s)':>10}{'gone in (s)':>13}  left; faults")
    for index in range(options.count):
        name = names[index % len(names)]
        run = interrupt(name, rng.choice([signal.SIGINT, signal.SIGTERM]), rng.uniform(0.05, COMMANDS[name][1]))
        runs.append(run)
        gone = "had ended" if run.finished else f"{run.lived:.2f}"
        print(f"{name:24}{run.sent:9}{run.after:10.2f}{gone:>13}  {', '.join(run.left) or '-'}; {'; '.join(run.faults) or '-'}")
        sys.stdout.flush()
    lived = [run.lived for run in runs if not run.finished]
    bad = [run for run in runs if run.faults]
    if lived:
        print(
            f"{len(lived)} interrupted of {len(runs)}: gone in {statistics.median(lived):.2f} s (median), {max(lived):.2f} s "
            f"(longest); {len(bad)} bad"
        )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
