"""The network's units, reconstructed one after another, each a pure function of its parameters and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
from flax import struct
from jax.typing import DTypeLike

from ptq4dit_jax.networks.float_network import Block, FloatNetwork
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import UnitKind
from ptq4dit_jax.numerics import EXACT

_Tree = TypeVar("_Tree")


class Unit(struct.PyTreeNode):
    """One unit. ``kind`` determines the program; ``index`` is its place in the stack (0 outside the stacks)."""

    kind: UnitKind = struct.field(pytree_node=False)
    index: int = struct.field(pytree_node=False, default=0)

    @property
    def name(self) -> str:
        stack = self.kind.stack
        return self.kind.role.value.replace("_", " ") if stack is None else f"{stack.block} {self.index}"

    @property
    def layers(self) -> dict[str, str]:
        """The unit's linear layers: name inside the unit -> full name."""
        return {linear.place.name: str(linear.place) for linear in self.kind.linears}

    @property
    def tables(self) -> tuple[str, ...]:
        """Parameters of the unit that are looked up or added, not multiplied; a model may lack them."""
        return self.kind.tables

    @property
    def sites(self) -> dict[str, str]:
        """The unit's sites: name inside the unit -> full name."""
        return {site.place.name: str(site.place) for site in self.kind.sites}

    def of_depth(self, value: _Tree) -> _Tree:
        """Returns this block's slice of a stacked tree; outside the stacks, the whole tree."""
        return value if self.kind.stack is None else _at(value, self.index)


@jax.jit
def _at(tree: _Tree, index: jax.Array | int) -> _Tree:
    """Slices a tree in one program; without jit, each operation on each leaf would be one."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def units(network: Network) -> tuple[Unit, ...]:
    """Returns all units in the order in which a hidden state passes them."""
    return tuple(
        Unit(kind, index) for kind in network.spec.kinds for index in range(1 if kind.stack is None else kind.stack.depth)
    )


def apply_unit(
    config: Network,
    kind: UnitKind,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """Returns the output of a unit for one batch.

    Args:
      config: shape of the network.
      kind: which kind of unit.
      params: kernels (K, N) and biases (N,) by layer, and the unit's tables that the model has.
      quantizers: callables by site, as in :mod:`ptq4dit_jax.networks.float_network`; may be empty.
      inputs: ``embed_image`` (x_BHWC,), ``embed_condition`` (t_B, y_B), ``block`` and ``head`` (x_BTD, silu_c_BD).
      dtype: compute type.
      precision: of float32 products.
    """
    output = _run(config, kind, params, quantizers, inputs, dtype, precision)
    return cast(jax.Array, output if kind.stack is None else output[0])


class _Passing(struct.PyTreeNode):
    """Observer that keeps what it sees."""

    def observe(self, x: jax.Array) -> Any:
        return x


def site_input(
    config: Network,
    kind: UnitKind,
    name: str,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """Returns the input of the layer behind a site for one batch, (B, [T,] K), quantized if the site has a quantizer.

    ``name`` is the site's name inside the unit; the other arguments are those of :func:`apply_unit`. XLA drops what follows
    the site.
    """
    _, seen = _run(config, kind, params, quantizers, inputs, dtype, precision, observers={name: _Passing()})
    return cast(jax.Array, seen["observers"][name])


def _run(
    config: Network,
    kind: UnitKind,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision,
    observers: Mapping[str, Any] | None = None,
) -> Any:
    """Runs the unit's module. With ``observers``, also returns the variables that they become."""
    variables = {"params": params} | ({"quantizers": quantizers} if quantizers else {})
    more: dict[str, Any] = {"method": kind.role.value} if kind.stack is None else {}
    if observers is not None:
        variables, more = variables | {"observers": observers}, more | {"mutable": ["observers"]}
    stack, settings = kind.stack, (dtype, precision)
    module = FloatNetwork(config, *settings) if stack is None else Block(config, stack, *settings)
    return module.apply(variables, *inputs, **more)
