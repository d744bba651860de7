"""The networks that this package knows: their names in model folders, and their settings."""

from __future__ import annotations

import functools

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import NetworkSpec

#: By the name in a model folder. A folder without a name holds a DiT.
NETWORKS: dict[str, type[DiTConfig]] = {"dit": DiTConfig, "lightning_dit": LightningDiTConfig}


def known_specs() -> list[NetworkSpec]:
    """Returns the tables of an example of every network, for the names in them."""
    return [_example(network).spec for network in NETWORKS.values()]


@functools.cache
def _example(network: type[DiTConfig]) -> DiTConfig:
    return network.example()


def name_of(network: Network) -> str:
    """Returns the name of a network in model folders.

    Raises:
      Ptq4ditError: this package does not know the network.
    """
    for name, settings in NETWORKS.items():
        if type(network) is settings:
            return name
    raise Ptq4ditError(f"A network of {type(network).__name__} cannot be saved; those that can are {', '.join(NETWORKS)}.")
