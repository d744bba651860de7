"""Waits such that the process can handle signals: for devices, by polling whether results are ready, and for threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import jax

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")
#: Seconds between two polls: a share of the time waited so far, so that little is added to any wait.
_SHORTEST, _LONGEST, _SHARE = 5e-5, 0.05, 0.005


def ready(tree: _Tree) -> _Tree:
    """Waits until all arrays of a tree are computed, and returns the tree.

    Python handles signals only between its own instructions, and ``device_get`` or ``np.asarray`` is a single one, however long
    it waits. Here a ``KeyboardInterrupt`` comes within 50 ms. A failed result counts as ready: reading it raises.
    """
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "is_ready"):  # a NumPy array, or a tracer
            continue
        started = time.perf_counter()
        while not leaf.is_ready():
            time.sleep(min(_LONGEST, max(_SHORTEST, _SHARE * (time.perf_counter() - started))))
    return tree


def in_background(function: Callable[[], _Result]) -> Callable[[], _Result]:
    """Starts ``function`` in a thread, while a device computes; the returned function gives its result or raises its error.

    Unlike with an executor, a process that ends does not wait for the thread.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def result() -> _Result:
        while not future.done():  # in short waits: signals do not interrupt an unlimited one everywhere
            with contextlib.suppress(TimeoutError):
                future.result(timeout=_LONGEST)
        return future.result()

    threading.Thread(target=run, daemon=True).start()
    return result


def within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """Runs ``function`` in a thread, and returns its result or raises its error; or raises ``TimeoutError`` after ``seconds``,
    and leaves it running."""
    done = threading.Event()

    def run() -> _Result:
        try:
            return function()
        finally:
            done.set()

    result = in_background(run)
    if not done.wait(seconds):
        raise TimeoutError
    return result()
