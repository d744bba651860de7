"""Several processes of one run, as on the hosts of a pod: how they start, which one writes, and how all get the same values.

As everywhere in JAX, all processes call the same functions with the same arguments, in the same order. Process 0 alone writes.
With a single process, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.waiting import within

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")

#: Seconds without a sign of life after which JAX counts a process as dead and ends the others.
HEARTBEAT = 20
#: Seconds that a process which fails waits for the others to fail alike. They then end by themselves, with their own message.
_LEAVING = 5.0
#: Seconds by which JAX, which ends a process that finds no others, waits longer than this program, which says so.
_LATER = 60
#: Words of errors that the loss of another process causes.
_OF_PEERS = re.compile("gloo|nccl|peer|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)
#: Messages are padded to multiples of this many bytes, so that few programs are compiled to send them.
_PACKET = 4096


def several() -> bool:
    """Returns whether this run has several processes. Without ``jax.distributed.initialize``, no backend is started to tell."""
    return bool(jax.distributed.is_initialized()) and jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return not several() or jax.process_index() == 0


def shared(tree: _Tree, source: int = 0) -> _Tree:
    """Returns what process ``source`` holds, in all processes, bit for bit: a tree of NumPy arrays.

    The others pass a tree of the same structure, shapes and types; arrays or :class:`jax.ShapeDtypeStruct`.
    """
    leaves, structure = jax.tree.flatten(tree)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    # As integers, because adding zeros, which is how the values are sent, would change the sign of -0.0.
    words = np.zeros(-(-sum(sizes) // _PACKET) * _PACKET // 4, np.uint32)
    if jax.process_index() == source:
        held = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.device_get(leaves)]
        words.view(np.uint8)[: sum(sizes)] = np.concatenate(held) if held else 0
    sent = multihost_utils.broadcast_one_to_all(words, is_source=jax.process_index() == source)
    parts = np.split(np.asarray(sent).view(np.uint8)[: sum(sizes)], np.cumsum(sizes)[:-1])
    found = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=bool(leaves))]
    return cast(_Tree, jax.tree.unflatten(structure, found))


def least(number: int | None) -> int | None:
    """Returns the least of all processes' numbers, none of which is negative; None where all are unknown (None)."""
    if not several():
        return number
    words = np.frombuffer(np.int64(-1 if number is None else number).tobytes(), np.uint32)
    found = np.ascontiguousarray(multihost_utils.process_allgather(words)).view(np.int64)
    return min((int(known) for known in found.ravel() if known >= 0), default=None)


def on_first(function: Callable[[], _Result]) -> _Result:
    """Runs a function in process 0 alone, and returns its result in all processes, as JSON holds it, or raises its error.

    Only a :class:`Ptq4ditError` is raised in all of them. Another error ends process 0, and thereby the run.
    """
    if not several():
        return function()
    result: Any = None
    failed: Ptq4ditError | None = None
    if is_first():
        try:
            result = function()
        except Ptq4ditError as error:
            failed = error
    said = _told({"result": result, "failed": failed and str(failed)})
    if said["failed"] is not None:
        raise failed or Ptq4ditError(said["failed"])
    return cast(_Result, result if is_first() else said["result"])


def _told(message: Any) -> Any:
    """Returns process 0's message, which JSON can hold."""
    text = np.frombuffer(json.dumps(message).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(shared(np.uint32(text.size)))
    return json.loads(shared(text if is_first() else np.zeros(length, np.uint8)).tobytes())


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None, *, timeout: int = 300) -> None:
    """Connects the processes of a run; must come before any other use of JAX. What is None is detected by JAX.

    Args:
      coordinator: address and port of process 0, as ``host:port``.
      count: the number of processes.
      index: which of them this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      Ptq4ditError: an argument is wrong, or missing where JAX detects none, or the processes did not find each other.
    """
    port = re.fullmatch(r".+:([0-9]{1,5})", coordinator or "")
    if coordinator is not None and (port is None or not 0 < int(port[1]) < 2**16):
        raise Ptq4ditError(
            f"The coordinator (--coordinator) must be HOST:PORT, for example 10.0.0.1:1234, not {coordinator!r}."
        )
    if count is not None and count < 1:
        raise Ptq4ditError(f"The number of processes (--num-processes) must be positive, not {count}.")
    if index is not None and not 0 <= index < (index + 1 if count is None else count):
        raise Ptq4ditError(f"The process id (--process-id) must be from 0 to the number of processes minus 1, not {index}.")
    # JAX would take SIGTERM for itself, as a notice of preemption, and the program would not end.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator or "the coordinator that JAX detected"
    connect = lambda: jax.distributed.initialize(
        coordinator, count, index, initialization_timeout=timeout + _LATER, heartbeat_timeout_seconds=HEARTBEAT
    )
    try:
        within(timeout, connect)
    except TimeoutError:
        raise Ptq4ditError(
            f"The processes of this run did not find each other through {where} within {timeout} s; start all of them, with "
            "one address that all can reach, and with process ids that differ."
        ) from None
    except Exception as error:
        options = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
        if isinstance(error, ValueError) and None in options.values():
            missing = ", ".join(name for name, value in options.items() if value is None)
            raise Ptq4ditError(
                f"JAX detects no cluster here that says how the processes of this run find each other; pass {missing}."
            ) from error
        raise Ptq4ditError(f"The processes of this run cannot be connected through {where}: {_first_line(error)}.") from error


def is_lost(error: BaseException) -> bool:
    """Returns whether an exception means that another process of this run has ended or cannot be reached."""
    return several() and isinstance(error, jax.errors.JaxRuntimeError) and _OF_PEERS.search(str(error)) is not None


def lost(error: BaseException) -> str:
    """Returns the sentence for such an exception."""
    reason = _first_line(error)
    return f"Another process of this run has ended or cannot be reached ({reason}); its own messages say why."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def leave() -> bool:
    """Lets go of the other processes before this one fails; returns whether there are any.

    JAX would wait for them for minutes. If all fail alike, each ends by itself. JAX ends those that do not fail.
    """
    if not jax.distributed.is_initialized():
        return False
    with contextlib.suppress(Exception):
        within(_LEAVING, jax.distributed.shutdown)
    return True
