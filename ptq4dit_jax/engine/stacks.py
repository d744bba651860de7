"""One layer of arrays that are stacked over depth: kernels read it where it lies, everything else takes it out."""

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
    """Layer ``index`` () int32 of ``stack`` (L, ...); it has the shape and type of the layer.

    In a loop over layers XLA copies what it cuts out of a stack for a kernel, and a kernel can as well add the offset itself.
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
        """The layer, cut out."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)


#: What the leaves of a layer are inside a block.
Leaf: TypeAlias = jax.Array | OfLayer


def _is_one(leaf: object) -> bool:
    return isinstance(leaf, OfLayer)


def lazy_layer(tree: _Tree, index: jax.Array) -> _Tree:
    """The tree of stacks as one of layers, none of them cut out."""
    return jax.tree.map(lambda stack: OfLayer(stack, index), tree)


@overload
def materialize(tree: Leaf) -> jax.Array: ...
@overload
def materialize(tree: _Tree) -> _Tree: ...
def materialize(tree: _Tree) -> _Tree | jax.Array:
    """The tree with every layer cut out of its stack; all else as it is."""
    return jax.tree.map(lambda leaf: leaf.take() if _is_one(leaf) else leaf, tree, is_leaf=_is_one)


def stack_of(leaf: Leaf) -> jax.Array:
    """The stack that a layer lies in, (L, ...); of any other array a stack of that one, (1, ...)."""
    if isinstance(leaf, OfLayer):
        return leaf.stack
    return jnp.reshape(leaf, (1, *jnp.shape(leaf)))  # for which nothing runs


def layer_of(*trees: object) -> jax.Array:
    """Which layer the trees are of, (1,) int32, which is one for all their stacks; 0 where nothing lies in a stack."""
    indices = (leaf.index for leaf in jax.tree.leaves(trees, is_leaf=_is_one) if _is_one(leaf))
    return jnp.asarray(next(indices, 0), jnp.int32).reshape(1)


#: The most layers whose weights are widened at the same time.
_WIDENED_TOGETHER = 4


def map_in_chunks(function: Callable[[_Tree], _Result], layers: _Tree) -> _Result:
    """The function of every layer of a tree of stacks, a few at a time: what it widens of all layers at once would be the
    largest array of the program."""
    depth = jax.tree.leaves(layers)[0].shape[0]
    few = max(size for size in range(1, _WIDENED_TOGETHER + 1) if depth % size == 0)  # all turns are then one program
    return jax.lax.map(function, layers, batch_size=few)
