"""Places models on a mesh: whole on every device, or cut over the mesh's axis ``model`` by rules over the names of layers.

XLA partitions the programs of a model that is cut. Layers cut along their contraction add up sums of all parts: integers
exactly (int32), floats in another order than one device would. Kernels of ours cannot be partitioned, so a quantized model that
is cut runs on ``xla``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ptq4dit_jax import sharding
from ptq4dit_jax.model import ModelFace
from ptq4dit_jax.quantizers import PACKED_ROWS

_Tree = TypeVar("_Tree")


class Cut(enum.Enum):
    """Along what a layer's weight is cut: its output channels N, its contraction K, or nothing."""

    OUTPUT = enum.auto()
    CONTRACTION = enum.auto()
    WHOLE = enum.auto()


#: Regular expressions over a layer's name in its block, and how a layer that one matches is cut. The first match decides.
Rules: TypeAlias = Sequence[tuple[str, Cut]]

#: A layer that follows a cut one channel by channel, or head by head, takes its input in the parts that are there (Shoeybi et
#: al., 2019). The first and last layer are small. An unknown layer is cut by output channels, which is right for any.
RULES: Rules = (
    (r"proj|fc2|time_fc2", Cut.CONTRACTION),
    (r"patch_embed|final", Cut.WHOLE),
    (r".*", Cut.OUTPUT),
)

#: The axis of a leaf, from the end, along which a layer's cut goes. Other leaves of a layer stay whole.
_AXES = {
    Cut.OUTPUT: {"kernel": 1, "bias": 1, "weight.values": 2, "weight.scale": 1, "weight.zero_point": 1},
    Cut.CONTRACTION: {"kernel": 2, "weight.values": 1, "act.balance": 1},
    Cut.WHOLE: {},
}


def placed(mesh: Mesh | None, tree: _Tree, rules: Rules = RULES) -> _Tree:
    """Places every leaf of a tree on the devices of the mesh, whole; with an axis ``model``, its models are cut by ``rules``.
    Without a mesh, JAX arrays stay; others go to the default device.

    Raises:
      Ptq4ditError: a model is to be cut, and names a backend whose kernels cannot be partitioned.
    """
    if mesh is None or sharding.model_size(mesh) == 1:
        return sharding.replicate(mesh, tree)

    def one(node: Any) -> Any:
        if not isinstance(node, ModelFace):
            return sharding.replicate(mesh, node)
        node = node.partitionable()
        return jax.tree.map(lambda leaf, spec: sharding.spread(mesh, leaf, spec), node, specs(node, mesh.shape["model"], rules))

    return cast(_Tree, jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, ModelFace)))


def put(tree: _Tree, place: sharding.Place, rules: Rules = RULES) -> _Tree:
    """Places a tree at a place of this process: :func:`placed` on a mesh, and as ``jax.device_put`` does it on a device."""
    return placed(place, tree, rules) if isinstance(place, Mesh) else sharding.put(tree, place)


def specs(model: ModelFace, size: int, rules: Rules = RULES) -> Any:
    """Returns the model's tree with a ``PartitionSpec`` for every leaf, where ``size`` devices hold the model.

    A layer whose rule does not divide its weight into equal parts is cut along the other axis, or stays whole.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    named = [(*_names(path), leaf) for path, leaf in leaves]
    layers: dict[str, dict[str, jax.Array]] = {}
    for layer, field, leaf in named:
        layers.setdefault(layer, {})[field] = leaf
    cuts = {layer: _chosen(fields, size, _rule(layer, rules)) for layer, fields in layers.items()}

    def of_leaf(layer: str, field: str, leaf: jax.Array) -> PartitionSpec:
        axis = _AXES[cuts[layer]].get(field)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * (leaf.ndim - axis), "model")

    return jax.tree.unflatten(structure, [of_leaf(*each) for each in named])


def _names(path: tuple[Any, ...]) -> tuple[str, str]:
    """Returns the full name of the layer that a leaf of a model belongs to, and of the leaf in that layer: ``blocks.qkv`` and
    ``kernel``, or ``weight.values``."""
    collection, *rest = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if collection == "params":
        return ".".join(rest[:-1]), rest[-1]
    return (rest[0], ".".join(rest[1:])) if collection == "linears" else ("", "")


def _rule(layer: str, rules: Rules) -> Cut:
    name = layer.rpartition(".")[-1]
    return next((cut for pattern, cut in rules if re.fullmatch(pattern, name)), Cut.WHOLE)


def _chosen(fields: Mapping[str, jax.Array], size: int, wanted: Cut) -> Cut:
    """Returns how to cut a layer with these leaves into equal parts, as close as possible to what is wanted."""
    if "kernel" in fields:
        (K, N), parts = fields["kernel"].shape[-2:], size
    elif "weight.values" in fields:
        values = fields["weight.values"]
        K, N = values.shape[-1], fields["weight.scale"].shape[-1]
        parts = size * (PACKED_ROWS if values.dtype == jnp.uint8 else 1)
    else:
        return Cut.WHOLE
    divides = {Cut.OUTPUT: N % parts == 0, Cut.CONTRACTION: K % size == 0}
    order = () if wanted is Cut.WHOLE else (wanted, *divides)
    return next((cut for cut in order if divides[cut]), Cut.WHOLE)
