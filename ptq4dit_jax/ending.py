"""How a program ends: by a signal within two seconds, quietly if nobody reads its output, and otherwise with a sentence.

Importing this installs nothing. :func:`run` is for a program's entry, which owns the process.

Exit statuses are as in shells: 128 + N for the signal N (130 for Ctrl-C, 143 for SIGTERM), and 141 (SIGPIPE) if the reader of
the output is gone.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from ptq4dit_jax import memory, processes, unfinished
from ptq4dit_jax.errors import Ptq4ditError

_SAID = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hung up"}
#: Words by signal number. Windows has no SIGHUP.
_SIGNALS = {int(getattr(signal, name)): word for name, word in _SAID.items() if hasattr(signal, name)}
#: Seconds that the program has to end by itself after a signal; then the process is ended as it is.
_GRACE = 1.2
#: A byte that is no signal's number, and the most seconds that a garbage collector callback takes.
_AGAIN, _SHORT = 0, 0.02
_CLOSED = 128 + 13  # SIGPIPE, which Windows does not name


def status_of(program: Callable[[], object]) -> int:
    """Runs a program and returns its exit status; a user's mistake, too little memory or the loss of another process gives one
    sentence on stderr and 1."""
    try:
        program()
    except Ptq4ditError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if memory.is_short(error):
            print(f"Error: {memory.SHORT}.", file=sys.stderr)
        elif processes.is_lost(error):
            print(f"Error: {processes.lost(error)}", file=sys.stderr)
        else:
            raise
        return 1
    return 0


def run(program: Callable[[], object]) -> NoReturn:
    """Runs a program in the main thread and ends the process.

    SIGINT, SIGTERM and SIGHUP raise ``SystemExit`` in the program, which gives it time to clean up. If it does not end within
    1.2 s, because the main thread waits in a library, or if a second signal comes, a thread removes what is staged and ends the
    process. Either way stderr gets one sentence on what was written and what the same command would do. A signal that the
    process was told to ignore stays ignored.
    """
    with unfinished.work() as work, _outputs() as outputs:
        ending = _Ending(work)
        with ending.watched():
            status = status_of(program)
            with contextlib.suppress(SystemExit):
                outputs.flush()
            if ending.number is not None:
                ending.leave(ending.number)
            if outputs.failed is not None:
                outputs.leave()
    if status and processes.leave():
        os._exit(status)
    sys.exit(status)


class _Ending:
    """What happens after a signal: the program has a grace period, then one thread reports the state and ends the process."""

    def __init__(self, work: unfinished.Work) -> None:
        self.work = work
        self.number: int | None = None
        self._lost = False
        self._leaving = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals during the block. The bytes that Python's own handler sends reach the thread at once, whatever
        the main thread is doing. After the block everything is done, and signals are ignored while Python shuts down."""
        taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in taken:
            signal.signal(number, self._raise)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        sys.unraisablehook = self._unraisable
        threading.Thread(target=self._watch, daemon=True, name="ptq4dit-signals").start()
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            self._writer.close()

    def _raise(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is None or self._lost:
            self.number, self._lost = self.number or number, False
            raise SystemExit(128 + self.number)

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Has a signal sent again if it came in a destructor or a weak reference's callback, where Python drops exceptions."""
        if self.number is not None and isinstance(lost.exc_value, SystemExit):
            self._lost = True
            self._writer.send(bytes([_AGAIN]))
        else:
            sys.__unraisablehook__(lost)

    def _watch(self) -> None:
        with self._reader as reader:
            while (number := _received(reader)) not in _SIGNALS:
                if number is None:
                    return
            left, simulated = time.monotonic() + _GRACE, 0
            while select.select([reader], [], [], max(0.0, left - time.monotonic()))[0]:
                match _received(reader):
                    case None:
                        return
                    case byte if byte == _AGAIN:
                        time.sleep(_SHORT)  # until that callback has returned
                        simulated += 1
                        _send_again(signal.Signals(number))
                    case _ if simulated:
                        simulated -= 1
                    case _:
                        break
        self.leave(number)

    def leave(self, number: int) -> NoReturn:
        """Reports the state, unless the other thread is doing so, and ends the process."""
        if self._leaving.acquire(blocking=False):
            self.work.clean()
            if sys.stdout is not None and sys.stdout.isatty():
                _write(1, "\x1b[?25h")  # shows the cursor, which a progress bar may have hidden
            _write(2, f"{_SIGNALS[number]}: {self.work.standing()}.\n")
        else:
            time.sleep(0.3)
        os._exit(128 + number)


def _send_again(number: signal.Signals) -> None:
    """Sends the main thread a signal, which also ends what it waits for, if the system supports this."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(number)


def _received(reader: socket.socket) -> int | None:
    """Returns the next signal's number; None once the other end is closed."""
    byte = reader.recv(1)
    return byte[0] if byte else None


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode(errors="backslashreplace"))


class _Outputs:
    """Standard output and standard error, whose failures end the program at once."""

    def __init__(self) -> None:
        self.failed: tuple[str, OSError] | None = None

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = self.failed or (name, error)
            raise SystemExit(1) from None

    def flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()

    def leave(self) -> NoReturn:
        """Ends the process without trying again to write what is left: status 141 if the reader is gone, else a sentence."""
        assert self.failed is not None
        name, error = self.failed
        if isinstance(error, BrokenPipeError):
            os._exit(_CLOSED)
        _write(2, f"Error: Cannot write to the {name} ({error.strerror or error}); what was printed is incomplete.\n")
        os._exit(1)


class _Stream:
    """A text stream that ends the program if it cannot be written to; everything else is passed to the stream."""

    def __init__(self, stream: TextIO, name: str, outputs: _Outputs) -> None:
        self._stream, self._name, self._outputs = stream, name, outputs

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with self._outputs.watch(self._name):
            return int(self._stream.write(text))
        return 0

    def flush(self) -> None:
        with self._outputs.watch(self._name):
            self._stream.flush()


@contextlib.contextmanager
def _outputs() -> Iterator[_Outputs]:
    """Watches the standard streams during the block."""
    outputs, before = _Outputs(), (sys.stdout, sys.stderr)
    for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
        if getattr(sys, attribute) is not None:
            setattr(sys, attribute, _Stream(getattr(sys, attribute), name, outputs))
    try:
        yield outputs
    finally:
        sys.stdout, sys.stderr = before
