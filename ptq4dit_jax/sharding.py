"""Places batches on a mesh, cut over its axis ``data``, and arrays whole; or deals out work to its places in pieces, each a
program of its own.

A place is a device, or the devices along the mesh's axis ``model``, which hold one model between them
(:mod:`ptq4dit_jax.placement`).

A mesh may span the processes of a run (:mod:`ptq4dit_jax.processes`). Each process then holds the devices that it addresses.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar, cast, overload

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax import processes
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.waiting import ready

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")

#: Where a program runs by itself: a device, a mesh whose axis ``data`` has size 1, or (None) the default device.
Place: TypeAlias = jax.Device | Mesh | None


def data_mesh(devices: Sequence[jax.Device] | None = None, *, model: int = 1) -> Mesh:
    """Returns a mesh over the given devices (default: all) with the axis ``data``, which cuts batches.

    With ``model`` above 1 there is an axis ``model`` of that size too: so many neighbouring devices hold a model between them,
    each a part of its weights (:mod:`ptq4dit_jax.placement`). It is for models that do not fit into one device.

    Raises:
      Ptq4ditError: the number of devices is not a multiple of ``model``.
    """
    chosen = np.asarray(jax.devices() if devices is None else devices)
    if model < 1 or chosen.size % model:
        raise Ptq4ditError(
            f"A model on {model} devices needs a multiple of them, not {chosen.size}; choose a divisor of {chosen.size} "
            "(--model-devices)."
        )
    return Mesh(chosen, ("data",)) if model == 1 else Mesh(chosen.reshape(-1, model), ("data", "model"))


def model_size(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of devices of ``mesh`` that hold one model between them."""
    return 1 if mesh is None else mesh.shape.get("model", 1)


def without_model(mesh: Mesh | None) -> Mesh | None:
    """Returns a mesh of the same devices that has the axis ``data`` alone, for work on parts of a model that fit anywhere."""
    return mesh if mesh is None or model_size(mesh) == 1 else data_mesh(list(mesh.devices.flat))


def data_size(mesh: Mesh | None) -> int:
    """Returns the number of parts into which ``mesh`` cuts a batch."""
    if mesh is None:
        return 1
    if "data" not in mesh.axis_names:
        raise Ptq4ditError(f"The mesh needs an axis named 'data' to shard batches over; it has {mesh.axis_names}.")
    if unknown := [name for name in mesh.axis_names if name not in ("data", "model")]:
        raise Ptq4ditError(f"A mesh has the axes 'data' and 'model' here, and none named {unknown[0]!r}; use data_mesh.")
    owners = {device.process_index for device in mesh.devices.flat}
    if owners != {jax.process_index()} and len(owners) < jax.process_count():
        raise Ptq4ditError(
            f"The mesh has devices of the processes {sorted(owners)}, of {jax.process_count()} in this run; make it of the "
            "devices of all processes, or of this process alone."
        )
    if any(len({device.process_index for device in row.flat}) > 1 for row in _rows(mesh)):
        raise Ptq4ditError(
            "The devices that hold one model between them must belong to one process, so a mesh's axis 'model' cannot have "
            f"size {mesh.shape['model']} with {jax.local_device_count()} devices per process; make it a divisor of that."
        )
    return mesh.shape["data"]


def _rows(mesh: Mesh) -> np.ndarray:
    """Returns the devices (data, model) of a mesh, whatever the order of its axes."""
    return np.moveaxis(mesh.devices, mesh.axis_names.index("data"), 0).reshape(mesh.shape["data"], -1)


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


