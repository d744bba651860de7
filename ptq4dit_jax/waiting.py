"""Waiting in a way that lets the process handle signals: for devices by asking whether results are ready, and for threads."""

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
#: The pause between two questions in seconds: a share of the time that was waited, so that little is added to any wait.
_SHORTEST, _LONGEST, _SHARE = 5e-5, 0.05, 0.005


def ready(tree: _Tree) -> _Tree:
    """Waits until all arrays of a tree are computed, and returns the tree.

    Python handles a signal between two of its own instructions, and ``device_get`` or ``np.asarray`` is one, however long it
    waits. Here a ``KeyboardInterrupt`` comes within 50 ms. What has failed counts as ready: reading it raises.
    """
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "is_ready"):  # an array of NumPy, or one that JAX traces
            continue
        started = time.perf_counter()
        while not leaf.is_ready():
            time.sleep(min(_LONGEST, max(_SHORTEST, _SHARE * (time.perf_counter() - started))))
    return tree


def in_background(function: Callable[[], _Result]) -> Callable[[], _Result]:
    """Starts ``function`` in a thread, beside what a device computes; what is returned gives its result, or raises its error.

    A process that ends does not wait for the thread, as it would for that of an executor.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def result() -> _Result:
        while not future.done():  # in turns: a wait without end is none that a signal interrupts everywhere
            with contextlib.suppress(TimeoutError):
                future.result(timeout=_LONGEST)
        return future.result()

    threading.Thread(target=run, daemon=True).start()
    return result
