"""Placing batches and models on a mesh: batches over ``data``, parameters replicated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax.errors import Ptq4ditError


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh named ``data`` over the given devices (default: all)."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def data_size(mesh: Mesh | None) -> int:
    """Into how many parts ``mesh`` cuts a batch."""
    if mesh is None:
        return 1
    if "data" not in mesh.axis_names:
        raise Ptq4ditError(f"The mesh needs an axis named 'data' to shard batches over; it has {mesh.axis_names}.")
    return mesh.shape["data"]


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """The tree with every leaf whole on every device of the mesh, or without one on a device: where it is, or the default."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(mesh: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """The tree with axis ``axis`` of every leaf cut over ``data``, or without a mesh on the default device."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")))
