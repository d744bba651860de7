"""Places batches and models on a mesh, with batches over ``data`` and parameters replicated; or deals out work to its devices
in pieces, each a program of one device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.waiting import ready

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with one axis, ``data``, over the given devices (default: all)."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def data_size(mesh: Mesh | None) -> int:
    """Returns the number of parts into which ``mesh`` cuts a batch."""
    if mesh is None:
        return 1
    if "data" not in mesh.axis_names:
        raise Ptq4ditError(f"The mesh needs an axis named 'data' to shard batches over; it has {mesh.axis_names}.")
    return mesh.shape["data"]


@overload
def replicate(mesh: Mesh | None, tree: np.ndarray) -> jax.Array: ...
@overload
def replicate(mesh: Mesh | None, tree: _Tree) -> _Tree: ...
def replicate(mesh: Mesh | None, tree: _Tree) -> _Tree | jax.Array:
    """Replicates every leaf to every device of the mesh. Without a mesh, JAX arrays stay; others go to the default device."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@overload
def shard(mesh: Mesh | None, tree: np.ndarray, axis: int = 0) -> jax.Array: ...
@overload
def shard(mesh: Mesh | None, tree: _Tree, axis: int = 0) -> _Tree: ...
def shard(mesh: Mesh | None, tree: _Tree, axis: int = 0) -> _Tree | jax.Array:
    """Shards axis ``axis`` of every leaf over ``data``. Without a mesh, leaves go to the default device."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")))


def devices_of(mesh: Mesh | None) -> list[jax.Device | None]:
    """Returns the devices that share a batch. Without a mesh, this is a single None, which leaves arrays where they are."""
    data_size(mesh)  # raises on a mesh that cannot be used
    return [None] if mesh is None else list(mesh.devices.ravel())


def deal_out(
    run: Callable[[int, jax.Device | None], _Result], count: int, mesh: Mesh | None, *, ahead: int = 2
) -> Iterator[_Result]:
    """Yields ``run(item, device)`` for ``count`` items, dealt out to the devices of the mesh in turn; results are in order.

    ``run`` must run a program of one device. Then the result of an item does not depend on its device. The program of one
    partition of several would be compiled differently, and its last bits would differ.

    Args:
      run: begins the work on an item, and returns arrays that need not be ready.
      count: the number of items.
      mesh: the mesh whose devices share the items.
      ahead: the number of items that each device may have begun before the first result is taken.
    """
    devices = devices_of(mesh)[:count]
    one = lambda item: run(item, devices[item % len(devices)])
    # The first item compiles alone, so that XLA tunes by measuring only once; then all other devices compile at once.
    begun = deque([one(0)])
    if len(devices) > 1:
        with ThreadPoolExecutor(len(devices) - 1) as threads:
            begun.extend(threads.map(one, range(1, len(devices))))
    following = len(begun)
    while begun or following < count:
        if following < count and len(begun) < ahead * len(devices):
            begun.append(one(following))
            following += 1
        else:
            yield ready(begun.popleft())
