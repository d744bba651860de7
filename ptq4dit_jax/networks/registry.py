"""The networks that this package knows: what a model folder calls them, and their settings."""

from __future__ import annotations

from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import NetworkSpec

#: By the name in a model folder, which says nothing for a DiT.
NETWORKS: dict[str, type[Network]] = {"dit": DiTConfig}


def known_specs() -> list[NetworkSpec]:
    """The tables of an example of every network, for the names in them."""
    return [network.example().spec for network in NETWORKS.values()]
