"""The parts of a network: its layers, the sites between them, and the homes of factors on a site's channels.

Everything outside a network's own file reads these tables: folding, policies, the skeleton of a checkpoint, parameter counts,
``describe``, and the units of reconstruction. The tables depend on no framework and no network.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape. Their parameters, quantizers and observers carry a leading axis of size ``depth``."""

    name: str
    depth: int

    @property
    def block(self) -> str:
        """The name of one of its blocks: "block" for "blocks"."""
        return self.name.removesuffix("s").replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer or a site is: under ``name`` in every block of ``stack``, or outside all stacks.

    Its full name, ``str(place)``, is ``blocks.qkv`` or ``final``.
    """

    name: str
    stack: Stack | None = None

    def __str__(self) -> str:
        return self.name if self.stack is None else f"{self.stack.name}.{self.name}"

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of its arrays: (depth,) in a stack, otherwise ()."""
        return () if self.stack is None else (self.stack.depth,)

    def of(self, tree: Mapping[str, Any]) -> Any:
        """Returns what a tree, such as a network's parameters, holds for this place."""
        return tree[self.name] if self.stack is None else tree[self.stack.name][self.name]

    def put(self, tree: Mapping[str, Any], value: Any) -> dict[str, Any]:
        """Returns the tree with another value at this place."""
        if self.stack is None:
            return {**tree, self.name: value}
        return {**tree, self.stack.name: {**tree[self.stack.name], self.name: value}}

    def beside(self, name: str) -> Place:
        """Returns the place of that name in the same blocks."""
        return Place(name, self.stack)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer (K, N).

    ``edge``: the layer is at an end of the network, small and sensitive, so policies give it more bits. ``modulates``: its
    input is the embedded condition alone, and its output is this number of vectors, such as shift and scale of a norm; 0 for
    other layers.
    """

    place: Place
    K: int
    N: int
    edge: bool = False
    modulates: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """A parameter (rows, features) that is looked up or added. ``deviation`` is the standard deviation of random initial
    values; None means ``features ** -0.5``, as in Flax."""

    rows: int
    features: int
    deviation: float | None = None


@dataclasses.dataclass(frozen=True)
class Gain:
    """A learned factor (features,) on the output of a norm that is in no layer, such as the norms of queries and keys."""

    place: Place
    features: int


@dataclasses.dataclass(frozen=True)
class Modulation:
    """A factor's home in the linear layer that makes shift and scale of a norm: chunks ``shift`` (None: there is no shift) and
    ``scale`` of its ``of`` chunks of columns. A factor b turns them into ``b shift`` and ``b (1 + scale) - 1``."""

    linear: str
    shift: int | None
    scale: int
    of: int


@dataclasses.dataclass(frozen=True)
class Columns:
    """A factor's home in chunk ``part`` of the ``of`` chunks of columns of a linear layer; the site is linear in that chunk.

    ``undone`` names the site of the same block that takes the factor's inverse; None if the layer fed by the site takes it.
    """

    linear: str
    part: int
    of: int
    undone: str | None = None


@dataclasses.dataclass(frozen=True)
class Residual:
    """No home in any layer: the factor stays at the site, as a vector in its quantizer."""


Home: TypeAlias = Modulation | Columns | Residual


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation that can be quantized and observed.

    Attributes:
      place: where it is.
      features: its trailing shape: channels, or (heads, width).
      feeds: the linear layer whose input it is; None for an input of one of attention's products.
      home: where a factor on its channels can be folded; None if it is not balanced.
      in_paper: whether PTQ4DiT balances it, if it is balanced at all.
      nonnegative: whether its values are nonnegative, like probabilities.
      reduced: whether its rows are reduced anyway, by a norm or the softmax, so that ranges per row cost little.
    """

    place: Place
    features: tuple[int, ...]
    feeds: Linear | None = None
    home: Home | None = None
    in_paper: bool = True
    nonnegative: bool = False
    reduced: bool = False


