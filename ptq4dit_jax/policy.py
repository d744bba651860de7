"""The policy, which decides each layer's width, and what stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ptq4dit_jax.edges import quoted, whole_number
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.registry import known_specs
from ptq4dit_jax.networks.spec import Linear, NetworkSpec
from ptq4dit_jax.quantizers import check_bits


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Width of a layer's weights, and whether its input is quantized, so that the product is computed on integers."""

    weight_bits: int
    integer: bool = True


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a policy decides for a network: each layer's rule, and whether attention's two products use integers."""

    layers: dict[str, LayerRule]
    integer_attention: bool

    @property
    def weights_only(self) -> bool:
        """Whether no activation is quantized."""
        return not (self.integer_attention or any(rule.integer for rule in self.layers.values()))

    def is_integer(self, spec: NetworkSpec, site: str) -> bool:
        """Whether the activation at a site is quantized."""
        feeds = spec.sites[site].feeds
        return self.integer_attention if feeds is None else self.layers[str(feeds.place)].integer


def _edges(rule: LayerRule) -> Callable[[NetworkSpec, Linear], LayerRule | None]:
    return lambda spec, linear: rule if linear.edge else None


def _small(spec: NetworkSpec, linear: Linear) -> LayerRule | None:
    """Gives 8 bits to the edges, and to the layers that make the norms' shift and scale."""
    return LayerRule(8) if linear.edge or linear.modulates else None


#: The policy that leaves all activations float, in the blocks too.
_WEIGHTS_ONLY = "weights-only"
#: How each named policy changes a layer's rule from "uniform" (the paper's), where every layer has ``weight_bits`` and integer
#: inputs.
POLICIES: dict[str, Callable[[NetworkSpec, Linear], LayerRule | None]] = {
    "uniform": lambda spec, linear: None,
    "edges8": _edges(LayerRule(8)),
    "edges8-float": _edges(LayerRule(8, integer=False)),
    "small8": _small,
    _WEIGHTS_ONLY: _edges(LayerRule(8, integer=False)),
}


def attention_of(spec: NetworkSpec) -> str:
    """Returns a policy's name for attention's two products, which have no weights: ``blocks.attention``."""
    return f"{spec.attending[0].name}.attention"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A named policy with exceptions: widths and inputs of single layers, by their full names, and whether attention's products
    use integers (None if not given)."""

    name: str
    layers: tuple[tuple[str, LayerRule], ...] = ()
    attention: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise Ptq4ditError(
                f"Unknown policy {self.name!r}; the policies are {', '.join(POLICIES)}, then layer=bits for exceptions."
            )

    @staticmethod
    def help() -> str:
        """Describes in words what a policy may be."""
        spec = known_specs()[0]
        layers = ", ".join(spec.linears)
        return f"{', '.join(POLICIES)}; then layer=bits or layer=bits:float, or {attention_of(spec)}=float. Layers: {layers}."

    def __str__(self) -> str:
        """Returns the text from which :meth:`parse` reads the policy."""
        exceptions = [f"{layer}={rule.weight_bits}{'' if rule.integer else ':float'}" for layer, rule in self.layers]
        if self.attention is not None:
            exceptions.append(f"{attention_of(known_specs()[0])}={'integer' if self.attention else 'float'}")
        return ",".join([self.name, *exceptions])

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Reads a policy such as ``edges8`` or ``uniform,blocks.adaLN=8,final=8:float,blocks.attention=float``.

        It is a name from ``POLICIES``, then any number of ``layer=bits`` or ``layer=bits:float`` (integer weights, float
        input), and ``blocks.attention=float`` or ``=integer``. ``weights-only`` is ``edges8-float`` with float inputs
        everywhere.

        Raises:
          Ptq4ditError: an unknown name, or text that cannot be read. A layer must belong to some known network.
        """
        name, *overrides = [part.strip() for part in text.split(",")]
        policy, layers = cls(name), dict[str, LayerRule]()
        specs = known_specs()
        for override in overrides:
            layer, _, value = override.partition("=")
            if layer in map(attention_of, specs):
                if value not in ("float", "integer"):
                    raise Ptq4ditError(f"Policy {override!r} must read {layer}=float or {layer}=integer.")
                policy = dataclasses.replace(policy, attention=value == "integer")
                continue
            if not any(layer in spec.linears for spec in specs):
                raise _unknown(layer, specs[0])
            bits, _, kind = value.partition(":")
            width = whole_number(bits)
            if width is None or kind not in ("", "float"):
                raise Ptq4ditError(f"Policy {quoted(override)} must read layer=bits or layer=bits:float, for example final=8.")
            layers[layer] = LayerRule(check_bits(f"The width of {layer}", width), integer=kind != "float")
        return dataclasses.replace(policy, layers=tuple(layers.items()))

    def rules(self, spec: NetworkSpec, weight_bits: int) -> Rules:
        """Returns what the policy decides for a network.

        Raises:
          Ptq4ditError: the network lacks a layer that has an exception.
        """
        if unknown := [layer for layer, _ in self.layers if layer not in spec.linears]:
            raise _unknown(unknown[0], spec)
        integer, changed = self.name != _WEIGHTS_ONLY, POLICIES[self.name]
        plain = LayerRule(weight_bits, integer)
        layers = {name: changed(spec, linear) or plain for name, linear in spec.linears.items()}
        return Rules(layers | dict(self.layers), integer if self.attention is None else self.attention)


def _unknown(layer: str, spec: NetworkSpec) -> Ptq4ditError:
    return Ptq4ditError(
        f"Unknown layer {layer!r} in the policy; the layers are {', '.join(spec.linears)}, and {attention_of(spec)} for its "
        "products."
    )
