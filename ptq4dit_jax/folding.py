"""Re-parameterization: balancing factors go into the parameters, so they cost nothing at run time (PTQ4DiT section 3.4, eqs.
13-21).

For a factor b on the input channels of a layer, ``X' = X b`` and ``W' = W / b``. The second is a division of the
kernel's rows. The first needs a home, which the network's tables name (:data:`ptq4dit_jax.networks.spec.Home`). In a DiT:

    qkv_in, fc1_in   the adaLN linear that makes their shift and scale: ``shift' = b shift``, ``1 + scale' = b (1 + scale)``
    v                the v columns of the qkv linear (used to give v's channels equal ranges; its inverse joins proj_in)
    proj_in, fc2_in  cannot be folded into a float layer; what is left (a :class:`ChannelScale` in the float model) is a
                     per-channel vector in the de-quantization of ``probs @ v`` and in the quantization of the GELU output
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import Columns, Modulation, Residual


def fold(
    network: Network, params: Mapping[str, Any], factors: Mapping[str, jax.Array]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Folds factors into parameters.

    Args:
      network: its tables say where each factor goes.
      params: the network's parameters; those of a stack's blocks carry a leading depth axis L.
      factors: ([L,] K) by the full name of a site with K features; absent means 1.

    Returns:
      New parameters, and the factors that remain at sites. With these applied there, the model computes the same function
      as before.
    """
    sites = {name: site for name, site in network.spec.sites.items() if name in factors}
    for name, site in sites.items():
        if site.feeds is not None:
            layer = site.feeds.place.of(params)
            params = site.feeds.place.put(params, {**layer, "kernel": layer["kernel"] / factors[name][..., None]})

    residual = {name: factors[name] for name, site in sites.items() if isinstance(site.home, Residual)}
    for name, site in sites.items():
        factor, home = factors[name], site.home
        if isinstance(home, Modulation):
            place = site.place.beside(home.linear)
            params = place.put(params, fold_modulation(place.of(params), factor, home))
        elif isinstance(home, Columns):
            place = site.place.beside(home.linear)
            params = place.put(params, _fold_columns(place.of(params), factor, home))
            if home.undone is not None:
                undone = str(site.place.beside(home.undone))
                residual[undone] = residual.get(undone, 1.0) / factor
    return dict(params), residual


def fold_modulation(layer: Mapping[str, jax.Array], factor: jax.Array, home: Modulation) -> dict[str, jax.Array]:
    """Multiplies the shift and scale chunks by ``factor`` ([L,] D) and adds ``factor - 1`` to the scale's bias."""
    D = factor.shape[-1]
    gain = jnp.ones(layer["bias"].shape, factor.dtype)
    offset = jnp.zeros_like(gain)
    for chunk in (home.shift, home.scale):
        if chunk is not None:
            gain = gain.at[..., chunk * D : (chunk + 1) * D].set(factor)
    offset = offset.at[..., home.scale * D : (home.scale + 1) * D].set(factor - 1)
    return {"kernel": layer["kernel"] * gain[..., None, :], "bias": layer["bias"] * gain + offset}


def _fold_columns(layer: Mapping[str, jax.Array], factor: jax.Array, home: Columns) -> dict[str, jax.Array]:
    """Multiplies a chunk of the columns by ``factor`` ([L,] K)."""
    gain = jnp.concatenate([factor if part == home.part else jnp.ones_like(factor) for part in range(home.of)], axis=-1)
    return {"kernel": layer["kernel"] * gain[..., None, :], "bias": layer["bias"] * gain}