def spread(mesh: Mesh, tree: _Tree, spec: PartitionSpec) -> _Tree:
    """Lays out every leaf over the devices of a mesh, whose processes each have it."""
    if spec == PartitionSpec():
        return replicate(mesh, tree)
    parts = NamedSharding(mesh, spec)
    if not spans_processes(mesh):
        return jax.device_put(own(tree), parts)

    def cut(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(parts, leaf.ndim):
            return leaf
        host = np.asarray(own(leaf))
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
        return jax.make_array_from_callback(host.shape, parts, lambda index: host[index])

    return jax.tree.map(cut, tree)


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
    return spread(mesh, tree, PartitionSpec(*[None] * axis, "data"))


def bytes_per_device(array: jax.Array | np.ndarray) -> int:
    """Returns the bytes that each device of an array holds of it; for an array on the host, all of them."""
    if not isinstance(array, jax.Array):
        return array.nbytes
    return array.dtype.itemsize * math.prod(array.sharding.shard_shape(array.shape))


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

    def place(leaf: Any, value: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return value
        return jax.device_put(value, leaf.sharding if leaf.committed else None)  # what no device owns can join any other

    return jax.tree.map(place, tree, processes.shared(tree))


def least(mesh: Mesh | None, number: int | None) -> int | None:
    """Returns the least of the numbers of a mesh's processes, none of which is negative; None where all are unknown (None)."""
    return processes.least(number) if spans_processes(mesh) else number


def places_of(mesh: Mesh | None) -> list[Place]:
    """Returns the places that share a batch. Without a mesh, this is a single None, which leaves arrays where they are."""
    data_size(mesh)  # raises on a mesh that cannot be used
    if mesh is None or model_size(mesh) == 1:
        return [None] if mesh is None else list(mesh.devices.ravel())
    return [data_mesh(list(row), model=row.size) for row in _rows(mesh)]


def own_places_of(mesh: Mesh | None, count: int | None = None) -> list[Place]:
    """Returns those of the first ``count`` places (default: all) that share a batch and that this process addresses."""
    return list(filter(is_own, places_of(mesh)[:count]))


def home(mesh: Mesh | None) -> Place:
    """Returns the place of this process at which it computes what is not shared out: the mesh's first."""
    return own_places_of(mesh)[0]


def is_own(place: Place) -> bool:
    """Returns whether this process addresses a place; None is its default device."""
    return place is None or _owner(place) == jax.process_index()


def _owner(place: jax.Device | Mesh) -> int:
    return (place.devices.flat[0] if isinstance(place, Mesh) else place).process_index


def put(tree: _Tree, place: Place) -> _Tree:
    """Returns the tree with every leaf whole at a place of this process: on each of its devices."""
    return jax.device_put(tree, NamedSharding(place, PartitionSpec()) if isinstance(place, Mesh) else place)


def deal_out(
    run: Callable[[int, Place], _Result],
    count: int,
    mesh: Mesh | None,
    *,
    like: Callable[[int], _Result],
    ahead: int = 2,
) -> Iterator[_Result]:
    """Yields ``run(item, place)`` for ``count`` items, dealt out to the places of the mesh in turn; results are in order.

    ``run`` must run a program of one place. Then the result of an item does not depend on its place. The program of one
    partition of several would be compiled differently, and its last bits would differ.

    Where the mesh spans processes, each runs the items of its own places, and sends the results to the others. All processes
    then get the same bytes, on the host, and must take all results.

    Args:
      run: begins the work on an item, and returns arrays that need not be ready.
      count: the number of items.
      mesh: the mesh whose places share the items.
      like: returns the shapes of an item's result, which are asked for only where processes share the items.
      ahead: the number of items that each place may have begun before the first result is taken.
    """
    places = places_of(mesh)[:count]
    of_item = lambda item: places[item % len(places)]
    ours = [item for item in range(count) if is_own(of_item(item))]
    results = _begun_ahead(lambda item: run(item, of_item(item)), ours, len(own_places_of(mesh, count)), ahead)
    if not spans_processes(mesh):
        yield from results
        return
    for item in range(count):
        found = next(results) if item in ours else like(item)
        yield processes.shared(found, source=_owner(cast(jax.Device | Mesh, of_item(item))))


def _begun_ahead(run: Callable[[int], _Result], items: Sequence[int], places: int, ahead: int) -> Iterator[_Result]:
    """Yields ``run(item)`` of each item, with up to ``ahead`` items begun for each of so many places."""
    # The first item compiles alone, so that XLA tunes by measuring only once; then all other places compile at once.
    begun = deque(run(item) for item in items[:1])
    if places > 1:
        with ThreadPoolExecutor(places - 1) as threads:
            begun.extend(threads.map(run, items[1:places]))
    following = len(begun)
    while begun or following < len(items):
        if following < len(items) and len(begun) < ahead * places:
            begun.append(run(items[following]))
            following += 1
        else:
            yield ready(begun.popleft())
