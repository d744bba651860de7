"""Places batches and models on a mesh, with batches over ``data`` and parameters replicated; or deals out work to its devices
in pieces, each a program of one device.

A mesh may span the processes of a run (:mod:`ptq4dit_jax.processes`). Each process then holds the devices that it addresses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast, overload

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax import processes
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
    owners = {device.process_index for device in mesh.devices.flat}
    if owners != {jax.process_index()} and len(owners) < jax.process_count():
        raise Ptq4ditError(
            f"The mesh has devices of the processes {sorted(owners)}, of {jax.process_count()} in this run; make it of the "
            "devices of all processes, or of this process alone."
        )
    return mesh.shape["data"]


def spans_processes(mesh: Mesh | None) -> bool:
    """Returns whether some devices of the mesh belong to another process."""
    return mesh is not None and not all(map(is_own, mesh.devices.flat))


@overload
def replicate(mesh: Mesh | None, tree: np.ndarray) -> jax.Array: ...
@overload
def replicate(mesh: Mesh | None, tree: _Tree) -> _Tree: ...
def replicate(mesh: Mesh | None, tree: _Tree) -> _Tree | jax.Array:
    """Replicates every leaf to every device of the mesh. Without a mesh, JAX arrays stay; others go to the default device."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), own(tree))
    whole = NamedSharding(mesh, PartitionSpec())
    if not spans_processes(mesh):
        return jax.device_put(own(tree), whole)
    return jax.tree.map(lambda leaf: _everywhere(leaf, whole), tree)


def _everywhere(leaf: Any, whole: NamedSharding) -> jax.Array:
    """Replicates an array to a mesh over processes, each of which has it."""
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(whole, leaf.ndim):
        return leaf
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_everywhere(jax.random.key_data(leaf), whole), impl=jax.random.key_impl(leaf))
    copies = [jax.device_put(own(leaf), device) for device in filter(is_own, whole.mesh.devices.flat)]
    return jax.make_array_from_single_device_arrays(copies[0].shape, whole, copies)


@overload
def shard(mesh: Mesh | None, tree: np.ndarray, axis: int = 0) -> jax.Array: ...
@overload
def shard(mesh: Mesh | None, tree: _Tree, axis: int = 0) -> _Tree: ...
def shard(mesh: Mesh | None, tree: _Tree, axis: int = 0) -> _Tree | jax.Array:
    """Shards axis ``axis`` of every leaf over ``data``. Without a mesh, leaves go to the default device."""
    if mesh is None:
        return jax.device_put(own(tree), None)
    parts = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    if not spans_processes(mesh):
        return jax.device_put(own(tree), parts)

    def cut(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(parts, leaf.ndim):
            return leaf
        host = np.asarray(own(leaf))
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
        return jax.make_array_from_callback(host.shape, parts, lambda index: host[index])

    return jax.tree.map(cut, tree)


def own(tree: _Tree) -> _Tree:
    """Returns a tree whose arrays this process holds alone: a copy of each that spans processes, and the rest as it is."""
    if not processes.several():
        return tree

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return leaf.addressable_data(0) if leaf.is_fully_replicated else jax.device_put(_gathered(leaf))

    return jax.tree.map(one, tree)


def to_host(tree: _Tree) -> _Tree:
    """Waits for the arrays of a tree, and returns their values on the host, of shards in other processes too."""
    ready(tree)
    return cast(_Tree, jax.device_get(jax.tree.map(_gathered, tree) if processes.several() else tree))


def _gathered(leaf: Any) -> Any:
    """Returns an array's values on the host if it is sharded over processes, and anything else as it is."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def agreed(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Returns what each process of a mesh has computed alone, with process 0's values.

    On a CPU these are the same bits anyway. On a GPU each process chooses its kernels by measuring, so last bits may differ.
    """
    if not spans_processes(mesh):
        return tree
    place = lambda leaf, value: jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value
    return jax.tree.map(place, tree, processes.shared(tree))


def least(mesh: Mesh | None, number: int | None) -> int | None:
    """Returns the least of the numbers of a mesh's processes, none of which is negative; None where all are unknown (None)."""
    return processes.least(number) if spans_processes(mesh) else number


def devices_of(mesh: Mesh | None) -> list[jax.Device | None]:
    """Returns the devices that share a batch. Without a mesh, this is a single None, which leaves arrays where they are."""
    data_size(mesh)  # raises on a mesh that cannot be used
    return [None] if mesh is None else list(mesh.devices.ravel())


def own_devices_of(mesh: Mesh | None, count: int | None = None) -> list[jax.Device | None]:
    """Returns those of the first ``count`` devices (default: all) that share a batch and that this process addresses."""
    return list(filter(is_own, devices_of(mesh)[:count]))


def home(mesh: Mesh | None) -> jax.Device | None:
    """Returns the device of this process on which it computes what is not shared out: the mesh's first."""
    return own_devices_of(mesh)[0]


def is_own(device: jax.Device | None) -> bool:
    """Returns whether this process addresses a device; None is its default device."""
    return device is None or device.process_index == jax.process_index()


def deal_out(
    run: Callable[[int, jax.Device | None], _Result],
    count: int,
    mesh: Mesh | None,
    *,
    like: Callable[[int], _Result],
    ahead: int = 2,
) -> Iterator[_Result]:
    """Yields ``run(item, device)`` for ``count`` items, dealt out to the devices of the mesh in turn; results are in order.

    ``run`` must run a program of one device. Then the result of an item does not depend on its device. The program of one
    partition of several would be compiled differently, and its last bits would differ.

    Where the mesh spans processes, each runs the items of its own devices, and sends the results to the others. All processes
    then get the same bytes, on the host, and must take all results.

    Args:
      run: begins the work on an item, and returns arrays that need not be ready.
      count: the number of items.
      mesh: the mesh whose devices share the items.
      like: returns the shapes of an item's result, which are asked for only where processes share the items.
      ahead: the number of items that each device may have begun before the first result is taken.
    """
    devices = devices_of(mesh)[:count]
    of_item = lambda item: devices[item % len(devices)]
    ours = [item for item in range(count) if is_own(of_item(item))]
    results = _begun_ahead(lambda item: run(item, of_item(item)), ours, len(own_devices_of(mesh, count)), ahead)
    if not spans_processes(mesh):
        yield from results
        return
    for item in range(count):
        found = next(results) if item in ours else like(item)
        yield processes.shared(found, source=cast(jax.Device, of_item(item)).process_index)


def _begun_ahead(run: Callable[[int], _Result], items: Sequence[int], devices: int, ahead: int) -> Iterator[_Result]:
    """Yields ``run(item)`` of each item, with up to ``ahead`` items begun for each of so many devices."""
    # The first item compiles alone, so that XLA tunes by measuring only once; then all other devices compile at once.
    begun = deque(run(item) for item in items[:1])
    if devices > 1:
        with ThreadPoolExecutor(devices - 1) as threads:
            begun.extend(threads.map(run, items[1:devices]))
    following = len(begun)
    while begun or following < len(items):
        if following < len(items) and len(begun) < ahead * devices:
            begun.append(run(items[following]))
            following += 1
        else:
            yield ready(begun.popleft())
