"""One layer of arrays that are stacked over depth: kernels read it in place, everything else cuts it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int32, Shaped

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")


class OfLayer(struct.PyTreeNode):
    """Layer ``index`` () int32 of ``stack`` (L, ...), with the shape and type of the layer.

    In a loop over layers, XLA copies what it cuts out of a stack for a kernel. The kernel can add the offset itself instead.
    """

    stack: Shaped[Array, "L ..."]
    index: Int32[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    @property
    def dtype(self) -> np.dtype:
        return self.stack.dtype

    def take(self) -> jax.Array:
        """Returns the layer, cut out."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)


#: A leaf of a layer inside a block.
Leaf: TypeAlias = jax.Array | OfLayer


def _is_one(leaf: object) -> bool:
    return isinstance(leaf, OfLayer)


def lazy_layer(tree: _Tree, index: jax.Array) -> _Tree:
    """Turns a tree of stacks into a tree of layers without cutting any out."""
    return jax.tree.map(lambda stack: OfLayer(stack, index), tree)


@overload
def materialize(tree: Leaf) -> jax.Array: ...
@overload
def materialize(tree: _Tree) -> _Tree: ...
def materialize(tree: _Tree) -> _Tree | jax.Array:
    """Returns the tree with every layer cut out of its stack, and other leaves unchanged."""
    return jax.tree.map(lambda leaf: leaf.take() if _is_one(leaf) else leaf, tree, is_leaf=_is_one)


def stack_of(leaf: Leaf) -> jax.Array:
    """Returns the stack that a layer lies in, (L, ...); for any other array, a stack of that array alone, (1, ...)."""
    if isinstance(leaf, OfLayer):
        return leaf.stack
    return jnp.reshape(leaf, (1, *jnp.shape(leaf)))  # costs nothing at run time


def layer_of(*trees: object) -> jax.Array:
    """Returns the index of the layer that the trees belong to, (1,) int32, one for all stacks; 0 if nothing lies in a stack."""
    indices = (leaf.index for leaf in jax.tree.leaves(trees, is_leaf=_is_one) if _is_one(leaf))
    return jnp.asarray(next(indices, 0), jnp.int32).reshape(1)


#: The largest number of layers whose weights are widened at the same time.
_WIDENED_TOGETHER = 4


def map_in_chunks(function: Callable[[_Tree], _Result], layers: _Tree) -> _Result:
    """Maps a function over the layers of a tree of stacks, a few at a time: all layers widened at once would be the largest
    array of the program."""
    depth = jax.tree.leaves(layers)[0].shape[0]
    few = max(size for size in range(1, _WIDENED_TOGETHER + 1) if depth % size == 0)  # so that one program serves all turns
    return jax.lax.map(function, layers, batch_size=few)