class Role(enum.Enum):
    """The inputs of a unit, and the method of the network that computes it.

    ``embed_image`` takes the image, ``embed_condition`` takes time and labels, ``block`` and ``head`` take the hidden state and
    the embedded condition.
    """

    IMAGE = "embed_image"
    CONDITION = "embed_condition"
    BLOCK = "block"
    HEAD = "head"


@dataclasses.dataclass(frozen=True)
class UnitKind:
    """A piece of the network that is rounded and reconstructed on its own. For a stack, each block is one unit of this kind.

    ``tables`` names its parameters that are looked up or added; a network may lack them. ``gains`` are those of its norms.
    """

    role: Role
    linears: tuple[Linear, ...]
    sites: tuple[Site, ...]
    tables: tuple[str, ...] = ()
    stack: Stack | None = None
    gains: tuple[Gain, ...] = ()

    @property
    def site_of(self) -> dict[str, str]:
        """The site that feeds each linear layer; both are given by their names inside the unit."""
        return {site.feeds.place.name: site.place.name for site in self.sites if site.feeds is not None}


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """The tables of a network.

    Attributes:
      linears: every linear layer by its full name, in the order in which they run.
      sites: every site that can be quantized, by its full name.
      kinds: the kinds of units, in the order in which a hidden state passes them; one kind stands for all blocks of a stack.
      tables: every table by name.
      gains: every gain of a norm that is in no layer, by its full name.
      outputs: sites whose values balancing leaves unchanged; they are observed when two models are compared.
    """

    linears: Mapping[str, Linear]
    sites: Mapping[str, Site]
    kinds: tuple[UnitKind, ...]
    tables: Mapping[str, Table]
    gains: Mapping[str, Gain]
    outputs: tuple[Place, ...] = ()

    @classmethod
    def of(cls, kinds: Iterable[UnitKind], tables: Mapping[str, Table], outputs: Iterable[Place] = ()) -> NetworkSpec:
        """Returns the tables of a network with these kinds of units."""
        kinds = tuple(kinds)
        linears = {str(linear.place): linear for kind in kinds for linear in kind.linears}
        sites = {str(site.place): site for kind in kinds for site in kind.sites}
        gains = {str(gain.place): gain for kind in kinds for gain in kind.gains}
        return cls(linears, sites, kinds, dict(tables), gains, tuple(outputs))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(kind.stack for kind in self.kinds if kind.stack is not None)

    @property
    def site_of(self) -> dict[str, str]:
        """The site that feeds each linear layer; both are given by their full names."""
        return {str(site.feeds.place): name for name, site in self.sites.items() if site.feeds is not None}

    @property
    def attention(self) -> tuple[str, ...]:
        """Full names of the inputs of attention's products."""
        return tuple(name for name, site in self.sites.items() if site.feeds is None)

    @property
    def attending(self) -> tuple[Stack, ...]:
        """The stacks whose blocks hold attention."""
        return tuple(kind.stack for kind in self.kinds if kind.stack and any(site.feeds is None for site in kind.sites))

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases of the linear layers, of table values, and of gains."""
        layers = ((linear.K + 1) * linear.N * math.prod(linear.place.lead) for linear in self.linears.values())
        gains = (gain.features * math.prod(gain.place.lead) for gain in self.gains.values())
        return sum(table.rows * table.features for table in self.tables.values()) + sum(layers) + sum(gains)


def nest_sites(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """Turns ``{"blocks.q": a, "final_in": b}`` into the tree of a variable collection, ``{"final_in": b, "blocks": {"q":
    a}}``."""
    tree: dict[str, Any] = {name: value for name, value in by_name.items() if "." not in name}
    for name, value in by_name.items():
        if "." in name:
            stack, _, name = name.partition(".")
            tree.setdefault(stack, {})[name] = value
    return tree


def flatten_sites(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts :func:`nest_sites`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= {f"{name}.{inner}": leaf for inner, leaf in value.items()} if isinstance(value, Mapping) else {name: value}
    return found
