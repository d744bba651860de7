"""The parts of the network that are reconstructed one after another, each a pure function of its parameters and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
from flax import struct
from jax.typing import DTypeLike

from ptq4dit_jax.dit import BLOCK_SITES, Block, DiT, DiTConfig
from ptq4dit_jax.numerics import EXACT

Kind = Literal["embed_image", "embed_condition", "block", "head"]

#: Linear layers and sites of the kinds outside the blocks. Each of these kinds is a method of :class:`DiT`.
_EDGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed_image": (("patch_embed",), ("patch_in",)),
    "embed_condition": (("time_fc1", "time_fc2"), ("time_in", "time_hidden")),
    "head": (("final_adaLN", "final"), ("final_adaLN_in", "final_in")),
}
_BLOCK_LAYERS = tuple(layer for layer in BLOCK_SITES.values() if layer)


@struct.dataclass
class Unit:
    """One part. ``kind`` decides the program, ``index`` which block it is (0 outside the blocks)."""

    kind: Kind = struct.field(pytree_node=False)
    index: int = struct.field(pytree_node=False, default=0)

    @property
    def name(self) -> str:
        return f"block {self.index}" if self.kind == "block" else self.kind.replace("_", " ")

    @property
    def layers(self) -> dict[str, str]:
        """The unit's linear layers: name inside the unit -> name in ``config.linear_shapes``."""
        if self.kind == "block":
            return {layer: f"blocks.{layer}" for layer in _BLOCK_LAYERS}
        return {layer: layer for layer in _EDGES[self.kind][0]}

    @property
    def tables(self) -> tuple[str, ...]:
        """Parameters of the unit that are looked up or added, not multiplied; a model may lack them."""
        return {"embed_image": ("position_embed",), "embed_condition": ("label_embed",)}.get(self.kind, ())

    @property
    def sites(self) -> dict[str, str]:
        """The unit's sites: name inside the unit -> name in ``config.site_features``."""
        if self.kind == "block":
            return {site: f"blocks.{site}" for site in BLOCK_SITES}
        return {site: site for site in _EDGES[self.kind][1]}

    def of_depth(self, name: str, value: Any) -> Any:
        """What a stacked tree holds for this unit: the slice at its depth for the names of blocks, else the whole."""
        return _at(value, self.index) if name.startswith("blocks.") else value


@jax.jit
def _at(tree: Any, index: jax.Array) -> Any:
    """One program a tree, where each operation of each of its leaves would be one."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def units(config: DiTConfig) -> tuple[Unit, ...]:
    """All parts in the order in which a hidden state passes them."""
    blocks = (Unit("block", index) for index in range(config.depth))
    return (Unit("embed_image"), Unit("embed_condition"), *blocks, Unit("head"))


def apply_unit(
    config: DiTConfig,
    kind: Kind,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """The output of a part for one batch.

    Args:
      config: shape of the network.
      kind: which part.
      params: kernels (K, N) and biases (N,) by layer, and the unit's tables that the model has.
      quantizers: callables by site, as in :mod:`ptq4dit_jax.dit`; may be empty.
      inputs: ``embed_image`` (x_BHWC,), ``embed_condition`` (t_B, y_B), ``block`` and ``head`` (x_BTD, silu_c_BD).
      dtype: compute type.
      precision: of float32 products.
    """
    output = _run(config, kind, params, quantizers, inputs, dtype, precision)
    return cast(jax.Array, output[0] if kind == "block" else output)


@struct.dataclass
class _Passing:
    """Observer that keeps what it sees."""

    def observe(self, x: jax.Array) -> Any:
        return x


def site_input(
    config: DiTConfig,
    kind: Kind,
    name: str,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """What the layer behind a site of the part is fed for one batch, (B, [T,] K); quantized, if the site has a quantizer.

    ``name`` is the site's inside the part; the other arguments are those of :func:`apply_unit`. XLA leaves out what follows the
    site.
    """
    _, seen = _run(config, kind, params, quantizers, inputs, dtype, precision, observers={name: _Passing()})
    return cast(jax.Array, seen["observers"][name])


def _run(
    config: DiTConfig,
    kind: Kind,
    params: Mapping[str, Any],
    quantizers: Mapping[str, Any],
    inputs: tuple[Any, ...],
    dtype: DTypeLike,
    precision: jax.lax.Precision,
    observers: Mapping[str, Any] | None = None,
) -> Any:
    """What the part's module returns, and with ``observers`` the variables that they have become beside it."""
    variables = {"params": params} | ({"quantizers": quantizers} if quantizers else {})
    more: dict[str, Any] = {} if kind == "block" else {"method": kind}
    if observers is not None:
        variables, more = variables | {"observers": observers}, more | {"mutable": ["observers"]}
    module: Any = Block if kind == "block" else DiT
    return module(config, dtype, precision).apply(variables, *inputs, **more)
