"""The integer interpreter: the verbs of a network's forward on codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ptq4dit_jax.engine.dispatch import Dispatch
from ptq4dit_jax.engine.layers import Fed, QLinear, attention, in_unit_steps
from ptq4dit_jax.engine.stacks import Leaf, OfLayer, lazy_layer, materialize
from ptq4dit_jax.networks.ops import Activation, Network, Norm, Rotary
from ptq4dit_jax.networks.parts import head_norm, modulate, normalize, rotate
from ptq4dit_jax.networks.spec import Columns, Place, Stack
from ptq4dit_jax.quantizers import ActQuantizer


class Layers(struct.PyTreeNode):
    """The layers of a stack of blocks, or of one block of it; names are those inside a block.

    ``sites`` are the quantizers of attention's inputs, or None if a kernel ends attention in codes. ``modulation`` holds, by
    layer, the outputs of the layers that see the condition alone. ``gains`` are those of norms that are in no layer.
    """

    linears: dict[str, QLinear]
    sites: dict[str, ActQuantizer] | None
    modulation: dict[str, Sequence[Float[Array, "... _B _N"] | OfLayer]]
    gains: dict[str, Float[Array, "... _features"] | OfLayer] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class IntegerOps:
    """The verbs (:class:`ptq4dit_jax.networks.ops.Ops`) on packed layers, of the network outside its stacks or of one block.

    Attributes:
      network: the network whose forward is run.
      layers: the layers that the forward names.
      stacks: the layers of each stack if this is the network outside its stacks; empty inside a block.
      tables: parameters that are looked up or added.
      dispatch: runs the operations.
      dtype: type of everything between the products.
    """

    network: Network
    layers: Layers
    stacks: Mapping[str, Layers]
    tables: Mapping[str, jax.Array]
    dispatch: Dispatch
    dtype: DTypeLike

    @classmethod
    def of(
        cls,
        network: Network,
        linears: Mapping[str, QLinear],
        sites: Mapping[str, ActQuantizer],
        tables: Mapping[str, jax.Array],
        gains: Mapping[str, jax.Array],
        dispatch: Dispatch,
        dtype: DTypeLike,
    ) -> IntegerOps:
        """Returns the interpreter for layers and quantizers of one group of steps, given by their full names."""
        spec = network.spec

        def within(stack: Stack | None) -> Layers:
            inside = lambda place: place.stack == stack
            return Layers(
                {each.place.name: linears[name] for name, each in spec.linears.items() if inside(each.place)},
                {each.place.name: sites[name] for name, each in spec.sites.items() if inside(each.place) and name in sites},
                {},
                {each.place.name: gains[name] for name, each in spec.gains.items() if inside(each.place)},
            )

        stacks = {stack.name: within(stack) for stack in spec.stacks}
        return cls(network, within(None), stacks, tables, dispatch, dtype)

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        return self.layers.linears[name](x, self.dispatch)

    def table(self, name: str) -> jax.Array | None:
        return self.tables.get(name)

    def look_up(self, name: str, rows: jax.Array) -> jax.Array:
        return self.tables[name][rows].astype(self.dtype)

    def modulation(self, name: str, c_BD: jax.Array, parts: int) -> Sequence[Leaf]:
        if name in self.layers.modulation:
            return self.layers.modulation[name]
        return jnp.split(self.linear(name, c_BD), parts, axis=-1)

    def normed(self, feeds: str, x_BTD: jax.Array, shift: Leaf | None, scale: Leaf, norm: Norm) -> Fed:
        layer = self.layers.linears[feeds]
        if self.stacks:  # outside blocks, rounded to the compute type first, as saved models always were
            return layer.feed(modulate(normalize(x_BTD, norm), materialize(shift), materialize(scale)), self.dispatch)
        return layer.feed_modulated(x_BTD, shift, scale, norm, self.dispatch)

    def product(self, name: str, fed: Fed) -> jax.Array:
        return self.layers.linears[name].product(fed, self.dtype, self.dispatch)

    def split(self, name: str, fed: Fed, parts: int) -> list[jax.Array]:
        return self.layers.linears[name].product_parts(fed, parts, self.dtype, self.dispatch)

    def head_normed(self, gain: str, x_BTD: jax.Array, heads: int, norm: Norm) -> jax.Array:
        return head_norm(x_BTD, heads, norm, materialize(self.layers.gains[gain]))

    def attend(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, heads: int, feeds: str, rotary: Rotary | None = None
    ) -> Fed:
        if rotary is not None:
            q_BTD, k_BTD = (rotate(x, heads, rotary) for x in (q_BTD, k_BTD))
        following, sites = self.layers.linears[feeds], self.layers.sites
        if sites is None:
            assert following.act is not None
            return self.dispatch.attention_codes(q_BTD, k_BTD, v_BTD, heads, following.act)
        return following.feed(attention(q_BTD, k_BTD, v_BTD, heads, sites, self.dispatch), self.dispatch)

    def activated(self, name: str, fed: Fed, activation: Activation, feeds: str) -> Fed:
        layer, following = self.layers.linears[name], self.layers.linears[feeds]
        if activation is Activation.GELU:
            return layer.product_gelu(fed, following, self.dtype, self.dispatch)
        gate, linear = layer.product_parts(fed, 2, self.dtype, self.dispatch)
        return following.feed(jax.nn.silu(gate) * linear, self.dispatch)

    def gated(self, name: str, fed: Fed, gate: Leaf, x_BTD: jax.Array) -> jax.Array:
        return self.layers.linears[name].product_residual(fed, gate, x_BTD, self.dispatch)

    def blocks(self, stack: Stack, x_BTD: jax.Array, c_BD: jax.Array) -> jax.Array:
        """Runs all blocks in turn. In a scan, each block's arrays are cut out of their stacks; otherwise backends receive the
        stacks and an index."""
        layers, spec = self.stacks[stack.name], self.network.spec
        linears, modulation = dict(layers.linears), dict[str, Sequence[Leaf]]()
        for name in layers.linears:
            if parts := spec.linears[str(Place(name, stack))].modulates:  # all blocks see the same condition
                modulation[name] = linears.pop(name).product_each(c_BD, parts, self.dispatch)
        layers = layers.replace(linears=linears, modulation=modulation)
        layers = self._ending_attention_in_codes(layers, stack, x_BTD)

        def run(block: Layers, x_BTD: jax.Array) -> jax.Array:
            return self.network.block(self._inside(block, x_BTD), stack, x_BTD, c_BD)

        if self.dispatch.scans_blocks:
            return jax.lax.scan(lambda x_BTD, block: (run(block, x_BTD), None), x_BTD, layers)[0]

        @jax.jit
        def block(layers: Layers, index: jax.Array, x_BTD: jax.Array) -> jax.Array:
            return run(lazy_layer(layers, index), x_BTD)

        # One function is called per block: in a loop, the counter and the constants of a block would be separate launches.
        for index in range(stack.depth):
            x_BTD = block(layers, jnp.int32(index), x_BTD)
        return x_BTD

    def _inside(self, block: Layers, x_BTD: jax.Array) -> IntegerOps:
        """Returns the interpreter of one block, whose input is ``x_BTD``."""
        weights = {name: layer.weight for name, layer in block.linears.items() if layer.integer}
        weights = self.dispatch.unpack_ahead(weights, x_BTD)
        linears = {
            name: dataclasses.replace(layer, weight=weights.get(name, layer.weight)) for name, layer in block.linears.items()
        }
        return dataclasses.replace(self, layers=block.replace(linears=linears), stacks={})

    def _ending_attention_in_codes(self, layers: Layers, stack: Stack, x_BTD: jax.Array) -> Layers:
        """Returns layers of the same function, without sites and in steps of 1 if a kernel of the backend ends attention in
        codes, and its other attention is in floats too."""
        spec = self.network.spec
        if self.dispatch.attends_on_codes:
            return layers
        for site in spec.sites.values():
            home = site.home
            if site.place.stack != stack or site.feeds is not None or not isinstance(home, Columns) or home.undone is None:
                continue
            fed = spec.sites[str(site.place.beside(home.undone))].feeds
            assert fed is not None
            following = lazy_layer(layers.linears[fed.place.name], jnp.int32(0))
            like_x = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)
            arguments = like_x, like_x, like_x, site.features[0], following.act
            if following.integer and self.dispatch.covers(self.dispatch.attention_codes, *arguments):
                pair = in_unit_steps(layers.linears[home.linear], layers.linears[fed.place.name])
                linears = layers.linears | dict(zip((home.linear, fed.place.name), pair, strict=True))
                return layers.replace(linears=linears, sites=None)
        return layers
