"""Waiting for devices in a way that lets the process handle signals: by asking whether results are ready."""

from __future__ import annotations

import time
from typing import TypeVar

import jax

_Tree = TypeVar("_Tree")
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
